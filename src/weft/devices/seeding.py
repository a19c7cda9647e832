"""Seeds: of the whole process, of the order of the data, and of what a data setup function draws."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
