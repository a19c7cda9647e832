"""What modules, functions and plain objects hold, and where: one walk, of which all who look for something are filters.

    for place in places(problem):
        print(place.owner, place.name, place.value)       # node 'plant' A tensor(...)

It stands low in the house, beside `types`, since problem/ (constants), checkpoint/ (attributes), devices/ (generators),
step/ (what a loss reaches) and compile/ all look, and none of them may import another one for it.
"""

from __future__ import annotations

import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

_OF_OTHERS = """
    torch weft numpy lightning pytorch_lightning pandas scipy matplotlib sklearn h5py xarray rich tqdm optuna
    _pytest pytest hypothesis IPython ipykernel wandb mlflow tensorboard
"""
_LIBRARIES = {*sys.stdlib_module_names, *_OF_OTHERS.split()} - {"__main__"}
HOLDERS = {
    "types.SimpleNamespace",
    "argparse.Namespace",
    "collections.UserDict",
    "collections.UserList",
    "collections.ChainMap",
    "_thread._local",
}
"""Classes of python's own that hold nothing but what their user gave them."""
_SEARCHED = "torch.distributions."  # of a library, but it holds what its user gave it
_OPAQUE = {"itertools", "functools", "queue", "_queue", "weakref", "_contextvars", "operator", "_operator", "builtins"}
"""Modules of classes that hold what they were given without an attribute."""
_PLAIN = {type(None), bool, int, float, complex, str, bytes}
_OF_MODULES = {"_parameters", "_buffers", "_modules"}
_OF_TORCH = {*vars(nn.Module())} | {
    "_is_full_backward_hook",
    "_compiled_call_impl",
    "_is_fsdp_managed_module",
    "_fsdp_use_orig_params",
}


class Place(NamedTuple):
    """One value where it is: `get` and `put` read and write the place; `put` is None where nothing can be put."""

    path: str
    """The dotted name of the module among those that were walked through, "" for the first one."""
    owner: str
    """Who holds it, for a message: "node 'plant'"."""
    name: str
    """How it is reached from there: "A", "TABLE['B']", "net.weight"."""
    value: Any
    get: Callable[[], Any]
    put: Callable[[Any], Any] | None
    module: nn.Module | None = None
    """Whose parameter or buffer it is, of a module that is not the problem's: the outermost one that was met."""


def attributes_of(things: Iterable[tuple[str, Any]]) -> Iterator[Place]:
    """The attributes that objects hold themselves, by the objects' names; without those of torch's `Module`."""
    for path, thing in things:
        own = getattr(thing, "__dict__", {})
        for name, value in own.items():
            if name not in _OF_TORCH:
                yield Place(path, path, name, value, partial(own.__getitem__, name), partial(own.__setitem__, name))


def members_of(kind: type) -> Iterable[tuple[str, Any]]:
    """What a class defines itself, by name: functions, values."""
    return vars(kind).items()


def places(problem: nn.Module, everything: bool = False) -> Iterator[Place]:
    """What the modules of a problem hold besides their parameters, buffers and modules, and what their functions read.

    Functions are searched for what they close over, read from their module, have as a default, or as an attribute of
    the object that they belong to; so are lists and dicts, functions that these call, and modules that are not the
    problem's, with their parameters. A list of plain values is one value. `everything`: also objects that cannot be
    called, and all methods of what is met: for those who look, not for those who put something else there.
    """
    walk = _Walk(everything)
    walk.seen |= {id(m): m for m in problem.modules()}
    for path, module in problem.named_modules():
        walk.path, walk.owner = path, owner_of(path, module)
        yield from walk.into_attributes(module, "")
        if not _of_library(type(module)):
            yield from walk.into_class(type(module), "forward")


def places_behind(things: Iterable[tuple[str, Any]], problem: nn.Module) -> Iterator[Place]:
    """The same of other things by their owners (steps, hooks, factories), in full; without the modules of `problem`."""
    walk = _Walk(everything=True)
    walk.seen |= {id(m): m for m in problem.modules()}
    for walk.owner, thing in things:
        yield from walk.into(thing, "", partial(lambda t: t, thing), None)


def owner_of(path: str, module: nn.Module) -> str:
    """A module in a message: a node or term by its name, another one by its place or its class."""
    kind, name = getattr(module, "kind", "node"), getattr(module, "name", None)
    return f"{kind} {name!r}" if isinstance(name, str) else path or type(module).__name__


def _is_opaque(kind: type) -> bool:
    if issubclass(kind, types.ModuleType):  # through one module lies every other
        return False
    return kind.__module__ in _OPAQUE or hasattr(kind, "tobytes")


def _of_library(kind: Any) -> bool:
    return _is_library(getattr(kind, "__module__", None))


