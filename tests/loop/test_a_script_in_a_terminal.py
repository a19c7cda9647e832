"""Ctrl-C in a terminal, in the script of somebody's first ten minutes: what is shown, what is kept."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

import weft
from tests.helpers.terminals import read_terminal, start_in_terminal

OF_THE_FIRST_MINUTES = """
import torch
import weft

torch.manual_seed(0)
X = torch.rand(120, 2)
net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
problem = weft.Supervised(net, torch.nn.MSELoss(), metrics=["r2"])
trainer = weft.Trainer(epochs=EPOCHS, seed=0, checkpoint=CHECKPOINT, run_name=NAME)
data = weft.Data((X[20:], X[20:].prod(1)), dev=(X[:20], X[:20].prod(1)), batch_size=32)
try:
    result = trainer.fit(problem, data, resume=RESUME)
finally:
    print("kept", trainer.validate()["dev_loss"], trainer.run.result.best_metric, trainer.run.result.epochs)
"""


def written_script(folder: Path, epochs: int, checkpoint: bool) -> str:
    given = {"EPOCHS": epochs, "CHECKPOINT": checkpoint}
    given |= {"NAME": "first" if checkpoint else None, "RESUME": "auto" if checkpoint else None}
    text = OF_THE_FIRST_MINUTES
    for name, value in given.items():
        text = text.replace(name, repr(value))
    (folder / "first.py").write_text(text)
    return str(folder / "first.py")


def what_was_kept(shown: str) -> tuple[float, float, int]:
    found = re.search(r"kept (\S+) (\S+) (\d+)", shown)
    assert found is not None, shown[-1000:]
    return float(found[1]), float(found[2]), int(found[3])


@pytest.mark.parametrize("checkpoint", [False, pytest.param(True, marks=pytest.mark.long)])
def test_ctrl_c_shows_the_users_line_and_keeps_the_best_weights(
    checkpoint: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WEFT_TRACEBACK", raising=False)
    process, master = start_in_terminal(sys.executable, written_script(tmp_path, 1_000_000, checkpoint))
    shown = read_terminal(master, "epoch 9")  # or any that begins so
    os.write(master, b"\x03")
    shown += read_terminal(master, "\0")
    _, status = os.waitpid(process, 0)
    os.close(master)
    assert os.waitstatus_to_exitcode(status) != 0
    assert "stopped: interrupted" in shown and shown.rstrip().endswith("KeyboardInterrupt")
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is there again
    trace = shown[shown.index("Traceback (most recent call last)") :]
    assert "result = trainer.fit(problem, data" in trace and trace.count("  File ") <= 2
    now, best, epochs = what_was_kept(shown)
    assert now == pytest.approx(best, rel=1e-6) and epochs > 1
    assert (tmp_path / "runs").is_dir() == checkpoint
    if checkpoint:
        assert weft.load_result(tmp_path / "runs" / "first").stop_reason == "interrupted"
        process, master = start_in_terminal(sys.executable, written_script(tmp_path, epochs + 3, checkpoint))
        shown = read_terminal(master, "\0")
        _, status = os.waitpid(process, 0)
        os.close(master)
        assert os.waitstatus_to_exitcode(status) == 0 and what_was_kept(shown)[2] == epochs + 3
        assert len(weft.load_result(tmp_path / "runs" / "first").history["train_loss"]) == epochs + 3
