"""The progress line: one line, now and then, of floats that are there."""

from __future__ import annotations

import io
import math
import re
import sys
from typing import Any

import pytest
import torch

import weft
from tests.helpers.problems import Clock
from weft.loop.progress_line import PLAIN_SECONDS, REFRESH_SECONDS, ProgressLine, duration


class Terminal(io.StringIO):
    """A text stream that says it is a terminal, and counts what is written."""

    def isatty(self) -> bool:
        return True


class NeverRead:
    """A loss that must not be looked at: reading it would wait for the device."""

    def __float__(self) -> float:
        raise AssertionError("the loss was read")

    item = __format__ = __repr__ = __float__  # type: ignore[assignment]


class ScriptedByEpoch(torch.nn.Module):
    """A problem whose train loss is 1 / (epoch + 1) and whose dev loss is 2 + epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        value = 1 / (batch["epoch"] + 1) if batch["name"] == "train" else 2.0 + batch["epoch"]
        return {f"{batch['name']}_loss": value + 0.0 * self.weight.sum()}


def a_trainer(line: ProgressLine, clock: Clock, num_epochs: int, step_seconds: float, **options: Any) -> weft.Trainer:
    """A trainer whose steps take `step_seconds`; the line gets a loss that must not be read."""

    def on_step_end(trainer: weft.Trainer, batch: Any, loss: torch.Tensor) -> None:
        clock.now += step_seconds
        line.on_step_end(trainer, batch, NeverRead())

    names = ("on_fit_start", "on_epoch_end", "on_fit_end")
    hooks = {"on_step_end": on_step_end, **{name: getattr(line, name) for name in names}}
    return weft.Trainer(epochs=num_epochs, hooks=hooks, progress=False, validate_every=2, **options)


def drive_line(
    line: ProgressLine, clock: Clock, num_epochs: int, num_steps: int, step_seconds: float, **options: Any
) -> weft.Trainer:
    """A fit with `num_steps` steps an epoch. The dev loss is best in epoch 1, the first that is validated."""
    trainer = a_trainer(line, clock, num_epochs, step_seconds, **options)
    trainer.fit(ScriptedByEpoch(), one_row_batches(num_steps))
    return trainer


def one_row_batches(num_steps: int) -> weft.Data:
    rows = torch.zeros(num_steps, 1)
    return weft.Data(weft.DictDataset({"p": rows}), weft.DictDataset({"p": rows}), batch_size=1)


def test_plain_lines_come_at_each_tenth_of_the_epochs() -> None:
    file, clock = io.StringIO(), Clock()
    drive_line(ProgressLine(file=file, clock=clock), clock, num_epochs=200, num_steps=5, step_seconds=0.001)
    lines = file.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == [f"{20 * i}/200" for i in range(1, 11)]
    assert "train_loss 0.05  dev_loss 21  best 3 (epoch 1)" in lines[0]
    assert "1,000 steps/s" in lines[0]
    assert "\x1b" not in file.getvalue() and "\r" not in file.getvalue()


def test_plain_lines_come_after_ten_seconds_of_a_long_epoch() -> None:
    file, clock = io.StringIO(), Clock()
    drive_line(ProgressLine(file=file, clock=clock), clock, num_epochs=1, num_steps=41, step_seconds=1.0)
    lines = file.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["0/1"] * 4 + ["1/1"]
    assert lines[0] == "epoch 0/1  0:10  1 steps/s" and lines[4].startswith("epoch 1/1  0:41  train_loss 1  dev_loss 2")


def test_few_epochs_give_a_line_each() -> None:
    file, clock = io.StringIO(), Clock()
    drive_line(ProgressLine(file=file, clock=clock), clock, num_epochs=3, num_steps=1, step_seconds=0.001)
    assert [line.split()[1] for line in file.getvalue().splitlines()] == ["1/3", "2/3", "3/3"]


def test_time_left_is_what_the_epochs_so_far_took() -> None:
    file, clock = io.StringIO(), Clock()
    drive_line(ProgressLine(file=file, clock=clock), clock, num_epochs=10, num_steps=10, step_seconds=6.0)
    after_three = [line for line in file.getvalue().splitlines() if line.startswith("epoch 3/10")]
    assert "3:00 < 7:00" in after_three[0]


def test_a_terminal_is_redrawn_no_more_often_than_the_throttle_allows() -> None:
    file, clock = Terminal(), Clock()
    seconds = 1000 * 0.01
    drive_line(ProgressLine(file=file, clock=clock), clock, num_epochs=100, num_steps=10, step_seconds=0.01)
    drawings = file.getvalue().count("\x1b[2K")  # erase line: once a redraw
    assert 10 < drawings <= seconds / REFRESH_SECONDS + 5
    assert REFRESH_SECONDS >= 0.1 and PLAIN_SECONDS >= 10


def test_a_terminal_keeps_one_line_and_its_cursor() -> None:
    file, clock = Terminal(), Clock()
    before = (sys.stdout, sys.stderr)
    drive_line(ProgressLine(file=file, clock=clock), clock, num_epochs=50, num_steps=10, step_seconds=0.01)
    text = file.getvalue()
    assert (sys.stdout, sys.stderr) == before
    assert text.count("\n") == 1 and text.rstrip("\x1b[?25h").endswith("\n")
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")  # shown after it was hidden
    assert "epoch 50/50" in text.split("\x1b[2K")[-1]


def test_a_narrow_terminal_keeps_the_epoch_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    file, clock = Terminal(), Clock()
    drive_line(ProgressLine(file=file, clock=clock), clock, num_epochs=10, num_steps=10, step_seconds=0.1)
    drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue()).split("\r")
    assert any(line == "epoch 5/10 ━━━━━─────  0:05 < 0:05  tra…" for line in drawn), drawn
    assert max(len(line.rstrip("\n")) for line in drawn) == 40


def test_the_last_line_names_why_training_stopped() -> None:
    file, clock = io.StringIO(), Clock()
    drive_line(ProgressLine(file=file, clock=clock), clock, 4, 1, 0.5, max_steps=2)
    assert file.getvalue().splitlines()[-1].endswith("2 steps/s  stopped: max_steps")
    file = io.StringIO()
    drive_line(ProgressLine(file=file, clock=clock), clock, 4, 1, 0.5)
    assert "stopped" not in file.getvalue()


def test_other_processes_are_silent(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weft.Run, "is_global_zero", property(lambda run: False))
    clock = Clock()
    drive_line(ProgressLine(clock=clock), clock, 5, 5, 1.0)
    assert capsys.readouterr() == ("", "")


def test_progress_false_is_silent_and_the_default_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    weft.Trainer(epochs=2, progress=False).fit(ScriptedByEpoch(), one_row_batches(1))
    assert capsys.readouterr() == ("", "")
    weft.Trainer(epochs=2).fit(ScriptedByEpoch(), one_row_batches(1))
    out, err = capsys.readouterr()
    assert out == "" and "epoch 2/2" in err


def test_the_line_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    drive_line(ProgressLine(clock=clock), clock, 5, 5, 1.0)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("epoch 1/5  0:05 < 0:20  train_loss 1  ")


def test_a_second_fit_opens_a_new_line_and_counts_on() -> None:
    file, clock, problem = io.StringIO(), Clock(), ScriptedByEpoch()
    trainer = a_trainer(ProgressLine(file=file, clock=clock), clock, 2, 0.1)
    trainer.fit(problem, one_row_batches(1))
    trainer.fit(problem, one_row_batches(1))
    assert [text.split()[1] for text in file.getvalue().splitlines()] == ["1/2", "2/2", "3/4", "4/4"]


def test_a_fit_that_fails_closes_the_line() -> None:
    def fail(trainer: Any, batch: Any) -> None:
        raise OSError("planted")

    file, clock = Terminal(), Clock()
    before = (sys.stdout, sys.stderr)
    with pytest.raises(OSError, match="planted"):
        drive_line(ProgressLine(file=file, clock=clock), clock, 5, 1, 0.1, training_step=fail)
    assert (sys.stdout, sys.stderr) == before
    assert "epoch 0/5  0:00  stopped: error" in file.getvalue()


def test_an_unknown_mode_is_an_error() -> None:
    with pytest.raises(ValueError, match="mode='bar'; expected one of"):
        ProgressLine("bar")  # type: ignore[arg-type]


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (61, "1:01"), (3599, "59:59"), (3661, "1:01:01")])
def test_durations_read_like_a_clock(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_nan_is_shown_as_nan() -> None:
    file, clock = io.StringIO(), Clock()
    step = {"validation_step": lambda trainer, batch: torch.tensor(math.nan)}
    with pytest.warns(UserWarning, match="dev_loss, which is monitored, was not finite"):
        drive_line(ProgressLine(file=file, clock=clock), clock, 1, 1, 1.0, **step)
    assert file.getvalue() == "epoch 1/1  0:01  train_loss 1  dev_loss nan  1 steps/s\n"


def test_a_notebook_shows_one_output_that_is_updated() -> None:
    pytest.importorskip("nbclient")
    from tests.helpers.notebooks import run_notebook

    code = """
