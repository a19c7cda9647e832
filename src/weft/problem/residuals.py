"""Residuals: terms that are sums of squares, which Gauss-Newton methods (`weft.optim`) can see into.

    problem = weft.Problem([net], [weft.residual(lambda u_xx, f: u_xx - f, name="equation")])
    residuals_of(problem)(batch)["equation"]        # whose mean square is the term

A module of your own says the same with a method `residuals(batch)`: a tensor, or several by name or in a list, whose
mean squares add up to its loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from weft.problem.constraints import Constraint
from weft.problem.losses import PenaltyLoss
from weft.problem.problem import Problem
from weft.problem.reading import is_neuromancer, neuromancer_terms
from weft.problem.terms import Objective, Term, with_parts
from weft.types import Batch


class Residual(Objective):
    """Something to bring to zero: `weight * mean(fn(...) ** 2)`. Made by `weft.residual`."""

    kind = "residual"

    @staticmethod
    def reduced(value: Tensor) -> Tensor:
        """The mean square over all entries."""
        return value.square().mean()


def residual(
    fn: Callable[..., Tensor], weight: float | Tensor = 1.0, name: str | None = None, part: str | None = None
) -> Residual:
    """A term that adds `weight * mean(fn(...) ** 2)` to the loss, and that least-squares optimizers can see into.

    fn: a function whose argument names are the keys it reads, or a module, as for `weft.objective`; it returns the
        residual itself, not its square, of any shape. Raises ValueError for a negative weight.
    part: of a batch with parts, the one whose keys the arguments name.
    """
    term = Residual(fn, weight, name, part)
    if term.given_weight < 0:
        raise ValueError(f"The weight of {term} must not be negative: residuals are brought to zero; got {weight!r}.")
    return term


def residuals_of(problem: Any) -> Callable[[Any], Any]:
    """What returns the residuals of a problem on a batch: a tensor, or several whose mean squares add up to the loss.

    Raises TypeError, with what to write instead, where the loss is no sum of squares.
    """
    if callable(own := getattr(problem, "residuals", None)):
        return own
    if isinstance(problem, Problem):
        return _of_terms(problem)
    if is_neuromancer(problem):
        return _of_neuromancer(problem)
    raise TypeError(
        f"{type(problem).__name__} does not say what its loss is the mean square of. Give it a method "
        "`residuals(self, batch)` that returns a tensor (or several, by name) whose mean squares add up to the loss, "
        "or make it a weft.Problem of weft.residual terms."
    )


def _of_terms(problem: Problem) -> Callable[[Batch], dict[str, Tensor]]:
    objectives, constraints, loss = list(problem.objectives), list(problem.constraints), problem.loss
    residual_terms = cast("list[Residual]", objectives)
    limits = cast("list[Constraint]", constraints)
    wrong = [
        f"{t}: write weft.residual(fn), whose square is minimised" for t in objectives if not isinstance(t, Residual)
    ]
    wrong += [f"{c}: its penalty is no square; give it norm=2" for c in limits if c.norm != 2]
    if type(loss) is not PenaltyLoss:
        wrong.append(f"loss={type(loss).__name__}: only weft.PenaltyLoss() adds squares up")
    if wrong:
        raise TypeError(f"The loss of {problem} is no sum of squares. {'. '.join(wrong)}.")

    def read(batch: Batch) -> dict[str, Tensor]:
        data = with_parts(batch) | problem.step(batch)
        found = {term.name: _weighted(term, term.value(data)) for term in residual_terms}
        return found | {c.name: _weighted(c, c.violation(c.value(data))) for c in limits}

    return read


def _weighted(term: Term, value: Tensor) -> Tensor:
    return torch.sqrt(term.weight) * value


def _of_neuromancer(problem: Any) -> Callable[[Batch], dict[str, Tensor]]:
    """`weight * (variable == target) ^ 2` is a mean square, as is an inequality with `^ 2`."""
    terms = neuromancer_terms(problem)
    wrong = [name for name, term in terms.items() if getattr(getattr(term, "comparator", None), "norm", None) != 2]
    usual = type(problem.loss).__name__ == "PenaltyLoss"
    if wrong or not usual:
        raise TypeError(
            f"The loss of {type(problem).__name__} is no sum of squares: "
            + (f"{wrong} are none. Write an objective as weight * (variable == target) ^ 2. " if wrong else "")
            + ("" if usual else f"{type(problem.loss).__name__} adds more than squares; use PenaltyLoss.")
        )

    def read(batch: Any) -> dict[str, Tensor]:
        data = dict(batch)
        data.update(problem.step(data))
        found = {}
        for name, term in terms.items():
            value = term(data)[term.output_keys[1]]  # left - right, or what an inequality has too much
            if "Eq" not in type(term.comparator).__name__:
                value = torch.relu(value)
            found[name] = value * term.weight**0.5
        return found

    return read
