"""Configs: what is accepted comes back as it was, and what is wrong is told by name, all at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft import cli, yamlfile
from weft.config import CheckpointConfig, TrainerConfig, complaints
from weft.recipes import recipe
from weft.recipes.batches import DataConfig
from weft.recipes.schema import ConfigError, Text, merge, normal, with_option

# ------------------------------------------------------------------------------------------------ round trips

NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("C",)), min_size=1, max_size=8)
FOLDERS = NAMES.filter(
    lambda text: text.isprintable() and not text.startswith("/") and not {"", ".", ".."} & {*text.split("/")}
)
CHOSEN: dict[str, Any] = {
    "devices": st.integers(1, 4096)
    | st.sampled_from(["auto", "0,2"])
    | st.lists(st.integers(0, 7), min_size=1, max_size=3),
    "num_nodes": st.integers(1, 100_000),
    "run_name": st.none() | FOLDERS,
    "max_time": st.none() | st.floats(0.1, 1e6) | st.sampled_from(["01:00:00", "2:00:00:00", "00:30"]),
    "precision": st.sampled_from(["32-true", "64-true", "bf16-mixed", "32", 32, 64]),
    "limit_batches": st.none()
    | st.integers(1, 9)
    | st.floats(0.01, 1.0)
    | st.dictionaries(st.sampled_from(["train", "dev"]), st.integers(1, 5)),
    "batch_size": st.none()
    | st.integers(1, 99)
    | st.just("all")
    | st.dictionaries(st.sampled_from(["train", "dev"]), st.integers(1, 5)),
}


def values_of(hint: Any, name: str) -> st.SearchStrategy[Any]:
    """Right values for a field with this type."""
    if name in CHOSEN:
        return CHOSEN[name]
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_args(hint) and get_origin(hint) is not list:
        return st.one_of([values_of(a, name) for a in get_args(hint) if get_origin(a) is not dict])
    if hint is CheckpointConfig:
        return configs(CheckpointConfig)
    return {
        int: st.integers(2, 2**40),
        float: st.floats(1e-9, 1e9),
        bool: st.booleans(),
        str: NAMES,
        type(None): st.none(),
        list[int]: st.lists(st.integers(0, 7), max_size=3),
        list[str]: st.lists(NAMES, max_size=3),
    }[hint]


def configs(cls: Any) -> st.SearchStrategy[Any]:
    fields = {name: values_of(hint, name) for name, hint in get_type_hints(cls).items()}
    return st.fixed_dictionaries({}, optional=fields).map(lambda values: cls(**values))


@given(configs(TrainerConfig))
def test_a_trainer_config_comes_back_from_yaml_as_it_was(config: TrainerConfig) -> None:
    assert TrainerConfig(**yamlfile.load(yamlfile.dump(config.to_dict()))) == config


@given(configs(DataConfig))
def test_a_data_config_comes_back_from_yaml_as_it_was(config: DataConfig) -> None:
    assert DataConfig(**yamlfile.load(yamlfile.dump(config.to_dict()))) == config


@given(configs(TrainerConfig))
def test_a_config_by_options_of_the_command_line_is_the_same_config(config: TrainerConfig) -> None:
    default, options = TrainerConfig(), {}
    for name, value in config.to_dict().items():
        if value != getattr(default, name) and (not isinstance(value, str) or value not in ("null", "true", "~")):
            written = value if isinstance(value, str) else yamlfile.dump(value).strip().removesuffix("\n...")
            if isinstance(value, str) and yamlfile_reads_otherwise(value):
                continue  # 'run_name: 5' can only be told from the number 5 where text is the only type
            options = with_option(options, f"trainer.{name}", written)
    normal_form, wrong = normal(options)
    assert wrong == []
    assert TrainerConfig(**normal_form.get("trainer", {})) == TrainerConfig(
        **{k: v for k, v in config.to_dict().items() if k in options.get("trainer", {})}
    )


def yamlfile_reads_otherwise(text: str) -> bool:
    try:
        return yamlfile.load(text) != text
    except ValueError:
        return True


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(PLAIN)
def test_plain_data_comes_back_from_yaml_with_its_types(data: Any) -> None:
    found = yamlfile.load(yamlfile.dump(data))
    assert found == data and repr(found) == repr(data)


def test_yaml_reads_as_people_expect() -> None:
    text = "a: 1e-3\nb: no\nc: 12:30:00\nd: 2024-01-01\ne: 1_000\nf: +5\ng: ~\nh: .5\ni: 1.\nj: on"
    assert yamlfile.load(text) == {
        "a": 0.001,
        "b": "no",
        "c": "12:30:00",
        "d": "2024-01-01",
        "e": "1_000",
        "f": 5,
        "g": None,
        "h": 0.5,
        "i": 1.0,
        "j": "on",
    }


@given(configs(TrainerConfig).map(lambda c: c.to_dict()))
def test_a_normal_config_is_normal(options: dict[str, Any]) -> None:
    config = {"problem": {"class_path": "weft.demo:make_problem", "init_args": {"a": 1}}, "trainer": options}
    once, wrong = normal(config)
    assert wrong == [] and normal(once) == (once, []) and once == config


def test_another_class_drops_the_arguments_of_the_one_before() -> None:
    base = {
        "optimizer": {"class_path": "Adam", "init_args": {"betas": [0.0, 0.9]}},
        "trainer": {"epochs": 3, "clip": 1.0},
    }
    assert merge(base, {"optimizer": "SGD"})["optimizer"] == {"class_path": "SGD"}
    assert merge(base, {"optimizer": {"init_args": {"lr": 0.1}}})["optimizer"]["init_args"] == {
        "betas": [0.0, 0.9],
        "lr": 0.1,
    }
    assert merge(base, {"trainer": {"epochs": 4}})["trainer"] == {"epochs": 4, "clip": 1.0}


def test_options_reach_their_places() -> None:
    config: dict[str, Any] = {}
    for name, value in [
        ("problem", "a.py:b"),
        ("problem.width", "3"),
        ("data.init_args.name", "x"),
        ("scheduler", "StepLR"),
        ("scheduler.interval", "step"),
        ("scheduler.step_size", "2"),
        ("hooks.0", "h:H"),
        ("hooks.0.every", "2"),
        ("trainer.checkpoint.keep", "3"),
        ("weights", "w.pt"),
        ("weights.strict", "false"),
        ("phases.0.epochs", "2"),
        ("phases.0.optimizer", "LBFGS"),
        ("phases.0.optimizer.lr", "1"),
    ]:
        config = with_option(config, name, value)
    assert config == {
        "problem": {"class_path": "a.py:b", "init_args": {"width": "3"}},
        "data": {"init_args": {"name": "x"}},
        "scheduler": {"class_path": "StepLR", "interval": "step", "init_args": {"step_size": "2"}},
        "hooks": [{"class_path": "h:H", "init_args": {"every": "2"}}],
        "trainer": {"checkpoint": {"keep": "3"}},
        "weights": {"path": "w.pt", "strict": "false"},
        "phases": [{"epochs": "2", "optimizer": {"class_path": "LBFGS", "init_args": {"lr": "1"}}}],
    }
    assert isinstance(config["trainer"]["checkpoint"]["keep"], Text)
    several = with_option({"optimizer": {"gen": "Adam", "disc": "Adam"}}, "optimizer.disc.lr", "3")
    assert several["optimizer"] == {"gen": "Adam", "disc": {"class_path": "Adam", "init_args": {"lr": "3"}}}


# ------------------------------------------------------------------------------------------------ mistakes

GOOD = """
import torch, weft
from torch import nn
from typing import Literal

