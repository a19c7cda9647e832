"""The training batches of an epoch from the place where it was left, and those of a loader from its beginning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from weft.devices import seeding
from weft.devices.generators import (
    generator_states,
    generators_of,
    generators_within,
    own_generators,
    set_generator_states,
)
from weft.step.state import RunState


def train_batches(state: RunState, rest: Callable[..., None]) -> Iterable[Any]:
    """The training batches of the epoch that were not used yet.

    A loader starts over in the random state of the epoch's start, and is skipped to its place; then the random state is
    again what it was, or what a checkpoint says. `rest`: what leaves the run.
    """
    start, kept, is_loader = state.progress.batch, state.kept, not state.source("train").resident
    if start == 0:
        kept.begin_epoch(seeding.random_state(), generator_states(generators_in(state)))
        batches = state.batches_of("train")
    else:
        random, generators = kept.take_random()
        if random is None:
            random, generators = seeding.random_state(), generator_states(generators_in(state))
        if kept.random_before_epoch is not None:
            seeding.set_random_state(kept.random_before_epoch)
            set_generators_in(state, kept.generators_before_epoch)
        batches = state.batches_of("train", start)
        seeding.set_random_state(random)
        set_generators_in(state, generators)
    return _unless_left(state, batches, rest) if is_loader and state.processes.world == 1 else batches


def _unless_left(state: RunState, batches: Iterable[Any], rest: Callable[..., None]) -> Iterator[Any]:
    """The same; an error in making one, after a signal that its processes heeded too, is that signal's."""
    try:
        yield from batches
    except Exception:
        if state.control.interruption.asked:
            rest()
        raise


def generators_in(state: RunState) -> dict[str, Any]:
    """The random generators of their own that the data and the problem's modules hold, by where they are.

    Those that files of the first version lack (of dev and test data, and deeper in the training data) have a ":" in
    their names.
    """
    found = own_generators((f"problem.{name}", module) for name, module in state.problem.named_modules())
    source = state.source("train")
    if source is not None and not source.resident:
        found = generators_of(source.loader) | found
    loaders = [(split, getattr(state.feed.splits.get(split), "loader", None)) for split in ("train", "dev", "test")]
    if all(loader is None for _, loader in loaders):
        return found
    known = {id(generator) for generator in found.values()}
    for split, loader in loaders:
        for name, generator in generators_within(loader, f"{split}: loader").items():
            if id(generator) not in known:
                known.add(id(generator))
                found[name] = generator
    return found


def set_generators_in(state: RunState, states: Mapping[str, Any]) -> None:
    """Put back the states of `generators_in`; what a file of the first version lacks stays as it is."""
    own = generators_in(state)
    set_generator_states({name: g for name, g in own.items() if name in states or ":" not in name}, states)
