"""The update by several optimizers, each of which follows a loss of its own. Loaded where there are some."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from weft.step.forward import forward_of
from weft.step.instrument import watched
from weft.step.microbatches import is_nothing, parts_of, weight_of
from weft.step.optimizer_step import closing
from weft.step.optimizers import parameters_of, shared_parameters
from weft.step.trained import look

if TYPE_CHECKING:
    from weft.step.state import RunState, Update


def by_several(state: RunState, begin: Callable, end: Callable) -> Update:
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
    parts, close = parts_of(state), closing(state, end)
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
            if isinstance(found, dict) and state.config.monitor_metric is None and not state.has("dev"):
                state.warn_once(
                    f"The best weights are those of the smallest sum of the losses of {list(found)}, which may say "
                    "nothing (GANs): name a monitor_metric, or keep the last weights, monitor_metric=False."
                )
            for number, (name, loss) in enumerate(named.items(), start=1):
                inputs = parameters[name] if name is not None else None
                backward(loss * share if share != 1.0 else loss, inputs=inputs, retain_graph=number < len(named))
                losses.append(loss.detach() * share)
        return close(batch, losses, read)

    return update