def make_problem(width: int = 4, kind: Literal["tanh", "relu"] = "tanh"):
    net = weft.Node(nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1)), ["p"], ["x"], name="net")
    return weft.Problem([net], objectives=[weft.objective(lambda x, p: (x - p) ** 2, name="f")])

def data_setup(nsim: int, scale: float = 1.0, keys: list[str] | None = None):
    p = scale * torch.linspace(-1, 1, nsim)[:, None]
    return weft.DictDataset({"p": p}), weft.DictDataset({"p": p}), None, 4

def tuple_of_three(): return data_setup(8)[:3]
def no_module(): return 3
def raises(): raise RuntimeError("no such experiment")
number = 7
"""
FILES = {
    "good.py": GOOD,
    "broken.py": "import torch\n\nx = (1\n",
    "raising.py": "import torch\nfrom weft import *\nvalue = 1 / 0\n",
    "missing_import.py": "import a_module_that_is_not_there\ndef make(): ...\n",
    "ring_a.py": "import ring_b\ndef make(): ...\n",
    "ring_b.py": "from ring_a import make\n",
    "twice.yaml": "trainer: {epochs: 1}\ntrainer: {epochs: 2}\n",
    "notyaml.yaml": "trainer: [1, 2\n",
    "list.yaml": "- 1\n- 2\n",
    "ring.yaml": "a: &a [*a]\n",
}
BASE = {"problem": "good.py:make_problem", "data": {"class_path": "good.py:data_setup", "init_args": {"nsim": 8}}}

MISTAKES: list[tuple[dict[str, Any], list[str], str]] = [
    # what is in the file besides BASE, further words of the command line, what is told
    ({"trainer": {"epohcs": 3}}, [], "trainer.epohcs=3: there is no such option; did you mean 'epochs'?"),
    ({"trainer": {"epochs": -1}}, [], "trainer.epochs=-1: must be at least 0"),
    ({"trainer": {"epochs": "many"}}, [], "trainer.epochs='many': expected a whole number"),
    ({"trainer": {"epochs": True}}, [], "trainer.epochs=True: expected a whole number"),
    ({"trainer": {"clip": 0}}, [], "trainer.clip=0: must be greater than 0"),
    (
        {"trainer": {"monitor_mode": "minn"}},
        [],
        "trainer.monitor_mode='minn': expected 'min' or 'max'; did you mean 'min'?",
    ),
    ({"trainer": {"precision": "64-ture"}}, [], "did you mean '64-true'?"),
    ({"trainer": {"max_time": "soon"}}, [], "trainer.max_time='soon': expected seconds or \"DD:HH:MM:SS\""),
    (
        {"trainer": {"checkpoint": {"every_n_epoch": 2}}},
        [],
        "trainer.checkpoint.every_n_epoch=2: there is no such option; did you mean 'every_n_epochs'?",
    ),
    ({"trainer": {"checkpoint": {"keep": 1}}}, [], "trainer.checkpoint.keep=1: must be at least 2"),
    ({"trainer": {"limit_batches": {"trian": 3}}}, [], "no split is named ['trian']"),
    ({"trainer": 5}, [], "trainer=5: expected a dict of options"),
    (
        {"trainer": {"patience": 3, "monitor_metric": "dev_accuracy", "monitor_mode": "max", "epochs": 2}},
        [],
        "'dev_accuracy'",
    ),
    ({"batches": {"batch_size": 0}}, [], "batches.batch_size=0: must be at least 1"),
    ({"batches": {"batchsize": 3}}, [], "did you mean 'batch_size'?"),
    ({"batches": {"num_workers": "every"}}, [], "batches.num_workers='every': expected a whole number or 'all'"),
    ({"optimiser": "Adam"}, [], "optimiser: there is no such section; did you mean 'optimizer'?"),
    ({"optimizer": "AdmaW"}, [], "optimizer='AdmaW': torch.optim has no 'AdmaW'; did you mean 'AdamW'?"),
    (
        {"optimizer": {"class_path": "AdamW", "init_args": {"learning_rate": 1}}},
        [],
        "optimizer.learning_rate=1: AdamW has no such parameter; it has lr, betas",
    ),
    ({"optimizer": {"class_path": "AdamW", "init_args": {"lr": "fast"}}}, [], "optimizer.lr='fast': expected a number"),
    ({"optimizer": {"class_path": "AdamW", "lr": 1e-3}}, [], "its own parameters go into optimizer.init_args"),
    (
        {"optimizer": {"class_path": "good.py:number"}},
        [],
        "optimizer='{here}/good.py:number': found int, expected a class or a function",
    ),
    (
        {"scheduler": {"class_path": "StepLR", "init_args": {"step_size": 2}, "interval": "steps"}},
        [],
        "scheduler.interval='steps': expected 'epoch' or 'step'; did you mean 'step'?",
    ),
    ({"scheduler": {"class_path": "StepLR"}}, [], "scheduler.step_size: missing; StepLR needs it (a whole number)"),
    ({"problem": "good.py:make_probem"}, [], "has no 'make_probem'; did you mean 'make_problem'?"),
    ({"problem": "god.py:make_problem"}, [], "there is no file {here}/god.py; did you mean 'good.py'?"),
    ({"problem": "good.py"}, [], "names a file; expected 'good.py:function'"),
    ({"problem": "no_such_package.module:make"}, [], "there is no module 'no_such_package'"),
    ({"problem": "make_problem"}, [], "problem='make_problem': expected 'module:function'"),
    ({"problem": {"init_args": {"width": 3}}}, [], "problem: found no class_path"),
    (
        {"problem": {"class_path": "good.py:make_problem", "init_args": {"width": 1.5}}},
        [],
        "problem.width=1.5: expected a whole number",
    ),
    (
        {"problem": {"class_path": "good.py:make_problem", "init_args": {"kind": "tan"}}},
        [],
        "problem.kind='tan': expected 'tanh' or 'relu'; did you mean 'tanh'?",
    ),
    ({"problem": "broken.py:make"}, [], "broken.py, line 3: '(' was never closed"),
    (
        {"problem": "raising.py:value"},
        [],
        "importing it raised ZeroDivisionError: division by zero (raising.py, line 3)",
    ),
    (
        {"problem": "missing_import.py:make"},
        [],
        "No module named 'a_module_that_is_not_there' (missing_import.py, line 1)",
    ),
    ({"problem": "ring_a.py:make"}, [], "circular import"),
    ({"problem": "good.py:no_module"}, [], "the problem is int 3; expected a torch.nn.Module"),
    ({"problem": "good.py:raises"}, [], "RuntimeError: no such experiment (good.py, line 16)"),
    ({"data": "good.py:data_setup"}, [], "data.nsim: missing; data_setup needs it (a whole number)"),
    ({"data": "good.py:tuple_of_three"}, [], "expected (train, dev, test, batch_size) or a weft.Data"),
    (
        {"data": {"class_path": "good.py:data_setup", "init_args": {"nsim": 8, "keys": "a"}}},
        [],
        "data.keys='a': expected a list (each text) or nothing (null)",
    ),
    ({"hooks": ["good.py:number"]}, [], "Hook 'int' has no event to be called at"),
    ({"loggers": ["tensorbord"]}, [], "did you mean 'tensorboard'?"),
    ({"phases": [{"epochs": 0}]}, [], "phases.0.epochs=0: must be at least 1"),
    ({"phases": [{"epochs": 1, "freeze": ["nett"]}]}, [], "has no node or submodule 'nett'; did you mean 'net'?"),
    ({"phases": [{"epochs": 1}], "trainer": {"epochs": 3}}, [], "each phase has its own epochs"),
    ({"weights": "nothing.pt"}, [], "nothing.pt"),
    ({}, ["--config", "nothing.yaml"], "there is no file nothing.yaml"),
    ({}, ["--config", "twice.yaml"], "twice.yaml, line 2: not valid YAML: the key 'trainer' stands twice"),
    ({}, ["--config", "notyaml.yaml"], "notyaml.yaml, line 2: not valid YAML"),
    ({}, ["--config", "list.yaml"], "list.yaml: found list, expected sections"),
    ({}, ["--config", "ring.yaml"], "recursive"),
    ({}, ["--trainer.epoch", "3"], "trainer.epoch=3: there is no such option; did you mean 'epochs'?"),
    ({}, ["--trainer.optimizer", "SGD"], "trainer.optimizer='SGD': optimizer is a section of its own: --optimizer ..."),
    ({}, ["--trainer.epochs"], "--trainer.epochs: needs a value"),
    ({}, ["--patience", "3"], "--patience: there is no such option; did you mean '--trainer.patience'?"),
    ({}, ["--data.nsin", "3"], "data.nsin=3: data_setup has no such parameter; did you mean 'nsim'?"),
    ({}, ["--data.nsim", "few"], "data.nsim='few': expected a whole number"),
    ({}, ["--trainer.devices", "[0,"], "devices='[0,'"),
    ({}, ["runs/a"], "'runs/a': not expected here"),
    ({"objects": {"problem": "x"}}, [], "this run was started from Python"),
]


@pytest.fixture
def config_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with files to name, and modules that are forgotten afterwards."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path  # type: ignore[misc]
    for name in set(sys.modules) - before:
        if name.split("_")[0] in ("good", "broken", "raising", "missing", "ring"):
            del sys.modules[name]


@pytest.mark.parametrize(("config", "words", "message"), MISTAKES, ids=[m[2][:40] for m in MISTAKES])
def test_a_mistake_is_told_by_name_and_without_a_traceback(
    config: dict[str, Any], words: list[str], message: str, config_files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("run.yaml").write_text(yamlfile.dump({**BASE, **config}))
    code = cli.main(["fit", "--config", "run.yaml", *words])
    told = capsys.readouterr().err
    assert message.replace("{here}", str(config_files)) in told
    assert code == (cli.FAILED if "RuntimeError" in message else cli.BAD_USAGE), told
    assert "Traceback" not in told


def test_there_are_at_least_forty_kinds_of_mistakes() -> None:
    assert len(MISTAKES) >= 40


def test_a_right_config_is_no_mistake(config_files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text(yamlfile.dump({**BASE, "trainer": {"epochs": 1, "progress": False}}))
    assert cli.main(["fit", "--config", "run.yaml"]) == cli.OK
    assert capsys.readouterr().err == ""


def test_all_problems_are_told_at_once(config_files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {**BASE, "optimiser": "Adam", "trainer": {"epochs": -1, "clip": "x"}, "batches": {"batch_size": 0}}
    Path("run.yaml").write_text(yamlfile.dump({**config, "problem": "god.py:make_problem"}))
    assert cli.main(["fit", "--config", "run.yaml", "--data"]) == cli.BAD_USAGE
    told = capsys.readouterr().err
    assert told.startswith("weft: 6 problems:") and len(told.splitlines()) == 7
    Path("run.yaml").write_text(yamlfile.dump(BASE))
    words = ["--data.nsin", "3", "--problem.width", "x", "--optimizer", "AdamW", "--optimizer.lr", "y"]
    assert cli.main(["fit", "--config", "run.yaml", *words]) == cli.BAD_USAGE
    assert capsys.readouterr().err.startswith("weft: 3 problems:")


def test_debug_shows_the_traceback(config_files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text(yamlfile.dump({**BASE, "problem": "good.py:raises"}))
    assert cli.main(["fit", "--config", "run.yaml", "--debug"]) == cli.FAILED
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_options_are_checked_before_anything_slow_is_imported(config_files: Path) -> None:
    Path("run.yaml").write_text(yamlfile.dump({**BASE, "trainer": {"epochs": -1}}))
    code = "import sys; from weft.cli import main; main(['fit', '--config', 'run.yaml']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False" and "must be at least 0" in done.stderr


def test_config_errors_in_python_name_every_field() -> None:
    with pytest.raises(ValueError, match=r"epochs=-1: must be at least 0; clip=0: must be greater than 0"):
        TrainerConfig(epochs=-1, clip=0)
    assert complaints(TrainerConfig, {"epochs": 3}) == []
    with pytest.raises(ConfigError, match="no such option"):
        with_option({}, "trainr.epochs", "3")


def test_an_option_that_names_a_class_and_those_of_its_arguments_may_stand_in_any_order(
    config_files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("run.yaml").write_text(
        yamlfile.dump({**BASE, "optimizer": {"class_path": "Adam", "init_args": {"betas": [0, 0.9]}}})
    )
    printed = []
    for words in (["--optimizer.lr", "0.1", "--optimizer", "SGD"], ["--optimizer", "SGD", "--optimizer.lr", "0.1"]):
        assert cli.main(["config", "--config", "run.yaml", *words]) == cli.OK
        printed.append(yamlfile.load(capsys.readouterr().out)["optimizer"])
    assert printed == [{"class_path": "SGD", "init_args": {"lr": 0.1}}] * 2


def test_mistakes_of_all_sections_are_told_at_once_and_nothing_is_run(tmp_path: Path) -> None:
    (tmp_path / "named.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
        "def make_problem(width: int = 3): ...\ndef setup(nsim: int = 5): ...\n"
    )
    described = {
        "problem": {"class_path": f"{tmp_path}/named.py:make_problem", "init_args": {"widht": 3}},
        "data": {"class_path": f"{tmp_path}/named.py:setup", "init_args": {"nsim": "many"}},
        "batches": {"batch_sise": 3},
        "trainer": {"epohcs": 3},
    }
    with pytest.raises(ConfigError) as told:
        recipe.check(described, needed=("problem", "data"))
    begins = [problem.split("=")[0] for problem in told.value.problems]
    assert sorted(begins) == ["batches.batch_sise", "data.nsim", "problem.widht", "trainer.epohcs"]
    assert not (tmp_path / "ran").exists()
    del described["trainer"], described["batches"]
    with pytest.raises(ConfigError, match="widht"):
        recipe.check(described, needed=("problem", "data"))
    assert (tmp_path / "ran").exists()  # without other mistakes what is named is imported
