"""Two processes that start in one run folder, and whether that cost a file or a result."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import weft
from tests.helpers import owners
from tests.helpers.patience import patience

SCRIPT = Path(owners.__file__)


def start_owner(root: Path, seed: int = 1, **options: Any) -> subprocess.Popen[str]:
    source, repo = Path(weft.__file__).parents[1], SCRIPT.parents[2]
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(root), str(seed), json.dumps(options)],
        env={**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{repo}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    STARTED.append(process)
    return process


STARTED: list[subprocess.Popen[str]] = []


def wait_for_file(path: Path) -> None:
    deadline = time.monotonic() + patience()
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


def epochs_of_train_loss(folder: Path) -> list[str]:
    with open(folder / "metrics.csv", newline="") as file:
        return [row["epoch"] for row in csv.DictReader(file) if row["name"] == "train_loss"]


def start_twice(root: Path, draw: random.Random) -> str:
    """Start two processes of one name, one some time after the other; returns what went wrong, "" if nothing did.

    Both start, both resume, the second resumes while the first runs, or the first is killed. They are forked from this
    one, so that their starts lie as close together as is drawn.
    """
    kind = draw.choice(["same name", "auto", "resume while it runs", "the owner is killed"])
    later = draw.uniform(0.0, draw.choice([0.05, 0.3, 1.5]))
    root.mkdir()
    first = _fork_owner(root, "first", None)
    if kind in ("resume while it runs", "the owner is killed"):
        wait_for_file(root / "a/checkpoints/last")
    time.sleep(later)
    if kind == "the owner is killed":
        os.kill(first, signal.SIGKILL)
    second = _fork_owner(root, "second", None if kind == "same name" else "auto")
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in (first, second)]
    told = [(root / name).read_text() for name in ("first", "second")]
    if kind == "the owner is killed":
        is_right = codes in ([-9, 0], [0, 0])
    else:
        is_right = 0 in codes and all(
            code == 0 or "is in use by process" in text for code, text in zip(codes, told, strict=True)
        )
    if not is_right:
        return f"{kind}, {later:.3f} s: {codes}, {told}"
    if epochs_of_train_loss(root / "a") != [str(epoch) for epoch in range(20)]:
        return f"{kind}, {later:.3f} s: the rows of two runs are mixed"
    is_whole = weft.load_result(root / "a").epochs == 20
    return "" if is_whole else f"{kind}, {later:.3f} s: the result is not that of a whole run"


def _fork_owner(root: Path, name: str, resume: str | None) -> int:
    """The number of a process that trains, and writes what it is told to the file of this name."""
    child = os.fork()
    if not child:
        status = 1
        sys.stdout = sys.stderr = open(root / name, "w", buffering=1)  # noqa: SIM115, the process ends
        try:
            owners.train_slowly(str(root), "1", json.dumps({"sleep": 0.05, "resume": resume}))
            status = 0
        except BaseException:  # noqa: BLE001, found in what it wrote
            traceback.print_exc()
        os._exit(status)
    return child
