"""The plain values that a step reads, wherever it finds them: whether they are as they were, and putting them back.

    watch = Watch(problem, trainer, [step])
    watch.glance()      # at every step, in microseconds: False if something has changed
    watch.changed()     # "cfg.lam": what has
    with watch.untouched(): ...

A graph holds numbers, flags and texts as they were when it was traced, and the modules, hooks and frozen parameters of
then. Watched are the attributes of modules and of the trainer, and what functions close over, read from their module,
have as defaults or find in lists, dicts and objects of the user's own; tensors by identity, as their values are inputs
of the graph. Long containers are looked at once an epoch. Random generators that a step reaches are put back too;
iterators cannot be, and are only named.
"""

from __future__ import annotations

import functools
import inspect
import io
import os
import random
import sys
import sysconfig
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from operator import is_, itemgetter
from types import CellType, CodeType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any
from weakref import ReferenceType

import numpy as np
import torch
from torch import Tensor, nn

from weft import places
from weft.devices.generators import GENERATORS, generator_states, generators_within, set_generator_states

HOLDERS = places.HOLDERS | {f"multiprocessing.sharedctypes.Synchronized{kind}" for kind in ("", "Array", "String")}
MAX_NEAR = 256  # items of a container that is looked at in every step
MAX_MEMORY = 2**20  # bytes of what shows its memory: it is copied to be compared
MAX_PLACES = 5000  # besides those of modules

_OF_MODULES = set(vars(nn.Module())) - {"training"}
_NOT_READ = ("hooks", "callbacks", "options", "phases", "run")  # of a trainer, by steps
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
_MISSING = object()
_PLAIN = (int, float, complex, str, bytes, np.generic, torch.dtype, torch.device, type(None))
_EVERYWHERE = (*(getattr(draw, "__self__", None) for draw in (random.random, np.random.rand)), torch.default_generator)
_UNSEEDED = {"default_rng", "RandomState", "SystemRandom", "urandom", "token_bytes", "getrandbits", "randbits", "uuid4"}
"""Names by which a step would make random numbers that nobody can put back."""
_LIBRARIES = ("torch", "weft", "numpy", "lightning", "builtins", "math", "typing")


@dataclass(frozen=True, eq=False)
class Place:
    """Something values are read from: a dict, class, list, set, array, closure's cell, or a function's defaults."""

    name: str
    held: Any
    keys: tuple[Any, ...] | None = None
    """Those of a dict or class that are read; None: all."""
    notes: frozenset[Any] = frozenset()
    """Keys whose values may change."""
    is_near: bool = True
    is_ordered: bool = False
    """Whether a dict's order counts."""

    def read(self) -> dict[Any, Any]:
        """Its values now, by key."""
        held = vars(self.held) if isinstance(self.held, type) else self.held
        if not isinstance(held, Mapping | list | set):
            return {"": _contents(held)}
        if isinstance(held, list | set):
            return dict(enumerate(held) if isinstance(held, list) else zip(held, held, strict=True))
        return dict(held) if self.keys is None else {k: held[k] for k in self.keys if k in held}

    def write(self, values: dict[Any, Any]) -> None:
        """Put back what `read` gave. What is as it was is not touched, not even for a moment."""
        held, now = self.held, self.read()
        if len(now) == len(values) and all(k in now and now[k] is v for k, v in values.items()):
            return
        if isinstance(held, CellType):
            held.cell_contents = values[""]
        elif isinstance(held, ContextVar):
            if values[""] is not _MISSING:
                held.set(values[""])
        elif isinstance(held, FunctionType):
            held.__defaults__ = values[""]
        elif isinstance(held, np.ndarray):
            held[...] = np.frombuffer(values[""], held.dtype).reshape(held.shape)
        elif not isinstance(held, type | MutableMapping | list | set):
            return  # a view of what cannot be written
        elif isinstance(held, list):
            held[:] = values.values()
        elif isinstance(held, set):
            held.intersection_update(values)
            held.update(values)
        elif isinstance(held, type):
            for key, value in values.items():
                setattr(held, key, value)
        else:
            for key in now.keys() - values.keys():
                del held[key]
            held.update(values)

    def expression(self, names: dict[str, Any]) -> str:
        """Items of a tuple that hold what is compared, as text; what they are made of is added to `names`."""

        def named(value: Any) -> str:
            names[name := f"v{len(names)}"] = value
            return name

        held = vars(self.held) if isinstance(self.held, type) else self.held
        at = named(held)
        if not isinstance(held, Mapping | list | set):
            return f"{named(_contents)}({at}), "
        if isinstance(held, list | set):
            return f"*{at}, len({at}), "
        if any(isinstance(key, Tensor) for key in held):  # whose hash is slow: an optimizer's state
            return f"*{at}.values(), len({at}), "
        keys = [k for k in (held if self.keys is None else self.keys) if k not in self.notes]
        one_by_one = "".join(f"{at}[{named(key)}], " for key in keys[:1])
        picked = f"*{named(itemgetter(*keys))}({at}), " if len(keys) > 1 else one_by_one
        if self.keys is not None:
            return picked
        return picked + (f"*{at}, " if keys and self.is_ordered else f"len({at}), ")


