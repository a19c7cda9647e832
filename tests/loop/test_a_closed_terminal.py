"""Training goes on when nobody reads what it prints any more."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import weft
from tests.helpers.patience import patience
from tests.helpers.resuming import make_data, make_problem
from weft.loop.progress_line import ProgressLine

SCRIPT = """
import logging, os, pathlib, signal, sys, time, warnings, torch, weft
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup and disown do
go = pathlib.Path(sys.argv[1])
def wait(trainer, batch, loss):
    if trainer.global_step == 2:
        print("here", file=sys.stderr, flush=True)
        while not go.exists():
            time.sleep(0.02)
    if trainer.global_step > 4:
        warnings.warn("a warning")
        logging.getLogger("a").warning("a log line")
        print("a line of the user's", flush=True)
class M(torch.nn.Module):
    def __init__(self): super().__init__(); self.l = torch.nn.Linear(1, 1)
    def forward(self, b): return {"train_loss": self.l(b["x"]).square().mean()}
result = weft.Trainer(epochs=40, hooks={"on_step_end": wait}).fit(M(), {"x": torch.ones(4, 1)})
go.with_suffix(".done").write_text(str(result.epochs))
"""


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_a_closed_terminal_stops_no_training(kind: str, tmp_path: Path) -> None:
    source = str(Path(weft.__file__).parents[1])
    reader, writer = os.pipe() if kind == "pipe" else pty.openpty()
    job = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "go")],
        env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
        stdout=writer,
        stderr=writer,
        start_new_session=True,
    )
    os.close(writer)
    text = b""
    while not text.endswith((b"here\n", b"here\r\n")):  # the end of the line is a write of its own
        text += os.read(reader, 4096)
    os.close(reader)
    (tmp_path / "go").touch()
    assert job.wait(patience()) == 0
    assert (tmp_path / "go.done").read_text() == "40"


def test_a_line_whose_file_was_closed_goes_silent(tmp_path: Path) -> None:
    file = open(tmp_path / "line", "w")  # noqa: SIM115, closed on the way
    line = ProgressLine("plain", file=file)
    result = weft.Trainer(epochs=5, progress=False, hooks=[line, {"on_epoch_start": lambda t: file.close()}]).fit(
        make_problem(), make_data()
    )
    assert result.epochs == 5


def test_a_process_without_stderr_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert weft.Trainer(epochs=1).fit(make_problem(), make_data()).epochs == 1
