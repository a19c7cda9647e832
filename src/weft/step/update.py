"""The update: forward, backward, clipping, check, optimizer step. The only place that calls backward.

`built_in(state, begin, end)` picks one of a few plain functions of a batch, once, when a run (or a phase) begins:
one optimizer; several by name; an optimizer that needs a closure. The user's own `update` is in `weft.step.manual`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from weft.step.forward import forward_of
from weft.step.instrument import watched
from weft.step.microbatches import is_nothing, parts_of, weight_of
from weft.step.optimizer_step import closing
from weft.step.optimizers import needs_closure
from weft.step.trained import look

if TYPE_CHECKING:
    from weft.step.state import RunState, Update


def built_in(state: RunState, begin: Callable[[Any], None], end: Callable[[Any, Tensor], None]) -> Update:
    """The update that fits the optimizers. `begin` and `end` frame the step (hooks, counting)."""
    if any(needs_closure(o) for o in state.training.optimizers.values()):
        from weft.step.closures import with_closure

        return with_closure(state, begin, end)
    if len(state.training.optimizers) > 1:
        from weft.step.several import by_several

        return by_several(state, begin, end)
    return by_one(state, begin, end)


def by_one(state: RunState, begin: Callable, end: Callable) -> Update:
    """One optimizer, which follows the loss."""
    forward, backward = forward_of(state, "train"), watched(state.hooks, "backward", state.fabric.backward)
    parts, close = parts_of(state), closing(state, end)

    def update(batch: Any) -> Tensor:
        begin(batch)
        losses, read = [], []
        for part, examples, share in parts(batch):
            loss, scalars = forward(part)
            if state.training.looks:
                look(state, loss)
            share = weight_of(state, scalars, share)
            if share != 1.0:
                loss = loss * share
            read.append((scalars, examples))
            if is_nothing(state, share):
                continue
            backward(loss)
            if not isinstance(share, float) or share:  # the mean over no rows is nan
                losses.append(loss.detach())
        return close(batch, losses, read)

    return update
