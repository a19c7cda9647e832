"""The options of a training run that are plain data, validated: what can stand in a file or on a command line.

    TrainerConfig(epochs=200, patience=20)      # ValueError names every field that is wrong, all at once
    complaints(TrainerConfig, {"epochs": -1}, "trainer.")   # ["trainer.epochs=-1: must be at least 0"]

The bounds of a field are part of its type: `Count` is a whole number of at least 1. Any class with annotated fields can
be checked in this way. Imports nothing slow, so that a command line can check its input before torch is loaded.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from weft.types import alternatives

# ------------------------------------------------------------------------------------------------ kinds of values


def at_least(least: float) -> Callable[[float], str]:
    """A bound: what is wrong with a number below `least`, "" otherwise. It stands in the Annotated type of a field."""
    return lambda value: "" if value >= least else f"must be at least {least}"


def _positive(value: float) -> str:
    return "" if value > 0 else "must be greater than 0"


def _time(text: str) -> str:
    try:
        return _positive(parse_time(text))
    except ValueError as error:
        return str(error)


def _limit(value: Any) -> str:
    limits = value if isinstance(value, Mapping) else {"train": value}
    if unknown := [k for k in limits if k not in ("train", "dev", "test", "predict")]:
        return f"no split is named {unknown}; expected train, dev, test, predict"
    right = all(1 <= v < 1 << 62 if isinstance(v, int) else 0 < v <= 1 for v in limits.values())
    return "" if right else "expected a number of batches (int >= 1) or a share (0 < float <= 1)"


def _devices(number: int) -> str:
    return "" if number == -1 or 0 <= number <= 4096 else "expected -1 (all) or at most 4096 devices on a machine"


def _nodes(number: int) -> str:
    return "" if 1 <= number <= 100_000 else "must be at least 1 and at most 100000"


def _sizes(sizes: Mapping[str, Any]) -> str:
    return next((wrong for size in sizes.values() if (wrong := complaint(size, BatchSize))), "")


def _path(text: str) -> str:
    try:
        return "" if "\0" not in os.fsencode(text).decode("latin-1") else "must not hold the character NUL"
    except UnicodeEncodeError:
        return "cannot be the name of a file"


def _folder_name(text: str) -> str:
    """What is wrong with the name of a folder below another one; it may have folders of its own ("a/b")."""
    parts = text.split("/")
    if "" in parts or "." in parts or ".." in parts or os.path.isabs(text):
        return "expected a name below root_dir, without '.', '..' or a leading '/'"
    if not text.isprintable():
        return "must not hold control characters"
    if wrong := _path(text):
        return wrong
    return "must not be longer than 200 bytes" if max(len(os.fsencode(p)) for p in parts) > 200 else ""


Count = Annotated[int, at_least(1)]
Natural = Annotated[int, at_least(0)]
Positive = Annotated[float, _positive]
Devices = Annotated[int, _devices]
Nodes = Annotated[int, _nodes]
Time = Annotated[str, _time]
"""Text like "DD:HH:MM:SS"."""
Path = Annotated[str, _path]
FolderName = Annotated[str, _folder_name]
"""Of a folder below another one."""
Limit = Annotated[int | float | dict[str, int | float], _limit]
"""A number of batches or a share of them, or a dict of these by split."""
BatchSize = Count | Literal["all"] | Annotated[Mapping[str, Any], _sizes] | None
"""Rows per batch, or a dict by split, by part of a split, or both."""

T = TypeVar("T")


class Manual:
    """The docstring of a class: a text, and each option of `kinds` with its sentence; made when it is read."""

    def __init__(self, text: str | None, *kinds: type | str) -> None:
        self.text, self.kinds = text, kinds

    def __get__(self, instance: Any, owner: Any = None) -> str:
        from weft.words.editors import manual

        return manual(self.text, self.kinds)


def with_manual(cls: type[T]) -> type[T]:
    """A dataclass of options: an unknown name is met with the closest one, and its docstring tells of each."""
    init, known = cls.__init__, cls.__dataclass_fields__  # type: ignore[attr-defined]

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **given: Any) -> None:
        if unknown := [(name, value) for name, value in given.items() if name not in known]:
            from weft.words.foreign import unknown_options

            raise unknown_options(cls.__name__, unknown, known)
        init(self, *args, **given)

    cls.__init__, cls.__doc__ = __init__, Manual(cls.__doc__, cls)  # type: ignore[assignment, misc]
    return cls


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
    16,
    32,
    64,
]


@with_manual
@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written, and how many are kept."""

    every_n_steps: Count | None = None
    """Save after every n optimizer steps (>= 1); None: not by steps."""
    every_n_epochs: Count | None = None
    """Save after every n epochs (>= 1); None: 1 if neither steps nor seconds are given."""
    every_n_seconds: Positive | None = None
    """Save at the first step boundary n seconds after the last save (> 0 s); None: not by time."""
    best: bool = True
    """Also save whenever the monitored metric improved."""
    keep: Annotated[int, at_least(2)] = 2
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


