"""What an editor, a type checker, TAB and help know of the options: all of them, and what the source says."""

from __future__ import annotations

import dataclasses
import inspect
import json
import pydoc
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import weft
from tests.helpers.source import SOURCE, told_by
from weft.events import EVENTS
from weft.loop.options import OBJECTS
from weft.loop.signatures import TrainerOptions
from weft.recipes.arguments import fields
from weft.words import editors

OF_OPTIONS = (weft.TrainerConfig, weft.DataConfig, weft.CheckpointConfig, weft.SweepConfig, weft.Data, weft.Phase)


def words(text: str) -> str:
    return " ".join(text.split())


def written_out() -> dict[str, tuple[Any, str]]:
    """Default and type of each argument in the signature that editors read."""
    parameters = list(inspect.signature(TrainerOptions.__init__).parameters.values())[1:]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in parameters)
    return {p.name: (p.default, p.annotation) for p in parameters}


def test_the_signature_that_editors_read_has_the_options_that_there_are() -> None:
    plain = {f.name: (f.default, f.type) for f in dataclasses.fields(weft.TrainerConfig)}
    objects = {name: (plain.get(name, (None,))[0], kind) for name, kind in editors.Objects.__annotations__.items()}
    assert set(objects) == set(OBJECTS)
    assert written_out() == {**plain, **objects}
    assert written_out() != {**plain, **objects, "epochs": (10, "Natural")}  # the comparison can fail


def test_inspect_sees_every_option_of_the_trainer_with_its_default() -> None:
    seen = inspect.signature(weft.Trainer).parameters
    assert {name: p.default for name, p in seen.items()} == {name: d for name, (d, _) in written_out().items()}
    assert {p.kind for p in seen.values()} == {inspect.Parameter.KEYWORD_ONLY}


def test_the_events_that_editors_read_are_those_that_there_are() -> None:
    methods = {name: value for name, value in vars(editors.Events).items() if name.startswith("on_")}
    named = {name: tuple(inspect.signature(method).parameters)[1:] for name, method in methods.items()}
    assert named == EVENTS and set(editors.Listening.__annotations__) == set(EVENTS)
    assert not [name for name in dir(weft.Hook) if name.startswith("on_")]  # a hook that has none is still an error


@pytest.mark.parametrize("cls", OF_OPTIONS, ids=lambda cls: cls.__name__)
def test_the_docstring_of_a_class_of_options_tells_each_one_as_the_source_does(cls: type) -> None:
    told, said = words(inspect.getdoc(cls) or ""), editors.sentences(cls)
    assert set(said) == {field.name for field in dataclasses.fields(cls)}
    for name, sentence in said.items():
        assert sentence, f"{cls.__name__}.{name} has no sentence below it"
        assert re.search(rf"\b{name}(=[^:]+)?: {re.escape(sentence)}", told), name
    assert said == {p.name: p.help for p in fields(cls)}  # those that `weft fit --help` prints


def test_help_of_the_trainer_is_its_manual() -> None:
    told = words(pydoc.plain(pydoc.render_doc(weft.Trainer)).replace(" |  ", " "))
    for name, (_, sentence) in editors.options_of([weft.TrainerConfig, "Objects"]).items():
        assert sentence and sentence in told, name
    assert "epochs=1000: Passes over the training data" in told and "an epoch that nobody wrote" not in told


def test_a_field_without_a_sentence_is_found_out() -> None:
    assert editors.sentences(Undocumented) == {"first": "", "second": "What it is."}


@dataclasses.dataclass
class Undocumented:
    """A class with a field that nothing is said about."""

    first: int
    second: int = 2
    """What it is."""


SLIPS = {
    "Data": (lambda: weft.Data({}, batch_sise=3), "'batch_sise'; did you mean 'batch_size'?"),  # type: ignore[call-arg]
    "Phase": (lambda: weft.Phase(epoch=3), "'epoch'; did you mean 'epochs'?"),  # type: ignore[call-arg]
    "CheckpointConfig": (lambda: weft.CheckpointConfig(kep=3), "'kep'; did you mean 'keep'?"),  # type: ignore[call-arg]
    "SweepConfig": (lambda: weft.SweepConfig(trails=3), "'trails'; did you mean 'trials'?"),  # type: ignore[call-arg]
    "Schedule": (lambda: weft.Schedule(None, zzz=1), "'zzz'; there are factory, interval"),  # type: ignore[call-arg]
    "Trainer": (lambda: weft.Trainer(epohcs=3), "'epohcs'; did you mean 'epochs'?"),  # type: ignore[call-arg]
}


