"""What shows in the first batches of a step: rows that meet all others, and gradients that it takes itself.

The first batch is computed under a watch over torch's functions (`weft.problem.pairs`): once a result is reduced, its
shape does not tell any more that (n,) met (n, 1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from weft.problem.pairs import PairWatch

if TYPE_CHECKING:
    from weft.step.state import RunState


def looked_at(state: RunState, step: Callable[[Any], Any], batch: Any, number: int) -> Any:
    """What `step` returns for its first or second batch (`number` 1, 2), of which parts of one batch are two.

    Says so where it changes the gradients of what is trained: the update takes them, and adds them up over parts.
    """
    own = (*state.problem.parameters(), *state.training.others.tensors.values())
    before = [(p.grad, 0 if p.grad is None else p.grad._version) for p in own]
    out = watched_for_pairs(state, step, batch) if number == 1 else step(batch)
    for p, (grad, version) in zip(own, before, strict=True):
        if p.grad is grad and (grad is None or grad._version == version):
            continue
        is_nothing = p.grad is None or not p.grad.any()
        if grad is None and is_nothing:  # zero_grad(set_to_none=False)
            continue
        from weft.step.explaining import takes_gradients

        state.warn_once(takes_gradients(lost=grad is not None and is_nothing))
        break
    return out


def watched_for_pairs(state: RunState, step: Callable[[Any], Any], batch: Any) -> Any:
    """What `step` returns for its first batch; says so where it computes every row with every other."""
    if any(_is_compiled(module) for module in state.problem.modules()):
        return step(batch)  # to torch's compiler a watch is another program, to be compiled once more
    with PairWatch(batch) as watch:
        out = step(batch)
    if watch.found is not None:
        state.warn_once(f"The step computes with {watch.found}")
    return out


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
