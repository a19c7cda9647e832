"""The folder of a run: where it is, and which one to resume.

    runs/2026-03-01_12-30-05/  config.yaml  metrics.csv  result.json  checkpoints/  event files

A run that starts anew under a name that was used before moves the files of the last one into its folder `old/`.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

from weft.config import TrainerConfig


def new_folder(config: TrainerConfig, options: dict[str, Any]) -> Path | None:
    """The folder of a new run, made; None if nothing asks for one (root_dir, a logger, checkpoint, a profile's trace).

    The files of an earlier run of this name stay until the new one begins (`set_aside`). Call in the first process.
    """
    traced = config.profiler == "pytorch" or getattr(options["profiler"], "needs_folder", False)
    wanted = config.root_dir is not None or config.checkpointing is not None or options["loggers"] or traced
    if not wanted or config.fast_dev_run:
        return None
    folder = Path(config.root_dir or "runs") / (config.run_name or time.strftime("%Y-%m-%d_%H-%M-%S"))
    number = 1
    while config.run_name is None and folder.exists():  # two runs in one second
        number += 1
        folder = folder.with_name(f"{folder.name.split('-run')[0]}-run{number}")
    folder = folder.absolute()  # the same one if the working directory changes
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def forget(folder: Path, root_is_ours: bool) -> None:
    """Take away the folder of a run that was refused before it began, if it is empty, and "runs" if that is ours."""
    with contextlib.suppress(OSError):  # not empty: an earlier run of this name
        folder.rmdir()
        if root_is_ours:
            folder.parent.rmdir()


_OF_A_RUN = (
    "checkpoints",
    "metrics.csv",
    "result.json",
    "profile",
    "events.out.tfevents.*",
    "environment.yaml",
    "report.html",
    "weights.pt",
)


def set_aside(folder: Path) -> None:
    """Move what an earlier run of this name left into `old/1`, `old/2`, ...: no file of one is taken for another's."""
    if left := [path for pattern in _OF_A_RUN for path in folder.glob(pattern)]:
        number = 1 + max((int(p.name) for p in folder.glob("old/*") if p.name.isdigit()), default=0)
        aside = folder / "old" / str(number)
        aside.mkdir(parents=True)
        for path in left:
            path.replace(aside / path.name)


RESUME_WORDS = ("auto", "last", "best")


def folder_to_resume(config: TrainerConfig, resume: str) -> Path | None:
    """The checkpoints folder that "auto", "last" or "best" mean: of this run name, else of the newest run.

    None if there is none, or if `resume` is a path.
    """
    if resume not in RESUME_WORDS:
        return None
    folders = [where_to_look(config)] if config.run_name else Path(config.root_dir or "runs").glob("*/checkpoints")
    found = [folder for folder in folders if any(folder.glob("step-*.ckpt"))]
    return max(found, key=lambda folder: folder.stat().st_mtime, default=None)


def where_to_look(config: TrainerConfig) -> Path:
    """Where `folder_to_resume` looks; with a star where any run will do."""
    return Path(config.root_dir or "runs") / (config.run_name or "*") / "checkpoints"


def folder_of(path: Path) -> Path | None:
    """The run folder that a checkpoint lies in; None if it was put somewhere else."""
    folder = path.absolute().parent
    return folder.parent if folder.name == "checkpoints" else None
