"""What happened to a submitted run, as lines of a file in its folder: the cluster's own records may not be there.

submitted -> started -> requeued | preempted -> started -> finished | failed
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from weft.records.foreign import MAX_BYTES, read_bytes

FOLDER, FILE = "submit", "events.jsonl"
ENDS = ("finished", "failed", "stuck", "cancelled")
_STATES = {"submitted": "queued", "started": "running", "requeued": "queued", "preempted": "preempted"}


def note(folder: Path, event: str, **more: Any) -> None:
    """Append one event to the run's file. One write of one line, so that several jobs may do so."""
    place = folder / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    line = "\n" + json.dumps({"time": time.time(), "event": event, **more}) + "\n"  # the one before may be torn
    with (place / FILE).open("ab", buffering=0) as file:
        file.write(line.encode())
        os.fsync(file.fileno())


def events(folder: Path) -> list[dict[str, Any]]:
    """All events of a run, in order; [] where it was not submitted. Lines that are none are left out."""
    found = []
    try:
        lines = read_bytes(folder / FOLDER / FILE, MAX_BYTES).decode(errors="replace").splitlines()
    except (OSError, ValueError):
        return []
    for line in lines:
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(said, Mapping) and isinstance(said.get("event"), str):
            found.append(dict(said))
    return found


def state(folder: Path) -> str | None:
    """ "queued", "running", "preempted", "finished", "failed", "stuck" or "cancelled"; None if it was not submitted.

    By the file alone: see `states`.
    """
    said = [e["event"] for e in events(folder)]
    if not said:
        return None
    ours = said[len(said) - said[::-1].index("submitted") :] if "submitted" in said else said
    return "cancelled" if "cancelled" in ours else _STATES.get(said[-1], said[-1])  # what ends by it says so later


def jobs_of(folder: Path) -> list[str]:
    """The numbers of the jobs that were submitted for a run, or joined a sweep, in order."""
    found = [str(e.get("job")) for e in events(folder) if e["event"] == "submitted"]
    return [job for job in found if re.fullmatch("[0-9]+", job)]  # they become words of a command


def states(folders: Iterable[Path]) -> dict[Path, str]:
    """The state of each of these runs that was submitted.

    SLURM is asked about those without an end, once for all. Of one that it does not know any more the state is
    "cancelled" (while it waited), "failed" (before Python began) or "lost". Where it does not answer the file holds.
    """
    found = {folder: said for folder in folders if (said := state(folder)) is not None}
    jobs = {folder: set(jobs_of(folder)) for folder, said in found.items() if said not in ENDS}
    known = _in_queue(set[str]().union(*jobs.values())) if jobs else None
    for folder in (folder for folder, own in jobs.items() if known is not None and not own & known):
        said = state(folder)  # it may have ended between the two looks
        found[folder] = said if said in ENDS else _how_it_went(folder)
    return found


def _how_it_went(folder: Path) -> str:
    """What became of a job that is gone and has written down no end."""
    last = events(folder)[-1]["event"]
    if last == "submitted" and any((folder / FOLDER).glob("job-*.log")):
        return "failed"
    return "lost" if last == "started" else "cancelled"


def _in_queue(jobs: set[str]) -> set[str] | None:
    """Those of the jobs (of an array: its number) that wait or run; None where SLURM does not answer."""
    command = ["squeue", "-h", "-o", "%F", "-j", ",".join(sorted(jobs))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode and "Invalid job id" not in done.stderr:
        return None
    return set(done.stdout.split())


def last_step(folder: Path) -> int:
    """The step of the newest checkpoint in the run's folder, 0 if there is none: from its name, nothing is loaded."""
    steps = [p.stem.rpartition("-")[2] for p in (folder / "checkpoints").glob("step-*.ckpt")]
    return max((int(s) for s in steps if s.isdigit()), default=0)


def makes_no_way(folder: Path) -> bool:
    """Whether the restart before this one made no step: it would be restarted for ever."""
    starts = [e for e in events(folder) if e["event"] == "started"]
    return len(starts) >= 2 and starts[-1].get("restart", 0) >= 1 and starts[-1].get("step") == last_step(folder)
