"""Training goes on when nobody reads what it prints any more."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

import weft
from tests.helpers.patience import patience
from tests.helpers.resuming import make_data, make_problem
from weft.loop.progress_line import ProgressLine

SCRIPT = """
import logging, os, pathlib, signal, sys, time, warnings, torch, weft
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup and disown do
go, progress, how = pathlib.Path(sys.argv[1]), sys.argv[2] == "progress", sys.argv[3]
def tell(*_):
    print("a line of the user's", flush=True)
    warnings.warn("a warning")
    logging.getLogger("a").warning("a log line")
def wait(trainer, batch, loss):
    if trainer.global_step == 2:
        print("here", file=sys.stderr, flush=True)
        while not go.exists():
            time.sleep(0.02)
    if trainer.global_step > 4:
        tell()
class M(torch.nn.Module):
    def __init__(self): super().__init__(); self.l = torch.nn.Linear(1, 1)
    def forward(self, b):
        if go.exists():
            print(b, flush=True)
        return {"train_loss": self.l(b["x"]).square().mean()}
hooks = [{"on_step_end": wait, "on_fit_end": tell}, weft.hooks.GradientNorms()]
trainer = weft.Trainer(epochs=40, hooks=hooks, progress="auto" if progress else False)
if how == "fit":
    result = trainer.fit(M(), {"x": torch.ones(4, 1)})
else:
    with trainer.start(M(), {"x": torch.ones(4, 1)}) as run:
        for epoch in run.epochs():
            for batch in run.batches():
                run.update(batch)
                print(epoch, flush=True) if go.exists() else None
    result = run.result
go.with_suffix(".done").write_text(str(result.epochs))
"""


def train_until_it_is_gone(folder: Path, reader: int, writer: int, progress: str = "progress", how: str = "fit") -> int:
    """The exit status of a training whose stdout and stderr are `writer`, of which `reader` is closed on the way."""
    job = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder / "go"), progress, how],
        env={**os.environ, "PYTHONPATH": str(Path(weft.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        stdout=writer,
        stderr=writer,
        start_new_session=True,
    )
    os.close(writer)
    text = b""
    while not text.endswith((b"here\n", b"here\r\n")):  # the end of the line is a write of its own
        text += os.read(reader, 4096)
    os.close(reader)
    (folder / "go").touch()
    return job.wait(patience())


@pytest.mark.parametrize(
    ("kind", "progress", "how"),
    [
        ("pipe", "silent", "fit"),
        ("terminal", "progress", "own loop"),
        *(
            pytest.param(kind, progress, how, marks=pytest.mark.long)
            for kind in ("pipe", "terminal")
            for progress in ("silent", "progress")
            for how in ("fit", "own loop")
        ),
    ],
)
def test_a_closed_terminal_stops_no_training(kind: str, progress: str, how: str, tmp_path: Path) -> None:
    reader, writer = os.pipe() if kind == "pipe" else pty.openpty()
    assert train_until_it_is_gone(tmp_path, reader, writer, progress, how) == 0
    assert (tmp_path / "go.done").read_text() == "40"


@pytest.mark.parametrize("progress", [False, "auto"])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_file_on_a_full_disk_stops_no_training(name: str, progress: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def tell(*_: Any) -> None:
        print("a line", file=getattr(sys, name), flush=True)

    full = io.TextIOWrapper(io.FileIO("/dev/full", "w"), write_through=True)
    monkeypatch.setattr(sys, name, full)
    hooks = {event: tell for event in ("on_fit_start", "on_step_end", "on_epoch_end", "on_fit_end")}
    data = make_data
    result = weft.Trainer(epochs=2, progress=progress, hooks=hooks).fit(make_problem(), lambda: tell() or data())
    assert result.epochs == 2 and getattr(sys, name) is full  # ours is taken away
    with pytest.raises(OSError, match="No space left"):  # from here on it is the script's own matter again
        tell()
    full.detach().close()


def test_a_text_that_cannot_be_written_is_still_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    hooks = {"on_epoch_end": lambda *_: print("\u00e9")}
    with pytest.raises(UnicodeEncodeError):
        weft.Trainer(epochs=1, progress=False, hooks=hooks).fit(make_problem(), make_data())


def test_a_stream_that_somebody_puts_in_the_place_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    other = io.StringIO()

    def swap(*_: Any) -> None:
        sys.stdout = other

    weft.Trainer(epochs=2, progress=False, hooks={"on_fit_start": swap, "on_epoch_end": lambda *_: print("x")}).fit(
        make_problem(), make_data()
    )
    assert sys.stdout is other and other.getvalue() == "x\nx\n"


def test_an_object_that_can_only_write_is_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tee:
        text = ""

        def write(self, text: str) -> None:
            self.text += text

    tee = Tee()
    monkeypatch.setattr(sys, "stderr", tee)
    result = weft.Trainer(epochs=2, hooks={"on_epoch_end": lambda *_: print("x", file=sys.stderr, flush=True)}).fit(
        make_problem(), make_data()
    )
    assert result.epochs == 2 and tee.text.count("x\n") == 2 and "epoch 2/2" in tee.text and sys.stderr is tee


def test_a_line_whose_file_was_closed_goes_silent(tmp_path: Path) -> None:
    file = open(tmp_path / "line", "w")  # noqa: SIM115, closed on the way
    line = ProgressLine("plain", file=file)
    result = weft.Trainer(epochs=5, progress=False, hooks=[line, {"on_epoch_start": lambda t: file.close()}]).fit(
        make_problem(), make_data()
    )
    assert result.epochs == 5


@pytest.mark.parametrize("progress", [False, "auto"])
def test_a_process_without_streams_trains(progress: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "stdout", None)
    hooks = {"on_step_end": lambda *_: print("a line")}
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        trainer = weft.Trainer(epochs=1, progress=progress, hooks=hooks)
        assert trainer.fit(make_problem(), make_data()).epochs == 1
        assert sys.stderr is None and sys.stdout is None
