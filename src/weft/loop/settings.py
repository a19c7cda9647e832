"""Under which settings a run trains, as a checkpoint records them.

`fixed_settings` give the saved state its meaning. With other `settings` (options, versions, the data) a run is another
one. `weft.loop.compatibility` compares them where a run goes on.
"""

from __future__ import annotations

import platform
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from weft.data.batches import Batches
from weft.loop.order import generators_in

if TYPE_CHECKING:
    from weft.step.state import RunState

# These say how long, where and how visibly a run trains; changing them changes no number of an epoch.
_FREE_OPTIONS = {
    "epochs",
    "max_steps",
    "max_time",
    "root_dir",
    "run_name",
    "log_every",
    "checkpoint",
    "resume",
    "profiler",
    "progress",
    "timeout",
    "loggers",
}


PRINTS = ("train data", "dev data")


def fixed_settings(state: RunState) -> dict[str, str]:
    """What gives the saved state its meaning, as strings by name: with another value it cannot be resumed."""
    found = {
        "precision": state.fabric._precision.precision,
        "processes": state.processes.world,
        "accumulate": state.config.accumulate,
        "compile": state.training.compile_choice,
        "phases": len(state.training.phases),
        "optimizers": {name: type(o).__name__ for name, o in state.training.optimizers.items()},
        "schedulers": {
            name: f"{type(s.scheduler).__name__} each {s.interval}" for name, s in state.training.schedules.items()
        },
        "rows of the training data": state.rows("train"),
        "batch_size": state.feed.data.batch_size,
        "batches in an epoch": _num_batches(state.source("train")),
        "limit_batches": state.config.limit("train"),
        "shuffle": state.feed.data.shuffle,
        "drop_last": state.feed.data.drop_last,
    }
    if state.processes.in_shards:
        found["problem"] = "in shards"
    return {name: str(value) for name, value in found.items()}


def _num_batches(source: Any) -> int | None:
    try:
        return len(source)
    except TypeError:  # a loader of a stream
        return None


MARK = "generators"
"""A setting that files of the first version lack, as they lack `NEW`."""
NEW = (MARK, "scheduler ", "functions of ", "turns of ", "groups of optimizer ", "phase ", "weights of phase ")


def settings(state: RunState) -> dict[str, str]:
    """Options, versions and data as strings by name: what may change, but then the run is another one."""
    found: dict[str, Any] = {k: repr(v) for k, v in state.config.to_dict().items() if k not in _FREE_OPTIONS}
    objects = {k: _name_of(v) for k, v in state.trainer.options.items() if v is not None and k not in _FREE_OPTIONS}
    device = state.fabric.device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    found |= {
        **objects,
        **{f"optimizer {name}": _defaults(o) for name, o in state.training.optimizers.items()},
        **state.training.made,
        **_of_phases(state),
        "device": f"{device.type} ({kind})",
        "number of threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
        MARK: sorted(generators_in(state)),
        **data_prints(state),
        **state.kept.in_force,
    }
    return {name: str(value) for name, value in found.items()}


def _of_phases(state: RunState) -> dict[str, Any]:
    """What the phases of a run in several are, by their numbers."""
    found: dict[str, Any] = {}
    if len(phases := state.training.phases) == 1:
        return found
    from weft.loop.made import in_words

    for number, phase in enumerate(phases):
        found[f"phase {number}"] = f"epochs={phase.epochs}, freeze={list(phase.freeze)}, patience={phase.patience}"
        if phase.until is not None:
            found[f"end of phase {number}"] = str(phase.until)
        found[f"weights of phase {number}"] = in_words(dict(phase.weights or {}))
    return found


def optimizers_made(optimizers: Mapping[str, Optimizer]) -> dict[str, str]:
    """The groups of optimizers where they differ from the defaults, as they were made: later their numbers change."""
    found = {}
    for name, optimizer in optimizers.items():
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        groups = [{**group, "lr": group.get("initial_lr", group.get("lr"))} for group in groups]
        plain = [{k: v for k, v in g.items() if v != optimizer.defaults.get(k) and k != "initial_lr"} for g in groups]
        if any(plain):
            from weft.loop.made import in_words

            found[f"groups of optimizer {name}"] = str([in_words(group) for group in plain])
    return found


def data_prints(state: RunState) -> dict[str, str]:
    """A text that changes with the data, for train and dev; made once for each data (it reads the device)."""
    if not state.kept.data_prints:
        sources = dict(zip(PRINTS, (state.source("train"), state.source("dev")), strict=True))
        state.kept.data_prints = {name: print_of(source) for name, source in sources.items() if source is not None}
    return state.kept.data_prints


def print_of(batches: Any) -> str:
    """Rows, and a checksum of up to a million numbers of each tensor."""
    if not isinstance(batches, Batches):
        return f"{batches.rows} rows"
    found = []
    for part, tensors in batches.parts.items():
        for key, tensor in tensors.items():
            stride = max(1, tensor[0].numel() * len(tensor) // 1_000_000)
            rows = tensor.detach()[::stride].contiguous().cpu()
            checksum = zlib.crc32(rows.view(-1).view(torch.uint8).numpy().tobytes()) if rows.numel() else 0
            found.append(f"{part + '.' if part else ''}{key} {tuple(tensor.shape)} {checksum:08x}")
    return ", ".join(found)


def _defaults(optimizer: Optimizer) -> str:
    plain = {k: v for k, v in optimizer.defaults.items() if isinstance(v, bool | int | float | str | tuple | None)}
    plain.pop("differentiable", None)  # torch adds it to some when it loads them
    return f"{type(optimizer).__name__}({', '.join(f'{k}={v}' for k, v in plain.items())})"


def _name_of(value: Any) -> str:
    if isinstance(value, Mapping):
        return str({k: _name_of(v) for k, v in value.items()})
    if isinstance(value, list | tuple):
        return str([_name_of(v) for v in value])
    return value if isinstance(value, str) else getattr(value, "__qualname__", type(value).__qualname__)
