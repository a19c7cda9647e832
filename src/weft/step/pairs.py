"""Steps and metrics in which (n,) met (n, 1): every row with every other, where a loss is made of rows.

The first batch of a step is computed under a watch over torch's functions (`weft.problem.pairs`): once a result is
reduced, its shape says nothing any more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from weft.problem.pairs import PairWatch

if TYPE_CHECKING:
    from weft.step.state import RunState


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
