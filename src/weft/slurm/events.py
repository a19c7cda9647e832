"""What happened to a submitted run, as lines of a file in its folder: the cluster's own records may not be there.

submitted -> started -> requeued | preempted -> started -> finished | failed
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
        lines = (folder / FOLDER / FILE).read_text(errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            said = json.loads(line)
        except ValueError:
            continue
        if isinstance(said, Mapping) and isinstance(said.get("event"), str):
            found.append(dict(said))
    return found


def state(folder: Path) -> str | None:
    """ "queued", "running", "preempted", "finished", "failed", "stuck" or "cancelled"; None if it was not submitted."""
    said = [e["event"] for e in events(folder)]
    if not said:
        return None
    ours = said[len(said) - said[::-1].index("submitted") :] if "submitted" in said else said
    return "cancelled" if "cancelled" in ours else _STATES.get(said[-1], said[-1])  # what ends by it says so later


def jobs_of(folder: Path) -> list[str]:
    """The numbers of the jobs that were submitted for a run, or joined a sweep, in order."""
    return [str(e["job"]) for e in events(folder) if e["event"] == "submitted" and "job" in e]


def last_step(folder: Path) -> int:
    """The step of the newest checkpoint in the run's folder, 0 if there is none: from its name, nothing is loaded."""
    steps = [p.stem.rpartition("-")[2] for p in (folder / "checkpoints").glob("step-*.ckpt")]
    return max((int(s) for s in steps if s.isdigit()), default=0)


def makes_no_way(folder: Path) -> bool:
    """Whether the restart before this one made no step: it would be restarted for ever."""
    starts = [e for e in events(folder) if e["event"] == "started"]
    return len(starts) >= 2 and starts[-1].get("restart", 0) >= 1 and starts[-1].get("step") == last_step(folder)
