"""The progress line: one line, now and then, of floats that are there."""

from __future__ import annotations

import io
import math
import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from weft.hooks.progress import PLAIN_SECONDS, REFRESH_SECONDS, ProgressLine, duration


class Clock:
    """Seconds that pass when told to; counts how often it is asked."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A text stream that says it is a terminal, and counts what is written."""

    def isatty(self) -> bool:
        return True


class NeverRead:
    """A loss that must not be looked at: reading it would wait for the device."""

    def __float__(self) -> float:
        raise AssertionError("the loss was read")

    item = __format__ = __repr__ = __float__  # type: ignore[assignment]


def a_trainer(num_epochs: int, is_global_zero: bool = True) -> Any:
    run = SimpleNamespace(
        progress=SimpleNamespace(step=0, epoch=0, last_epoch=num_epochs),
        best=SimpleNamespace(name="dev_loss", value=None, epoch=None),
        config=SimpleNamespace(train_metric="train_loss", dev_metric="dev_loss"),
        is_global_zero=is_global_zero,
    )
    return SimpleNamespace(run=run, current_epoch=0)


def drive(line: ProgressLine, clock: Clock, num_epochs: int, num_steps: int, step_seconds: float, **kwargs: Any) -> Any:
    """Call the events of a fit; the dev loss is best in epoch 1 and measured in every second epoch only."""
    trainer = kwargs.pop("trainer", None) or a_trainer(num_epochs)
    progress = trainer.run.progress
    line.on_fit_start(trainer)
    for epoch in range(num_epochs):
        trainer.current_epoch = progress.epoch
        for _ in range(num_steps):
            clock.now += step_seconds
            progress.step += 1
            line.on_step_end(trainer, None, NeverRead())
        metrics = {"train_loss": 1.0 / (epoch + 1), "train_f": 7.0}
        if epoch % 2:
            metrics["dev_loss"] = 2.0 + epoch
        if epoch == 1:
            trainer.run.best = SimpleNamespace(name="dev_loss", value=3.0, epoch=1)
        line.on_epoch_end(trainer, metrics)
        progress.epoch += 1
    line.on_fit_end(trainer, SimpleNamespace(stop_reason=kwargs.pop("reason", "epochs")))
    return trainer


def test_plain_lines_come_at_each_tenth_of_the_epochs() -> None:
    file, clock = io.StringIO(), Clock()
    drive(ProgressLine(file=file, clock=clock), clock, num_epochs=200, num_steps=5, step_seconds=0.001)
    lines = file.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == [f"{20 * i}/200" for i in range(1, 11)] + ["200/200"]
    assert "train_loss 0.05  dev_loss 21  best 3 (epoch 1)" in lines[0]
    assert "1,000 steps/s" in lines[0]
    assert "\x1b" not in file.getvalue() and "\r" not in file.getvalue()


def test_plain_lines_come_after_ten_seconds_of_a_long_epoch() -> None:
    file, clock = io.StringIO(), Clock()
    drive(ProgressLine(file=file, clock=clock), clock, num_epochs=1, num_steps=41, step_seconds=1.0)
    lines = file.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["0/1"] * 4 + ["1/1", "1/1"]
    assert "epoch 0/1  0:10  1 steps/s" in lines[0] and "0:41 < 0:00" in lines[4]


def test_few_epochs_give_a_line_each() -> None:
    file, clock = io.StringIO(), Clock()
    drive(ProgressLine(file=file, clock=clock), clock, num_epochs=3, num_steps=1, step_seconds=0.001)
    assert [line.split()[1] for line in file.getvalue().splitlines()] == ["1/3", "2/3", "3/3", "3/3"]


def test_time_left_is_what_the_epochs_so_far_took() -> None:
    file, clock = io.StringIO(), Clock()
    drive(ProgressLine(file=file, clock=clock), clock, num_epochs=10, num_steps=10, step_seconds=6.0)
    after_three = [line for line in file.getvalue().splitlines() if line.startswith("epoch 3/10")]
    assert "3:00 < 7:00" in after_three[0]


def test_a_terminal_is_redrawn_no_more_often_than_the_throttle_allows() -> None:
    file, clock = Terminal(), Clock()
    seconds = 1000 * 0.01
    drive(ProgressLine(file=file, clock=clock), clock, num_epochs=100, num_steps=10, step_seconds=0.01)
    drawings = file.getvalue().count("\x1b[2K")  # erase line: once a redraw
    assert 10 < drawings <= seconds / REFRESH_SECONDS + 5
    assert REFRESH_SECONDS >= 0.1 and PLAIN_SECONDS >= 10


