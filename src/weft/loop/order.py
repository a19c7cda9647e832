"""The training batches of an epoch, from the place where it was left."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from weft.devices import seeding
from weft.devices.seeding import generator_states, generators_of, own_generators, set_generator_states
from weft.step.state import RunState


def train_batches(state: RunState) -> Iterable[Any]:
    """The training batches of the epoch that were not used yet.

    A loader starts over in the random state of the epoch's start, and is skipped to its place; then the random state is
    again what it was, or what a checkpoint says.
    """
    start, kept = state.progress.batch, state.kept
    random, generators = kept.random_to_resume, kept.generators_to_resume
    kept.random_to_resume, kept.generators_to_resume = None, {}
    if start == 0:
        kept.random_before_epoch, kept.generators_before_epoch = None, {}
        if not state.source("train").resident:  # tensors know their order
            kept.random_before_epoch = seeding.random_state()
            kept.generators_before_epoch = generator_states(generators_in(state))
        return state.batches_of("train")
    own = generators_in(state)
    if random is None:
        random, generators = seeding.random_state(), generator_states(own)
    if kept.random_before_epoch is not None:
        seeding.set_random_state(kept.random_before_epoch)
        set_generator_states(own, kept.generators_before_epoch)
    batches = state.batches_of("train", start)
    seeding.set_random_state(random)
    set_generator_states(own, generators)
    return batches


def generators_in(state: RunState) -> dict[str, Any]:
    source = state.source("train")
    of_data = {} if source.resident else generators_of(source.loader)
    return of_data | own_generators((f"problem.{name}", module) for name, module in state.problem.named_modules())