@pytest.mark.parametrize("name", SLIPS)
def test_an_unknown_option_is_met_with_the_closest_at_run_time(name: str) -> None:
    call, told = SLIPS[name]
    with pytest.raises(TypeError, match=re.escape(f"{name} has no option {told}")):
        call()


FACES = [weft.hooks, weft.optim, weft.plot, weft.integrations]


@pytest.mark.parametrize("face", FACES, ids=lambda face: face.__name__)
def test_help_of_a_face_lists_everything_with_a_line_each(face: Any) -> None:
    names = face.__all__ or [name for name in dir(face) if not name.startswith("__")]
    listed = dict(re.findall(r"^(\w+) +(.+)$", (face.__doc__ or "").rpartition("\n\n")[2], re.MULTILINE))
    assert listed == {name: (inspect.getdoc(getattr(face, name)) or "").splitlines()[0] for name in names}
    assert {*names} == {name for name in dir(face) if not name.startswith("__")}  # what TAB shows


# ------------------------------------------------------------------------------------------------ jedi


# What jedi, which completes in Jupyter, offers behind a bracket. In a process of its own: jedi starts another one.
COMPLETED = """
import json, sys
import jedi
source, *calls = json.loads(sys.argv[1])
project = jedi.Project(source, added_sys_path=[source], smart_sys_path=False)
for call in calls:
    offered = [c.name_with_symbols for c in jedi.Script(f"import weft\\n{call}(", project=project).complete()]
    calls[calls.index(call)] = sorted(name[:-1] for name in offered if name.endswith("="))
print(json.dumps(calls))
"""


def test_jedi_completes_every_option() -> None:
    pytest.importorskip("jedi")
    classes = [weft.Data, weft.Phase, weft.CheckpointConfig, weft.SweepConfig]
    calls = [f"weft.{name}" for name in ("no_such_thing", "Trainer", *(cls.__name__ for cls in classes), "sweep")]
    nothing, trainer, *others, sweep = told_by(COMPLETED, json.dumps([str(SOURCE.parent), *calls]))
    assert [*nothing] == [] and set(trainer) == set(written_out())
    assert [set(found) for found in others] == [{f.name for f in dataclasses.fields(cls)} for cls in classes]
    assert {*others[-1], "run", "space"} == {*sweep}


# ------------------------------------------------------------------------------------------------ basedpyright

