"""The folder of a run: where it is, and which one to resume.

    runs/2026-03-01_12-30-05/  config.yaml  metrics.csv  result.json  checkpoints/  event files
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from weft import checkpoint
from weft.config import TrainerConfig


def new_folder(config: TrainerConfig, options: dict[str, Any]) -> Path | None:
    """The folder of a new run, made; None if nothing asks for one (root_dir, a logger, checkpoint, a profile's trace)."""
    traced = config.profiler == "pytorch" or getattr(options["profiler"], "needs_folder", False)
    wanted = config.root_dir is not None or config.checkpointing is not None or options["loggers"] or traced
    if not wanted or config.fast_dev_run:
        return None
    folder = Path(config.root_dir or "runs") / (config.run_name or time.strftime("%Y-%m-%d_%H-%M-%S"))
    number = 1
    while config.run_name is None and folder.exists():  # two runs in one second
        number += 1
        folder = folder.with_name(f"{folder.name.split('-run')[0]}-run{number}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def state_to_resume(config: TrainerConfig, resume: str) -> tuple[dict[str, Any] | None, Path | None]:
    """The state to go on from, and the folder of its run; twice None with "auto" where there is none yet.

    `resume`: "auto", "last", "best" or the path of a checkpoint. Raises CheckpointError if it cannot be loaded.
    """
    folder = folder_to_resume(config, resume)
    if folder is None and resume == "auto":
        return None, None
    place, which = (folder, resume if resume == "best" else "last") if folder else (Path(resume), "last")
    state, path = checkpoint.load(place, which)
    return state, path.parent.parent if path.parent.name == "checkpoints" else None


def folder_to_resume(config: TrainerConfig, resume: str) -> Path | None:
    """The checkpoints folder that "auto", "last" or "best" mean: of this run name, else of the newest run.

    None if there is none, or if `resume` is a path.
    """
    if resume not in ("auto", "last", "best"):
        return None
    root = Path(config.root_dir or "runs")
    if config.run_name is not None:
        found = [root / config.run_name / "checkpoints"]
    else:
        found = sorted(root.glob("*/checkpoints"), key=lambda p: p.stat().st_mtime, reverse=True)
    return next((folder for folder in found if any(folder.glob("step-*.ckpt"))), None)
