"""Two processes never write in one run folder: the second is told so, waits, or takes over from a dead one."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from tests.helpers.grouped import NoisyLine
from tests.helpers.patience import patience
from tests.helpers.twice import STARTED, epochs_of_train_loss, start_owner, start_twice, wait_for_file
from weft.config import TrainerConfig
from weft.records import folders, lease

pytestmark = pytest.mark.filterwarnings("ignore:Resuming")  # a fit goes on with what another script began


@pytest.fixture(autouse=True)
def nothing_is_held() -> Iterator[None]:
    yield
    for process in STARTED:
        if process.poll() is None:
            process.kill()
            process.communicate()
    STARTED.clear()
    for folder in list(lease._HELD):
        lease.release(folder)


def fit_named(root: Path, resume: Any = None, **options: Any) -> weft.FitResult:
    given: dict[str, Any] = {"epochs": 3, "root_dir": str(root), "run_name": "a", "checkpoint": True, "progress": False}
    given["optimizer"] = lambda params: torch.optim.SGD(params, lr=0.01)
    return weft.Trainer(**{**given, **options}).fit(NoisyLine(), {"x": torch.ones(4, 2)}, resume=resume)


def test_a_second_start_of_a_name_is_refused_and_costs_the_first_nothing(tmp_path: Path) -> None:
    first = start_owner(tmp_path, epochs=30, until=str(tmp_path / "go on"), sleep=0.0)
    wait_for_file(tmp_path / "a/checkpoints/last")
    for resume in (None, "auto", "last", str(tmp_path / "a"), str(tmp_path / "a/checkpoints")):
        with pytest.raises(lease.RunInUseError, match=f"a is in use by process {first.pid} on .*another run_name"):
            fit_named(tmp_path, resume)
    (tmp_path / "go on").touch()
    told, errors = first.communicate(timeout=patience())
    assert first.returncode == 0, errors
    assert told.split()[-1] == "30" and epochs_of_train_loss(tmp_path / "a") == [str(epoch) for epoch in range(30)]
    assert not (tmp_path / "a/old").exists() and weft.load_result(tmp_path / "a").epochs == 30
    assert fit_named(tmp_path, "last", epochs=31).epochs == 31  # and now it is free


def test_the_run_of_a_killed_process_is_taken_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = start_owner(tmp_path, epochs=10**6)
    wait_for_file(tmp_path / "a/checkpoints/last")
    first.kill()
    first.communicate()
    assert fit_named(tmp_path, "auto", seed=1, max_steps=10**6, epochs=1).epochs >= 1
    assert f"belonged to process {first.pid} on" in caplog.text and "ended without a word" in caplog.text


def test_auto_without_a_name_takes_no_run_that_is_alive(tmp_path: Path) -> None:
    first = start_owner(tmp_path, epochs=10**6)
    wait_for_file(tmp_path / "a/checkpoints/last")
    result = fit_named(tmp_path, "auto", run_name=None)
    assert result.run_dir is not None and result.run_dir.name != "a" and result.epochs == 3
    again = fit_named(tmp_path, "auto", run_name=None, epochs=5)
    assert again.run_dir == result.run_dir and again.epochs == 5  # the newest that is free
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=patience())
    assert first.returncode == 143


def test_of_two_that_start_at_once_one_trains_and_the_other_is_told(tmp_path: Path) -> None:
    both = [start_owner(tmp_path, seed, sleep=0.1) for seed in (1, 2)]
    told = [process.communicate(timeout=patience()) for process in both]
    codes = sorted(process.returncode for process in both)
    if codes == [0, 0]:  # one began after the other had ended
        assert (tmp_path / "a/old/1/result.json").exists()
    else:
        assert codes == [0, 1] and "is in use by process" in "".join(errors for _, errors in told)
    assert epochs_of_train_loss(tmp_path / "a") == [str(epoch) for epoch in range(20)]


def foreign_lease(folder: Path, **told: Any) -> Path:
    """A lease of another process, by default one that lives on another machine."""
    path = folder / ".owner/000001.json"
    path.parent.mkdir(parents=True)
    there = {"host": "elsewhere", "boot": "b", "space": "s", "pid": 1, "began": "1", "since": "today", "restarts": 0}
    path.write_text(json.dumps({**there, **told}))
    return path


def test_an_owner_on_another_machine_is_dead_after_a_silence(tmp_path: Path) -> None:
    path = foreign_lease(tmp_path)
    with pytest.raises(lease.RunInUseError, match="process 1 on elsewhere.*after 120 s without a sign of life"):
        lease.acquire(tmp_path)
    os.utime(path, (time.time() + 10**6, time.time() + 10**6))  # a clock was wrong
    assert lease.owner(tmp_path) is None
    os.utime(path, (time.time() - 200, time.time() - 200))
    lease.acquire(tmp_path)
    assert lease.owner(tmp_path) is not None


def test_auto_waits_until_it_is_known_whether_the_owner_is_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "SILENT_SECONDS", 1.0)
    dead = foreign_lease(tmp_path / "dead")
    lease.acquire(dead.parents[1], wait=True)
    alive, over = foreign_lease(tmp_path / "alive"), threading.Event()

    def beat() -> None:
        while not over.wait(0.05):
            os.utime(alive)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(lease.RunInUseError):
            lease.acquire(alive.parents[1], wait=True)
    finally:
        over.set()
        thread.join()


def test_a_requeued_job_takes_over_from_itself_and_waits_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    foreign_lease(tmp_path / "own", job="77", restarts=0)
    with pytest.raises(lease.RunInUseError):  # as long as it was not put back
        lease.acquire(tmp_path / "own")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    lease.acquire(tmp_path / "own")
    other = foreign_lease(tmp_path / "other", job="76")
    threading.Timer(0.5, lambda: other.write_text(json.dumps({"released": True}))).start()
    lease.acquire(tmp_path / "other", wait=True)


def test_in_a_job_array_auto_takes_only_what_this_task_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    first = fit_named(tmp_path, "auto", run_name=None)
    monkeypatch.setenv("SLURM_JOB_ID", "6")
    second = fit_named(tmp_path, "auto", run_name=None)
    assert first.run_dir != second.run_dir
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    assert fit_named(tmp_path, "auto", run_name=None, epochs=4).run_dir == first.run_dir


def test_who_was_taken_over_writes_nothing_more(tmp_path: Path) -> None:
    def lose(trainer: Any, metrics: Any) -> None:
        if trainer.current_epoch == 1:
            newest = max((tmp_path / "a/.owner").glob("*.json"))
            lease._next(newest).write_text(json.dumps({"pid": 5, "host": "elsewhere"}))

    with pytest.raises(lease.RunInUseError, match="taken over by process 5 on elsewhere"):
        fit_named(tmp_path, hooks={"on_epoch_end": lose}, checkpoint={"every_n_epochs": 1, "best": False})
    assert not (tmp_path / "a/result.json").exists()
    assert [path.name for path in (tmp_path / "a/checkpoints").glob("step-*")] == ["step-000000001.ckpt"]


def test_who_was_taken_over_logs_nothing_more(tmp_path: Path) -> None:
    def lose(trainer: Any, batch: Any, loss: Any) -> None:
        if trainer.global_step == 2:
            newest = max((tmp_path / "a/.owner").glob("*.json"))
            lease._next(newest).write_text(json.dumps({"pid": 5, "host": "elsewhere"}))

    with pytest.raises(lease.RunInUseError, match="taken over by process 5 on elsewhere"):
        fit_named(tmp_path, hooks={"on_step_end": lose}, log_every=1, checkpoint=False)
    assert "train_loss_step" in (tmp_path / "a/metrics.csv").read_text()  # of the step before
    assert not [row for row in (tmp_path / "a/metrics.csv").read_text().splitlines() if row.startswith("2,")]


def test_a_folder_that_is_moved_while_its_run_is_at_work_is_named(tmp_path: Path) -> None:
    def move(trainer: Any, metrics: Any) -> None:
        (tmp_path / "a").rename(tmp_path / "b")

    with pytest.raises(lease.RunInUseError, match="/a was moved or deleted while its run was at work"):
        fit_named(tmp_path, hooks={"on_epoch_end": move})
    assert fit_named(tmp_path, "auto", run_name="b").epochs == 3


def test_a_lease_that_could_not_be_written_is_nobodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*paths: Any) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
        patch.setattr(os, "replace", fail)
        lease.acquire(tmp_path)
    assert lease.owner(tmp_path) is None and not lease._HELD
    lease.acquire(tmp_path)


def test_a_start_that_was_given_up_is_no_owner_of_its_own_process(tmp_path: Path) -> None:
    fit_named(tmp_path)
    trainer = weft.Trainer(
        epochs=5,
        root_dir=str(tmp_path),
        run_name="a",
        checkpoint=True,
        progress=False,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.01),
    )
    for _ in range(2):
        run = trainer.start(NoisyLine(), {"x": torch.ones(4, 2)}, resume="last")
    with run, pytest.raises(lease.RunInUseError):
        fit_named(tmp_path)


def test_folders_without_a_name_are_made_once_each(tmp_path: Path) -> None:
    found: list[Path | None] = []
    config, options = TrainerConfig(root_dir=str(tmp_path)), {"loggers": [], "profiler": None}
    threads = [threading.Thread(target=lambda: found.append(folders.new_folder(config, options))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 8


@pytest.mark.parametrize("content", ["", "[1]", "[" * 5000, '{"pid": "x", "host": 3}', "\x00\xff"])
def test_a_damaged_lease_counts_as_a_process_that_is_not_named(content: str, tmp_path: Path) -> None:
    path = foreign_lease(tmp_path)
    path.write_text(content, encoding="latin-1")
    with pytest.raises(lease.RunInUseError, match="in use by (a process that is not named|process x)"):
        lease.acquire(tmp_path)
    os.utime(path, (time.time() - 200, time.time() - 200))
    lease.acquire(tmp_path)


@pytest.mark.parametrize("size", [1, pytest.param(200, marks=pytest.mark.long)])
def test_double_starts_at_random_moments_mix_no_files_and_lose_no_result(size: int, tmp_path: Path) -> None:
    draw = random.Random(3)
    found = [start_twice(tmp_path / str(number), draw) for number in range(size)]
    assert not any(found), [wrong for wrong in found if wrong]
