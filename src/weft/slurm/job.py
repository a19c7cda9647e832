"""What runs in the job: python -m weft.slurm.job FOLDER GRACE, once in each task."""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from weft.devices.requeue import BY_SCRIPT, comes_back, told_of
from weft.slurm import events
from weft.slurm.leaving import leave_in_time

OK, FAILED, STUCK, REQUEUE, TERMINATED = 0, 1, 4, 138, 143


class Job:
    """What a submitted function is given: `folder`, and the `options` that its trainer needs to be gone on with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.options: dict[str, Any] = {
            "root_dir": str(folder.parent),
            "run_name": folder.name,
            "checkpoint": True,
            "resume": "auto",
        }


def main(folder: Path, grace: int) -> int:
    """Run what was submitted, and write down how it went. Returns the exit status.

    `grace`: seconds before the time limit at which, with the slowest step and save added, the run leaves by itself.
    """
    is_first = os.environ.get("SLURM_PROCID", "0") == "0"
    restart, step = int(os.environ.get("SLURM_RESTART_COUNT", "0")), events.last_step(folder)
    if is_first:
        event = "stuck" if events.makes_no_way(folder) else "started"
        events.note(folder, event, restart=restart, step=step, job=os.environ.get("SLURM_JOB_ID"))
    if _first_word(folder, restart) == "stuck":
        print(f"weft: the last restart made no step (step {step}); this one ends the chain", flush=True)
        return STUCK
    leave_in_time(grace)
    os.environ[BY_SCRIPT] = "1"
    status = FAILED
    try:
        status = _run(folder)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else FAILED
    except KeyboardInterrupt:
        status = 130
    finally:
        if status == TERMINATED and comes_back(signal.SIGTERM):
            status = REQUEUE
        if is_first:
            how = {OK: "finished", REQUEUE: "requeued", TERMINATED: "preempted"}.get(status, "failed")
            how = _terminated(restart) if status == TERMINATED else how
            events.note(folder, how, restart=restart, step=events.last_step(folder), status=status)
    return status


def _first_word(folder: Path, restart: int) -> str:
    """What the first task has written about this restart; all of them go by it."""
    while True:
        for event in events.events(folder):
            if event["event"] in ("started", "stuck") and event.get("restart") == restart:
                return event["event"]
        time.sleep(0.2)


def _terminated(restart: int) -> str:
    """What SIGTERM meant: a job that SLURM itself puts back into its queue has been counted by then."""
    restarts = told_of(os.environ.get("SLURM_JOB_ID", "")).get("Restarts", "")
    return "cancelled" if restarts == str(restart) else "preempted"


def _run(folder: Path) -> int:
    place = folder / events.FOLDER
    if (place / "config.yaml").exists():
        from weft import cli

        return cli.main(["fit", "--config", str(place / "config.yaml")])
    import cloudpickle

    function = cloudpickle.loads((place / "function.pkl").read_bytes())
    returned = function(Job(folder)) if inspect.signature(function).parameters else function()
    if os.environ.get("SLURM_PROCID", "0") == "0" and not hasattr(returned, "best_metric"):
        try:
            (place / "returned.json").write_text(json.dumps(returned))
        except TypeError as error:  # training is over and kept: no reason to fail
            print(f"weft: what {function} returned is not kept: {error}", flush=True)
    return OK


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
