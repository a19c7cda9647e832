"""How the terms of a problem add up to one loss: here the penalty; see also `barrier` and `lagrangian`.

    problem = weft.Problem([net], objectives=[f], constraints=[inner], loss=weft.PenaltyLoss())

A loss is a module called with the data and the terms; it returns scalars by name: each term's contribution,
`<constraint>_violation`, `objective_loss`, `penalty_loss` and `loss`. None branches on the value of a tensor, so all
can be traced.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from operator import add
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from weft.problem.terms import Objective
from weft.types import Batch

if TYPE_CHECKING:
    from weft.problem.constraints import Constraint


class PenaltyLoss(nn.Module):
    """The sum of all objectives and all weighted constraint penalties (Nocedal & Wright, 2nd ed., ch. 17.1-17.2).

    Called as `loss(data, objectives, constraints)` with a batch that holds what the nodes computed. Raises TypeError
    for an objective whose value is no tensor.
    """

    def forward(
        self, data: Batch, objectives: Iterable[Objective], constraints: Iterable[Constraint]
    ) -> dict[str, Tensor]:
        """Scalars by name: each term, `<constraint>_violation`, `objective_loss`, `penalty_loss` and `loss`."""
        out: dict[str, Tensor] = {}
        objective_terms = add_objectives(out, data, objectives)
        penalties = []
        for c in constraints:
            out[c.name], out[f"{c.name}_violation"] = penalty, _ = self.penalty(c, data)
            penalties.append(penalty)
        return totals(out, objective_terms, penalties)

    def penalty(self, constraint: Constraint, data: Batch) -> tuple[Tensor, Tensor]:
        """What a constraint adds to the loss of `data`, and its mean violation."""
        return constraint(data)


def add_objectives(out: dict[str, Tensor], data: Batch, objectives: Iterable[Objective]) -> list[Tensor]:
    """Add the contribution of each objective to `out`, by its name; returns them."""
    contributions = [term(data) for term in objectives]
    out.update((term.name, c) for term, c in zip(objectives, contributions, strict=True))
    return contributions


def totals(out: dict[str, Tensor], objectives: list[Tensor], penalties: list[Tensor]) -> dict[str, Tensor]:
    """Add the two sums and their sum to `out`; a sum of no terms is zero."""
    sums = [reduce(add, part) if part else None for part in (objectives, penalties)]
    loss = reduce(add, [total for total in sums if total is not None])
    out["objective_loss"], out["penalty_loss"] = (torch.zeros_like(loss) if s is None else s for s in sums)
    out["loss"] = loss
    return out