RIGHT = """
from typing import Any
import torch
import weft

def step(trainer: weft.Trainer, batch: Any) -> torch.Tensor:
    return trainer.problem(batch)

class Print(weft.Hook):
    def on_epoch_end(self, trainer, metrics):
        print(trainer.current_epoch + 1, metrics["train_loss"] + 1.0)

class Mine(weft.Trainer):
    def __init__(self, gain: float, **options: Any) -> None:
        super().__init__(**options)
        self.gain = gain

weft.Trainer(
    epochs=3, min_epochs=1, max_steps=10, max_time="00:10", train_metric="a", dev_metric="b", test_metric="c",
    monitor_metric="b", monitor_mode="min", patience=2, min_delta=0.1, warmup=1, clip=1.0, clip_algorithm="norm",
    accumulate=2, validate_every=2, accelerator="cpu", devices=[0], num_nodes=1, strategy="auto", precision="64-true",
    timeout=10.0, compile="auto", seed=1, deterministic=True, on_nonfinite="skip", strict_data=True, root_dir="runs",
    run_name="a", log_every=3, checkpoint=weft.CheckpointConfig(keep=3), resume="auto", profiler="simple",
    progress=False, fast_dev_run=2, limit_batches={"train": 0.5}, optimizer=torch.optim.LBFGS,
    scheduler=weft.Schedule(lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9), "step", frequency=2),
    phases=[weft.Phase(epochs=3, optimizer=torch.optim.LBFGS, scheduler=None, data=None, freeze=["a"],
                       weights={"f": 2.0}, patience=3, setup=lambda trainer: None)],
    metrics={"r2": weft.whole(lambda x: x)}, training_step=step, test_step=step,
    validation_step=lambda trainer, batch: step(trainer, batch),
    predict_step=lambda trainer, batch: {"x": batch["x"]}, loggers=["csv"], plugins=None,
    hooks=[Print(), {"on_fit_end": lambda trainer, result: print(result.epochs, trainer.current_epoch)}],
)
weft.Trainer(hooks={"on_step_end": lambda trainer, batch, loss: trainer.log("loss", loss.mean())})
weft.Trainer(checkpoint={"keep": 3}, limit_batches=3, devices="auto", optimizer={"a": torch.optim.Adam})
weft.Data(train={}, dev=None, test=None, predict=None, batch_size={"train": 3}, shuffle=False, drop_last=True,
          num_workers="all", pre_batch="in_memory", refresh_every=3, inputs_require_grad=["x"])
weft.CheckpointConfig(every_n_steps=3, every_n_epochs=2, every_n_seconds=1.5, best=False, keep=3, background=True)
weft.SweepConfig(trials=3, workers=2, sampler="grid", pruner="none", metric="a", mode="max", seed=3, name="a",
                 root_dir="runs", storage=None, max_failures=2, take_over=True)
Mine(gain=2.0, epochs=3)
"""
WRONG = """
import weft

class Print(weft.Hook):
    def on_epoch_end(self, trainer, metrics):
        trainer.current_epoch + "a"

weft.Trainer(epohcs=3)
weft.Trainer(epochs="three")
weft.Trainer(patience="x")
weft.Trainer(clip="big")
weft.Trainer(monitor_mode="least")
weft.Trainer(precision="fp16")
weft.Trainer(3)
weft.Trainer(optimizer=0.1)
weft.Trainer(hooks=weft.hooks.EMA)
weft.Trainer(training_step=3)
weft.Trainer(training_step=lambda trainer: 0.0)
weft.Trainer(on_nonfinite="skipp")
weft.Trainer(phases=weft.Phase(epochs=3))
weft.Trainer(hooks={"on_epoch_end": lambda trainer, metrics: trainer.currentepoch})
weft.Data({}, batch_sise=3)
weft.Data({}, batch_size="x")
weft.Phase(epochs="a")
weft.CheckpointConfig(kep=2)
weft.SweepConfig(sampler="tpee")
"""
SLIP_OF_THE_PEN = "import weft\n\nweft.Trainer(epohcs=3)\nweft.Trainer(epochs='three')\n"


def complaints(folder: Path, **files: str) -> dict[str, set[int]]:
    """The lines that a type checker finds wrong in each file."""
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    check = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable, str(folder)]
    told = json.loads(subprocess.run(check, capture_output=True, text=True, check=False, cwd=SOURCE.parent).stdout)
    errors = [d for d in told["generalDiagnostics"] if d["severity"] == "error"]
    found: dict[str, set[int]] = {name: set() for name in files}
    for error in errors:
        found[Path(error["file"]).stem].add(error["range"]["start"]["line"])
    return found


def test_a_type_checker_finds_a_slip_in_a_name_and_in_a_value(tmp_path: Path) -> None:
    assert complaints(tmp_path, slip=SLIP_OF_THE_PEN, right="import weft\n\nweft.Trainer(epochs=3)\n") == {
        "slip": {2, 3},
        "right": set(),
    }


@pytest.mark.long
def test_a_type_checker_takes_every_option_and_finds_twenty_mistakes(tmp_path: Path) -> None:
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "standard"}')
    found = complaints(tmp_path, right=RIGHT, wrong=WRONG)
    mistakes = {i for i, line in enumerate(WRONG.splitlines()) if line.startswith(("weft.", "        trainer."))}
    assert len(mistakes) == 20
    assert found == {"right": set(), "wrong": mistakes}
    options = re.findall(r"(\w+)=", RIGHT)
    assert {*written_out(), "strategy"} <= {*options}
