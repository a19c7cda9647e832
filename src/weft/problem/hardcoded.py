"""Constants that plain functions use: the matrices of a plant, wherever the run is.

    A = torch.tensor([[1.2, 1.0], [0.0, 1.0]])
    plant = weft.Node(lambda x, u: x @ A.T + u, ["x", "u"], ["x"], name="plant")

For the time of a run such tensors are replaced by copies on its device (and in float64 under 64-true); then the
originals are put back. Found are those that a function of the problem closes over, reads from its module, has as a
default, or as an attribute of the object it belongs to; in lists and dicts too, and in functions that it calls; and
plain attributes of modules, which are neither parameters nor buffers.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_NOT_SEARCHED = ("torch", "weft", "numpy", "lightning", "builtins", "functools", "math")


@dataclass(frozen=True)
class Constant:
    """A tensor that module `owner` uses under `name`; `get` and `put` read and write the place where it is."""

    owner: str
    name: str
    value: Tensor
    get: Callable[[], Tensor]
    put: Callable[[Tensor], Any]


def constants_of(problem: nn.Module) -> list[Constant]:
    """The constants that the modules and plain functions of a problem use, one for each place."""
    found: list[Constant] = []
    seen: set[int] = set()
    for path, module in problem.named_modules():
        owner = (
            f"node {module.name!r}" if isinstance(getattr(module, "name", None), str) else path or type(module).__name__
        )
        found += [Constant(owner, *place) for place in _in_module(module, seen)]
    return found


@contextmanager
def constants_on(problem: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Within: the constants of the problem are on `device`; floating ones have `dtype` if it is given."""
    moved: list[tuple[Constant, Tensor]] = []
    copies: dict[int, Tensor] = {}  # a tensor in two places stays one tensor
    if device.type != "cpu" or dtype is not None:  # else they are where they belong
        for constant in constants_of(problem):
            value = constant.value
            there = copies.get(id(value))
            if there is None:
                there = value.detach().to(device, dtype if dtype is not None and value.is_floating_point() else None)
                copies[id(value)] = there
            if there.device != value.device or there.dtype != value.dtype:
                constant.put(there)
                moved.append((constant, there))
    try:
        yield
    finally:
        for constant, there in moved:
            if constant.get() is there:  # nobody has put something else there meanwhile
                constant.put(constant.value)


def misplaced(problem: nn.Module, device: torch.device) -> list[str]:
    """The constants that are not on `device`, as text: "node 'plant' uses A on cpu"."""
    return [f"{c.owner} uses {c.name} on {c.value.device}" for c in constants_of(problem) if c.value.device != device]


Found = Iterator[tuple[str, Tensor, Callable[[], Tensor], Callable[[Tensor], Any]]]


def _in_module(module: nn.Module, seen: set[int]) -> Found:
    own = vars(module)
    for name in list(own):
        if name in ("_parameters", "_buffers", "_modules"):
            continue
        if isinstance(own[name], Tensor):
            yield name, own[name], partial(own.__getitem__, name), partial(own.__setitem__, name)
        else:
            yield from _in(own[name], seen)
    if not type(module).__module__.startswith(_NOT_SEARCHED):
        yield from _in(type(module).forward, seen)


def _in(value: Any, seen: set[int]) -> Found:
    """The constants behind a value that is, or holds, a function."""
    if isinstance(value, nn.Module | Tensor | type) or id(value) in seen:
        return
    if isinstance(value, types.FunctionType):
        seen.add(id(value))
        yield from _in_function(value, seen)
    elif isinstance(value, types.MethodType):
        seen.add(id(value))
        yield from _in(value.__func__, seen)
        yield from _in_object(value.__self__, seen)
    elif isinstance(value, partial):
        seen.add(id(value))
        yield from _in(value.func, seen)
        yield from _in_mapping(value.keywords, seen)
    elif isinstance(value, dict | list):
        seen.add(id(value))
        yield from _in_mapping(value, seen)
    elif isinstance(value, tuple):
        for item in value:
            yield from _in(item, seen)
    elif callable(value) and hasattr(value, "__dict__") and not type(value).__module__.startswith(_NOT_SEARCHED):
        yield from _in_object(value, seen)
        yield from _in(type(value).__call__, seen)


def _in_function(function: types.FunctionType, seen: set[int]) -> Found:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            value = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
        if isinstance(value, Tensor):
            yield name, value, partial(getattr, cell, "cell_contents"), partial(setattr, cell, "cell_contents")
        else:
            yield from _in(value, seen)
    if not (function.__module__ or "").startswith(_NOT_SEARCHED):
        scope = function.__globals__
        for name in _names(function.__code__):
            if isinstance(scope.get(name), Tensor):
                yield name, scope[name], partial(scope.__getitem__, name), partial(scope.__setitem__, name)
            elif name in scope and not isinstance(scope[name], types.ModuleType):
                yield from _in(scope[name], seen)
    for i, value in enumerate(function.__defaults__ or ()):
        if isinstance(value, Tensor):
            yield f"default {i}", value, partial(_default, function, i), partial(_put_default, function, i)
    yield from _in_mapping(function.__kwdefaults__ or {}, seen)


def _default(function: types.FunctionType, i: int) -> Tensor:
    return (function.__defaults__ or ())[i]


def _put_default(function: types.FunctionType, i: int, value: Tensor) -> None:
    defaults: list[Any] = list(function.__defaults__ or ())
    defaults[i] = value
    function.__defaults__ = tuple(defaults)


def _names(code: types.CodeType) -> Iterator[str]:
    """Names that code, and functions made inside it, may read from their module."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _in_object(thing: Any, seen: set[int]) -> Found:
    if isinstance(thing, nn.Module | types.ModuleType | type) or id(thing) in seen or not hasattr(thing, "__dict__"):
        return
    seen.add(id(thing))
    yield from _in_mapping(vars(thing), seen)


def _in_mapping(items: MutableMapping[Any, Any] | list[Any], seen: set[int]) -> Found:
    for key, value in list(items.items() if isinstance(items, Mapping) else enumerate(items)):
        if isinstance(value, Tensor):
            yield str(key), value, partial(items.__getitem__, key), partial(items.__setitem__, key)
        elif callable(value) or isinstance(value, dict | list):
            yield from _in(value, seen)