def _is_library(module: Any) -> bool:
    return str(module).partition(".")[0] in _LIBRARIES


class _Walk:
    """One walk: what was seen, and on whose behalf it looks."""

    def __init__(self, everything: bool) -> None:
        self.everything, self.path, self.owner = everything, "", ""
        self.seen: dict[int, Any] = {}  # the things themselves are kept, so that no id is used twice

    def is_new(self, thing: Any) -> bool:
        return id(thing) not in self.seen and self.seen.setdefault(id(thing), thing) is thing

    def into(self, value: Any, name: str, get: Callable[[], Any], put: Callable[[Any], Any] | None) -> Iterator[Place]:
        """The place itself if it holds a value, else what is behind it."""
        if isinstance(value, Tensor) or type(value) in _PLAIN:
            yield Place(self.path, self.owner, name, value, get, put)
        elif isinstance(value, types.FunctionType):
            if self.is_new(value):
                yield from self.into_function(value)
        elif isinstance(value, types.MethodType):  # made anew each time that it is read
            yield from self.into(value.__func__, name, get, None)
            yield from self.into(value.__self__, "self", get, None)
        elif isinstance(value, partial):
            if self.is_new(value):
                yield from self.into(value.func, name, get, None)
                yield from self.into_items(value.args, f"{name}.args", get, None)
                for key, item in list(value.keywords.items()):
                    own = value.keywords
                    yield from self.into(item, key, partial(own.__getitem__, key), partial(own.__setitem__, key))
        elif isinstance(value, dict | list | tuple | set | frozenset | deque):
            if self.is_new(value):
                yield from self.into_items(value, name, get, put)
        elif isinstance(value, nn.Module):
            if self.is_new(value):
                yield from self.into_module(value, name)
        elif isinstance(value, type):
            if not _of_library(value):
                yield from self.into_class(value, "__call__")
        elif self.everything and _is_opaque(type(value)):
            if self.is_new(value):
                from weft.referents import referents

                for item in referents(value, _of_library):
                    yield from self.into(item, name, partial(lambda i: i, item), None)
        elif isinstance(wrapped := getattr(value, "__dict__", {}).get("__wrapped__"), types.FunctionType):
            yield from self.into(wrapped, name, get, None)  # functools.cache
        elif self.is_searched(value) and self.is_new(value):
            yield from self.into_attributes(value, name)
            yield from self.into_class(type(value), "__call__")
        else:
            yield Place(self.path, self.owner, name, value, get, put)

    def is_searched(self, value: Any) -> bool:
        """Whether an object is looked into: one of the user's, and no data."""
        kind = type(value)
        if isinstance(value, Dataset | DataLoader | Sampler | types.ModuleType):
            return False
        if f"{kind.__module__}.{kind.__qualname__}" in HOLDERS:
            return self.everything
        if _of_library(kind) and not kind.__module__.startswith(_SEARCHED):
            return False
        return self.everything or (callable(value) and hasattr(value, "__dict__"))

    def into_items(self, items: Any, name: str, get: Callable[[], Any], put: Any) -> Iterator[Place]:
        """The items of a container; one of plain values only is a value itself, as is the namespace of a library."""
        values = list(items.values()) if isinstance(items, dict) else list(items)
        is_of_library = isinstance(items, dict) and "__spec__" in items and _is_library(items.get("__name__"))
        if is_of_library or set(map(type, values)) <= _PLAIN:
            yield Place(self.path, self.owner, name, items, get, put)
            return
        keys = list(items) if isinstance(items, dict) else range(len(values))
        for key, value in zip(keys, values, strict=True):
            read: Callable[[], Any] = partial(lambda v: v, value)
            write: Callable[[Any], Any] | None = None
            if isinstance(items, dict | list | deque):
                read, write = partial(items.__getitem__, key), partial(items.__setitem__, key)
            elif isinstance(items, tuple):
                read = partial(lambda i: get()[i], key)
                write = None if put is None else partial(_put_into_tuple, get, put, key)
            path = f"{name}[{key!r}]" if name or not isinstance(key, str) else key
            yield from self.into(value, path, read, write)

    def into_attributes(self, thing: Any, name: str) -> Iterator[Place]:
        """The attributes of an object, or of a module without its parameters, buffers and modules."""
        before = f"{name}." if name else ""
        own, is_module = getattr(thing, "__dict__", {}), isinstance(thing, nn.Module)
        for attribute, value in list(own.items()):
            hooks = attribute not in _OF_MODULES and isinstance(value, dict) and value
            if hooks or not (is_module and attribute in _OF_TORCH):
                read, write = partial(own.__getitem__, attribute), partial(own.__setitem__, attribute)
                yield from self.into(value, before + attribute, read, write)
        for kind in type(thing).__mro__ if hasattr(type(thing), "__slots__") else ():
            for slot in slots_of(kind):
                if hasattr(thing, slot):
                    read, write = partial(getattr, thing, slot), partial(setattr, thing, slot)
                    yield from self.into(getattr(thing, slot), before + slot, read, write)

    def into_module(self, module: nn.Module, name: str) -> Iterator[Place]:
        """All of a module that is not the problem's, parameters and buffers included."""
        for prefix, part in module.named_modules(prefix=name):
            if part is not module and not self.is_new(part):
                continue
            for held in (part._parameters, part._buffers):
                for key, tensor in held.items():
                    if tensor is not None:
                        read, write = partial(held.__getitem__, key), partial(held.__setitem__, key)
                        path = f"{prefix}.{key}".lstrip(".")
                        yield Place(self.path, self.owner, path, tensor, read, write, module)
            yield from self.into_attributes(part, prefix)
            if not _of_library(type(part)):
                yield from self.into_class(type(part), "forward")

    def into_class(self, kind: type, method: str) -> Iterator[Place]:
        """What a class holds and its methods read; without `everything` that one method alone."""
        if not self.everything:
            if isinstance(function := getattr(kind, method, None), types.FunctionType):
                yield from self.into(function, method, partial(getattr, kind, method), None)
            return
        for base in kind.__mro__:
            if _of_library(base) or not self.is_new(base):
                continue
            for attribute, value in list(vars(base).items()):
                function = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
                if not attribute.startswith("__") or isinstance(function, types.FunctionType):
                    name = f"{base.__name__}.{attribute}"
                    read, write = partial(getattr, base, attribute), partial(setattr, base, attribute)
                    yield from self.into(function, name, read, write)

    def into_function(self, function: types.FunctionType) -> Iterator[Place]:
        """What a function closes over, reads from its module (and other modules of the user's), has as defaults."""
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
            except ValueError:  # not assigned yet
                continue
            read, write = partial(getattr, cell, "cell_contents"), partial(setattr, cell, "cell_contents")
            yield from self.into(value, name, read, write)
        if not _of_library(function):
            yield from self.into_scope(function)
        for i, value in enumerate(function.__defaults__ or ()):
            yield from self.into(value, f"default {i}", partial(_default, function, i), partial(_put, function, i))
        for named in (function.__kwdefaults__ or {}, function.__dict__):
            for key, value in list(named.items()):
                yield from self.into(value, key, partial(named.__getitem__, key), partial(named.__setitem__, key))

    def into_scope(self, function: types.FunctionType) -> Iterator[Place]:
        """The names that a function may read from its module, and from modules of the user's that this one imports."""
        names = dict.fromkeys(_names(function.__code__))
        scopes: dict[str, dict[str, Any]] = {"": function.__globals__}
        for name in names:
            module = function.__globals__.get(name)
            if isinstance(module, types.ModuleType) and module.__name__.partition(".")[0] not in _LIBRARIES:
                scopes[f"{name}."] = vars(module)
        for before, scope in scopes.items():
            for name in names:
                if name in scope and not isinstance(scope[name], types.ModuleType):
                    read, write = partial(scope.__getitem__, name), partial(scope.__setitem__, name)
                    yield from self.into(scope[name], before + name, read, write)