import torch, weft
p = torch.linspace(-1, 1, 8)[:, None]
problem = weft.Problem([weft.Node(torch.nn.Linear(1, 1), ["p"], ["x"])], objectives=[weft.objective(lambda x: x**2)])
result = weft.Trainer(epochs=20).fit(problem, weft.DictDataset({"p": p}))
"""
    notebook = run_notebook(code)
    (output,) = notebook.cells[0].outputs
    assert output.output_type == "display_data"
    assert re.match(r"epoch 20/20  \d+:\d\d  train_loss \S+  best \S+ \(epoch 19\)", output.data["text/plain"])


def test_something_slow_is_told_and_counts_neither_as_speed_nor_for_what_is_left() -> None:
    file, clock = io.StringIO(), Clock()
    line = ProgressLine(file=file, clock=clock)

    def compiles(trainer: weft.Trainer, batch: Any) -> None:
        if trainer.global_step == 1:
            state = trainer.running.state
            state.hooks.hooks.append(line)  # as it is among the hooks where the option asks for it
            with state.telling("compiling the update"):
                clock.now += 50.0

    trainer = a_trainer(line, clock, num_epochs=10, step_seconds=6.0)
    trainer.hooks.append({"on_step_start": compiles})
    trainer.fit(ScriptedByEpoch(), one_row_batches(10))
    told = file.getvalue().splitlines()
    at = next(i for i, text in enumerate(told) if "compiling" in text)
    assert told[at].endswith("0:06  compiling the update ...") and told[at + 1].endswith(
        "0:56  compiling the update: 50 s"
    )
    after_one = next(text for text in told if text.startswith("epoch 1/10"))
    assert "1:50 < 9:00" in after_one  # nine epochs of a minute are left, though 1:50 have passed


def test_a_plain_log_shows_no_line_of_something_slow_where_nobody_listens() -> None:
    trainer = weft.Trainer(epochs=1, progress=False)
    trainer.fit(ScriptedByEpoch(), one_row_batches(1))
    with trainer.running.state.telling("compiling the update"):
        pass
