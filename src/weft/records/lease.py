"""Who owns a run folder: one process at a time, also on a network file system and after a crash.

    acquire(folder)     # or RunInUseError, which names the owner
    check(folder)       # before something is written that another owner would not expect
    release(folder)

A lease is a small file with a number in `.owner/`; the highest number is the one that holds. It names a process, whose
file time a thread renews. Who takes over makes the file with the next number, which only one process can make, and
numbers are not used again: nothing is locked, so nothing stays locked. Whether an owner is dead is known on its own
machine from the process table (number and start time), after a requeue from SLURM's count of restarts, and elsewhere
from a file time that has grown old by the clock of the file system.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from weft.yamlfile import only_files

FOLDER = ".owner"
BEAT_SECONDS = 10.0
SILENT_SECONDS = 120.0
"""After so long without a sign an owner on another machine counts as dead."""
REQUEUE_SECONDS = 600.0
"""So long a requeued job waits for the one that it continues."""
_KEPT = 8  # old files: a process that looked long ago must find its number used


class RunInUseError(RuntimeError):
    """Another process writes in the folder of this run."""


class Lease:
    """The ownership of one folder by this process; `lost` once another one took it over."""

    def __init__(self, path: Path, told: dict[str, Any]) -> None:
        self.path, self.told, self.lost, self.in_use = path, told, False, False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="weft-lease", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            self.look()

    def look(self) -> None:
        """Say that the owner is alive, or find that it is the owner no longer."""
        try:
            os.utime(self.path)
            self.lost = self.lost or _next(self.path).exists()
        except FileNotFoundError:
            self.lost = True
        except OSError:  # a file system that is away for a moment
            pass

    def give_back(self) -> None:
        self._over.set()
        self._thread.join()
        if not self.lost and self.told["pid"] == os.getpid():
            with suppress(OSError):  # then it counts as that of a dead process, later
                _write(self.path, {**self.told, "released": True})


_HELD: dict[Path, Lease] = {}


def acquire(folder: Path, wait: bool = False) -> None:
    """Make this process the owner of `folder`, which is made if it is missing.

    Raises RunInUseError where the owner is alive. `wait`: not before it is certain that it is, or, in a job that SLURM
    has put back into its queue, before the one that it continues had time to end.
    """
    held = _HELD.get(folder)
    if (
        held is not None and held.told["pid"] == os.getpid() and not (held.in_use or held.lost)
    ):  # `trainer.start` whose block was never entered
        return
    began, signs = time.monotonic(), set[float]()
    while True:
        path, told = _latest(folder)
        alive = path is not None and _is_alive(path, told)
        if not alive and _take(folder, path):
            if path is not None and not told.get("released"):
                _say(f"{folder} belonged to {_name(told)}, which ended without a word; this process goes on with it.")
            return
        if alive and path is not None:
            with suppress(FileNotFoundError):
                signs.add(path.stat().st_mtime)
            certain = len(signs) > 1 or _is_here(told)
            waited = time.monotonic() - began
            if not wait or (waited > REQUEUE_SECONDS if _restarts() else certain):
                raise RunInUseError(_refusal(folder, told, certain))
            if waited < 1.0:
                _say(f"{folder} is in use by {_name(told)}; waiting for its end.")
            time.sleep(1.0)


def release(folder: Path) -> None:
    """Let others have the folder; nothing where this process does not own it."""
    if (lease := _HELD.pop(folder, None)) is not None:
        lease.give_back()


def enter(folder: Path) -> None:
    """The run of this folder begins: from here on a second one in this process is refused, too."""
    _HELD[folder].in_use = True


def check(folder: Path, look: bool = True) -> None:
    """Raise RunInUseError if another process has taken the folder over. Without `look`: if that is known by now."""
    lease = _HELD.get(folder)
    if lease is None or lease.told["pid"] != os.getpid():
        return
    if look:
        lease.look()
    if lease.lost:
        path, told = _latest(folder)
        if path is None:
            raise RunInUseError(f"{folder} was moved or deleted while its run was at work, which stops here.")
        raise RunInUseError(
            f"{folder} was taken over by {_name(told)}, since no sign of life of this process was seen for "
            f"{SILENT_SECONDS:.0f} s. This one stops here, and writes nothing more."
        )


def owner(folder: Path) -> str | None:
    """The process that owns the folder and is alive, in words; None if nobody does."""
    path, told = _latest(folder)
    return _name(told) if path is not None and _is_alive(path, told) else None


def was_given_back(folder: Path) -> bool:
    """Whether the last owner of the folder let go of it, and did not die with it."""
    return bool(_latest(folder)[1].get("released"))


def is_of_this_job(folder: Path) -> bool:
    """Whether the last owner of the folder was in this SLURM job (or this task of an array), before a requeue too."""
    job = os.environ.get("SLURM_JOB_ID")
    return job is not None and _latest(folder)[1].get("job") == job


# ---- files


def _latest(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """The lease in force and what it says; {} if it cannot be read (it is being written, or damaged)."""
    paths = [path for path in (folder / FOLDER).glob("*.json") if path.stem.isdigit()]
    if not paths:
        return None, {}
    path = max(paths, key=lambda path: int(path.stem))
    try:
        with open(path, "rb", opener=only_files) as file:
            told = json.loads(file.read(4096))
    except (OSError, ValueError, RecursionError):
        told = {}
    return path, told if isinstance(told, dict) else {}


def _next(path: Path) -> Path:
    return path.with_name(f"{int(path.stem) + 1:06d}.json")


def _take(folder: Path, before: Path | None) -> bool:
    """Make the lease after `before`; False if another process was quicker."""
    path = folder / FOLDER / "000001.json" if before is None else _next(before)
    path.parent.mkdir(parents=True, exist_ok=True)
    told = _this_process()
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    except FileExistsError:
        return False
    try:
        _write(path, told)
    except BaseException:  # an empty one would count as that of somebody
        path.unlink(missing_ok=True)
        raise
    _HELD[folder] = Lease(path, told)
    with suppress(OSError):
        old = sorted((p for p in path.parent.glob("*.json") if p.stem.isdigit()), key=lambda p: int(p.stem))
        for one in old[:-_KEPT]:
            one.unlink()
    return True


def _write(path: Path, told: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text(json.dumps(told))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---- processes


def _this_process() -> dict[str, Any]:
    return {
        "host": platform.node(),
        "boot": _text("/proc/sys/kernel/random/boot_id"),
        "space": _link("/proc/self/ns/pid"),  # a container has process numbers of its own
        "pid": os.getpid(),
        "began": _start_of(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restarts": _restarts(),
        "token": uuid.uuid4().hex,
    }


def _restarts() -> int:
    """How often SLURM has put this job back into its queue."""
    count = os.environ.get("SLURM_RESTART_COUNT", "")
    return int(count) if count.isdigit() and os.environ.get("SLURM_JOB_ID") else 0


def _is_here(told: dict[str, Any]) -> bool:
    """Whether the process table of this machine tells of that process."""
    here = _this_process()
    return all(told.get(key) == here[key] for key in ("host", "boot", "space"))


def _is_alive(path: Path, told: dict[str, Any]) -> bool:
    if told.get("released"):
        return False
    restarts, is_of_job = told.get("restarts"), told.get("job") and told["job"] == os.environ.get("SLURM_JOB_ID")
    if is_of_job and isinstance(restarts, int) and restarts < _restarts():
        return False
    pid = told.get("pid")
    if isinstance(pid, int) and _is_here(told):
        if pid == os.getpid():
            return any(lease.told["token"] == told.get("token") for lease in _HELD.values())
        if told.get("began") is not None:
            return _start_of(pid) == told["began"]
        if not _exists(pid):
            return False
    return abs(_age(path)) < SILENT_SECONDS  # a time in the future is no sign of life either


def _start_of(pid: int) -> str | None:
    """When a process began, in ticks since the machine did; None for one that has ended, or where it is not told."""
    fields = (_text(f"/proc/{pid}/stat") or "").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] not in ("Z", "X") else None


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _age(path: Path) -> float:
    """Seconds since the file was renewed, both by the clock of its file system."""
    probe = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def _link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


# ---- words


def _name(told: dict[str, Any]) -> str:
    if not told:
        return "a process that is not named"
    job = f", SLURM job {told['job']}" if told.get("job") else ""
    words = f"process {told.get('pid')} on {told.get('host')} (since {told.get('since')}{job})"
    return "".join(c for c in words if c.isprintable())[:300]


def _refusal(folder: Path, told: dict[str, Any], certain: bool) -> str:
    later = "" if certain else f" If it is dead: after {SILENT_SECONDS:.0f} s without a sign of life it counts as that."
    return (
        f"{folder} is in use by {_name(told)}, and two runs in one folder would mix their files. "
        f"Wait for its end or stop it, or give this run another run_name.{later}"
    )


def _say(text: str) -> None:
    logging.getLogger("weft").warning(text)
