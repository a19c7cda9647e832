"""Micro-batches: parts of a batch, their shares, and what was read from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weft.data.batches import num_examples
from weft.step.optimizers import parameters_of

if TYPE_CHECKING:
    from weft.loop.run import Run

Update = Callable[[Any], Tensor]
Combine = Callable[[Tensor, int], Tensor]
Step = Callable[[Tensor | None, Sequence[tuple[Mapping[str, Any], int]]], bool]
"""(Loss, scalars read with their examples) -> whether the optimizers stepped."""


def _parts(run: Run) -> Callable[[Any], list[tuple[Any, int, float]]]:
    """A function of what `run.batches` yields: its batches, each with its number of examples and its share of all.

    Of several processes one may have no row of a short batch; such a batch is left out. Where the problem is in shards
    all must compute together, and gradients are summed in backward: there a batch's share is its number of examples.
    """
    in_shards, least = run.processes.in_shards, 1 if run.processes.skips_empty else 0

    def one(batch: Any) -> list[tuple[Any, int, float]]:
        n = num_examples(batch)
        return [(batch, n, float(n) if in_shards else 1.0)] if n >= least else []

    def several(batches: Any) -> list[tuple[Any, int, float]]:
        examples = [num_examples(batch) for batch in batches]
        total = 1 if in_shards else max(1, sum(examples))
        return [(batch, n, n / total) for batch, n in zip(batches, examples, strict=True) if n >= least]

    return several if run.config.accumulate > 1 else one


def _sum(run: Run, losses: list[Tensor]) -> Tensor:
    return torch.stack(losses).sum() if losses else torch.zeros((), device=run.fabric.device)


def _num_read(read: Sequence[tuple[Any, int]]) -> int:
    return sum(examples for _, examples in read)


def combiner(run: Run, names: Sequence[str] | None = None) -> Combine | None:
    """What makes the gradients of the named optimizers (or all) those of the global batch; None in a single process."""
    params = [p for name in names or run.optimizers for p in parameters_of(run.optimizers[name])]
    return run.processes.combiner(list(dict.fromkeys(params)))


def _rows_of(run: Run) -> int:
    return sum(map(num_examples, run.batch)) if isinstance(run.batch, list) else num_examples(run.batch)


# ---------------------------------------------------------------- the optimizer step


def record(run: Run, read: Sequence[tuple[Mapping[str, Any], int]]) -> None:
    """Count what a step measured: for each of its batches, the scalars by name and the number of examples."""
    if run.measured is not None:
        run.measured = [({name: torch.as_tensor(v).detach() for name, v in s.items()}, n) for s, n in read]
    for scalars, examples in read:
        run.means.add(scalars, examples)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value

