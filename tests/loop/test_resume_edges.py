"""What could still get between a run and its resumption: torn files, full disks, moved folders, odd names, evaluations
at odd moments, a damaged compiler cache."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from tests.helpers.crashes import IO_CALLS, in_child, state_of_step
from tests.helpers.hostile import evil_files
from tests.helpers.killing import plain_data, plain_problem
from tests.helpers.resuming import (
    FUSE,
    Crash,
    differences,
    disturb,
    fit,
    given,
    make_data,
    make_problem,
    start_alike,
    summary,
)
from weft import yamlfile
from weft.checkpoint import archive
from weft.checkpoint import folder as checkpoints
from weft.checkpoint.archive import CheckpointError
from weft.checkpoint.changed import changed_attributes
from weft.checkpoint.hidden import attributes
from weft.devices import seeding
from weft.loggers.csv import CSVLogger, read_rows


@pytest.fixture(autouse=True)
def no_fuse() -> Iterator[None]:
    FUSE.set(0)
    yield
    FUSE.set(0)


def die(root: Path, calls: int = 9, **options: Any) -> None:
    """A run that crashes after so many steps, and the new random numbers of the process after it."""
    start_alike()
    FUSE.set(calls)
    with pytest.raises(Crash):
        fit(root, {}, **options)
    FUSE.set(0)
    disturb()


def whole(root: Path, **options: Any) -> dict[str, Any]:
    start_alike()
    return summary(root, *fit(root, {}, **options))


# ---- files beside the checkpoints ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*environment.yaml is damaged. earlier sessions")
@pytest.mark.parametrize("name", ["config.yaml", "environment.yaml", "result.json", "report.html"])
def test_no_file_beside_the_checkpoints_can_hold_a_resumption_up_wherever_it_is_torn(name: str, tmp_path: Path) -> None:
    expected = whole(tmp_path / "whole", epochs=2)
    die(tmp_path / "cut", epochs=2)
    path = tmp_path / "cut/run" / name
    data = path.read_bytes()
    shutil.copytree(tmp_path / "cut", tmp_path / "kept")
    for length in (0, 1, 10, len(data) // 3, len(data) - 5):
        shutil.rmtree(tmp_path / "cut")
        shutil.copytree(tmp_path / "kept", tmp_path / "cut")
        path.write_bytes(data[:length])
        found = summary(tmp_path / "cut", *fit(tmp_path / "cut", {}, epochs=2))
        assert not differences(expected, found), (length, differences(expected, found)[:8])


def test_config_and_environment_are_replaced_in_one_operation(tmp_path: Path) -> None:
    """A process that dies at any call while it writes them leaves the old or the new text."""
    fit(tmp_path, {}, epochs=1)
    folder = tmp_path / "run"
    before = {name: (folder / name).read_text() for name in ("config.yaml", "environment.yaml")}
    for number in range(1, 40, 3):

        def body(number: int = number) -> None:
            moments = 0

            def profile(frame: Any, event: str, function: Any) -> None:
                nonlocal moments
                if event.startswith("c_") and getattr(function, "__name__", "") in IO_CALLS:
                    moments += 1
                    if moments == number:
                        os._exit(0)

            from weft.records.describe import RunFolder

            class Stop(weft.Hook):
                def on_fit_start(self, trainer: Any) -> None:
                    sys.setprofile(profile)
                    RunFolder().on_fit_start(trainer)
                    os._exit(0)

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # which names the hook
                fit(tmp_path, {"hooks": Stop}, epochs=3)

        assert in_child(body) == 0
        for name, text in before.items():
            now = (folder / name).read_text()
            assert now == text or (now.endswith("\n") and yamlfile.load(now)), now
    fit(tmp_path, {}, epochs=1)
    assert not list(folder.glob(".*.tmp")), "a temporary file of a killed process is left"


@pytest.mark.parametrize("length", [0, 1, 20, 28, 29, 60, 300])
def test_a_torn_metrics_csv_does_not_hold_a_resumption_up(length: int, tmp_path: Path) -> None:
    die(tmp_path)
    path = tmp_path / "run/metrics.csv"
    rows = read_rows(path)
    path.write_bytes(path.read_bytes()[:length])
    result, _ = fit(tmp_path, {})
    assert result.epochs == 4
    later = [row for row in read_rows(path) if row.epoch >= 1]
    assert {row.epoch for row in later} == {1, 2, 3} and len(rows) > 5


def test_rows_that_the_power_took_are_left_out_with_a_warning_and_a_copy(tmp_path: Path) -> None:
    die(tmp_path)
    path = tmp_path / "run/metrics.csv"
    text = path.read_bytes().replace(b"train_loss", b"\0\0\0,\0\0\xff")
    path.write_bytes(text)
    with pytest.raises(ValueError, match="metrics.csv, line .*: found"):
        read_rows(path)  # which never guesses
    with pytest.warns(UserWarning, match=r"broken rows, left out now: line \d+.*metrics-damaged.csv has all"):
        result, _ = fit(tmp_path, {})
    assert result.epochs == 4 and (tmp_path / "run/metrics-damaged.csv").read_bytes() == text
    assert [row.epoch for row in read_rows(path) if row.name == "train_loss"] == [1, 2, 3]


def test_a_full_disk_in_metrics_csv_names_it_and_leaves_no_half_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"

    def body() -> None:
        logger = CSVLogger(path)
        logger.log_metrics({"a": 1.0, "epoch": 0}, 1)
        logger.save()
        size = path.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 37, resource.RLIM_INFINITY))
        logger.log_metrics({"b": 2.0, "c": 3.0, "epoch": 0}, 2)
        for _ in range(2):
            with pytest.raises(OSError, match="metrics.csv could not be written: File too large") as caught:
                logger.save()
            assert caught.value.errno == errno.EFBIG and path.stat().st_size == size
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        logger.save()  # there is room again

    assert in_child(body) == 0
    assert [(row.step, row.name, row.value) for row in read_rows(path)] == [(1, "a", 1.0), (2, "b", 2.0), (2, "c", 3.0)]


def test_no_way_to_a_run_folder_runs_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that would, in the place of every checkpoint of a run: resumed by word, folder and path, and read back."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker = tmp_path / "executed"
    fit(tmp_path, {}, epochs=1)
    (tmp_path / "evil").mkdir()
    run = tmp_path / "run"
    for path in evil_files(tmp_path / "evil", str(marker)):
        for step in (run / "checkpoints").glob("step-*.ckpt"):
            shutil.copy(path, step)
        for resume in ("last", "best", str(run), str(run / "checkpoints"), str(step), str(path)):
            with pytest.raises(CheckpointError):
                fit(tmp_path, {}, epochs=2, resume=resume)
        for load in (lambda: weft.load_result(run).last_weights, lambda: weft.load_weights(make_problem(), run)):
            with pytest.raises(CheckpointError):
                load()
    with pytest.warns(UserWarning, match="no checkpoint that can be loaded.*starts anew"):
        fit(tmp_path, {}, epochs=1)
    assert not marker.exists()


# ---- places ----------------------------------------------------------------------------------------------------------


def test_a_folder_that_was_moved_or_lies_behind_links_is_gone_on_with_in_its_new_place(tmp_path: Path) -> None:
    expected = whole(tmp_path / "whole")
    die(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    untouched = {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    assert not differences(expected, summary(tmp_path / "copy", *fit(tmp_path / "copy", {})))
    assert {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()} == untouched

    place, elsewhere = tmp_path / "a/run/checkpoints", tmp_path / "scratch"
    newest = checkpoints.find(place).name
    place.rename(elsewhere)
    place.symlink_to(elsewhere)
    (elsewhere / "last").unlink()
    (elsewhere / "last").symlink_to(newest)  # as other tools point to theirs: to the file itself
    with pytest.warns(UserWarning, match="last cannot be read.*is used instead"):
        found = summary(tmp_path / "a", *fit(tmp_path / "a", {}))
    assert not differences(expected, found) and not (elsewhere / "last").is_symlink()
    assert (elsewhere / newest).exists() or checkpoints.find(elsewhere).name > newest


def test_names_of_folders_may_hold_anything(tmp_path: Path) -> None:
    expected = whole(tmp_path / "whole", epochs=2)
    for name in ("two words", "[x]*?", "a:b", "new\nline", "%s{0}", "step-000000123.ckpt", "checkpoints", "\udcff"):
        die(tmp_path / name, epochs=2)
        found = summary(tmp_path / name, *fit(tmp_path / name, {}, epochs=2))
        assert not differences(expected, found), (name, differences(expected, found)[:8])


def test_a_working_directory_that_changes_does_not_split_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    expected = whole(tmp_path / "whole")
    leave = {"on_step_end": lambda trainer, batch, loss: os.chdir(tmp_path / "elsewhere")}
    start_alike()
    result, problem = fit(Path("runs"), {"hooks": given(leave)})
    assert result.run_dir == tmp_path / "runs/run" and not list((tmp_path / "elsewhere").iterdir())
    assert not differences(expected["weights"], dict(problem.state_dict()))
    assert len(read_rows(tmp_path / "runs/run/metrics.csv")) == len(read_rows(tmp_path / "whole/run/metrics.csv"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.long
def test_a_disk_that_is_really_full_spares_what_is_there_and_the_run_goes_on_when_there_is_room(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        checkpoints.save(disk / "save", 1, state_of_step(1))
        with pytest.raises(
            OSError, match=r"step-000000002.ckpt could not be written: No space left .* bytes needed, \d+ free"
        ):
            checkpoints.save(disk / "save", 2, state_of_step(2, 1_000_000))
        assert checkpoints.load(disk / "save")[0]["step"] == 1 and not list((disk / "save").glob(".*"))
        expected = whole(tmp_path / "whole")
        die(disk)
        with pytest.raises(OSError, match="No space left"), (disk / "filler").open("wb", buffering=0) as filler:
            while filler.write(b"x" * 512):
                pass
        with pytest.raises(OSError, match="could not be written: No space left"):
            fit(disk, {})
        assert checkpoints.load(disk / "run")[0]["progress"]["step"] == 8
        os.truncate(disk / "filler", 0)
        assert not differences(expected, summary(disk, *fit(disk, {})))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# ---- moments ---------------------------------------------------------------------------------------------------------


def averaging_loop(root: Path) -> dict[str, Any]:
    """Evaluates after every step, which puts the averages in the place of the weights until the next step."""
    options: dict[str, Any] = {"epochs": 3, "progress": False, "loggers": "csv", "run_name": "run"}
    average = weft.hooks.EMA(0.9)
    trainer = weft.Trainer(root_dir=str(root), checkpoint={"every_n_steps": 1}, resume="auto", hooks=average, **options)
    problem = make_problem()
    with trainer.start(problem, make_data()) as run:
        for _ in run.epochs():
            for batch in run.batches("train"):
                run.update(batch)
                run.evaluate("dev")
    assert run.result is not None
    return summary(root, run.result, problem)


@pytest.mark.parametrize("forgets", [False, True])
def test_a_save_while_averages_stand_in_the_problem_keeps_the_trained_weights(forgets: bool, tmp_path: Path) -> None:
    start_alike()
    expected = averaging_loop(tmp_path / "whole")
    start_alike()
    FUSE.set(9)
    with pytest.raises(Crash):
        averaging_loop(tmp_path / "cut")
    FUSE.set(0)
    disturb()
    if forgets:
        state, path = checkpoints.load(tmp_path / "cut/run")
        state["hooks"]["EMA"]["live"] = None
        archive.write(path, state)
    assert bool(differences(expected, averaging_loop(tmp_path / "cut"))) == forgets


def test_a_save_that_a_hook_asks_for_is_there_after_the_update_in_a_loop_over_batches_of_ones_own(
    tmp_path: Path,
) -> None:
    asked: list[Path] = []
    trainer = weft.Trainer(
        epochs=1,
        progress=False,
        root_dir=str(tmp_path),
        run_name="run",
        checkpoint={"every_n_epochs": 100},
        hooks={"on_step_end": lambda trainer, *_: asked.append(trainer.run.save())},
    )
    with trainer.start(plain_problem(), plain_data()) as run:
        for _ in run.epochs():
            for number, batch in enumerate(list(run.batches_of("train"))):
                run.update(batch)
                assert len(asked) == number + 1
                assert archive.read(asked[-1])["progress"]["step"] == number + 1


def test_a_save_that_a_hook_asks_for_after_a_step_waits_for_the_hooks_after_it(tmp_path: Path) -> None:
    """Else their part of the step would be missing after a resume: of averages, say, or of the numbers logged."""
    asked: list[Path] = []

    def save(trainer: Any, batch: Any, loss: Any) -> None:
        if trainer.global_step == 7:
            asked.append(trainer.run.save())
            assert not asked[-1].exists()

    setting = {"hooks": lambda: [{"on_step_end": save}, weft.hooks.EMA(0.9)], "log_every": given(1)}
    start_alike()
    expected = summary(tmp_path / "whole", *fit(tmp_path / "whole", setting, every=100))
    start_alike()
    FUSE.set(9)
    with pytest.raises(Crash):
        fit(tmp_path / "cut", setting, every=100)
    FUSE.set(0)
    disturb()
    assert asked[-1].name == checkpoints.find(tmp_path / "cut/run").name == "step-000000007.ckpt"
    assert not differences(expected, summary(tmp_path / "cut", *fit(tmp_path / "cut", setting, every=100)))


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # it interrupts what comes after the save
@pytest.mark.parametrize("background", [False, True])
def test_ctrl_c_pressed_over_and_over_during_a_save_does_not_damage_it(background: bool, tmp_path: Path) -> None:
    """A signal at every fifth call of the operating system, from the first one on."""
    how = {"checkpoint": lambda: {"background": background}}
    expected = summary(tmp_path / "whole", *fit(tmp_path / "whole", how, every=3, epochs=2, resume=None))
    for start in (2, 5):
        root, calls = tmp_path / str(start), [0]

        def profile(frame: Any, event: str, function: Any, calls: list[int] = calls, start: int = start) -> None:
            if getattr(function, "__name__", "") in IO_CALLS and "weft" in frame.f_code.co_filename:
                calls[0] += 1
                if calls[0] % 5 == start % 5:
                    os.kill(os.getpid(), signal.SIGINT)

        def strike(profile: Any = profile) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            sys.setprofile(profile)

        torch.manual_seed(0)
        FUSE.set(4, strike)
        with pytest.raises(KeyboardInterrupt):
            fit(root, how, every=3, epochs=2)
        sys.setprofile(None)
        assert calls[0] > 10
        state, path = checkpoints.load(root / "run")
        assert state["progress"]["step"] in (3, 4) and not list(path.parent.glob(".*"))
        FUSE.set(0)
        result, _ = fit(root, how, every=3, epochs=2)
        assert result.steps == expected["result"]["steps"]


@pytest.mark.long
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")
def test_a_damaged_package_in_the_cache_of_compiled_graphs_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path / "cache"))
    weights = []
    for keep in (None, 1000, 0):
        for path in (tmp_path / "cache").glob("*.so") if keep is not None else ():
            path.write_bytes(path.read_bytes()[:keep])
        problem = plain_problem()
        weft.Trainer(epochs=2, seed=1, compile=True, progress=False).fit(problem, plain_data())  # else: a warning
        weights.append([p.detach().clone() for p in problem.parameters()])
    assert all(map(torch.equal, weights[0], weights[1])) and all(map(torch.equal, weights[0], weights[2]))


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="needs an Apple GPU")
def test_random_numbers_of_an_apple_gpu_go_on_where_the_file_left_them(tmp_path: Path) -> None:
    archive.write(tmp_path / "r.ckpt", {"random": seeding.random_state()})
    expected = torch.rand(5, device="mps").cpu()
    seeding.set_random_state(archive.read(tmp_path / "r.ckpt")["random"])
    assert torch.equal(torch.rand(5, device="mps").cpu(), expected)


# ---- what modules keep -----------------------------------------------------------------------------------------------


def test_a_change_of_what_modules_keep_is_noticed_and_what_cannot_be_written_holds_nothing_up(tmp_path: Path) -> None:
    problem = plain_problem()
    problem.table, problem.rate = {n: "x" for n in range(10**5)}, float("nan")
    problem.mixed = {"a": [1, 2.0, True, None], "b": ({3}, "c")}
    problem.ring: list[Any] = []
    problem.ring.append(problem.ring)  # no end to it
    before = attributes(problem)
    assert changed_attributes(problem, before) == {}
    assert not any("ring" in name for name in before)
    problem.table[7] = "y"
    problem.mixed["a"][2] = 1  # equal to True, and another value
    found = changed_attributes(problem, before)
    assert found == {"table": problem.table, "mixed": problem.mixed}
    assert found["table"] is not problem.table and found["mixed"]["a"][2] is not True
    weft.Trainer(epochs=1, progress=False, root_dir=str(tmp_path), run_name="run", checkpoint=True).fit(
        problem, plain_data()
    )
    assert checkpoints.load(tmp_path / "run" / "checkpoints")[0]["module_state"] == {}
