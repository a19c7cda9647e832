"""The code of a run as it was when the run was submitted: a job that is requeued tomorrow runs that."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SUFFIXES = {".py", ".yaml", ".yml", ".json", ".toml", ".cfg", ".ini", ".txt", ".sh", ".pyi", ".so"}
LARGEST, MOST = 2**20, 64 * 2**20  # bytes of a file that is code, and of all of them
SKIPPED = {"__pycache__", "node_modules", "site-packages"}


def freeze(source: Path, target: Path, leave_out: Path) -> list[str]:
    """Copy the code below `source` to `target`; whatever else lies in `source` is linked to from there.

    So relative paths to data mean what they meant. What git ignores is no code, nor are files above 1 MiB, what begins
    with a dot (secrets are kept there), environments, and `leave_out` (where runs go). Returns the names of the files
    copied, in order.
    Raises ValueError where more than 64 MiB would be copied.
    """
    source, leave_out = source.resolve(), leave_out.resolve()
    files = [f for f in _files(source) if not (source / f).is_relative_to(leave_out)]
    if (size := sum((source / f).stat().st_size for f in files)) > MOST:
        raise ValueError(f"{source} has {size >> 20} MiB of code; submit from the folder that holds just the project.")
    for name in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / name, target / name)
    _link_the_rest(source, target)
    return files


def in_copy(config: Any, prefix: str, runs: Path) -> Any:
    """`config` with paths below the working folder as those below `prefix`; where runs go (`runs`) there is no code.

    Warns of code that lies elsewhere: no copy of it is made.
    """
    here = Path.cwd()
    if isinstance(config, str) and config.startswith("/"):
        path = Path(config.partition(".py:")[0])
        if path.is_relative_to(here) and not path.is_relative_to(runs):
            return prefix + config[len(str(here)) + 1 :]
        if ".py:" in config and not path.is_relative_to(sys.prefix):
            told = f"{path}.py is not below {here}, so no copy of it is kept: the job runs it as it is then."
            warnings.warn(told, stacklevel=3)
        return config
    if isinstance(config, Mapping):
        return {k: in_copy(v, prefix, runs) if k != "root_dir" else v for k, v in config.items()}
    return [in_copy(v, prefix, runs) for v in config] if isinstance(config, list) else config


def _files(source: Path) -> list[str]:
    """The files of code below `source`, relative to it."""
    names = _known_to_git(source) or _walked(source)  # no repository, or a folder in one that ignores it
    names = {n for n in names if not any(part.startswith(".") for part in Path(n).parts)}
    return sorted(n for n in names if (source / n).is_file() and (source / n).stat().st_size <= LARGEST)


def _known_to_git(source: Path) -> set[str]:
    command = ["git", "-c", "core.fsmonitor=false", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run([*command, "--", "."], cwd=source, capture_output=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return set()
    names = {os.fsdecode(name).rstrip("/") for name in done.stdout.split(b"\0") if name}
    inner = {name for name in names if (source / name).is_dir()}  # other repositories within this one
    return names - inner | {f"{name}/{n}" for name in inner for n in _walked(source / name)}


def _walked(source: Path) -> set[str]:
    found = set[str]()
    for folder, inner, files in os.walk(source):
        here = Path(folder)
        inner[:] = [d for d in inner if not (d.startswith(".") or d in SKIPPED or _is_environment(here / d))]
        found |= {str((here / f).relative_to(source)) for f in files if Path(f).suffix in SUFFIXES}
    return found


def _is_environment(folder: Path) -> bool:
    return (folder / "pyvenv.cfg").exists() or (folder / "conda-meta").exists()


def _link_the_rest(source: Path, target: Path) -> None:
    """Links to what was not copied, from the top down: a folder of which nothing was copied is one link."""
    target.mkdir(parents=True, exist_ok=True)
    for entry in source.iterdir():
        there = target / entry.name
        if there.is_dir() and not there.is_symlink() and entry.is_dir():
            _link_the_rest(entry, there)
        elif not there.exists() and not target.is_relative_to(entry):
            there.symlink_to(entry)
