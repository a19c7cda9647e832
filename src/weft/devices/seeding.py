"""Seeds: of the whole process, of the order of the data, and of what a data setup function draws."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weft.places import attributes_of

GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)

# ---- random state ----------------------------------------------------------------------------------------------------


def random_state() -> dict[str, Any]:
    """The global random state of python, numpy, torch on the CPU, and every GPU of this process, as plain values.

    A GPU library that was not started yet has drawn nothing; it is not started for this and counts as no devices.
    """
    version, internal, gauss = random.getstate()
    return {
        "python": [version, torch.tensor(internal, device="cpu"), gauss],
        "numpy": with_tensors(np.random.get_state(legacy=False)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "mps": [torch.mps.get_rng_state()] if torch.backends.mps.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put back what `random_state` gave.

    Raises ValueError, before anything is set, if a part or a device is missing.
    """
    parts = {"python", "numpy", "torch", "cuda", "mps"}
    if set(state) != parts:
        raise ValueError(f"The random state has the parts {sorted(state)}; expected {sorted(parts)}.")
    here = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    for kind, count in here.items():
        if len(state[kind]) > count:
            raise ValueError(
                f"The random state holds {len(state[kind])} {kind} devices, this process sees {count}; "
                "resume on as many (see CUDA_VISIBLE_DEVICES)."
            )
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    np.random.set_state(with_arrays(state["numpy"]))
    torch.set_rng_state(state["torch"].cpu())
    for device, device_state in enumerate(state["cuda"]):
        torch.cuda.set_rng_state(device_state.cpu(), device)
    for device_state in state["mps"]:
        torch.mps.set_rng_state(device_state.cpu())


def with_tensors(value: Any) -> Any:
    """The state of a generator of numpy as plain values: tensors in the place of arrays."""
    if isinstance(value, Mapping):
        return {name: with_tensors(item) for name, item in value.items()}
    return torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value


def with_arrays(value: Any) -> Any:
    """What `with_tensors` was given."""
    if isinstance(value, Mapping):
        return {name: with_arrays(item) for name, item in value.items()}
    return value.numpy() if isinstance(value, Tensor) else value


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def order_seed(seed: int | None) -> int:
    """The seed of the data's order: `seed`, or torch's initial one. It is read, never drawn."""
    return (torch.initial_seed() if seed is None else seed) % 2**63


def begin(asked: int | None, seed: int, rank: int) -> None:
    """Seed the process if that was asked for. Of several, every one but the first gets random numbers of its own, made
    of the run's `seed`, so that each draws other points, masks and noise.
    """
    if asked is not None:
        seed_everything(asked)
    if rank:
        seed_everything(int(np.random.SeedSequence([seed, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1)))


@contextmanager
def data_randomness(seed: int | None, index: int) -> Iterator[None]:
    """The random state in which a data setup function runs.

    Without a seed (in one process only): the user's own, as it is. Otherwise that of `seed + index` (the number of the
    refresh), alike in every process, and the state before is restored.
    """
    if seed is None:
        yield
        return
    before = random_state()
    seed_everything(seed + index)
    try:
        yield
    finally:
        set_random_state(before)


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


def generator_states(generators: Mapping[str, Any]) -> dict[str, Any]:
    """The states of generators (of torch, numpy or python) as plain values by the same names."""
    return {name: _state_of(generator) for name, generator in generators.items()}


def set_generator_states(generators: Mapping[str, Any], states: Mapping[str, Any]) -> None:
    """Put back what `generator_states` gave. Raises ValueError for a generator that is missing here or there."""
    if set(generators) != set(states):
        raise ValueError(
            f"The training data and the problem have the random generators {sorted(generators)}; the checkpoint has "
            "the "
            f"states of {sorted(states)}."
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
