"""Where (n,) meets (n, 1): every row with every other, which is seldom meant where a result is made of rows.

    with PairWatch(batch) as watch:
        loss = step(batch)
    if watch.found: ...                                # "tensors of shapes (8,) and (8, 1), which makes (8, 8): ..."

Shapes of inputs do not tell what is meant, nor does a result that was reduced; so operations are looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

_NAMES = """
    sub rsub add mul div true_divide pow float_power fmod remainder atan2 hypot logaddexp xlogy eq ne lt le gt ge
    maximum minimum fmax fmin where lerp copysign dist
"""
_METHODS = "sub rsub add radd mul rmul truediv rtruediv pow"
_LOSSES = """
    mse_loss l1_loss smooth_l1_loss huber_loss kl_div poisson_nll_loss soft_margin_loss cosine_similarity
    pairwise_distance
"""
_FUNCTIONS = {getattr(owner, name) for owner in (torch, Tensor) for name in _NAMES.split() if hasattr(owner, name)}
_FUNCTIONS |= {getattr(Tensor, f"__{name}__") for name in _METHODS.split()}
_FUNCTIONS |= {getattr(nn.functional, name) for name in _LOSSES.split()}
_PICKING = {torch.masked_select, Tensor.masked_select, torch.nonzero, Tensor.nonzero, torch.argwhere, Tensor.argwhere}


class PairWatch(TorchFunctionMode):
    """Notes the first operation of two tensors of rows of shapes (n, ...) and (n, ..., 1), n > 1, that share no memory.

    Where they do (`x[:, None] - x`), every row with every other is what is meant. Tensors of rows are those of the
    batch, what was computed with a gradient, or, where there are none, what was computed from such tensors; constants
    or parameters of n entries (centers, frequencies) are none.
    """

    def __init__(self, batch: Any) -> None:
        super().__init__()
        self.given = {id(_base(tensor)) for tensor in tensors_in(batch)}
        self.computed: Any = WeakIdKeyDictionary()
        self.found: str | None = None
        self.picks = False
        """Whether rows were picked by a mask, so that how many there are depends on their values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.found is None and func in _FUNCTIONS and len(args) >= 2:
            self._look(*[a for a in args if isinstance(a, Tensor)][:2])
        self.picks = self.picks or func in _PICKING or (func is Tensor.__getitem__ and _has_mask(args[1]))
        out = func(*args, **(kwargs or {}))
        if self.found is None and not torch.is_grad_enabled() and any(map(self._is_of_rows, tensors_in(args))):
            self.computed.update({tensor: True for tensor in tensors_in(out)})
        return out

    def _look(self, *pair: Tensor) -> None:
        shapes = sorted((tuple(t.shape) for t in pair), key=len)
        if len(shapes) < 2 or not shapes[0] or shapes[0][0] < 2 or shapes[1] != (*shapes[0], 1):
            return
        rows, result = shapes[0][0], _broadcast(*shapes)
        if result[:2] == (rows, rows) and _base(pair[0]) is not _base(pair[1]) and all(map(self._is_of_rows, pair)):
            self.found = (
                f"tensors of shapes {shapes[0]} and {shapes[1]}, which makes {result}: every row with every other. "
                "Give both the same shape (x[:, None] or x[:, 0]); where this is meant, write x[:, None] and "
                "y[None, :]."
            )

    def _is_of_rows(self, tensor: Tensor) -> bool:
        base = _base(tensor)
        return tensor.grad_fn is not None or id(base) in self.given or tensor in self.computed or base in self.computed


def _has_mask(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and part.dtype == torch.bool and part.dim() for part in parts)


def refuse_pairs(what: str, value: Any, read: Mapping[str, Any], watch: PairWatch) -> None:
    """Raise ValueError where (n,) met (n, 1) in what gave `value`, and both are shapes of what was `read`."""
    shapes = [tuple(v.shape) for v in read.values() if isinstance(v, Tensor)]
    if watch.found is None or not isinstance(value, Tensor) or value.ndim < 2 or tuple(value.shape) in shapes:
        return
    if any((*shape, 1) in shapes for shape in shapes) and value.shape[0] == value.shape[1]:
        found = ", ".join(f"{k} {tuple(v.shape)}" for k, v in read.items() if isinstance(v, Tensor))
        raise ValueError(
            f"{what} has shape {tuple(value.shape)}, every row with every other. It reads {found}, and computes with "
            f"{watch.found} Or return its mean (.mean())."
        )


def has_rows(read: Mapping[str, Any]) -> bool:
    """Whether shapes tell anything: of one row they do not."""
    return any(isinstance(v, Tensor) and v.ndim and v.shape[0] > 1 for v in read.values())


def _broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:  # the operation itself will tell
        return ()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a value: itself, or those in its items."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)


def _base(tensor: Tensor) -> Tensor:
    """The tensor that this one is a view of."""
    return tensor if tensor._base is None else tensor._base
