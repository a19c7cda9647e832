"""Random generators that objects hold: found wherever they hold them, their states taken and put back."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weft.devices.seeding import random_state, set_random_state, with_arrays, with_tensors
from weft.places import attributes_of, members_of, slots_of

GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)

# ---- found -----------------------------------------------------------------------------------------------------------


def generators_of(loader: Any) -> dict[str, Any]:
    """The random generators of their own that a loader, its samplers and its dataset hold, by where they are."""
    batch_sampler, dataset = getattr(loader, "batch_sampler", None), getattr(loader, "dataset", None)
    places = {
        "loader": loader,
        "sampler": getattr(loader, "sampler", None),
        "batch_sampler": batch_sampler,
        "batch_sampler.sampler": getattr(batch_sampler, "sampler", None),
        "dataset": dataset,
        "dataset.dataset": getattr(dataset, "dataset", None),
    }
    return own_generators(places.items())


def own_generators(things: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The random generators that objects hold as attributes, by the objects' names and the attributes'."""
    return {f"{p.path}.{p.name}": p.value for p in attributes_of(things) if isinstance(p.value, GENERATORS)}


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
        for name, value in members_of(kind):
            if isinstance(value, FunctionType):
                yield from globals_of(value)
            elif isinstance(value, GENERATORS):
                yield f".{name}", value
        yield from ((f".{slot}", getattr(thing, slot)) for slot in slots_of(kind) if hasattr(thing, slot))
    yield from ((f".{p.name}", p.value) for p in attributes_of([("", thing)]) if p.name != "_iterator")


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


# ---- taken and put back ----------------------------------------------------------------------------------------------


def generator_states(generators: Mapping[str, Any]) -> dict[str, Any]:
    """The states of generators (of torch, numpy or python) as plain values by the same names."""
    return {name: _state_of(generator) for name, generator in generators.items()}


def set_generator_states(generators: Mapping[str, Any], states: Mapping[str, Any]) -> None:
    """Put back what `generator_states` gave. Raises ValueError for a generator that is missing here or there."""
    if set(generators) != set(states):
        raise ValueError(
            f"The training data and the problem have the random generators {sorted(generators)}; the checkpoint has "
            f"the states of {sorted(states)}."
        )
    for name, generator in generators.items():
        _set_generator(generator, states[name])


def _set_generator(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state.cpu())
    elif isinstance(generator, random.Random):
        generator.setstate((state[0], tuple(state[1].tolist()), state[2]))
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(with_arrays(state))
    else:
        generator.bit_generator.state = with_arrays(state)


def _state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        version, internal, gauss = generator.getstate()
        return [version, torch.tensor(internal), gauss]
    is_old = isinstance(generator, np.random.RandomState)
    return with_tensors(generator.get_state(legacy=False) if is_old else generator.bit_generator.state)


def fix_kept_batches(sources: Iterable[Any]) -> None:
    """Let batches that are made once be made in the random state of this moment, whenever they are asked for.

    A resumed run makes them again in the middle of training, and must get the same ones.
    """
    for source in sources:
        loader: Any = getattr(source, "loader", None)
        if getattr(loader, "made_once", False):
            own = generators_of(loader)
            loader.within = partial(_put_back_after, own, random_state(), generator_states(own))


@contextmanager
def _put_back_after(
    generators: Mapping[str, Any], random: Mapping[str, Any], states: Mapping[str, Any]
) -> Iterator[None]:
    before = random_state(), generator_states(generators)
    set_random_state(random)
    set_generator_states(generators, states)
    try:
        yield
    finally:
        set_random_state(before[0])
        set_generator_states(generators, before[1])