class Watch:
    """The plain values that a step reads, as they are now. `functions`: what else it runs; `extra`: further places."""

    def __init__(
        self, problem: nn.Module, owner: Any, functions: Iterable[Any] = (), extra: Iterable[Place] = ()
    ) -> None:
        walk = _Walk()
        walk.owner(owner)
        walk.into(type(problem).__name__, problem)
        for function in functions:
            walk.into(getattr(function, "__name__", type(function).__name__), function)
        run = getattr(owner, "run", None)
        optimizers = list(run.optimizers.values()) if run is not None else []
        if walk.reads_rates:
            walk.places += [Place("the optimizer's param_groups", g) for o in optimizers for g in o.param_groups]
        self.places, self.tensors = [*walk.places, *extra], walk.tensors
        self.generators, self.one_way = walk.generators, walk.one_way
        self._saved = [place.read() for place in self.places]
        parameters = [*problem.parameters(), *(p for o in optimizers for g in o.param_groups for p in g["params"])]
        self._near = _reader([*walk.near(), *(p for p in extra if p.is_near)], parameters, walk.unhooked)
        self._all = _reader(self.places, parameters)
        self._near_before, self._all_before = self._near(), self._all()

    def glance(self) -> bool:
        """Whether all that is near is as it was. Cheap enough for every step."""
        now = self._near()
        if now is None or not _alike(now, self._near_before):
            return False
        self._near_before = now  # equal values may be other objects: the same ones are quicker to compare
        return True

    def changed(self) -> str | None:
        """What is no longer as it was, None if all is."""
        if _alike(self._all(), self._all_before):
            return None
        for place, before in zip(self.places, self._saved, strict=True):
            now = place.read()
            for key in {**before, **now}:
                if key not in place.notes and not _alike(now.get(key, _MISSING), before.get(key, _MISSING)):
                    return place.name if key == "" else f"{place.name}.{key}"
        return "what is frozen, or a hook,"

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Whatever the block does in these places, to buffers and other tensors of the modules, and what it draws from
        generators, is undone.
        """
        saved, drawn = [place.read() for place in self.places], generator_states(self.generators)
        with restored(self.tensors):
            try:
                yield
            finally:
                for place, before in zip(self.places, saved, strict=True):
                    place.write(before)
                set_generator_states(self.generators, drawn)


@contextmanager
def restored(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Whatever the block does to the values of `tensors` is undone, bit for bit."""
    tensors = [t for t in tensors if t.layout is torch.strided and not t.is_meta]
    before = [t.detach().clone() for t in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


def _reader(
    places: Iterable[Place], parameters: Iterable[Tensor], empty: Iterable[list[Any]] = ()
) -> Callable[[], tuple[Any, ...] | None]:
    """A function that gives what is compared of these places and parameters, None where something is no longer there.

    Its code is made for them: to call a function for each place would take as long as a small step's other Python.
    `empty`: groups of containers that are to stay so.
    """
    names: dict[str, Any] = {}
    text = "".join(place.expression(names) for place in places)
    for name, p in {f"p{id(p)}": p for p in parameters}.items():
        names[name] = p
        text += f"{name}.requires_grad, {name}._backward_hooks or {name}._post_accumulate_grad_hooks, "
    for number, group in enumerate(empty):
        held = {f"e{number}_{i}": container for i, container in enumerate(group)}
        names |= held
        text += f"{' or '.join(held)}, "
    read = eval(f"lambda: ({text})", names)  # of names that are ours alone

    def found() -> tuple[Any, ...] | None:
        try:
            return read()
        except (LookupError, ValueError):
            return None

    return found


def _alike(now: Any, before: Any) -> bool:
    """Whether two values are the same object, or equal plain ones."""
    if now is before:
        return True
    if type(now) is not type(before):
        return False
    if isinstance(now, list | tuple):
        same = len(now) == len(before)
        return same and (all(map(is_, now, before)) or all(map(_alike, now, before)))
    if not isinstance(now, _PLAIN):
        return False
    return bool(now == before) if now else repr(now) == repr(before)  # 0.0 is not -0.0; nan is like nan


class _Slots(MutableMapping):
    """The attributes of an object that has slots, as a dict."""

    def __init__(self, of: Any) -> None:
        self.of, kinds = of, [vars(kind).get("__slots__", ()) for kind in type(of).__mro__]
        found = [name for slots in kinds for name in ([slots] if isinstance(slots, str) else slots)]
        self.names = [name for name in found if not name.startswith("__")]

    def __getitem__(self, name: str) -> Any:
        return getattr(self.of, name, _MISSING)

    def __setitem__(self, name: str, value: Any) -> None:
        if value is not _MISSING:
            setattr(self.of, name, value)

    def __delitem__(self, name: str) -> None:
        delattr(self.of, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class _Items(MutableMapping):
    """The items of a sequence that is no list (deque, array, UserList), as a dict by number."""

    def __init__(self, of: Any) -> None:
        self.of = of

    def __getitem__(self, number: int) -> Any:
        return self.of[number]

    def __setitem__(self, number: int, value: Any) -> None:
        if number == len(self.of):
            self.of.append(value)
        else:
            self.of[number] = value

    def __delitem__(self, number: int) -> None:
        self.of.pop()  # items are put back by number: the ones too many are at the end

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.of)))

    def __len__(self) -> int:
        return len(self.of)


