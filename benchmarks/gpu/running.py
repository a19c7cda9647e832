"""Checks in processes of their own, each within its time; what they find is written down as it comes."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.gpu.checks import Check
from benchmarks.gpu.rows import FAILED, MISSED, NOT_RUN, Row

ROOT = Path(__file__).resolve().parents[2]
MODULE = "benchmarks.gpu.worker"
STARTING = 90.0  # seconds to import torch and to start the device


class Found:
    """The table so far; `say` is given each line, and the files `out`.json and `out`.md always hold all of it."""

    def __init__(self, out: Path | None, say: Callable[[str], None]) -> None:
        self.out, self.say, self.about = out, say, dict[str, str]()
        self.rows: list[dict[str, Any]] = []
        self.seconds: dict[str, float] = {}

    def add(self, check: str, row: Row) -> None:
        """One more line."""
        self.rows.append({"check": check, **row._asdict()})
        bar = f" (bar: {row.bar})" if row.bar else ""
        self.say(f"{row.verdict:>7}  {check:<12}  {row.what}: {row.found}{bar}")
        self.write()

    @property
    def is_accepted(self) -> bool:
        """Whether no bar was missed, and all was done."""
        return bool(self.rows) and not any(row["verdict"] in (MISSED, FAILED, NOT_RUN) for row in self.rows)

    def write(self) -> None:
        """Both files anew: who is stopped has what was found until then."""
        if self.out is None:
            return
        self.out.parent.mkdir(parents=True, exist_ok=True)
        content = {"about": self.about, "seconds": self.seconds, "rows": self.rows}
        self.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        self.out.with_suffix(".md").write_text(markdown(content), encoding="utf-8")


def markdown(content: dict[str, Any]) -> str:
    """The table with its surroundings, of what the JSON file holds."""
    about = "\n".join(f"- {name}: {value}" for name, value in content["about"].items())
    whole = sum(content["seconds"].values())
    return f"# On a GPU\n\n{about}\n\n{table(content['rows'])}\n\nAll of it took {whole:.0f} s (`make gpu`).\n"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| | found | bar | |", "|---|---|---|---|"]
    cells = ([row[key].replace("|", "\\|").replace("\n", " ") for key in ("what", "found", "bar")] for row in rows)
    return "\n".join(lines + [f"| {' | '.join(c)} | {row['verdict']} |" for c, row in zip(cells, rows, strict=True)])


def run(checks: Sequence[Check], found: Found, device: str, size: str, folder: Path, minutes: float) -> None:
    """Do the checks. One that crashes or runs out of its time is told as such, and the next ones go on."""
    left, ends, starts = list(checks), time.monotonic() + 60 * minutes, 0
    while left and (remaining := ends - time.monotonic()) > 0:
        starts += 1
        if starts > len(checks) + 2:
            break
        with worker(left, device, size, folder) as lines:
            _follow(lines, left, found, min(STARTING, remaining), ends)
    for check in left:
        found.add(check.name, Row(check.what, "the time was up", check.bar, NOT_RUN))


def _follow(lines: Iterator[Any], left: list[Check], found: Found, starting: float, ends: float) -> None:
    """Take what one process tells, and take what it has done from `left`, until it ends or its time is up."""
    due, current, began = time.monotonic() + starting, None, 0.0
    while left:
        told = lines.send(due) if due > time.monotonic() else "the time was up"
        if isinstance(told, str):  # why no more comes
            if current is not None:
                left.remove(current)
                found.add(current.name, Row(current.what, told, current.bar, FAILED))
            return
        if "about" in told:
            found.about = told["about"]
            found.write()
        elif "begin" in told:
            current, began = next(check for check in left if check.name == told["begin"]), time.monotonic()
            due = min(began + current.limit, ends)
        elif "row" in told and current is not None:
            found.add(current.name, Row(**told["row"]))
        elif "end" in told and current is not None:
            found.seconds[current.name] = round(time.monotonic() - began, 1)
            if told["error"]:
                found.add(current.name, Row(current.what, _short(told["error"]), current.bar, FAILED))
            left.remove(current)
            current, due = None, min(time.monotonic() + STARTING, ends)


def _short(error: str) -> str:
    return error.strip().splitlines()[0][:300]


@contextmanager
def worker(checks: Sequence[Check], device: str, size: str, folder: Path) -> Iterator[Any]:
    """A process that does `checks`. Within, `lines.send(due)` gives what it tells next, or in words why nothing comes.

    At the end it is killed with all that it has started.
    """
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", MODULE, device, size, str(folder)]
    command.append(",".join(check.name for check in checks))
    with open(folder / "log.txt", "ab") as log:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep), "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
    lines = _told(process)
    next(lines)
    try:
        yield lines
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        lines.close()


def _told(process: subprocess.Popen[bytes]) -> Any:
    waiting: queue.Queue[bytes] = queue.Queue()

    def read() -> None:
        with process.stdout as told:  # type: ignore[union-attr]
            for line in told:
                waiting.put(line)
        waiting.put(b"")

    reader = threading.Thread(target=read, name="weft-gpu-lines", daemon=True)
    reader.start()
    try:
        due = yield None
        while True:
            try:
                line = waiting.get(timeout=max(0.0, due - time.monotonic()))
            except queue.Empty:
                due = yield "the time was up"
            else:
                due = yield json.loads(line) if line else f"the process ended with status {process.wait()}"
    finally:
        reader.join(10.0)
