"""The barrier loss: keeps away from the boundaries of constraints. Loaded where it is used."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from weft.problem.constraints import Constraint
from weft.problem.losses import PenaltyLoss
from weft.types import Batch, suggest


class BarrierLoss(PenaltyLoss):
    """Keeps away from the boundary of a constraint: a barrier where it holds, the penalty where it does not.

    Where the value v = lhs - rhs of an inequality is negative, it contributes barrier(v), clamped to
    [0, upper_bound]; elsewhere the penalty of PenaltyLoss. An equality has no inside and is penalised.

    barrier: a function of v, or the name of one:
        "log10"    -log10(-v)
        "log"      -log(-v)
        "inverse"  -1 / v
        "softexp"  (exp(alpha v) - 1) / alpha + alpha
        "softlog"  -log(1 + alpha (-v - alpha)) / alpha
        "expshift" exp(v + shift)
    upper_bound: the largest value of the barrier, > 0. Raises ValueError for another, and for an unknown barrier.
    Relaxed barriers: Feller & Ebenbauer, arXiv:1602.01321. The formulas are those of NeuroMANCER's BarrierLoss.
    """

    def __init__(
        self,
        barrier: str | Callable[[Tensor], Tensor] = "log10",
        upper_bound: float = 1.0,
        shift: float = 1.0,
        alpha: float = 0.5,
    ) -> None:
        super().__init__()
        barriers: dict[str, Callable[[Tensor], Tensor]] = {
            "log10": _log10_barrier,
            "log": _log_barrier,
            "inverse": _inverse_barrier,
            "softexp": partial(_softexp_barrier, alpha=alpha),
            "softlog": partial(_softlog_barrier, alpha=alpha),
            "expshift": partial(_expshift_barrier, shift=shift),
        }
        if not callable(barrier) and barrier not in barriers:
            raise ValueError(
                f"BarrierLoss has no barrier {barrier!r}{suggest(str(barrier), barriers) or '.'} "
                f"It is one of {list(barriers)}, or a function of the constraint's value."
            )
        if not upper_bound > 0:
            raise ValueError(f"The upper_bound of BarrierLoss must be > 0; got {upper_bound!r}.")
        if alpha == 0 and barrier in ("softexp", "softlog"):
            raise ValueError(f"The barrier {barrier!r} divides by alpha, which must not be 0.")
        self.barrier = barrier if callable(barrier) else barriers[barrier]
        self.upper_bound = upper_bound

    def penalty(self, constraint: Constraint, data: Batch) -> tuple[Tensor, Tensor]:
        """Barrier and penalty of a constraint together, and its mean violation in `data`."""
        c, value = constraint, constraint.value(data)
        violation = c.violation(value)
        cost = violation if c.norm == 1 else violation.square()
        if c.sense != "==":
            cost = torch.where(value < 0, self._clamped(value), cost)  # nan is not < 0, and stays nan
        return c.weight * c.shapes.mean(cost), c.shapes.mean(violation)

    def _clamped(self, value: Tensor) -> Tensor:
        # Outside (value >= 0) the result is not used, but 0 * inf in its derivative would be nan; so stay just inside.
        inside = value.clamp(max=-math.sqrt(torch.finfo(value.dtype).tiny))
        barrier = torch.nan_to_num(self.barrier(inside), nan=0.0, posinf=0.0, neginf=0.0)
        return barrier.clamp(min=0.0, max=self.upper_bound)


def _log10_barrier(value: Tensor) -> Tensor:
    return -torch.log10(-value)


def _log_barrier(value: Tensor) -> Tensor:
    return -torch.log(-value)


def _inverse_barrier(value: Tensor) -> Tensor:
    return -1 / value


def _softexp_barrier(value: Tensor, alpha: float) -> Tensor:
    return (torch.exp(alpha * value) - 1) / alpha + alpha


def _softlog_barrier(value: Tensor, alpha: float) -> Tensor:
    return -torch.log(1 + alpha * (-value - alpha)) / alpha


def _expshift_barrier(value: Tensor, shift: float) -> Tensor:
    return torch.exp(value + shift)
