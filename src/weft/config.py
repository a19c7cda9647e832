"""The options of a training run that are plain data, validated: what can stand in a file or on a command line.

    TrainerConfig(epochs=200, patience=20)      # ValueError names every field that is wrong, all at once
    complaints(TrainerConfig, {"epochs": -1}, "trainer.")   # ["trainer.epochs=-1: must be at least 0"]

Imports nothing slow, so that a command line can check its input before torch is loaded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from weft.types import suggest

Precision = Literal[
    "32-true",
    "64-true",
    "16-mixed",
    "bf16-mixed",
    "16-true",
    "bf16-true",
    "transformer-engine",
    "transformer-engine-float16",
    "16",
    "bf16",
    "32",
    "64",
]


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written, and how many are kept."""

    every_n_steps: int | None = None
    """Save after every n optimizer steps (>= 1); None: not by steps."""
    every_n_epochs: int | None = None
    """Save after every n epochs (>= 1); None: 1 if neither steps nor seconds are given."""
    every_n_seconds: float | None = None
    """Save at the first step boundary n seconds after the last save (> 0 s); None: not by time."""
    best: bool = True
    """Also save whenever the monitored metric improved."""
    keep: int = 2
    """How many of the newest checkpoints stay on disk besides the best (>= 2)."""
    background: bool = False
    """Write in a thread while the next steps run."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def epochs(self) -> int | None:
        """`every_n_epochs`, or 1 where nothing else was asked for."""
        if self.every_n_epochs is None and self.every_n_steps is None and self.every_n_seconds is None:
            return 1
        return self.every_n_epochs


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Everything about a run that is plain data. All keyword; an unknown name or a wrong value raises."""

    epochs: int = 1000
    """Passes over the training data (>= 0); a second `fit` of the same problem trains so many more."""
    min_epochs: int = 0
    """Early stopping waits for so many epochs (>= 0)."""
    max_steps: int | None = None
    """Stop after so many optimizer steps of this fit (>= 0); None: no limit."""
    max_time: float | str | None = None
    """Stop at the first step boundary after so many seconds (> 0 s), or "DD:HH:MM:SS"; None: no limit."""
    train_metric: str = "train_loss"
    """Key of the loss to minimise in what the problem returns for a training batch."""
    dev_metric: str = "dev_loss"
    """Key of the loss in what the problem returns for a dev batch; monitored by default."""
    test_metric: str = "test_loss"
    """Key of the loss in what the problem returns for a test batch."""
    monitor_metric: str | None = None
    """Metric that decides best weights and early stopping; None: dev_metric, or train_metric without a dev set."""
    monitor_mode: Literal["min", "max"] = "min"
    """Whether smaller ("min") or larger ("max") is better."""
    patience: int | None = None
    """Stop after so many validations without improvement (>= 1); None: never."""
    min_delta: float = 0.0
    """An improvement must be larger than this (>= 0, in units of the metric)."""
    warmup: int = 0
    """Epochs at the start that do not count against patience (>= 0)."""
    clip: float | None = None
    """Largest gradient norm, or largest absolute entry (> 0); None: no clipping."""
    clip_algorithm: Literal["norm", "value"] = "norm"
    """Clip the global 2-norm of an optimizer's gradients ("norm") or each entry ("value")."""
    accumulate: int = 1
    """Batches per optimizer step (>= 1); the update equals that of one big batch."""
    validate_every: int = 1
    """Validate after every n epochs and after the last (>= 1)."""
    accelerator: str = "auto"
    """"auto", "cpu", "gpu", "cuda", "mps", "tpu"."""
    devices: int | str | list[int] = 1
    """How many devices, which ones ([0, 2] or "0,2"), -1 or "auto" for all."""
    num_nodes: int = 1
    """Machines (>= 1)."""
    strategy: str = "auto"
    """"auto", "ddp", "ddp_spawn", "ddp_fork", "ddp_notebook", "ddp_find_unused_parameters_true" or "fsdp" (in shards)."""
    precision: Precision | int = "32-true"
    """"32-true", "64-true", "bf16-mixed", "16-mixed", "bf16-true", ...; inputs keep their dtype under "-mixed"."""
    timeout: float | None = None
    """Seconds after which a lost process ends the job (> 0 s); None: torch's default."""
    compile: bool | Literal["auto"] = False
    """Turn the update into one compiled graph: True, False, or "auto" (decided from counts before step 0)."""
    seed: int | None = None
    """Seeds python, numpy and torch, and the order of the data (>= 0); None: random state is left alone."""
    deterministic: bool = False
    """Only deterministic algorithms (torch.use_deterministic_algorithms) during the fit."""
    on_nonfinite: Literal["raise", "skip", "stop"] = "raise"
    """What happens when a loss or gradient is NaN or infinite, before the optimizer steps."""
    strict_data: bool = False
    """NaN or Inf in the data is an error instead of a warning."""
    root_dir: str | None = None
    """Folder that run folders go into; None: nothing is written unless a logger or checkpoint asks ("runs")."""
    run_name: str | None = None
    """Name of the run's folder below root_dir; None: a timestamp."""
    log_every: int | None = None
    """Also log step values every n steps (>= 1); None: once per epoch."""
    checkpoint: bool | CheckpointConfig | dict[str, Any] = False
    """True, or the settings of `CheckpointConfig`; False: none."""
    resume: str | None = None
    """"auto", "last", "best" or the path of a checkpoint to go on from; None: start anew."""
    profiler: Literal["simple", "pytorch", "advanced"] | None = None
    """Where the time goes: "simple" (a table), "pytorch" (a trace in the run's folder), "advanced" (cProfile); None: off."""
    progress: bool | Literal["auto"] = "auto"
    """The progress line on stderr: "auto" (a line that is rewritten, or plain lines without a terminal) or False."""
    fast_dev_run: bool | int = False
    """True (1 batch) or n: one epoch of n batches of each split, nothing written to disk."""
    limit_batches: int | float | dict[str, int | float] | None = None
    """At most n batches (int >= 1) or a share (0 < float <= 1) of each epoch; by split as a dict; None: all."""

    def __post_init__(self) -> None:
        if isinstance(self.checkpoint, dict):
            object.__setattr__(self, "checkpoint", build(CheckpointConfig, self.checkpoint, "checkpoint."))
        check(self)

    @property
    def max_seconds(self) -> float | None:
        """`max_time` in seconds."""
        return parse_time(self.max_time) if isinstance(self.max_time, str) else self.max_time

    @property
    def checkpointing(self) -> CheckpointConfig | None:
        """The settings in force, None if no checkpoints are written."""
        if isinstance(self.checkpoint, CheckpointConfig):
            return self.checkpoint
        return CheckpointConfig() if self.checkpoint else None

    def limit(self, split: str) -> int | float | None:
        """The limit on batches that holds for `split`."""
        if self.fast_dev_run:
            return int(self.fast_dev_run)
        return self.limit_batches.get(split) if isinstance(self.limit_batches, dict) else self.limit_batches

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for YAML; `TrainerConfig(**config.to_dict()) == config`."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How data is cut into batches, where it differs from what the data setup function returned.

    None everywhere: as it said. The fields are those of `weft.Data`.
    """

    batch_size: int | Literal["all"] | dict[str, Any] | None = None
    """Rows per batch and process (>= 1), "all" for one batch, or a dict of these by split or part."""
    shuffle: bool | None = None
    """Training rows in a new order each epoch."""
    drop_last: bool | None = None
    """Leave out a short last training batch."""
    num_workers: int | Literal["all"] | None = None
    """Processes that read a dataset which is not made of tensors (>= 0); "all": one per core."""
    pre_batch: Literal["in_memory", "on_disk"] | None = None
    """Make the batches of a dataset once and keep them, in memory or in a temporary folder."""
    refresh_every: int | None = None
    """Call the data setup function again every n epochs (>= 1)."""
    inputs_require_grad: list[str] | None = None
    """Keys that derivatives are taken with respect to."""

    def __post_init__(self) -> None:
        check(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for YAML; `DataConfig(**config.to_dict()) == config`."""
        return dataclasses.asdict(self)


