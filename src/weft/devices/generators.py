"""Random generators that objects hold, wherever they hold them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weft.devices.seeding import GENERATORS
from weft.places import slots_of


def generators_within(thing: Any, place: str, without: Iterable[Any] = (), depth: int = 6) -> dict[str, Any]:
    """All random generators that can be reached from an object, by the way to them.

    The way leads through attributes, items, what functions close over, and the globals that functions and methods name.
    Modules, tensors, weft's own objects, long lists and what is in `without` are not looked into.
    """
    found: dict[str, Any] = {}
    _gather(thing, place, depth, found, {id(one) for one in without}, is_root=True)
    return found


_CLOSED = (torch.nn.Module, Tensor, np.ndarray, type, ModuleType, str, bytes)


def _gather(thing: Any, place: str, depth: int, found: dict[str, Any], seen: set[int], is_root: bool = False) -> None:
    if isinstance(thing, GENERATORS):
        found[place] = thing
        return
    of_weft = type(thing).__module__.startswith("weft.") and not is_root
    if of_weft or isinstance(thing, _CLOSED) or id(thing) in seen or len(seen) > 10_000:
        return
    seen.add(id(thing))
    for name, item in _parts(thing) if depth else ():
        if not isinstance(item, int | float | complex | None):
            _gather(item, place + name, depth - 1, found, seen)


def _parts(thing: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds: items, attributes, what a function has bound or names."""
    if isinstance(thing, list | tuple | set | dict):
        items = thing.items() if isinstance(thing, dict) else enumerate(thing)
        yield from ((f"[{key!r}]", item) for key, item in (items if len(thing) <= 1000 else ()))
        return
    if isinstance(thing, partial):
        yield from ((".func", thing.func), (".args", thing.args), (".keywords", thing.keywords))
    if isinstance(thing, MethodType):
        yield from ((".__self__", thing.__self__), (".__func__", thing.__func__))
        return
    if isinstance(thing, FunctionType):
        yield from ((f".{name}", value) for name, value in closure_of(thing).items())
        yield from globals_of(thing)
    for kind in [] if isinstance(thing, FunctionType) else type(thing).__mro__[-2::-1]:
        if kind.__module__.startswith("torch."):
            continue
        for name, value in vars(kind).items():
            if isinstance(value, FunctionType):
                yield from globals_of(value)
            elif isinstance(value, GENERATORS):
                yield f".{name}", value
        yield from ((f".{slot}", getattr(thing, slot)) for slot in slots_of(kind) if hasattr(thing, slot))
    yield from ((f".{name}", value) for name, value in getattr(thing, "__dict__", {}).items() if name != "_iterator")


def globals_of(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """The generators, and the functions of its own module, that the code of a function names."""
    codes = [function.__code__]
    for code in codes:  # grows while it is gone through
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    for name in dict.fromkeys(name for code in codes for name in code.co_names):
        value = function.__globals__.get(name)
        if isinstance(value, GENERATORS):
            yield f":{name}", value
        elif isinstance(value, FunctionType) and value.__module__ == function.__module__:
            yield f".{name}", value


def closure_of(function: FunctionType) -> dict[str, Any]:
    """What a function closes over, by name; cells that are not filled yet are left out."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not filled yet
            continue
    return found
