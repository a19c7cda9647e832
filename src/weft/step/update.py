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
from weft.step.microbatches import combiner, divided, is_nothing, num_read, parts_of, record, total, weight_of
from weft.step.optimizer_step import make_step
from weft.step.optimizers import needs_closure, parameters_of, shared_parameters
from weft.step.trained import look

if TYPE_CHECKING:
    from weft.step.state import RunState, Update


def built_in(state: RunState, begin: Callable[[Any], None], end: Callable[[Any, Tensor], None]) -> Update:
    """The update that fits the optimizers. `begin` and `end` frame the step (hooks, counting)."""
    if any(needs_closure(o) for o in state.training.optimizers.values()):
        from weft.step.closures import with_closure

        return with_closure(state, begin, end)
    return _several(state, begin, end) if len(state.training.optimizers) > 1 else _single(state, begin, end)


def _single(state: RunState, begin: Callable, end: Callable) -> Update:
    forward, backward = forward_of(state, "train"), watched(state.hooks, "backward", state.fabric.backward)
    parts, close = parts_of(state), _closing(state, end)

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


def _several(state: RunState, begin: Callable, end: Callable) -> Update:
    """All gradients first, each loss with respect to its own optimizer's parameters; then every optimizer steps.

    Stepping one before the other's backward would change the tensors that backward still needs.
    A step that returns one loss gives every optimizer its gradients of that.
    """
    if shared := shared_parameters(state.problem, state.training.optimizers):
        raise ValueError(
            f"Parameters {shared[:5]} belong to several optimizers, and would get the gradients of all their losses. "
            "Give each optimizer its own, or write the steps out in `update` (with self.backward and self.step)."
        )
    forward, backward = forward_of(state, "train"), watched(state.hooks, "backward", state.fabric.backward)
    parts, close = parts_of(state), _closing(state, end)
    parameters = {
        name: [p for p in parameters_of(o) if p.requires_grad] for name, o in state.training.optimizers.items()
    }

    def update(batch: Any) -> Tensor:
        begin(batch)
        losses, read = [], []
        for part, examples, share in parts(batch):
            found, scalars = forward(part)
            share = weight_of(state, scalars, share)
            read.append((scalars, examples))
            if state.training.looks:
                look(state, found)
            if is_nothing(state, share):
                continue
            named = found if isinstance(found, dict) else {None: found}
            for number, (name, loss) in enumerate(named.items(), start=1):
                inputs = parameters[name] if name is not None else None
                backward(loss * share if share != 1.0 else loss, inputs=inputs, retain_graph=number < len(named))
                losses.append(loss.detach() * share)
        return close(batch, losses, read)

    return update


def _closing(state: RunState, end: Callable) -> Callable[[Any, list[Tensor], list[Any]], Tensor]:
    """What is done once all gradients are there: over all processes, step, count. Returns the loss of the whole."""
    step, combine = make_step(state, list(state.training.optimizers.values())), combiner(state)

    def close(batch: Any, losses: list[Tensor], read: list[Any]) -> Tensor:
        loss = divided(state, total(state, losses), read)
        if combine is not None:
            loss = combine(loss, num_read(read))
        if step(loss, read):
            record(state, read)
        end(batch, loss)
        return loss

    return close