def slots_of(kind: type) -> Iterable[str]:
    """The names of the slots that a class adds."""
    slots = vars(kind).get("__slots__", ())
    return [s for s in ([slots] if isinstance(slots, str) else slots) if s not in ("__dict__", "__weakref__")]


def _put_into_tuple(get: Callable[[], Any], put: Callable[[Any], Any], i: int, value: Any) -> None:
    items = list(get())
    items[i] = value
    kind = type(get())
    put(kind(*items) if hasattr(kind, "_fields") else kind(items))


def _default(function: types.FunctionType, i: int) -> Any:
    return (function.__defaults__ or ())[i]


def _put(function: types.FunctionType, i: int, value: Any) -> None:
    defaults: list[Any] = list(function.__defaults__ or ())
    defaults[i] = value
    function.__defaults__ = tuple(defaults)


def _names(code: types.CodeType) -> Iterator[str]:
    """Names that code, and functions made inside it, may read from their module."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def named(found: Iterable[Place]) -> Mapping[str, Place]:
    """Places by a name that is the same in every process that builds the same problem."""
    by_name: dict[str, Place] = {}
    for place in found:
        name, count = f"{place.path}:{place.name}", 2
        while name in by_name:
            name, count = f"{place.path}:{place.name}#{count}", count + 1
        by_name[name] = place
    return by_name