def _contents(held: Any) -> Any:
    """What a cell or a context variable holds, the defaults of a function, the bytes of an array or of other memory."""
    if isinstance(held, ContextVar):
        return held.get(_MISSING)
    if isinstance(held, FunctionType):
        return held.__defaults__
    try:
        if isinstance(held, CellType):
            return held.cell_contents
        return np.asarray(held).tobytes() if hasattr(held, "__array__") else memoryview(held).tobytes()
    except ValueError:  # not assigned yet, or closed
        return _MISSING


# ---- where values are read -------------------------------------------------------------------------------------------


class _Walk:
    """The places behind a value, each once."""

    def __init__(self) -> None:
        self.places: list[Place] = []
        self.tensors: list[Tensor] = []
        """Buffers, and other tensors that modules hold."""
        self.generators: dict[str, Any] = {}
        """Random generators that can be put back, by where they were found; not those of python and numpy at large."""
        self.one_way: dict[str, Any] = {}
        """What gives something else each time and cannot be put back: iterators, random numbers of the system."""
        self.reads_rates = False
        """Whether a step names the groups of an optimizer, as it does to read the learning rate."""
        self._seen: dict[int, Any] = {}
        self._classes: set[type] = set()
        self.unhooked: list[list[Any]] = []
        self._of_modules = 0
        self._of_owner: dict[str, Any] = {}

    def near(self) -> Iterator[Place]:
        """Those to look at in every step; of a module's attributes without those that every module has."""
        for place in self.places:
            if place.is_near:
                is_module = isinstance(place.held, dict) and "_parameters" in place.held
                free = place.notes | _OF_MODULES if is_module else place.notes
                yield replace(place, notes=free)

    def owner(self, owner: Any) -> None:
        """Add the attributes of a trainer. Behind those that a step's code names is looked later."""
        self._seen |= {id(owner): owner, id(type(owner)): type(owner)}
        self._of_owner = {k: v for k, v in vars(owner).items() if k not in _NOT_READ}
        self.places.append(Place(type(owner).__name__, vars(owner)))
        for name, value in self._of_owner.items():
            if isinstance(value, GENERATORS):
                self.into(name, value)

    def into(self, name: str, value: Any, owner: type | None = None, far: bool = False) -> None:
        """Add the places that are, or are behind, `value`.

        `owner`: the class whose method it may be; `far`: a list or dict that is not to be looked at in every step.
        """
        if isinstance(value, (*_PLAIN, Tensor)) or id(value) in self._seen:
            return
        if len(self.places) - self._of_modules > MAX_PLACES:
            self.one_way[name] = f"the step reaches more than {MAX_PLACES:,} values, too many to look at in every step"
            return
        self._seen[id(value)] = value  # kept, so that its number is not used again
        if isinstance(value, GENERATORS):
            self._generator(name, value)
        elif isinstance(value, nn.Module):
            self._module(name, value)
        elif isinstance(value, FunctionType):
            self._function(name, value, owner)
        elif isinstance(value, MethodType):
            self.into(name, value.__self__)
            self.into(name, value.__func__, type(value.__self__))
        elif isinstance(value, functools.partial):
            for part in (value.func, value.args, value.keywords):
                self.into(name, part)
        elif isinstance(value, dict):
            self.dictionary(name, value, far)
        elif isinstance(value, list | set | tuple | frozenset):
            if isinstance(value, list | set):
                self.places.append(Place(name, value, is_near=not far and len(value) <= MAX_NEAR))
            for item in value:
                self.into(name, item)
        elif isinstance(value, np.ndarray):
            if value.dtype != object:
                self.places.append(Place(name, value, is_near=value.nbytes <= 8 * MAX_NEAR))
        elif isinstance(value, ContextVar):
            self.places.append(Place(name, value))
            self.into(name, _contents(value))
        elif isinstance(value, deque | array):
            view = _Items(value)
            self.places.append(Place(name, view, is_near=not far and len(value) <= MAX_NEAR))
            for item in value if isinstance(value, deque) else ():
                self.into(name, item)
        elif isinstance(value, ReferenceType):
            self.into(name, value())
        elif f"{type(value).__module__}.{type(value).__qualname__}" in HOLDERS:
            self.dictionary(name, vars(value))
        elif isinstance(value, Mapping):  # of a library of configurations, or a view of a dict
            self.dictionary(name, value, far)
        elif isinstance(value, type):
            if not _of_library(value.__module__):
                self._class(value)
                for item in vars(value).values():
                    self.into(name, getattr(item, "fget", None) or getattr(item, "__func__", item), value)
        elif (
            hasattr(value, "__dict__") and not isinstance(value, ModuleType) and not _of_library(type(value).__module__)
        ):
            self.dictionary(name, vars(value))
            if slots := _Slots(value):
                self.dictionary(name, slots)
            self.into(type(value).__name__, type(value))
        elif hasattr(type(value), "__slots__") and not _of_library(type(value).__module__):
            self.dictionary(name, _Slots(value))
            self.into(type(value).__name__, type(value))
        elif not isinstance(value, ModuleType) and not type(value).__module__.startswith("weft."):
            self._foreign(name, value)

    def _generator(self, name: str, value: Any) -> None:
        if isinstance(value, random.SystemRandom):
            self.one_way[name] = value
        elif not any(value is one for one in _EVERYWHERE):
            self.generators[f"{name} ({len(self.generators) + 1})" if name in self.generators else name] = value

    def _foreign(self, name: str, value: Any) -> None:
        """Look at an object of a library: it may be a generator's method, an iterator, or hold a generator."""
        if isinstance(of := getattr(value, "__self__", None), GENERATORS):
            self.into(name, of)
        elif callable(wrapped := getattr(value, "__wrapped__", None)):  # a cache's function
            self.into(name, wrapped)
        elif (size := _small_memory(value)) is not None:
            self.places.append(Place(name, value, is_near=size <= 8 * MAX_NEAR))
        elif isinstance(value, Iterator) and not isinstance(value, io.IOBase):
            if not isinstance(value, GeneratorType) or value.gi_frame is not None:  # not at its end
                self.one_way[name] = value
        else:
            for way, generator in generators_within(value, name, depth=3).items():
                self.into(way, generator)

    def dictionary(self, name: str, values: Any, far: bool = False) -> None:
        """Add a dict and what is behind its values."""
        self.places.append(Place(name, values, is_near=not far and len(values) <= MAX_NEAR, is_ordered=True))
        for key, value in list(values.items()):
            self.into(f"{name}.{key}", value)

    def _module(self, name: str, module: nn.Module) -> None:
        for path, m in module.named_modules():
            if m is not module and id(m) in self._seen:
                continue
            path, kind, self._seen[id(m)] = path or name, type(m), m
            self.tensors += [t for held in (vars(m), m._buffers) for t in held.values() if type(t) is Tensor]
            # a module's own notes: NeuroMANCER's variables keep their last value so; public ones may be read by anybody
            notes = frozenset(k for k, v in vars(m).items() if k.startswith("_") and isinstance(v, Tensor))
            self.places.append(Place(path, vars(m), None, notes))
            own = [m._parameters, m._buffers, m._modules]
            self.places += [Place(path, held, is_ordered=held is m._modules) for held in own]
            hooks = [vars(m)[kind] for kind in (*_HOOKS, *_BACKWARD_HOOKS)]
            self.places += [Place(path, held, is_near=any(hooks)) for held in hooks]
            self.unhooked += [] if any(hooks) else [hooks]  # most: looked at in one expression
            own += hooks
            self._seen |= {id(held): held for held in own}
            self._of_modules += 1 + len(own)
            for key, value in list(vars(m).items()):
                if key not in _OF_MODULES or key in _HOOKS:
                    self.into(f"{path}.{key}", value, far=_of_library(kind.__module__))
            if not _of_library(kind.__module__):
                self._class(kind)
                self.into(f"{path}.forward", kind.forward, kind)

    def _class(self, kind: type) -> None:
        """Add the attributes and methods of a class, without what is behind these."""
        for held in kind.__mro__:
            if held not in self._classes and not _of_library(held.__module__):
                self._classes.add(held)
                keys = tuple(k for k in vars(held) if not k.startswith("__"))
                self.places += [Place(held.__name__, held, keys)] if keys else []

    def _function(self, name: str, function: FunctionType, owner: type | None) -> None:
        is_ours = _of_library(function.__module__ or "")  # or torch's: it reads what it closes over, and sets it once
        for free, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if id(cell) not in self._seen:
                self._seen[id(cell)] = cell
                if not is_ours:
                    self.places.append(Place(free, cell))
                self.into(free, _contents(cell), far=is_ours)
        if function.__defaults__ and not is_ours:
            self.places.append(Place(f"{name}'s defaults", function))
        self.into(f"{name}'s default", function.__defaults__ or ())
        self.into(f"{name}'s default", function.__kwdefaults__ or ())
        if is_ours:
            return
        names = tuple(dict.fromkeys(_names(function.__code__)))
        if not {"environ", "getenv"}.isdisjoint(names) and id(os.environ) not in self._seen:
            self._seen[id(os.environ)] = os.environ
            self.places.append(Place("os.environ", os.environ))
        if "param_groups" in names:
            self.reads_rates = True
        for made in _UNSEEDED.intersection(names):
            way = f"the step makes random numbers by {made} (in {function.__name__})"
            self.one_way[made] = f"{way}, of which a graph would hold one draw"
        self._some(function.__module__, function.__globals__, function.__globals__, names)
        for attribute in self._of_owner.keys() & names:
            self.into(attribute, self._of_owner[attribute])
        for method in names if owner is not None else ():
            found = inspect.getattr_static(owner, method, None)
            found = getattr(found, "fget", None) or getattr(found, "__func__", found)
            if isinstance(found, (FunctionType, Iterator, *GENERATORS)):
                self.into(method, found, owner)

    def _some(self, name: str, held: Any, values: Any, names: Iterable[str]) -> None:
        """Add those of a namespace's values that are named."""
        keys = tuple(k for k in names if k in values and not isinstance(values[k], ModuleType))
        if keys:
            self.places.append(Place(name, held, keys))
        for key in keys:
            self.into(key, values[key])
        for module in {values[k] for k in names if k in values and isinstance(values[k], ModuleType)}:
            if not _of_library(module.__name__):
                self._some(module.__name__, vars(module), vars(module), names)


def _small_memory(value: Any) -> int | None:
    """The bytes of numbers that an object of a library holds and shows (ctypes, bytearray, a pandas table), if few."""
    try:
        if not hasattr(type(value), "__array__"):
            size = memoryview(value).nbytes
            return size if size <= MAX_MEMORY else None
        size = getattr(value, "size", None)  # a method of some
        found = np.asarray(value) if isinstance(size, int) and size <= MAX_NEAR else None
        return None if found is None or found.dtype == object else found.nbytes
    except Exception:  # noqa: BLE001, it is theirs: what does not show its numbers has none to watch
        return None


def _names(code: CodeType) -> Iterator[str]:
    """Names that code, and functions made inside it, may read from their module."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


@functools.cache
def _of_library(module: str) -> bool:
    """Whether a module is no code of the user's: installed, or python's own."""
    if module.partition(".")[0] in _LIBRARIES:
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    folders = tuple(sysconfig.get_paths()[k] for k in ("stdlib", "platstdlib", "purelib", "platlib"))
    return file.startswith(folders) if file else module in sys.builtin_module_names
