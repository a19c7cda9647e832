"""The folder of a run: where it is, and which one to resume.

    runs/2026-03-01_12-30-05/  config.yaml  metrics.csv  result.json  checkpoints/  event files

A run that starts anew under a name that was used before moves the files of the last one into its folder `old/`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path
from typing import Any

from weft.config import TrainerConfig
from weft.records import lease


def new_folder(config: TrainerConfig, options: dict[str, Any]) -> Path | None:
    """The folder of a new run, made; None if nothing asks for one (root_dir, a logger, checkpoint, a profile's trace).

    The files of an earlier run of this name stay until the new one begins (`set_aside`). Call in the first process,
    which owns the folder from then on. Raises RunInUseError where a run of this name is under way.
    """
    traced = config.profiler == "pytorch" or getattr(options["profiler"], "needs_folder", False)
    wanted = config.root_dir is not None or config.checkpointing is not None or options["loggers"] or traced
    if not wanted or config.fast_dev_run:
        return None
    root = Path(config.root_dir or "runs").absolute()  # the same one if the working directory changes
    if config.run_name is not None:
        folder = root / config.run_name
        lease.acquire(folder)
        return folder
    name, number = time.strftime("%Y-%m-%d_%H-%M-%S"), 1
    folder = root / name
    while not made(folder):  # two runs in one second
        number += 1
        folder = root / f"{name}-run{number}"
    lease.acquire(folder)
    return folder


def made(folder: Path) -> bool:
    """Make a folder, unless it is there already."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def forget(folder: Path, root_is_ours: bool) -> None:
    """Take away the folder of a run that was refused before it began, if it is empty, and "runs" if that is ours."""
    with contextlib.suppress(OSError):
        if {path.name for path in folder.iterdir()} <= {lease.FOLDER}:
            shutil.rmtree(folder / lease.FOLDER, ignore_errors=True)
        folder.rmdir()  # raises where it is not empty: an earlier run of this name
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

    None if there is none. If `resume` is a path: the folder of its run. This process owns the run from then on. "auto"
    without a name takes no run that is under way, in a SLURM job first the one that this job had begun, and in a job
    array no other.
    """
    if resume not in RESUME_WORDS:
        place = Path(resume) / "checkpoints" / "last" if (Path(resume) / "checkpoints").is_dir() else Path(resume)
        folder = folder_of(place / "last" if place.name == "checkpoints" else place)
        if folder is None or not Path(resume).exists():
            return None
        lease.acquire(folder)
        return folder / "checkpoints"
    root = Path(config.root_dir or "runs")
    folders = [where_to_look(config)] if config.run_name else root.glob("*/checkpoints")
    found = [folder.absolute() for folder in folders if any(folder.glob("step-*.ckpt"))]
    found.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
    if resume == "auto" and not config.run_name:
        return _first_free(found)
    if not found:
        return None
    lease.acquire(found[0].parent, wait=resume == "auto")
    return found[0]


def _first_free(found: list[Path]) -> Path | None:
    """The first of the folders whose run nobody is at; of this SLURM job before all others."""
    own = [folder for folder in found if lease.is_of_this_job(folder.parent)]
    others = [] if "SLURM_ARRAY_TASK_ID" in os.environ else [folder for folder in found if folder not in own]
    for folder in own + others:
        try:
            lease.acquire(folder.parent)
        except lease.RunInUseError:
            continue
        return folder
    return None


def where_to_look(config: TrainerConfig) -> Path:
    """Where `folder_to_resume` looks; with a star where any run will do."""
    return Path(config.root_dir or "runs") / (config.run_name or "*") / "checkpoints"


def folder_of(path: Path) -> Path | None:
    """The run folder that a checkpoint lies in; None if it was put somewhere else."""
    folder = path.absolute().parent
    return folder.parent if folder.name == "checkpoints" else None