_AT_LEAST = {
    "epochs": 0,
    "min_epochs": 0,
    "max_steps": 0,
    "patience": 1,
    "min_delta": 0,
    "warmup": 0,
    "accumulate": 1,
    "validate_every": 1,
    "num_nodes": 1,
    "seed": 0,
    "log_every": 1,
    "fast_dev_run": 0,
    "every_n_steps": 1,
    "every_n_epochs": 1,
    "keep": 2,
    "batch_size": 1,
    "num_workers": 0,
    "refresh_every": 1,
    "trials": 1,
    "workers": 1,
    "max_failures": 0,
}
_POSITIVE = {"max_time", "clip", "timeout", "every_n_seconds"}
_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    dict: "a dict",
    list: "a list",
    type(None): "nothing (null)",
}


def build(cls: type, values: dict[str, Any], prefix: str = "") -> Any:
    """`cls(**values)`, where an unknown name raises TypeError with the closest known one."""
    known = [f.name for f in dataclasses.fields(cls)]
    unknown = [k for k in values if k not in known]
    if unknown:
        listed = ", ".join(f"{prefix}{k}" for k in unknown)
        raise TypeError(f"Unknown option {listed}{suggest(unknown[0], known) or f'. Options: {known}'}")
    return cls(**values)


def check(config: Any) -> None:
    """Raise one ValueError that names every field of the dataclass `config` with a wrong type or value."""
    if wrong := complaints(type(config), vars(config)):
        raise ValueError(f"{type(config).__name__}: " + "; ".join(wrong))


