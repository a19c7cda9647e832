"""Checkpoint files: written at one instant, verified byte by byte, loaded without running code.

    path = checkpoint.save(folder, step, state)             # step-000000123.ckpt; `last` points to it
    state, path = checkpoint.load(folder)                   # the newest that is whole
    problem = checkpoint.load_weights(problem, run_folder)  # the best weights of a run

A checkpoint is a dict of tensors and plain values in torch's own zip format: `torch.load(path, weights_only=True)`
reads it, here and anywhere. `last` and `best` are text files that hold a file name; they move once the new file is
verified.

A file with a higher step than `last` belongs to a future that was given up (a run resumed from an older checkpoint):
it comes after all others when one is looked for, and it is the first to be deleted.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weft.checkpoint.archive import CheckpointError, is_in_parts, local, put, read, remove, write
from weft.yamlfile import only_files

STEP_FILE = re.compile(r"step-(\d{9,})\.ckpt")
TEMPORARY_FILE = re.compile(r"\..+\.(\d+)-\d+@(.+)\.tmp")


# ---- a folder of checkpoints -----------------------------------------------------------------------------------------


def save(
    folder: str | os.PathLike[str],
    step: int,
    state: Mapping[str, Any],
    *,
    keep: int = 2,
    best: bool = False,
    write: Any = write,
) -> Path:
    """Write `step-<step>.ckpt` and return its path; then move `last` (and `best` if asked), then delete old ones.

    Call on one rank. `write(path, state)`: what writes, else the function of that name. Kept are the `keep` newest (at
    least 2: the newest may be damaged after it was verified) and what `best` points to. Raises like `write`; then
    nothing was moved or deleted.
    If `best` points to a higher step, one that was given up, it moves here too: each checkpoint carries its best
    weights.
    """
    if keep < 2:
        raise ValueError(f"keep={keep} checkpoints; expected at least 2, so that one is left if the newest is damaged.")
    folder = local(folder)
    path = step_path(folder, step)
    write(path, state)
    # `best` before `last`: a crash in between repeats these steps and moves both; the other way round `best` stays
    # behind.
    try:
        best = best or _step_of(_pointed(folder, "best")) > step
    except CheckpointError:  # the pointer is damaged
        best = True
    for name in ("best", "last") if best else ("last",):
        put(folder / name, f"{path.name}\n".encode())
    _prune(folder, keep)
    return path


def set_last(path: Path) -> None:
    """Let `last` point to the checkpoint at `path`: a run that goes on from there gives up what came after."""
    if STEP_FILE.fullmatch(path.name):
        put(path.parent / "last", f"{path.name}\n".encode())


def step_path(folder: str | os.PathLike[str], step: int) -> Path:
    """The path of the checkpoint of a step."""
    return local(folder) / f"step-{step:09d}.ckpt"


def find(folder: str | os.PathLike[str], which: str = "last") -> Path:
    """The path of the newest verified checkpoint (or of the best) in a run folder or its `checkpoints` folder.

    One that is damaged is passed over, with one warning that names it: then the next older one is taken (of any, as
    each carries the best weights up to then). Raises CheckpointError if none is whole, or there is no `best`.
    """
    return _first_whole(folder, which, "meta")[1]  # every byte is verified, but no numbers are loaded


def load(
    place: str | os.PathLike[str], which: str = "last", map_location: Any = "cpu", *, with_shards: bool = True
) -> tuple[dict[str, Any], Path]:
    """The state and the path it came from: of the checkpoint `place`, or, in a folder of some, of what `find` finds.

    One that was named is never replaced by another: it loads or raises CheckpointError. Of a checkpoint in parts the
    sharded tensors are whole, or, without `with_shards`, left to `complete`.
    """
    place = local(place)
    is_one = not place.is_dir() or is_in_parts(place)
    state, path = (read_any(place, map_location), place) if is_one else _first_whole(place, which, map_location)
    return complete(state, path) if with_shards else state, path


def clean(folder: str | os.PathLike[str]) -> list[str]:
    """Delete the temporary files that killed processes left in the folder; returns their names. Call before a run.

    Of another machine, or where that cannot be known (Windows), only files older than a day.
    """
    removed = []
    for path in sorted(local(folder).glob(".*.tmp")):
        made_by = TEMPORARY_FILE.fullmatch(path.name)
        if made_by and not _may_be_writing(path, int(made_by.group(1)), made_by.group(2)):
            remove(path)
            removed.append(path.name)
    return removed


def _may_be_writing(path: Path, process: int, host: str) -> bool:
    try:
        if time.time() - path.stat().st_mtime > 86400:
            return False
        if host == socket.gethostname() and sys.platform != "win32":
            # Our own number and not one of our threads: a process before us had it (the first one of a container).
            if process == os.getpid():
                return any(f".{process}-{thread.ident}@" in path.name for thread in threading.enumerate())
            os.kill(process, 0)  # no signal: asks whether it exists
    except (ProcessLookupError, FileNotFoundError):
        return False
    except PermissionError:  # it exists and is another user's
        pass
    return True


def _step_of(name: str | None) -> int:
    found = STEP_FILE.fullmatch(name or "")
    return int(found.group(1)) if found else -1


def _pointed(folder: Path, pointer: str) -> str | None:
    """The file name in `last` or `best`; None if there is no such pointer."""
    try:
        with open(folder / pointer, opener=only_files) as file:
            name = file.read(1000).strip()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / pointer} cannot be read: {error}") from error
    if _step_of(name) < 0:
        raise CheckpointError(
            f"{folder / pointer} is damaged: it holds {name[:50]!r}; expected a name like step-000000123.ckpt"
        )
    return name


def _newest_first(folder: Path, last: str | None) -> list[str]:
    """The names of all checkpoints: from the step of `last` down, then those above it."""
    limit = _step_of(last) if last else sys.maxsize
    names = [path.name for path in folder.glob("step-*.ckpt") if _step_of(path.name) >= 0]
    return sorted(names, key=lambda name: (_step_of(name) <= limit, _step_of(name)), reverse=True)


def _prune(folder: Path, keep: int) -> None:
    try:
        best, last = _pointed(folder, "best"), _pointed(folder, "last")
        for name in _newest_first(folder, last)[keep:]:
            if name != best:
                remove(folder / name)
    except (CheckpointError, OSError) as error:
        warnings.warn(f"Old checkpoints in {folder} were not deleted: {error}", stacklevel=3)


def _first_whole(folder: str | os.PathLike[str], which: str, map_location: Any) -> tuple[dict[str, Any], Path]:
    if which not in ("last", "best"):
        raise ValueError(f"which={which!r}; expected 'last' or 'best'.")
    folder = local(folder)
    folder = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    if which == "best" and not (folder / "best").exists():
        raise CheckpointError(f"{folder} has no `best` checkpoint (no metric was monitored?); ask for 'last'.")
    pointed: list[str | None] = []
    damaged: list[str] = []
    for pointer in (which, "last"):
        try:
            pointed.append(_pointed(folder, pointer))
        except CheckpointError as error:
            damaged.append(str(error))
            pointed.append(None)
    names = [name for name in pointed[:1] if name] + _newest_first(folder, pointed[1])
    for name in dict.fromkeys(names):
        try:
            state = read_any(folder / name, map_location)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        if damaged:
            warnings.warn(f"{' '.join(dict.fromkeys(damaged))} {name} is used instead.", stacklevel=3)
        return state, folder / name
    raise CheckpointError(f"{folder} has no checkpoint that can be loaded. {' '.join(damaged)}".rstrip())


def read_any(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The state in a checkpoint, a file or in parts; of one in parts the shards are left to `complete`."""
    if not is_in_parts(path):
        return read(path, map_location)
    from weft.checkpoint.parts import read_parts

    return read_parts(path, map_location)


def complete(state: Any, path: Path | None, processes: Any = None) -> dict[str, Any]:
    """`state` with the shards that `path` holds, if it is in parts."""
    if path is None or not is_in_parts(path):
        return state
    from weft.checkpoint import parts

    return parts.complete(state, path, processes)
