"""What runs in the job: python -m weft.slurm.job FOLDER, once in each task."""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from weft.devices.requeue import BY_SCRIPT, comes_back
from weft.slurm import events

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


def main(folder: Path) -> int:
    """Run what was submitted, and write down how it went. Returns the exit status."""
    is_first = os.environ.get("SLURM_PROCID", "0") == "0"
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if is_first and events.makes_no_way(folder):
        events.note(folder, "stuck", restart=restart, step=events.last_step(folder))
        print(
            f"weft: the last restart made no step (step {events.last_step(folder)}); this one ends the chain",
            flush=True,
        )
        return STUCK
    if is_first:
        events.note(
            folder, "started", job=os.environ.get("SLURM_JOB_ID"), restart=restart, step=events.last_step(folder)
        )
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
            events.note(folder, how, restart=restart, step=events.last_step(folder), status=status)
    return status


def _run(folder: Path) -> int:
    place = folder / events.FOLDER
    if (place / "config.yaml").exists():
        from weft import cli

        return cli.main(["fit", "--config", str(place / "config.yaml")])
    import cloudpickle

    function = cloudpickle.loads((place / "function.pkl").read_bytes())
    returned = function(Job(folder)) if inspect.signature(function).parameters else function()
    if os.environ.get("SLURM_PROCID", "0") == "0" and not hasattr(returned, "best_metric"):
        (place / "returned.json").write_text(json.dumps(returned))
    return OK


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
