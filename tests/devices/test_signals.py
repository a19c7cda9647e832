"""Signals end a run between two steps: saved, with the right exit status, and resumed bit for bit."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from tests.helpers.bitwise import same
from tests.helpers.crashes import IO_CALLS, in_child
from tests.helpers.patience import patience
from tests.helpers.resuming import FUSE, SETTINGS, differences, fit, last_state, make_data, make_problem, summary
from weft.checkpoint import folder as checkpoints
from weft.devices.requeue import requeue
from weft.devices.signals import SIGNALS, SignalExit

EXIT = {"SIGTERM": 143, "SIGUSR1": 138}


def send(name: str, times: int = 1) -> Any:
    def act() -> None:
        for _ in range(times):
            os.kill(os.getpid(), getattr(signal, name))

    return act


@pytest.fixture(autouse=True)
def handlers_are_put_back() -> Iterator[None]:
    FUSE.set(0)
    torch.manual_seed(1)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_stops_after_the_step_saves_and_is_resumed_bitwise(
    name: str, background: bool, tmp_path: Path
) -> None:
    setting: dict[str, Any] = {"checkpoint": lambda: {"background": background}}
    expected = summary(tmp_path / "whole", *fit(tmp_path / "whole", setting, every=100))
    torch.manual_seed(1)
    for calls, step in ((9, 9), (3, 12)):  # in the middle of an epoch, and in its last step
        FUSE.set(calls, send(name))
        with pytest.raises(KeyboardInterrupt if name == "SIGINT" else SystemExit) as caught:
            fit(tmp_path / "cut", setting, every=100)
        if name != "SIGINT":
            assert caught.value.code == EXIT[name] and isinstance(caught.value, SignalExit)
        state = last_state(tmp_path / "cut")
        assert state["progress"]["step"] == step and state["progress"]["batch"] == (step - 1) % 6 + 1
        torch.manual_seed(77)
    assert weft.load_result(tmp_path / "cut/run").stop_reason == "interrupted"
    FUSE.set(0)
    found = summary(tmp_path / "cut", *fit(tmp_path / "cut", setting, every=100))
    assert not differences(expected, found), differences(expected, found)[:8]


def test_a_signal_during_the_evaluation_stops_after_the_epoch(tmp_path: Path) -> None:
    def strike(trainer: Any) -> None:
        if trainer.current_epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        fit(tmp_path, {"hooks": lambda: {"on_validation_start": strike}}, every=100)
    progress = last_state(tmp_path)["progress"]
    assert (progress["step"], progress["epoch"], progress["batch"]) == (12, 2, 0)


def test_a_process_that_is_terminated_ends_with_143(tmp_path: Path) -> None:
    def body() -> None:
        FUSE.set(4, send("SIGTERM"))
        try:
            fit(tmp_path, {})
        except SystemExit as leave:
            os._exit(leave.code)  # what the interpreter does with it

    assert in_child(body) == 143 and last_state(tmp_path)["progress"]["step"] == 4


def test_without_checkpoints_a_signal_still_ends_the_run_between_steps() -> None:
    FUSE.set(4, send("SIGTERM"))
    problem, trainer = make_problem(), weft.Trainer(epochs=2, progress=False)
    with pytest.raises(SystemExit):
        trainer.fit(problem, make_data())
    assert trainer.run is not None and trainer.run.result is not None
    assert trainer.run.result.stop_reason == "interrupted" and trainer.global_step == 4


def test_ctrl_c_puts_the_best_weights_back_and_is_raised_again_in_a_script(tmp_path: Path) -> None:
    problem = make_problem()
    trainer = weft.Trainer(epochs=9, progress=False, optimizer=lambda p: torch.optim.SGD(p, lr=0.3))
    FUSE.set(45, send("SIGINT"))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(problem, make_data())
    run = trainer.run
    assert run is not None and run.result is not None and run.best.weights is not None
    assert run.result.stop_reason == "interrupted" and run.result.steps == 45
    assert same(dict(problem.state_dict()), run.best.weights.state_dict())
    assert not same(dict(problem.state_dict()), dict(run.result.last_weights))
    result = trainer.fit(problem, make_data())  # goes on with what was left
    assert result.epochs == 9


def test_in_an_interactive_interpreter_ctrl_c_gives_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    FUSE.set(4, send("SIGINT"))
    result = weft.Trainer(epochs=2, progress=False).fit(make_problem(), make_data())
    assert result.stop_reason == "interrupted" and result.steps == 4


def test_a_second_ctrl_c_in_a_step_interrupts_at_once(tmp_path: Path) -> None:
    FUSE.set(9, send("SIGINT", times=2))
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, {})
    assert last_state(tmp_path)["progress"]["step"] == 8  # the torn step is not saved


def test_a_second_ctrl_c_during_the_save_does_not_damage_it(tmp_path: Path) -> None:
    for number in range(1, 60, 7):
        root, moments = tmp_path / str(number), [0]

        def profile(frame: Any, event: str, function: Any, number: int = number, moments: list[int] = moments) -> None:
            is_open = bool(moments[0]) or (
                getattr(function, "__name__", "") == "open" and "weft" in frame.f_code.co_filename
            )
            if is_open and getattr(function, "__name__", "") in IO_CALLS:
                moments[0] += 1
                if moments[0] == number:
                    os.kill(os.getpid(), signal.SIGINT)

        def strike(profile: Any = profile) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            sys.setprofile(profile)  # the next files to be opened are those of the save

        FUSE.set(4, strike)
        with pytest.raises(KeyboardInterrupt):
            fit(root, {}, every=100, epochs=1)
        sys.setprofile(None)
        assert moments[0] > 40
        state, path = checkpoints.load(root / "run")
        assert state["progress"]["step"] == 4 and path.name == "step-000000004.ckpt"
        assert not list((root / "run/checkpoints").glob(".*"))
        FUSE.set(0)
        assert fit(root, {}, every=100, epochs=1)[0].steps == 6


def test_sigterm_goes_before_ctrl_c(tmp_path: Path) -> None:
    for order in (("SIGTERM", "SIGINT"), ("SIGINT", "SIGTERM")):
        FUSE.set(4, lambda order=order: [os.kill(os.getpid(), getattr(signal, name)) for name in order])
        with pytest.raises(SystemExit):
            fit(tmp_path / order[0], {})


@pytest.mark.parametrize("fails", [False, True])
def test_slurm_puts_the_job_back_after_it_was_saved(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin/scontrol"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nls {tmp_path}/run/checkpoints >> {tmp_path}/calls\n'
        + ("echo 'slurm_requeue error: Requeue disabled' >&2; exit 1\n" if fails else "")
    )
    script.chmod(0o755)
    with monkeypatch.context() as environment:
        environment.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
        environment.setenv("SLURM_JOB_ID", "4711")
        FUSE.set(4, send("SIGUSR1"))
        if fails:
            with (
                pytest.raises(SystemExit),
                pytest.warns(UserWarning, match="4711 was not requeued: .*Requeue disabled"),
            ):
                fit(tmp_path, {}, every=100)
        else:
            with pytest.raises(SystemExit):
                fit(tmp_path, {}, every=100)
        calls = (tmp_path / "calls").read_text()
        assert calls.startswith("requeue 4711\n") and "step-000000004.ckpt" in calls  # it was there by then
        environment.setenv("SLURM_ARRAY_JOB_ID", "12")
        environment.setenv("SLURM_ARRAY_TASK_ID", "3")
        requeue(signal.SIGUSR1, is_saved=True) if not fails else None
        assert fails or "requeue 12_3" in (tmp_path / "calls").read_text()
        FUSE.set(2, send("SIGUSR1"))
        with pytest.raises(SystemExit), pytest.warns(UserWarning, match="not requeued: it writes no checkpoints"):
            weft.Trainer(epochs=1, progress=False).fit(make_problem(), make_data())
        (tmp_path / "calls").unlink()
        FUSE.set(2, send("SIGTERM"))  # the job was cancelled: it must not come back
        with pytest.raises(SystemExit):
            fit(tmp_path, {}, every=100)
        assert "requeue" not in (tmp_path / "calls").read_text()


def test_a_handler_of_ones_own_stays_in_force(tmp_path: Path) -> None:
    got = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: got.append(number))
    try:
        FUSE.set(4, send("SIGUSR1"))
        result, _ = fit(tmp_path, {}, epochs=1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert got == [signal.SIGUSR1] and result.steps == 6


def test_in_another_thread_training_works_without_handlers(tmp_path: Path) -> None:
    results = []
    thread = threading.Thread(target=lambda: results.append(fit(tmp_path, {}, epochs=1)[0]))
    thread.start()
    thread.join()
    assert results[0].steps == 6


def _sleep() -> None:
    threading.Event().wait()


def test_processes_that_training_forks_can_still_be_terminated(tmp_path: Path) -> None:
    """Else the pools of a dataset would hang when they are closed."""
    codes = []

    def fork(trainer: Any) -> None:
        child = multiprocessing.get_context("fork").Process(target=_sleep)
        child.start()
        child.terminate()
        child.join(patience())
        codes.append(child.exitcode)

    fit(tmp_path, {"hooks": lambda: {"on_epoch_start": fork}}, epochs=1)
    assert codes == [-signal.SIGTERM]


def test_a_fit_within_a_fit_is_ended_too(tmp_path: Path) -> None:
    inner: list[Any] = []

    def train_another(trainer: Any) -> None:
        FUSE.set(3, send("SIGTERM"))
        inner.append(weft.Trainer(epochs=5, progress=False))
        inner[0].fit(make_problem(), make_data())

    with pytest.raises(SystemExit):
        fit(tmp_path, {"hooks": lambda: {"on_epoch_start": train_another}})
    assert inner[0].global_step == 3


def test_workers_of_a_loader_do_not_disturb_the_stop(tmp_path: Path) -> None:
    FUSE.set(9, send("SIGTERM"))
    with pytest.raises(SystemExit):
        fit(tmp_path, SETTINGS["loader, workers"])
    assert last_state(tmp_path)["progress"]["step"] == 9
