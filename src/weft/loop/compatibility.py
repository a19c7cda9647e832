"""What must be the same where a run goes on, and what is named if it is not.

`fixed` settings give the saved state its meaning: with others it is refused. With other `settings` (options, versions,
the data) the run goes on, but is another one, and one warning says so.
"""

from __future__ import annotations

import platform
import warnings
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from weft.data.batches import Batches
from weft.step.history import Progress

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


# A LightningModule brings its loaders only when training begins.
_OF_LOADERS, _PRINTS = ("rows of the training data", "batches in an epoch"), ("train data", "dev data")


def describe(progress: Progress) -> str:
    """Where a run is, in words: "after epoch 3, step 120" or "epoch 3, after batch 17, step 117"."""
    if progress.batch == 0:
        return f"after epoch {progress.epoch - 1}, step {progress.step}"
    return f"epoch {progress.epoch}, after batch {progress.batch}, step {progress.step}"


def fixed_settings(state: RunState) -> dict[str, str]:
    """What gives the saved state its meaning, as strings by name: with another value it cannot be resumed."""
    found = {
        "precision": state.fabric._precision.precision,
        "processes": state.processes.world,
        "accumulate": state.config.accumulate,
        "compile": state.kept.compile_choice,
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


def settings(state: RunState) -> dict[str, str]:
    """Options, versions and data as strings by name: what may change, but then the run is another one."""
    found: dict[str, Any] = {k: repr(v) for k, v in state.config.to_dict().items() if k not in _FREE_OPTIONS}
    objects = {k: _name_of(v) for k, v in state.trainer.options.items() if v is not None and k not in _FREE_OPTIONS}
    device = state.fabric.device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    found |= {
        **objects,
        **{f"optimizer {name}": _defaults(o) for name, o in state.training.optimizers.items()},
        "device": f"{device.type} ({kind})",
        "number of threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
        **data_prints(state),
    }
    return {name: str(value) for name, value in found.items()}


def compare(state: RunState, saved: Mapping[str, Any]) -> None:
    """Raise ValueError for settings that must not change, naming all; warn once of those that did otherwise."""
    here, there, path = fixed_settings(state), saved["fixed"], state.kept.resumed_from
    unknown = {name for name in _OF_LOADERS if "None" in (here[name], there.get(name))}
    names = [name for name in here if here[name] != there.get(name) and name not in unknown]
    wrong = [f"{name}: {there.get(name)} there, {here[name]} here" for name in names]
    if not saved["error"] and 1 + len(saved["other_processes"]) != state.processes.world:
        wrong.append(f"state of {1 + len(saved['other_processes'])} processes there")
    if wrong:
        raise ValueError(
            f"{path} cannot be resumed with these settings: {'; '.join(wrong)}. "
            "To train on from its weights alone, use weft.load_weights(problem, path)."
        )
    here, there = settings(state), saved["options"]
    unknown = {name for name in _PRINTS if "None rows" in (here.get(name), there.get(name))}
    names = [name for name in {**there, **here} if here.get(name) != there.get(name) and name not in unknown]
    changed = [f"{name}: {there.get(name, 'nothing')} -> {here.get(name, 'nothing')}" for name in names]
    torn = f" It was saved at an error, maybe in the middle of a step ({saved['error']})." if saved["error"] else ""
    if changed or torn:
        but = f" Changed since: {'; '.join(changed)}." if changed else ""
        warnings.warn(
            f"Resuming {path} ({describe(state.progress)}).{but}{torn} The run will not end bit for bit where the "
            "undisturbed one would.",
            stacklevel=5,
        )


def data_prints(state: RunState) -> dict[str, str]:
    """A text that changes with the data, for train and dev; made once for each data (it reads the device)."""
    if not state.kept.data_prints:
        sources = dict(zip(_PRINTS, (state.source("train"), state.source("dev")), strict=True))
        state.kept.data_prints = {name: _print_of(source) for name, source in sources.items() if source is not None}
    return state.kept.data_prints


def _print_of(batches: Any) -> str:
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
