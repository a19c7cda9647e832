"""The code of a run as it was when the run was submitted: a job that is requeued tomorrow runs that."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

SUFFIXES = {".py", ".yaml", ".yml", ".json", ".toml", ".cfg", ".ini", ".txt", ".sh", ".pyi", ".so"}
LARGEST, MOST = 2**20, 64 * 2**20  # bytes of a file that is code, and of all of them
SKIPPED = {"__pycache__", "node_modules", "site-packages"}


def freeze(source: Path, target: Path, leave_out: Path) -> list[str]:
    """Copy the code below `source` to `target`; whatever else lies in `source` is linked to from there.

    So relative paths to data mean what they meant. What git ignores is no code, nor are files above 1 MiB, folders that
    begin with a dot, environments, and `leave_out` (where runs go). Returns the names of the files copied, in order.
    Raises ValueError where more than 64 MiB would be copied.
    """
    files = [f for f in _files(source) if not _is_below(source / f, leave_out)]
    if (size := sum((source / f).stat().st_size for f in files)) > MOST:
        raise ValueError(f"{source} has {size >> 20} MiB of code; submit from the folder that holds just the project.")
    for name in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / name, target / name)
    _link_the_rest(source, target)
    return files


def _files(source: Path) -> list[str]:
    """The files of code below `source`, relative to it."""
    command = [
        "git",
        "-c",
        "core.fsmonitor=false",
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
        "--",
        ".",
    ]
    try:
        done = subprocess.run(command, cwd=source, capture_output=True, timeout=60, check=True)
        names = sorted({os.fsdecode(name) for name in done.stdout.split(b"\0") if name})
    except (OSError, subprocess.SubprocessError):  # no git, or not in a repository
        names = sorted(_walked(source))
    return [n for n in names if (source / n).is_file() and (source / n).stat().st_size <= LARGEST]


def _walked(source: Path) -> list[str]:
    found = []
    for folder, inner, files in os.walk(source):
        here = Path(folder)
        inner[:] = [
            d for d in inner if not d.startswith(".") and d not in SKIPPED and not (here / d / "pyvenv.cfg").exists()
        ]
        found += [str((here / f).relative_to(source)) for f in files if Path(f).suffix in SUFFIXES]
    return found


def _link_the_rest(source: Path, target: Path) -> None:
    """Links to what was not copied, from the top down: a folder of which nothing was copied is one link."""
    target.mkdir(parents=True, exist_ok=True)
    for entry in source.iterdir():
        there = target / entry.name
        if there.is_dir() and not there.is_symlink() and entry.is_dir():
            _link_the_rest(entry, there)
        elif not there.exists() and not target.is_relative_to(entry):
            there.symlink_to(entry)


def _is_below(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())
