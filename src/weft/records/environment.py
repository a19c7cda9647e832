"""A run in words, for the files of its folder: what it was made of, when, how, where, and with what.

described(lambda x: x)      # "<lambda> (train.py, line 12)"
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weft import yamlfile


def read_sessions(folder: Path) -> list[dict[str, Any]]:
    """The entries of `environment.yaml`, oldest first; [] if there is none, with a warning if it is damaged."""
    path = folder / "environment.yaml"
    if not path.is_file():
        return []
    try:
        found = yamlfile.load_file(path)
    except (ValueError, OSError):
        found = None
    sessions = found.get("sessions") if isinstance(found, dict) else None
    if not isinstance(sessions, list) or not all(isinstance(session, dict) for session in sessions):
        warnings.warn(f"{path} is damaged: earlier sessions of this run are not known any more.", stacklevel=2)
        return []
    return sessions


PACKAGES = ("lightning", "numpy", "neuromancer")


def config_of(trainer: Any) -> dict[str, Any]:
    """The config of a run as plain data.

    Of a run described by a config, that config. Of one started from Python: the trainer's options, and under "objects"
    the names of what cannot stand in a file.
    """
    recipe = getattr(trainer, "recipe", None)
    if recipe is not None:
        return recipe
    options = {k: v for k, v in trainer.config.to_dict().items() if v != _default(trainer.config, k)}
    objects = {"problem": described(trainer.problem)}
    objects |= {name: described(value) for name, value in trainer.options.items() if value is not None}
    return {"trainer": options, "objects": objects}


def _default(config: Any, name: str) -> Any:
    return next(f.default for f in dataclasses.fields(config) if f.name == name)


def described(value: Any) -> Any:
    """An object in words: a function by name and place, an object by class, dicts and lists entry by entry."""
    if isinstance(value, dict):
        return {str(k): described(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [described(v) for v in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    code = getattr(value, "__code__", None)
    if code is not None:
        return f"{value.__qualname__} ({Path(code.co_filename).name}, line {code.co_firstlineno})"
    kind = value if isinstance(value, type) else type(value)
    name = getattr(value, "name", None)
    return f"{kind.__module__}.{kind.__qualname__}" + (f" {name!r}" if isinstance(name, str) else "")


def surroundings(trainer: Any) -> dict[str, Any]:
    """When and how training was begun, and with what: command, seeds, versions, git, host, devices."""
    run = trainer.run
    return {
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": _command(),
        "folder": os.getcwd(),
        "resumed_at_step": run.progress.step or None,
        "seed": trainer.config.seed,
        "order_seed": run.state.feed.seed,
        "versions": {"python": platform.python_version(), **_versions()},
        "git": git_state(Path.cwd()),
        "host": platform.node(),
        "system": platform.platform(),
        "processes": run.fabric.world_size,
        "devices": _devices(run.fabric),
    }


def _command() -> str:
    """The command line of this process as it would be typed again."""
    program = Path(sys.argv[0])
    if program.name != "__main__.py":
        return shlex.join([program.name, *sys.argv[1:]])
    start = ["weft"] if program.parent.name == "cli" else ["python", "-m", program.parent.name]
    return shlex.join([*start, *sys.argv[1:]])


def _versions() -> dict[str, str]:
    import torch

    found = {"weft": sys.modules["weft"].__version__, "torch": str(torch.__version__)}
    found |= {"cuda": cuda} if (cuda := torch.version.cuda) else {}  # type: ignore[attr-defined]
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """The commit that `folder` is at and whether anything differs from it; None outside git or without it.

    A checkout is somebody else's as long as nobody looked at it, and its config can name programs: git is asked in a
    way that starts none of them (hooks, file monitors, filters, those of submodules).
    """
    try:
        commit = _git(folder, "rev-parse", "--verify", "HEAD")
        named = _git(folder, "config", "--list", "--name-only", "-z", "--show-scope").split("\0")
        own = {name for scope, name in zip(named[::2], named[1::2], strict=False) if scope not in ("system", "global")}
        filters = [name for name in own if name.startswith("filter.")]
        changed = _git(folder, "status", "--porcelain", "--ignore-submodules=all", off=filters).splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return {
        "commit": commit.strip(),
        "clean": not changed,
        **({"changed": [c.strip() for c in changed[:20]]} if changed else {}),
    }


_OFF = {"core.fsmonitor": "false", "core.hooksPath": os.devnull, "core.pager": "cat", "diff.external": ""}


def _git(folder: Path, *arguments: str, off: Sequence[str] = ()) -> str:
    settings = {**_OFF, **{name: "false" if name.endswith(".required") else "" for name in off}}
    env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_CONFIG_COUNT": str(len(settings))}
    for number, (key, value) in enumerate(settings.items()):
        env |= {f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value}
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True, env=env
    )
    return done.stdout


def _devices(fabric: Any) -> list[str]:
    """The names of the devices of this process's machine that the run uses."""
    import torch

    device = fabric.device
    if device.type == "cuda":
        return [
            f"{torch.cuda.get_device_name(i)}" for i in getattr(fabric.strategy, "parallel_devices", None) or [device]
        ]
    if device.type == "cpu":
        return [f"{_processor()}, {torch.get_num_threads()} threads"]
    return [str(device)]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