def test_a_terminal_keeps_one_line_and_its_cursor() -> None:
    file, clock = Terminal(), Clock()
    before = (sys.stdout, sys.stderr)
    drive(ProgressLine(file=file, clock=clock), clock, num_epochs=50, num_steps=10, step_seconds=0.01)
    text = file.getvalue()
    assert (sys.stdout, sys.stderr) == before
    assert text.count("\n") == 1 and text.rstrip("\x1b[?25h").endswith("\n")
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")  # shown after it was hidden
    assert "epoch 50/50" in text.split("\x1b[2K")[-1]


def test_a_narrow_terminal_keeps_the_epoch_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    file, clock = Terminal(), Clock()
    drive(ProgressLine(file=file, clock=clock), clock, num_epochs=10, num_steps=10, step_seconds=0.1)
    drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue()).split("\r")
    assert any(line == "epoch 5/10 ━━━━━─────  0:05 < 0:05  tra…" for line in drawn), drawn
    assert max(len(line.rstrip("\n")) for line in drawn) == 40


def test_the_last_line_names_why_training_stopped() -> None:
    file, clock = io.StringIO(), Clock()
    drive(ProgressLine(file=file, clock=clock), clock, 4, 1, 0.5, reason="patience")
    assert file.getvalue().splitlines()[-1].endswith("2 steps/s  stopped: patience")
    file = io.StringIO()
    drive(ProgressLine(file=file, clock=clock), clock, 4, 1, 0.5)
    assert "stopped" not in file.getvalue()


def test_other_processes_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    drive(ProgressLine(clock=clock), clock, 5, 5, 1.0, trainer=a_trainer(5, is_global_zero=False))
    assert capsys.readouterr() == ("", "")


def test_the_line_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    drive(ProgressLine(clock=clock), clock, 5, 5, 1.0)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("epoch 1/5  0:05 < 0:20  train_loss 1  ")


def test_a_second_fit_opens_a_new_line_and_counts_on() -> None:
    file, clock = io.StringIO(), Clock()
    line = ProgressLine(file=file, clock=clock)
    trainer = drive(line, clock, 2, 1, 0.1)
    trainer.current_epoch, trainer.run.progress.last_epoch = 2, 4
    drive(line, clock, 2, 1, 0.1, trainer=trainer)
    assert [text.split()[1] for text in file.getvalue().splitlines()] == ["1/2", "2/2", "2/2", "3/4", "4/4", "4/4"]


def test_a_fit_that_never_began_its_first_epoch_closes_the_line() -> None:
    file, clock, trainer = Terminal(), Clock(), a_trainer(5)
    line = ProgressLine(file=file, clock=clock)
    line.on_fit_start(trainer)
    clock.now += 1.0
    line.on_fit_end(trainer, None)
    assert "epoch 0/5" in file.getvalue()
    line.on_fit_end(trainer, None)  # twice is harmless


def test_an_unknown_mode_is_an_error() -> None:
    with pytest.raises(ValueError, match="mode='bar'; expected one of"):
        ProgressLine("bar")  # type: ignore[arg-type]


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (61, "1:01"), (3599, "59:59"), (3661, "1:01:01")])
def test_durations_read_like_a_clock(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_nan_is_shown_as_nan() -> None:
    file, clock, trainer = io.StringIO(), Clock(), a_trainer(1)
    line = ProgressLine(file=file, clock=clock)
    line.on_fit_start(trainer)
    line.on_epoch_end(trainer, {"train_loss": math.nan})
    assert "train_loss nan" in file.getvalue()


def test_a_notebook_shows_one_output_that_is_updated() -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    code = """
from types import SimpleNamespace as NS
from weft.hooks.progress import ProgressLine
now = [0.0]
line = ProgressLine(clock=lambda: now[0])
run = NS(progress=NS(step=0, epoch=0, last_epoch=20), best=NS(name=None, value=None, epoch=None),
         config=NS(train_metric="train_loss", dev_metric="dev_loss"), is_global_zero=True)
trainer = NS(run=run, current_epoch=0)
line.on_fit_start(trainer)
for epoch in range(20):
    trainer.current_epoch = epoch
    now[0] += 1.0
    run.progress.step += 3
    line.on_epoch_end(trainer, {"train_loss": 0.5})
    run.progress.epoch += 1
line.on_fit_end(trainer, NS(stop_reason="epochs"))
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(notebook, timeout=60).execute()
    (output,) = notebook.cells[0].outputs
    assert output.output_type == "display_data"
    assert output.data["text/plain"] == "epoch 20/20  0:20  train_loss 0.5  3 steps/s"
