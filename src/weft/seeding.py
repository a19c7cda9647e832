"""Seeds: of the whole process, of the order of the data, and of what a data setup function draws."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from weft.checkpoint import random_state, set_random_state


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def order_seed(seed: int | None) -> int:
    """The seed of the data's order: `seed`, or torch's initial one. It is read, never drawn."""
    return (torch.initial_seed() if seed is None else seed) % 2**63


def separate(seed: int, rank: int) -> None:
    """Give every process but the first random numbers of its own, so that each draws other points, masks and noise."""
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
