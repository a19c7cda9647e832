"""Constraints: terms that compare two sides. Loaded where there is one.

    inner = weft.less_equal("x", lambda p: p**2, weight=100.0, name="inner")

A constraint has a *value* (<= 0 where it holds; an equality holds at 0) and a *violation* (the part of the value that
is too much, >= 0). What it contributes to the loss depends on the loss it is used in: see `weft.problem.losses`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from weft.problem.pairs import PairWatch, has_rows
from weft.problem.terms import Term, check_function, explain, shape_of
from weft.types import Batch

Side = Callable[..., Tensor] | str | float | Tensor
"""One side of a constraint: a function of keys, a key, a number or a tensor."""


def _identity(value: Any) -> Any:
    return value


class _Constant(nn.Module):
    """A tensor that moves with the module it stands in, and is no part of its state dict."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value.detach(), persistent=False)

    def forward(self) -> Tensor:
        return self.value


class Constraint(Term):
    """`lhs <= rhs`, `lhs >= rhs` or `lhs == rhs`. Made by `weft.less_equal`, `weft.greater_equal`, `weft.equal`."""

    kind = "constraint"

    def __init__(
        self,
        lhs: Side,
        sense: str,
        rhs: Side,
        weight: float | Tensor = 1.0,
        norm: int = 1,
        name: str | None = None,
        part: str | None = None,
    ) -> None:
        super().__init__(weight, name, part)
        if self.given_weight < 0:
            raise ValueError(f"The weight of {self} must not be negative, it would reward violation; got {weight!r}.")
        if norm not in (1, 2):
            raise ValueError(f"The norm of {self} must be 1 (absolute) or 2 (squared); got {norm!r}.")
        self.sense, self.norm = sense, norm
        self.lhs, self.lhs_keys = self._side(lhs)
        self.rhs, self.rhs_keys = self._side(rhs)
        if not callable(lhs) and not callable(rhs) and not self.keys:
            raise ValueError(f"{self} compares {lhs!r} with {rhs!r}: neither side is a key or a function of keys.")

    def _side(self, side: Side) -> tuple[Callable[..., Any], list[str]]:
        if isinstance(side, str):
            key = f"{self._prefix}{side}"
            self.keys += [key] if key not in self.keys else []
            return _identity, [key]
        if isinstance(side, Tensor):
            return _Constant(side), []
        if isinstance(side, Real):
            return partial(_identity, side), []
        if callable(side):
            check_function(side, f"A side of {self} is a function of keys")
            return side, self._add_function(side)
        raise TypeError(f"A side of {self} is a function, a key, a number or a tensor; got {type(side).__name__}.")

    def value(self, data: Batch) -> Tensor:
        """How far the sides are apart: <= 0 where an inequality holds, 0 where an equality does. Not reduced."""
        try:
            left, right = self._sides(data) if self._shapes.seen else self._first(data)
        except Exception as error:
            explain(error, str(self), self.keys, data)
            raise
        try:
            value = right - left if self.sense == ">=" else left - right
            if not self._shapes.seen:
                self._check_shapes(left, right, value)
            self._shapes.note(value)
            return value
        except (AttributeError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"{self} cannot compare its sides: left {shape_of(left)}, right {shape_of(right)}; expected tensors of "
                "shapes that broadcast, or a number on one side."
            ) from error

    def _sides(self, data: Batch) -> tuple[Any, Any]:
        return self.lhs(*[data[k] for k in self.lhs_keys]), self.rhs(*[data[k] for k in self.rhs_keys])

    def _first(self, data: Batch) -> tuple[Any, Any]:
        """Both sides, and whether they pick rows by a mask."""
        if torch.compiler.is_compiling() or not has_rows(read := {k: data[k] for k in self.keys}):
            return self._sides(data)
        with PairWatch(read) as watch:
            sides = self._sides(data)
        self._shapes.picks = watch.picks
        return sides

    def _check_shapes(self, left: Any, right: Any, value: Tensor) -> None:
        """Once, at several rows: (n,) against (n, 1) makes (n, n), which compares every row with every other."""
        short, long = sorted((tuple(getattr(side, "shape", ())) for side in (left, right)), key=len)
        rows = value.shape[0] if value.ndim > 1 else 0  # AttributeError: value is no tensor
        if rows > 1 and long == (*short, 1) and value.shape[:2] == (rows, rows):
            raise ValueError(
                f"{self} compares left {shape_of(left)} with right {shape_of(right)}, every row with every other; "
                "give both sides the same shape (x[:, None] or x[:, 0]); where this is meant, x[:, None] and "
                "y[None, :]."
            )
        self._shapes.seen = value.ndim == 0 or value.shape[0] > 1

    def violation(self, value: Tensor) -> Tensor:
        """The part of `value` that breaks the constraint, >= 0, of the same shape."""
        return value.abs() if self.sense == "==" else torch.relu(value)

    def forward(self, data: Batch) -> tuple[Tensor, Tensor]:
        """The penalty `weight * mean(violation ** norm)` and the mean violation, both scalars."""
        violation = self.violation(self.value(data))
        mean = self._shapes.mean(violation)
        return self.weight * (mean if self.norm == 1 else self._shapes.mean(violation.square())), mean


def less_equal(
    lhs: Side, rhs: Side, weight: float | Tensor = 1.0, norm: int = 1, name: str | None = None, part: str | None = None
) -> Constraint:
    """The constraint `lhs <= rhs`; penalty `weight * mean(relu(lhs - rhs) ** norm)`.

    Each side is a function whose argument names are the keys it reads, a key, a number or a tensor; their shapes must
    broadcast. norm: 1 (exact for a large enough weight) or 2 (smooth). name: defaults to `constraint_0`, by its place.
    part: of a batch with parts, the one whose keys both sides name: with "boundary", `u` is the key "boundary.u".
    """
    return Constraint(lhs, "<=", rhs, weight, norm, name, part)


def greater_equal(
    lhs: Side, rhs: Side, weight: float | Tensor = 1.0, norm: int = 1, name: str | None = None, part: str | None = None
) -> Constraint:
    """The constraint `lhs >= rhs`; penalty `weight * mean(relu(rhs - lhs) ** norm)`. See `less_equal`."""
    return Constraint(lhs, ">=", rhs, weight, norm, name, part)


def equal(
    lhs: Side, rhs: Side, weight: float | Tensor = 1.0, norm: int = 1, name: str | None = None, part: str | None = None
) -> Constraint:
    """The constraint `lhs == rhs`; penalty `weight * mean(abs(lhs - rhs) ** norm)`. See `less_equal`."""
    return Constraint(lhs, "==", rhs, weight, norm, name, part)
