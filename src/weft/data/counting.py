"""What is said of a batch whose tensors differ in their rows. Loaded where one does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def in_words(found: Sequence[tuple[Any, Tensor]], rows: int) -> str:
    """Which tensors, by key or number, have how many rows, that they count as `rows`, and what to do about it."""
    named: dict[int, list[str]] = {}
    for key, tensor in found:
        named.setdefault(tensor.size(0), []).append(str(key) if isinstance(key, str) else f"tensor {key}")
    counts = ", ".join(f"{number} by {' and '.join(keys)}" for number, keys in named.items())
    return (
        f"The tensors of a batch differ in their first dimension, {counts}: it was counted as {rows} examples. "
        'Return "num_examples" from the step, or put it into the batch, to say otherwise.'
    )
