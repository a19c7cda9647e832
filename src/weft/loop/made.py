"""What optimizers and schedulers were made with, in words that change when it does. Loaded for a run with a folder."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from weft.devices.generators import closure_of
from weft.places import slots_of

if TYPE_CHECKING:
    from weft.step.schedules import Scheduled


def schedules_made(optimizers: Mapping[str, Optimizer], schedules: Mapping[str, Scheduled]) -> dict[str, str]:
    """Schedules as they were made; some keep their arguments in the optimizer's groups. What torch does not save of
    them, and so is in force as it is now, under names of its own: functions, and whose turn it is."""
    found = {}
    for name, schedule in schedules.items():
        functions: list[str] = []
        words, turns = in_words(schedule.scheduler, functions=functions), (schedule.frequency, schedule.monitor)
        found |= {f"functions of scheduler {name}": ", ".join(functions)} if functions else {}
        found |= {f"turns of scheduler {name}": f"each {turns[0]}, by {turns[1]}"} if turns != (1, None) else {}
        optimizer = optimizers[name]
        own = [{k: v for k, v in g.items() if k not in optimizer.defaults} for g in optimizer.param_groups]
        own = [{k: v for k, v in group.items() if k not in ("params", "initial_lr")} for group in own]
        found[f"scheduler {name}"] = words + (f", {in_words(own)}" if any(own) else "")
    return found


_EVOLVES = {
    "optimizer",
    "last_epoch",
    "_step_count",
    "_last_lr",
    "base_lrs",
    "_get_lr_called_within_step",
    "_is_initial",
}


_NAMED_ONLY = (torch.nn.Module, Optimizer, ModuleType, type)
MOST_WORDS = 2000  # things that a text describes: a closure may hold the whole of a script


def in_words(value: Any, seen: dict[int, Any] | None = None, functions: list[str] | None = None) -> str:
    """A value as a text that changes when it does: plain values, containers, the code of functions and what they read,
    attributes. What trains is named only: it changes as it does. `functions`: where the texts of functions go instead.
    """
    if isinstance(value, bool | int | float | complex | str | bytes | np.generic | None):
        return repr(value)
    is_own = isinstance(value, MethodType) and isinstance(value.__self__, LRScheduler)
    if is_own or isinstance(value, BuiltinFunctionType):  # of the scheduler that is told, or of no code to be read
        return value.__qualname__
    if isinstance(value, torch.Tensor | np.ndarray):
        is_told = not getattr(value, "requires_grad", False) and math.prod(value.shape) <= 100
        return repr(value.tolist()) if is_told else f"tensor of shape {tuple(value.shape)}"
    name, seen = type(value).__name__, {} if seen is None else seen
    if id(value) in seen or len(seen) >= MOST_WORDS or isinstance(value, _NAMED_ONLY):
        return str(name)
    seen[id(value)] = value  # which keeps the number from being used again
    if functions is not None and isinstance(value, FunctionType | MethodType | partial):
        functions.append(in_words(value, {}))
        return "function"
    words = partial(in_words, seen=seen, functions=functions)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{k}: {words(v)}' for k, v in value.items())}}}"
    if isinstance(value, list | tuple | set):
        items = [words(v) for v in value]
        return f"[{', '.join(sorted(items) if isinstance(value, set) else items)}]"
    if isinstance(value, MethodType):
        return f"{value.__qualname__} {words(value.__func__)} of {words(value.__self__)}"
    if isinstance(value, FunctionType):
        return f"{value.__name__} {_print_of_code(value, words):08x}"
    attributes = {k: v for k, v in getattr(value, "__dict__", {}).items() if k not in _EVOLVES}
    for slot in (slot for kind in type(value).__mro__ for slot in slots_of(kind) if hasattr(value, slot)):
        attributes[slot] = getattr(value, slot)
    if isinstance(value, partial):
        attributes = {"function": value.func, "arguments": value.args, **value.keywords}
    return f"{name}({', '.join(f'{k}={words(v)}' for k, v in attributes.items())})"


def _print_of_code(function: FunctionType, words: Callable[[Any], str]) -> int:
    """A checksum of what a function does: its code, its defaults, what it closes over and reads from its module."""
    codes, found = [function.__code__], []
    for code in codes:  # grows while it is gone through
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        found += [repr(code.co_code), *code.co_names, *(repr(c) for c in code.co_consts if not isinstance(c, CodeType))]
    read = {name: function.__globals__[name] for c in codes for name in c.co_names if name in function.__globals__}
    held = [closure_of(function), function.__defaults__, function.__kwdefaults__, vars(function).get("__wrapped__")]
    return zlib.crc32(f"{found} {words(held)} {words(read)}".encode())
