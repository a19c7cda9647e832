"""Steps and metrics in which (n,) met (n, 1): every row with every other, where a loss is made of rows.

The first batch of a step is computed under a watch over torch's functions: once a result is reduced, its shape says
nothing any more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from weft.data.batches import outermost

if TYPE_CHECKING:
    from weft.step.state import RunState

_NAMES = [
    "sub",
    "rsub",
    "add",
    "mul",
    "div",
    "true_divide",
    "pow",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "maximum",
    "minimum",
    "where",
]
_FUNCTIONS = {getattr(owner, name) for owner in (torch, Tensor) for name in _NAMES if hasattr(owner, name)} | {
    getattr(Tensor, f"__{name}__") for name in ["sub", "rsub", "add", "radd", "mul", "rmul", "truediv", "rtruediv"]
}


def watched_for_pairs(state: RunState, step: Callable[[Any], Any], batch: Any) -> Any:
    """What `step` returns for its first batch; says so where it computes every row with every other."""
    if any(_is_compiled(module) for module in state.problem.modules()):
        return step(batch)  # to torch's compiler a watch is another program, to be compiled once more
    with PairWatch(batch) as watch:
        out = step(batch)
    if watch.found is not None:
        state.warn_once(watch.found)
    return out


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


class PairWatch(TorchFunctionMode):
    """Notes the first operation of two tensors of rows of shapes (n,) and (n, 1), n > 1, that share no memory.

    Where they do (`x[:, None] - x`), every row with every other is what is meant. Tensors of rows are those of the
    batch and what was computed with a gradient; constants or parameters of n entries (centers, frequencies) are none.
    """

    def __init__(self, batch: Any) -> None:
        super().__init__()
        self.given = {id(_base(tensor)) for _, tensor in outermost(batch)}
        self.found: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.found is None and func in _FUNCTIONS and len(args) >= 2:
            self._look(*[a for a in args if isinstance(a, Tensor)][:2])
        return func(*args, **(kwargs or {}))

    def _look(self, *pair: Tensor) -> None:
        shapes = sorted((tuple(t.shape) for t in pair), key=len)
        rows = shapes[0][0] if shapes and len(shapes[0]) == 1 else 0
        if rows < 2 or shapes != [(rows,), (rows, 1)] or _base(pair[0]) is _base(pair[1]):
            return
        if all(id(_base(t)) in self.given or t.grad_fn is not None for t in pair):
            self.found = (
                f"The step computes with tensors of shapes ({rows},) and ({rows}, 1), which makes ({rows}, {rows}): "
                "every row with every other. Give both the same shape (x[:, None] or x[:, 0]); where this is meant, "
                "write x[:, None] and y[None, :]."
            )


def _base(tensor: Tensor) -> Tensor:
    """The tensor that this one is a view of."""
    return tensor if tensor._base is None else tensor._base
