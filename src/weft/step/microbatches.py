"""Micro-batches: parts of a batch, their shares, and what was read from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weft.data.batches import disagreement, num_examples
from weft.devices.processes import Combine
from weft.problem.terms import picks_rows
from weft.step.metrics import DENOMINATOR, counted, has_count
from weft.step.optimizers import parameters_of

if TYPE_CHECKING:
    from weft.step.state import RunState


def parts_of(state: RunState) -> Callable[[Any], list[tuple[Any, int, float]]]:
    """A function of what `run.batches` yields: its batches, each with its number of examples and its share of all.

    Of several processes one may have no row of a short batch; such a batch is left out. Where the problem is in shards
    all must compute together, and gradients are summed in backward: there a batch's share is its number of examples.
    """
    in_shards, least = state.processes.in_shards, 1 if state.processes.skips_empty else 0

    def one(batch: Any) -> list[tuple[Any, int, float]]:
        n = num_examples(batch)
        return [(batch, n, float(n) if in_shards else 1.0)] if n >= least else []

    def several(batches: Any) -> list[tuple[Any, int, float]]:
        examples = [num_examples(batch) for batch in batches]
        whole = 1 if in_shards else max(1, sum(examples))
        return [(batch, n, n / whole) for batch, n in zip(batches, examples, strict=True) if n >= least]

    return several if state.config.accumulate > 1 else one


def tell_of_counting(state: RunState, split: str, batch: Any, loss: Any, scalars: Mapping[str, Any]) -> None:
    """Say, once, where the first batch of a split shows that what is computed is no mean over its rows."""
    said = [] if DENOMINATOR in scalars else [disagreement(batch)]
    if picks_rows(state.problem) and state.num_batches(split) != 1:
        from weft.problem.picked import one_number_of_picked

        said.append(one_number_of_picked(state.problem))
    for message in filter(None, said):
        state.warn_once(message)
    if split == "train" and (state.config.accumulate > 1 or state.processes.world > 1):
        from weft.step.shares import tell_of_shares

        tell_of_shares(state, batch, loss, scalars)


def total(state: RunState, losses: list[Tensor]) -> Tensor:
    """The sum of the parts' losses; zero where this process had none."""
    if len(losses) == 1:
        return losses[0]
    return torch.stack(losses).sum() if losses else torch.zeros((), device=state.fabric.device)


def weight_of(state: RunState, scalars: Any, share: float) -> Any:
    """What the loss of a part is multiplied with: its share, or the denominator that the step returned.

    How much all of them come to is known after the last part only; `divided` then divides by that.
    """
    if not has_count(scalars):
        return share
    return counted(scalars, 0) if state.config.accumulate > 1 or state.processes.in_shards else 1.0


def is_nothing(state: RunState, share: Any) -> bool:
    """Whether a part is a mean over nothing, which is nan and so are its gradients. In shards all compute together."""
    return isinstance(share, float) and share == 0.0 and not state.processes.in_shards


def divided(state: RunState, loss: Tensor, read: Sequence[tuple[Any, int]]) -> Tensor:
    """The loss of all parts, as its gradients: divided by what the step returned as their denominators, if it did."""
    if state.config.accumulate == 1 or state.processes.in_shards or not any(has_count(s) for s, _ in read):
        return loss
    whole = num_read(read)
    if isinstance(whole, float) and not whole:
        return loss
    for optimizer in state.training.optimizers.values():
        for p in parameters_of(optimizer):
            if p.grad is not None:
                p.grad.div_(whole)
    return loss / whole


def num_read(read: Sequence[tuple[Any, int]]) -> Any:
    """What all that was read counts for: the denominators that the step returned, else the examples."""
    return sum(counted(scalars, examples) for scalars, examples in read)


def combiner(state: RunState, names: Sequence[str] | None = None) -> Combine | None:
    """What makes the gradients of the named optimizers (or all) those of the global batch; None in a single process."""
    params = [p for name in names or state.training.optimizers for p in parameters_of(state.training.optimizers[name])]
    return state.processes.combiner(list(dict.fromkeys(params)))


def rows_of(batch: Any) -> int:
    """The examples of what `run.batches` yields: a batch, or a list of them when accumulating."""
    return sum(map(num_examples, batch)) if isinstance(batch, list) else num_examples(batch)


def record(state: RunState, read: Sequence[tuple[Mapping[str, Any], int]]) -> None:
    """Count what a step measured: for each of its batches, the scalars by name and the number of examples."""
    if state.step.measured is not None:
        state.step.measured = [(_tensors(scalars), examples) for scalars, examples in read]
    for scalars, examples in read:
        state.epoch.means.add(scalars, examples)


def _tensors(scalars: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: torch.as_tensor(v).detach() for name, v in scalars.items() if not name.startswith(DENOMINATOR)}
