"""When a run saves, what is in a checkpoint, what is refused, and what an error leaves behind."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import weft
from tests.helpers.bitwise import same
from tests.helpers.crashes import in_child
from tests.helpers.resuming import (
    FUSE,
    SETTINGS,
    Average,
    Crash,
    DevRows,
    differences,
    fit,
    last_state,
    make_data,
    make_problem,
    rows,
)
from weft.checkpoint import archive
from weft.checkpoint import folder as checkpoints
from weft.checkpoint.archive import CheckpointError
from weft.checkpoint.weights_files import save_weights
from weft.loop.resume import FORMAT, PARTS
from weft.loop.saving import Checkpointing

SIX = 6  # batches in an epoch of `make_data`


@pytest.fixture(autouse=True)
def no_crash() -> None:
    FUSE.set(0)
    torch.manual_seed(4)


class Watch(weft.Hook):
    """Notes which files appear at which place of the run."""

    def __init__(self) -> None:
        self.saved: list[tuple[int, int, int]] = []
        self.seen: dict[str, int] = {}

    def on_step_start(self, trainer: Any, batch: Any) -> None:
        self.look(trainer)

    def on_fit_end(self, trainer: Any, result: Any) -> None:
        self.look(trainer)

    def look(self, trainer: Any) -> None:
        for path in sorted(Path(trainer.run.run_dir, "checkpoints").glob("step-*.ckpt")):
            if self.seen.get(path.name) != path.stat().st_ino:
                progress = archive.read(path)["progress"]
                self.saved.append((progress["step"], progress["epoch"], progress["batch"]))
                self.seen[path.name] = path.stat().st_ino


def places(root: Path, how: Mapping[str, Any] | bool, epochs: int = 3, **options: Any) -> list[tuple[int, int, int]]:
    """(step, epoch, batch in the epoch) of every checkpoint that a run writes, in order."""
    watch = Watch()
    trainer = weft.Trainer(
        root_dir=str(root),
        epochs=epochs,
        progress=False,
        hooks=[watch, *options.pop("hooks", [])],
        checkpoint=how,
        **options,
    )
    trainer.fit(make_problem(), make_data())
    return watch.saved


# ---- when ------------------------------------------------------------------------------------------------------------


def test_checkpoints_are_written_when_they_were_asked_for(tmp_path: Path) -> None:
    quiet = {"best": False, "keep": 50}
    assert places(tmp_path / "a", quiet) == [(6, 1, 0), (12, 2, 0), (18, 3, 0)]  # each epoch unless told otherwise
    assert places(tmp_path / "b", quiet | {"every_n_epochs": 2}) == [(12, 2, 0), (18, 3, 0)]  # and at the end
    assert places(tmp_path / "c", quiet | {"every_n_steps": 4}) == [
        (4, 0, 4),
        (8, 1, 2),
        (12, 1, 6),
        (16, 2, 4),
        (18, 3, 0),
    ]
    in_epochs = quiet | {"every_n_steps": 4, "every_n_epochs": 2}
    assert places(tmp_path / "d", in_epochs) == [(4, 0, 4), (8, 1, 2), (12, 2, 0), (16, 2, 4), (18, 3, 0)]
    assert places(tmp_path / "e", quiet | {"every_n_epochs": 10}, epochs=0) == []


def test_the_best_is_written_when_it_is_found_and_carries_its_weights(tmp_path: Path) -> None:
    setting: dict[str, Any] = {"checkpoint": lambda: {"every_n_epochs": 100}}
    result, problem = fit(tmp_path, setting, epochs=8, every=None, optimizer=lambda p: torch.optim.SGD(p, lr=0.2))
    state, path = checkpoints.load(tmp_path / "run", "best")
    assert state["progress"]["epoch"] == (result.best_epoch or 0) + 1 and state["best"]["weights"] is None
    assert same(dict(state["problem"]), dict(problem.state_dict()))
    last, _ = checkpoints.load(tmp_path / "run", "last")
    assert last["progress"]["epoch"] == 8 and path.name != "step-000000048.ckpt"
    assert same(dict(last["best"]["weights"]), dict(problem.state_dict()))
    fresh = weft.load_weights(make_problem(seed=3), tmp_path / "run")
    assert same(dict(fresh.state_dict()), dict(problem.state_dict()))


def test_without_best_the_run_folder_still_gives_the_best_weights(tmp_path: Path) -> None:
    """`best` names a file that carries them, whether or not it was written in the best epoch."""
    setting: dict[str, Any] = {"checkpoint": lambda: {"every_n_epochs": 4, "best": False}}
    result, problem = fit(tmp_path, setting, epochs=10, every=None, optimizer=lambda p: torch.optim.SGD(p, lr=0.2))
    assert (result.best_epoch or 0) + 1 not in (4, 8, 10)
    assert same(
        dict(weft.load_weights(make_problem(seed=3), tmp_path / "run").state_dict()), dict(problem.state_dict())
    )


def test_seconds_are_counted_from_the_last_save(tmp_path: Path) -> None:
    now = [0.0]
    hook = Checkpointing(weft.CheckpointConfig(every_n_seconds=10, best=False), clock=lambda: now[0])

    def pass_time(trainer: Any, batch: Any, loss: Any) -> None:
        now[0] += 3.0

    trainer = weft.Trainer(
        root_dir=str(tmp_path), run_name="r", epochs=2, progress=False, hooks=[hook, {"on_step_end": pass_time}]
    )
    trainer.fit(make_problem(), make_data())
    names = [path.name for path in sorted((tmp_path / "r/checkpoints").glob("step*"))]
    assert names == ["step-000000008.ckpt", "step-000000012.ckpt"]  # after 12 s, 24 s, (36 s and the end are one)


def test_the_same_step_saved_twice_keeps_the_later_state_which_can_be_told(tmp_path: Path) -> None:
    """The last step of an epoch: first before, then after the dev set was seen and the epoch closed."""
    how = {"every_n_steps": SIX, "every_n_epochs": 1, "best": False, "keep": 50}
    assert places(tmp_path, how, epochs=1, run_name="r") == [
        (6, 1, 0)
    ]  # the first was replaced before it was looked at
    state, path = checkpoints.load(tmp_path / "r")
    assert (
        path.name == "step-000000006.ckpt" and state["progress"]["batch"] == 0 and state["history"]["num_epochs"] == 1
    )


def test_nothing_is_saved_in_a_dry_run_or_unasked(tmp_path: Path) -> None:
    weft.Trainer(root_dir=str(tmp_path), epochs=1, progress=False).fit(make_problem(), make_data())
    weft.Trainer(root_dir=str(tmp_path), fast_dev_run=True, checkpoint=True, progress=False).fit(
        make_problem(), make_data()
    )
    assert not list(tmp_path.rglob("*.ckpt"))


def test_saving_in_the_middle_of_something_is_refused(tmp_path: Path) -> None:
    told = []

    def save(trainer: Any, *args: Any) -> None:
        with pytest.raises(RuntimeError, match="save: .* is under way") as caught:
            trainer.run.save()
        told.append(str(caught.value).split(" is under")[0])

    events = ("on_before_optimizer_step", "on_validation_start", "on_epoch_end")
    options: dict[str, Any] = {"epochs": 1, "progress": False, "limit_batches": 1}
    trainer = weft.Trainer(root_dir=str(tmp_path), hooks=dict.fromkeys(events, save), **options)
    trainer.fit(make_problem(), make_data())
    assert told == ["save: an update", "save: an evaluation", "save: the end of an epoch"]
    with (
        pytest.raises(RuntimeError, match="no folder"),
        weft.Trainer(**options).start(make_problem(), make_data()) as run,
    ):
        run.save()
    with weft.Trainer(root_dir=str(tmp_path), **options).start(make_problem(), make_data()) as run:
        for _ in run.epochs():
            for batch in run.batches():
                run.update(batch)
                assert archive.read(run.save())["progress"]["step"] == 1


# ---- what is in it ---------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_everything_and_only_plain_values(tmp_path: Path) -> None:
    fit(tmp_path, {"hooks": Average, "scheduler": SETTINGS["plateau"]["scheduler"]}, epochs=1)
    _, path = checkpoints.load(tmp_path / "run")
    state = torch.load(path, weights_only=True)
    assert set(state) == set(PARTS) and state["format"] == FORMAT
    assert state["hooks"].keys() == {"Average"} and state["state"]["steps"] == SIX
    assert state["options"]["torch"] == str(torch.__version__) and state["fixed"]["rows of the training data"] == "22"
    assert state["module_state"].keys() >= {"nodes.0.fn.calls", "nodes.0.fn.hidden", "nodes.0.fn.drift"}


def test_what_cannot_be_saved_is_refused_by_name_and_the_weights_are_not_lost(tmp_path: Path) -> None:
    def spoil(trainer: Any, batch: Any, loss: Any) -> None:
        trainer.state["where"] = Path("here")

    with pytest.raises(TypeError, match=r"state\['state'\]\['where'\] is a pathlib.*; use str"):
        fit(tmp_path, {"hooks": lambda: {"on_step_end": spoil}})


class Silent(weft.Hook):
    def on_epoch_start(self, trainer: Any) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {"a": 1}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.loaded = dict(state_dict)


def test_hooks_whose_state_is_missing_or_left_over_are_named(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which names the option `hooks`
        fit(tmp_path, {"hooks": lambda: [Average(), Silent()]}, epochs=1)
        with pytest.raises(ValueError, match=r"hooks with state: it lacks none and has \['Silent'\] besides"):
            fit(tmp_path, {"hooks": Average}, epochs=2)
        with pytest.raises(ValueError, match=r"it lacks \['Silent.2'\] and has \['Average'\] besides"):
            fit(tmp_path, {"hooks": lambda: [Silent(), Silent()]}, epochs=2)
        result, _ = fit(tmp_path, {"hooks": lambda: [Silent(), Average()]}, epochs=2)  # in whatever order
    assert result.epochs == 2


def test_what_decides_the_meaning_of_the_state_must_be_the_same(tmp_path: Path) -> None:
    fit(tmp_path, {}, epochs=1)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"precision": lambda: "64-true"}, "precision: 32-true there, 64-true here"),
        ({"accumulate": lambda: 2}, "accumulate: 1 there, 2 here"),
        (
            {"data": lambda: weft.Data({"p": rows(21)}, {"p": rows(9)}, batch_size=4)},
            "rows of the training data: 22 there, 21",
        ),
        ({"data": lambda: weft.Data({"p": rows()}, {"p": rows(9)}, batch_size=5)}, "batch_size: 4 there, 5 here"),
        ({"data": lambda: make_data(shuffle=False)}, "shuffle: True there, False here"),
        ({"optimizer": lambda: lambda p: torch.optim.SGD(p, lr=0.1)}, "optimizers: {'default': 'Adam'} there"),
        (
            {"scheduler": SETTINGS["plateau"]["scheduler"]},
            "schedulers: {} there, {'default': 'ReduceLROnPlateau each epoch'}",
        ),
    ]
    for setting, message in cases:
        with pytest.raises(ValueError, match="cannot be resumed with these settings") as caught:
            fit(tmp_path, setting, epochs=2)
        assert message in str(caught.value) and "step-000000006.ckpt" in str(caught.value)
    assert {path: path.read_bytes() for path in before} == before  # and the run is as it was


def test_what_changed_otherwise_is_named_in_one_warning(tmp_path: Path) -> None:
    fit(tmp_path, {}, epochs=1)
    changed: dict[str, Any] = {"clip": lambda: 1.0, "optimizer": lambda: lambda p: torch.optim.Adam(p, lr=0.5)}
    changed["data"] = lambda: weft.Data(
        weft.DictDataset({"p": rows() + 1}), weft.DictDataset({"p": rows(9, 2)}), batch_size=4
    )
    with pytest.warns(UserWarning, match="Changed since") as caught:
        fit(tmp_path, changed, epochs=2)
    (warning,) = caught
    for part in (
        "clip: None -> 1.0",
        "optimizer default: Adam(lr=0.001",
        "train data: p (22, 2)",
        "after epoch 0, step 6",
    ):
        assert part in str(warning.message)
    assert "not end bit for bit" in str(warning.message) and "dev data" not in str(warning.message)


def test_other_weights_parameters_and_modules_are_errors_that_name_them(tmp_path: Path) -> None:
    fit(tmp_path, {}, epochs=1)

    def other() -> weft.Problem:
        problem = make_problem()
        problem.nodes[1].fn[0] = nn.Linear(1, 5)
        return problem

    with pytest.raises(ValueError, match=r"has nodes.1.fn.0.weight of shape \(4, 1\), this problem has \(5, 1\)"):
        fit(tmp_path, {"problem": other}, epochs=2)

    def reordered(params: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(list(params)[::-1], lr=1e-3, betas=(0.0, 0.9), fused=True)

    with (
        pytest.raises(ValueError, match="Optimizer 'default' updates .*; the checkpoint's updated"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # which names the option `optimizer`
        fit(tmp_path, {"optimizer": lambda: reordered}, epochs=2)


# ---- data that cannot be resumed -------------------------------------------------------------------------------------


def test_data_that_cannot_be_started_again_is_refused_when_checkpointing(tmp_path: Path) -> None:
    def once() -> Any:
        yield {"p": rows(4)}

    def persistent() -> weft.Data:
        return weft.Data(DataLoader(DevRows(), batch_size=4, num_workers=1, persistent_workers=True))

    for data, why in ((lambda: weft.Data(once()), "one-shot iterable"), (persistent, "persistent_workers=False")):
        with pytest.raises(ValueError, match=f"the training data .*{why}.*checkpoint=False"):
            fit(tmp_path, {"data": data}, resume=None)
    weft.Trainer(epochs=1, progress=False).fit(make_problem(), once())  # without checkpoints it may be


# ---- what to go on from ----------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_passed_over_with_one_warning_and_the_end_is_the_same(tmp_path: Path) -> None:
    torch.manual_seed(5)
    fit(tmp_path / "a", {}, resume=None)
    expected = last_state(tmp_path / "a")
    FUSE.set(15)
    torch.manual_seed(5)
    with pytest.raises(Crash):
        fit(tmp_path / "b", {})
    FUSE.set(0)
    newest = checkpoints.find(tmp_path / "b/run")
    flip(newest)
    with pytest.raises(CheckpointError, match=f"{newest.name} is damaged"):
        fit(tmp_path / "b", {}, resume=str(newest))
    with pytest.warns(UserWarning, match=f"{newest.name} is damaged.*is used instead") as caught:
        fit(tmp_path / "b", {})
    assert len(caught) == 1 and not differences(expected, last_state(tmp_path / "b"))


def test_auto_starts_anew_where_nothing_is_and_says_so_where_nothing_is_whole(tmp_path: Path) -> None:
    result, _ = fit(tmp_path, {}, epochs=1)
    assert result.epochs == 1
    for path in (tmp_path / "run/checkpoints").glob("step*"):
        flip(path)
    with pytest.warns(UserWarning, match="no checkpoint that can be loaded.*The run starts anew"):
        result, _ = fit(tmp_path, {}, epochs=1)
    assert result.steps == SIX and last_state(tmp_path)["progress"]["epoch"] == 1


def test_auto_without_a_name_takes_the_newest_run(tmp_path: Path) -> None:
    for name, age in (("old", 100), ("new", 0)):
        fit(tmp_path, {}, epochs=1, run_name=name)
        os.utime(tmp_path / name / "checkpoints", (1e9 - age, 1e9 - age))
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    result, _ = fit(tmp_path, {}, epochs=2, run_name=None)
    assert result.run_dir == tmp_path / "new" and result.epochs == 2


def test_what_there_is_not_cannot_be_resumed(tmp_path: Path) -> None:
    for resume in ("last", "best"):
        with pytest.raises(CheckpointError, match=f"resume='{resume}': there are no checkpoints in .*run/checkpoints"):
            fit(tmp_path, {}, resume=resume)
    with pytest.raises(CheckpointError, match="does not exist"):
        fit(tmp_path, {}, resume=str(tmp_path / "nothing.ckpt"))
    with pytest.raises(CheckpointError, match="is a URL"):
        fit(tmp_path, {}, resume="https://host/step-000000001.ckpt")
    weft.Trainer(epochs=1, progress=False).fit(problem := make_problem(), make_data())
    save_weights(problem, tmp_path / "w.pt")
    with pytest.raises(
        CheckpointError, match=r"no checkpoint of a run but a file of format 'weft-weights-1'.*load_weights"
    ):
        fit(tmp_path, {}, resume=str(tmp_path / "w.pt"))
    torch.save({"state_dict": problem.state_dict()}, tmp_path / "lightning.ckpt")
    with pytest.raises(CheckpointError, match=r"a file with the keys \['state_dict'\]"):
        fit(tmp_path, {}, resume=str(tmp_path / "lightning.ckpt"))


def test_a_checkpoint_of_a_newer_format_or_without_a_part_says_so(tmp_path: Path) -> None:
    fit(tmp_path, {}, epochs=1)
    state, path = checkpoints.load(tmp_path / "run")
    archive.write(path, state | {"format": FORMAT + 1})
    with pytest.raises(
        CheckpointError, match=rf"written by a newer weft \(format {FORMAT + 1}, known here: up to {FORMAT}\)"
    ):
        fit(tmp_path, {}, resume=str(path))
    for part in PARTS:
        archive.write(path, {k: v for k, v in state.items() if k != part})
        with pytest.raises(
            CheckpointError, match="no checkpoint of a run" if part == "format" else rf"lacks \['{part}'\]"
        ):
            fit(tmp_path, {}, resume=str(path))


OLD = sorted((Path(__file__).parents[1] / "files").glob("format-*.ckpt"))


def tiny(root: Path, **options: Any) -> weft.FitResult:
    """The run whose checkpoint is kept for each released format."""
    problem = weft.Problem(
        [weft.Node(nn.Linear(1, 1), ["p"], ["x"])], [weft.objective(lambda x: (x - 1) ** 2, name="f")]
    )
    data = weft.Data({"p": torch.linspace(-1, 1, 8)[:, None]}, {"p": torch.linspace(-1, 1, 5)[:, None]}, batch_size=3)
    trainer = weft.Trainer(
        epochs=3,
        seed=1,
        progress=False,
        patience=9,
        root_dir=str(root),
        run_name="tiny",
        scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        checkpoint={"every_n_steps": 5},
        **options,
    )
    return trainer.fit(problem, data)


@pytest.mark.filterwarnings("ignore:Resuming")  # on another machine, with another torch
@pytest.mark.parametrize("path", OLD, ids=lambda path: path.stem)
def test_checkpoints_of_every_released_format_load_for_ever(path: Path, tmp_path: Path) -> None:
    """Written by `python -m tests.loop.test_checkpointing`, once for each format."""
    state = archive.read(path)
    assert f"format-{state['format']}" == path.stem and state["progress"]["batch"] == 2
    result = tiny(tmp_path, resume=str(path))
    assert result.epochs == 3 and result.steps == 9 and len(result.history["dev_loss"]) == 3
    assert result.history["dev_loss"][0] == state["history"]["values"]["dev_loss"][0].item()
    fresh = weft.Problem([weft.Node(nn.Linear(1, 1), ["p"], ["x"])], [weft.objective(lambda x: x, name="f")])
    weft.load_weights(fresh, path)
    assert same(dict(fresh.state_dict()), dict(state["problem"]))


def test_there_is_a_checkpoint_of_the_present_format() -> None:
    assert f"format-{FORMAT}" in {path.stem for path in OLD}


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_an_error_leaves_its_own_file_which_only_its_path_resumes(tmp_path: Path) -> None:
    FUSE.set(9)
    with pytest.raises(Crash):
        fit(tmp_path, {})
    FUSE.set(0)
    folder = tmp_path / "run/checkpoints"
    state = archive.read(folder / "exception.ckpt")
    assert state["error"] == "Crash: " and state["progress"]["step"] == 8 and state["progress"]["batch"] == 3
    assert (
        checkpoints.find(folder).name == "step-000000008.ckpt"
        and archive.read(checkpoints.find(folder))["error"] is None
    )
    with pytest.warns(UserWarning, match="saved at an error, maybe in the middle of a step"):
        result, _ = fit(tmp_path, {}, resume=str(folder / "exception.ckpt"), epochs=2)
    assert result.epochs == 2 and result.steps == 11  # the batch at which it happened is left out


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_ends_the_training_with_its_name_and_spares_the_checkpoints(
    tmp_path: Path, background: bool
) -> None:
    how: dict[str, Any] = {"checkpoint": lambda: {"background": background}}
    fit(tmp_path, how, epochs=1, resume=None)
    folder = tmp_path / "run/checkpoints"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def body() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        with pytest.raises(OSError) as caught, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the report does not fit either
            fit(tmp_path, how, epochs=3)
        assert caught.value.errno == errno.EFBIG and "bytes needed" in str(caught.value)
        assert str(folder / "step-0000000") in str(caught.value)
        assert "No checkpoint was written at this error" in caught.value.__notes__[0]

    assert in_child(body) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    result, _ = fit(tmp_path, how, epochs=3)  # with room again
    assert result.steps == 3 * SIX


def test_temporary_files_of_killed_processes_are_gone_after_the_next_start(tmp_path: Path) -> None:
    fit(tmp_path, {}, epochs=1)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    left = tmp_path / f"run/checkpoints/.step-000000009.ckpt.{child}-1@{os.uname().nodename}.tmp"
    left.touch()
    fit(tmp_path, {}, epochs=2)
    assert not left.exists()


def test_a_new_run_under_an_old_name_does_not_mix_with_it(tmp_path: Path) -> None:
    fit(tmp_path, {}, epochs=4, resume=None)
    old = weft.load_result(tmp_path / "run")
    result, problem = fit(tmp_path, {}, epochs=1, resume=None)
    assert same(
        dict(weft.load_weights(make_problem(seed=9), tmp_path / "run").state_dict()), dict(problem.state_dict())
    )
    assert max(archive.read(p)["progress"]["step"] for p in (tmp_path / "run/checkpoints").glob("step*")) == SIX
    assert weft.load_result(tmp_path / "run").history.keys() == result.history.keys()
    assert len(weft.load_result(tmp_path / "run").history["train_loss"]) == 1
    assert weft.load_result(tmp_path / "run/old/1").history == old.history


if __name__ == "__main__":  # writes the file of the present format
    import tempfile

    class Stop(weft.Hook):
        def on_step_end(self, trainer: Any, batch: Any, loss: Any) -> None:
            if trainer.global_step == 6:
                raise RuntimeError

    with tempfile.TemporaryDirectory() as folder:
        try:
            tiny(Path(folder), hooks=Stop())
        except RuntimeError:
            shutil.copy(
                Path(folder, "tiny/checkpoints/step-000000005.ckpt"),
                Path(__file__).parents[1] / f"files/format-{FORMAT}.ckpt",
            )
