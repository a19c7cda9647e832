"""What the sentence of each option allows, written down a second time: what accepted values are held against."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Rule = Callable[[Any], bool]


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return _whole(value) or (isinstance(value, float) and math.isfinite(value))


def integer(least: int, most: int = 2**64) -> Rule:
    return lambda value: _whole(value) and least <= value <= most


def above(least: float, equal: bool = False) -> Rule:
    return lambda value: _number(value) and (value > least or (equal and value == least))


def one_of(*choices: Any) -> Rule:
    return lambda value: any(type(value) is type(choice) and value == choice for choice in choices)


def either(*rules: Rule) -> Rule:
    return lambda value: any(rule(value) for rule in rules)


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(is_text, value))


def duration(value: Any) -> bool:
    parts = value.split(":") if isinstance(value, str) else []
    return 2 <= len(parts) <= 4 and all(part.isdecimal() for part in parts) and any(int(part) for part in parts)


def size(value: Any) -> bool:
    return either(none, one_of("all"), integer(1))(value) or (
        isinstance(value, Mapping) and all(map(size, value.values()))
    )


def limit(value: Any) -> bool:
    if isinstance(value, dict):
        return set(value) <= {"train", "dev", "test", "predict"} and all(_limit(v) for v in value.values())
    return _limit(value)


def _limit(value: Any) -> bool:
    return integer(1)(value) or (isinstance(value, float) and 0 < value <= 1)


def checkpoint(value: Any) -> bool:
    return isinstance(value, bool) or (
        isinstance(value, dict) and all(k in _SAVING and _SAVING[k](v) for k, v in value.items())
    )


def name_below(value: Any) -> bool:
    return (
        is_text(value)
        and bool(value)
        and value.isprintable()
        and not set(value.split("/")) & {"", ".", ".."}
        and path(value)
    )


def path(value: Any) -> bool:
    try:
        return is_text(value) and b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False


none, flag = one_of(None), one_of(True, False)
_SAVING = {
    "every_n_steps": either(none, integer(1)),
    "every_n_epochs": either(none, integer(1)),
    "every_n_seconds": either(none, above(0)),
    "best": flag,
    "keep": integer(2),
    "background": flag,
}
PRECISIONS = (
    "32-true 64-true 16-mixed bf16-mixed 16-true bf16-true transformer-engine transformer-engine-float16 16 bf16 32 64"
)
STRATEGIES = "auto ddp ddp_spawn ddp_fork ddp_notebook ddp_find_unused_parameters_true fsdp"
ALLOWED: dict[str, Rule] = {
    "epochs": integer(0),
    "min_epochs": integer(0),
    "max_steps": either(none, integer(0)),
    "max_time": either(none, above(0), duration),
    "train_metric": is_text,
    "dev_metric": is_text,
    "test_metric": is_text,
    "monitor_metric": either(none, is_text, one_of(False)),
    "monitor_mode": one_of("min", "max"),
    "patience": either(none, integer(1)),
    "min_delta": above(0, equal=True),
    "warmup": integer(0),
    "clip": either(none, above(0)),
    "clip_algorithm": one_of("norm", "value"),
    "accumulate": integer(1),
    "validate_every": integer(1),
    "accelerator": one_of("auto", "cpu", "gpu", "cuda", "mps", "tpu"),
    "devices": either(integer(-1), one_of("auto"), is_text, lambda v: isinstance(v, list) and all(map(_whole, v))),
    "num_nodes": integer(1),
    "strategy": one_of(*STRATEGIES.split()),
    "precision": one_of(*PRECISIONS.split(), 16, 32, 64),
    "timeout": either(none, above(0)),
    "compile": one_of(True, False, "auto"),
    "seed": either(none, integer(0)),
    "deterministic": flag,
    "on_nonfinite": one_of("raise", "skip", "stop", "ignore"),
    "strict_data": flag,
    "root_dir": either(none, path),
    "run_name": either(none, name_below),
    "log_every": either(none, integer(1)),
    "checkpoint": checkpoint,
    "resume": either(none, is_text),
    "profiler": one_of(None, "simple", "pytorch", "advanced"),
    "progress": one_of(True, False, "auto"),
    "fast_dev_run": either(flag, integer(0)),
    "limit_batches": either(none, limit),
    "batch_size": size,
    "shuffle": flag,
    "drop_last": flag,
    "num_workers": either(integer(0), one_of("all")),
    "pre_batch": one_of(None, "in_memory", "on_disk"),
    "refresh_every": either(none, integer(1)),
    "inputs_require_grad": texts,
}