@with_manual
@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Everything about a run that is plain data. All keyword; an unknown name or a wrong value raises."""

    epochs: Natural = 1000
    """Passes over the training data (>= 0); a second `fit` of the same problem trains so many more."""
    min_epochs: Natural = 0
    """Early stopping waits for so many epochs (>= 0)."""
    max_steps: Natural | None = None
    """Stop after so many optimizer steps of this fit (>= 0); None: no limit."""
    max_time: Positive | Time | None = None
    """Stop at the first step boundary after so many seconds (> 0 s), or "DD:HH:MM:SS"; None: no limit."""
    train_metric: str = "train_loss"
    """Key of the loss to minimise in what the problem returns for a training batch."""
    dev_metric: str = "dev_loss"
    """Key of the loss in what the problem returns for a dev batch; monitored by default."""
    test_metric: str = "test_loss"
    """Key of the loss in what the problem returns for a test batch."""
    monitor_metric: str | Literal[False] | None = None
    """What decides best weights and early stopping; None: dev_metric, or train_metric; False: the last weights stay."""
    monitor_mode: Literal["min", "max"] = "min"
    """Whether smaller ("min") or larger ("max") is better."""
    patience: Count | None = None
    """Stop after so many validations without improvement (>= 1); None: never."""
    min_delta: Annotated[float, at_least(0)] = 0.0
    """An improvement must be larger than this (>= 0, in units of the metric)."""
    warmup: Natural = 0
    """Epochs at the start that do not count against patience (>= 0)."""
    clip: Positive | None = None
    """Largest gradient norm, or largest absolute entry (> 0); None: no clipping."""
    clip_algorithm: Literal["norm", "value"] = "norm"
    """Clip the global 2-norm of an optimizer's gradients ("norm") or each entry ("value")."""
    accumulate: Count = 1
    """Batches per optimizer step (>= 1); as one big batch for means over rows, or over a returned `num_examples`."""
    validate_every: Count = 1
    """Validate after every n epochs and after the last (>= 1)."""
    accelerator: str = "auto"
    """"auto", "cpu", "gpu", "cuda", "mps", "tpu"."""
    devices: Devices | str | list[int] = 1
    """How many devices, which ones ([0, 2] or "0,2"), -1 or "auto" for all."""
    num_nodes: Nodes = 1
    """Machines (>= 1)."""
    strategy: str = "auto"
    """"auto", "ddp", "ddp_spawn", "ddp_fork", "ddp_notebook", "ddp_find_unused_parameters_true", or "fsdp": shards."""
    precision: Precision = "32-true"
    """"32-true", "64-true", "bf16-mixed", "16-mixed", "bf16-true", ...; inputs keep their dtype under "-mixed"."""
    timeout: Positive | None = None
    """Seconds after which a lost process ends the job (> 0 s); None: torch's default."""
    compile: bool | Literal["auto"] = False
    """Turn the update into one compiled graph: True, False, or "auto" (decided from counts before step 0)."""
    seed: Natural | None = None
    """Seeds python, numpy and torch, and the order of the data (>= 0); None: random state is left alone."""
    deterministic: bool = False
    """Only deterministic algorithms (torch.use_deterministic_algorithms) during the fit."""
    on_nonfinite: Literal["raise", "skip", "stop", "ignore"] = "raise"
    """What happens when a loss or gradient is NaN or infinite, before the optimizer steps; "ignore": it steps."""
    strict_data: bool = False
    """NaN or Inf in the data is an error instead of a warning."""
    root_dir: Path | None = None
    """Folder that run folders go into; None: nothing is written unless a logger or checkpoint asks ("runs")."""
    run_name: FolderName | None = None
    """Name of the run's folder below root_dir; None: a timestamp."""
    log_every: Count | None = None
    """Also log step values every n steps (>= 1); None: once per epoch."""
    checkpoint: bool | CheckpointConfig | dict[str, Any] = False
    """True, or the settings of `CheckpointConfig`; False: none."""
    resume: str | None = None
    """"auto", "last", "best" or the path of a checkpoint to go on from; None: start anew."""
    profiler: Literal["simple", "pytorch", "advanced"] | None = None
    """Where the time goes: "simple" (a table), "pytorch" (a trace in the folder), "advanced" (cProfile); None: off."""
    progress: bool | Literal["auto"] = "auto"
    """The progress line on stderr: "auto" (a line that is rewritten, or plain lines without a terminal) or False."""
    fast_dev_run: bool | Natural = False
    """True (1 batch) or n: one epoch of n batches of each split, nothing written to disk."""
    limit_batches: Limit | None = None
    """At most n batches (int >= 1) or a share (0 < float <= 1) of each epoch; by split as a dict; None: all."""

    def __post_init__(self) -> None:
        check(self)
        if isinstance(self.checkpoint, dict):
            object.__setattr__(self, "checkpoint", CheckpointConfig(**self.checkpoint))

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

    def metric_of(self, split: str) -> str:
        """The key of the loss of `split`."""
        return {"train": self.train_metric, "dev": self.dev_metric}.get(split, self.test_metric)

    def limit(self, split: str) -> int | float | None:
        """The limit on batches that holds for `split`."""
        if self.fast_dev_run:
            return int(self.fast_dev_run)
        return self.limit_batches.get(split) if isinstance(self.limit_batches, dict) else self.limit_batches

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for YAML; `TrainerConfig(**config.to_dict()) == config`."""
        return dataclasses.asdict(self)


# ------------------------------------------------------------------------------------------------ checking


def check(config: Any) -> None:
    """Raise one ValueError that names every field of the dataclass `config` with a wrong type or value.

    Containers of other libraries (OmegaConf's) become lists and dicts.
    """
    for field in dataclasses.fields(config):
        object.__setattr__(config, field.name, _plain(getattr(config, field.name)))
    if wrong := complaints(type(config), vars(config)):
        raise ValueError(f"{type(config).__name__}: " + "; ".join(wrong))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping) and not isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview | list | tuple):
        return [_plain(part) for part in value]
    return value


@functools.cache
def types_of(cls: type) -> dict[str, Any]:
    """The types of the annotated fields of a class by name, with their bounds."""
    return get_type_hints(cls, include_extras=True)


def complaints(cls: type, values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What is wrong with `values` as fields of the class `cls`: a line for each unknown name and wrong value.

    `prefix` stands before each name ("trainer."). An empty list means that `cls(**values)` works.
    """
    types = types_of(cls)
    wrong = []
    for name, value in values.items():
        if name not in types:
            from weft.words.foreign import advice

            hint = advice(str(name), value, types) or f"; there are {', '.join(types)}"
            wrong.append(f"{prefix}{name}={value!r}: there is no such option{hint}")
        elif isinstance(value, dict) and (inner := config_in(types[name])):
            wrong += complaints(inner, value, f"{prefix}{name}.")
        elif found := complaint(value, types[name]):
            wrong.append(f"{prefix}{name}={value!r}: {found}")
    return wrong


def config_in(kind: Any) -> type | None:
    """The dataclass among the alternatives of a type: what a dict in its place describes."""
    return next((a for a in alternatives(kind) if isinstance(a, type) and dataclasses.is_dataclass(a)), None)


def complaint(value: Any, kind: Any) -> str:
    """Why `value` cannot stand where the type `kind` is asked for, "" if it can."""
    fitting = [a for a in alternatives(kind) if matches(value, a)]
    if not fitting:
        from weft.words.kinds import expected

        return expected(kind, value)
    if isinstance(value, float) and not math.isfinite(value):
        return "expected a finite number"
    if isinstance(value, int) and value.bit_length() > 64:
        return "must have at most 64 bits"
    bounds = [getattr(a, "__metadata__", ()) for a in fitting]
    return min((next((wrong for b in found if (wrong := b(value))), "") for found in bounds), key=bool)


def matches(value: Any, kind: Any) -> bool:
    """Whether `value` has the type `kind`, whatever its bounds (an int is a float, a bool is no int)."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return matches(value, args[0])
    if origin in (Union, UnionType):
        return any(matches(value, a) for a in args)
    if origin is Literal:
        return any(value is a or (type(value) is type(a) and value == a) for a in args)
    if origin in (dict, Mapping):
        return isinstance(value, origin) and all(matches(k, args[0]) and matches(v, args[1]) for k, v in value.items())
    if origin in (list, tuple, Sequence):
        return isinstance(value, list | tuple) and all(matches(v, args[0]) for v in value)
    if kind is Any:
        return True
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    try:
        return isinstance(value, origin or kind)
    except TypeError:  # nothing that a value can be asked for, such as a type variable
        return True


def parse_time(text: str) -> float:
    """Seconds in "DD:HH:MM:SS" (leading parts may be missing). Raises ValueError for anything else."""
    parts = text.split(":")
    if not 2 <= len(parts) <= 4 or not all(p.strip().isdigit() for p in parts):
        raise ValueError('expected seconds or "DD:HH:MM:SS"')
    units = (86400, 3600, 60, 1)[-len(parts) :]
    return float(sum(int(p) * u for p, u in zip(parts, units, strict=True)))