def complaints(cls: type, values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What is wrong with `values` as fields of the dataclass `cls`: a line for each unknown name and wrong value.

    `prefix` stands before each name ("trainer."). An empty list means that `cls(**values)` works.
    """
    hints = get_type_hints(cls)
    wrong = []
    for name, value in values.items():
        if name not in hints:
            hint = suggest(str(name), hints) or f"; there are {', '.join(hints)}"
            wrong.append(f"{prefix}{name}={value!r}: there is no such option{hint}")
        elif name == "checkpoint" and isinstance(value, dict):
            wrong += complaints(CheckpointConfig, value, f"{prefix}checkpoint.")
        elif complaint := _complaint(name, value, hints[name]):
            wrong.append(f"{prefix}{name}={value!r}: {complaint}")
    return wrong


def typed(cls: type, name: str, text: str, parse: Callable[[str], Any]) -> Any:
    """`text` as the value that field `name` of the dataclass `cls` may have; `parse` reads numbers, lists, null.

    Text that is allowed as it stands stays text where what it parses to is not allowed ("0,2", "007").
    """
    hint = get_type_hints(cls).get(name, Any)
    parsed = parse(text)
    return text if not matches(parsed, hint) and matches(text, hint) else parsed


def _complaint(name: str, value: Any, hint: Any) -> str:
    if not matches(value, hint):
        choices = [c for c in _choices(hint) if isinstance(c, str)]
        return f"expected {describe(hint)}" + (suggest(value, choices) if isinstance(value, str) else "")
    if isinstance(value, float) and not math.isfinite(value):
        return "expected a finite number"
    if value is None or isinstance(value, bool):
        return ""
    if name in _AT_LEAST and isinstance(value, int | float) and value < _AT_LEAST[name]:
        return f"must be at least {_AT_LEAST[name]}"
    if name in _POSITIVE and not isinstance(value, str) and value <= 0:
        return "must be greater than 0"
    if name == "max_time" and isinstance(value, str):
        try:
            return "" if parse_time(value) > 0 else "must be greater than 0"
        except ValueError as error:
            return str(error)
    if name == "precision" and not isinstance(value, str) and value not in (16, 32, 64):
        return "expected 16, 32 or 64"
    if name == "limit_batches":
        limits = value if isinstance(value, dict) else {"": value}
        unknown = [k for k in limits if k not in ("", "train", "dev", "test", "predict")]
        if unknown:
            return f"no split is named {unknown}; expected train, dev, test, predict"
        if not all(v >= 1 if isinstance(v, int) else 0 < v <= 1 for v in limits.values()):  # pyright: ignore[reportOperatorIssue]
            return "expected a number of batches (int >= 1) or a share (0 < float <= 1)"
    return ""


def matches(value: Any, hint: Any) -> bool:
    """Whether `value` has the type that `hint` names (an int is a float, a bool is no int)."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(value is a or (type(value) is type(a) and value == a) for a in args)
    if origin is dict:
        return isinstance(value, dict) and all(matches(k, args[0]) and matches(v, args[1]) for k, v in value.items())
    if origin is list:
        return isinstance(value, list | tuple) and all(matches(v, args[0]) for v in value)
    if args:  # a union
        return any(matches(value, a) for a in args)
    if hint is Any:
        return True
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint if hint is not None else type(None))


def _choices(hint: Any) -> list[Any]:
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [c for a in get_args(hint) for c in _choices(a)]


def describe(hint: Any) -> str:
    """The type that `hint` names, in words: "a whole number or nothing (null)"."""
    if get_origin(hint) is Literal:
        return " or ".join(repr(c) for c in get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(dict.fromkeys(describe(a) for a in get_args(hint)))
    if get_origin(hint) is list and get_args(hint):
        return f"a list (each {describe(get_args(hint)[0])})"
    kind = get_origin(hint) or hint
    return _WORDS.get(kind, getattr(kind, "__name__", str(hint)))


def parse_time(text: str) -> float:
    """Seconds in "DD:HH:MM:SS" (leading parts may be missing). Raises ValueError for anything else."""
    parts = text.split(":")
    if not 2 <= len(parts) <= 4 or not all(p.strip().isdigit() for p in parts):
        raise ValueError('expected seconds or "DD:HH:MM:SS"')
    units = (86400, 3600, 60, 1)[-len(parts) :]
    return float(sum(int(p) * u for p, u in zip(parts, units, strict=True)))
