"""Terms that pick rows by a mask, and count for those alone. Loaded where a problem has one."""

from __future__ import annotations

from torch import nn

from weft.problem.problem import Problem


def one_number_of_picked(problem: nn.Module) -> str | None:
    """What to say of a term that picks rows by a mask and makes one number of them itself; None if there is none."""
    terms = problem.terms.values() if isinstance(problem, Problem) else ()
    for term in terms:
        if term.shapes.picks and term.shapes.rows is None:
            return (
                f"{term} picks rows by a mask and makes one number of them, which then counts for all rows of its "
                "batch: means over batches, and parts of a batch, are not exact. Return the rows themselves "
                "(weft averages them), and it counts for those that it picked."
            )
    return None


def add_up(problem: nn.Module, split: str, means: dict[str, float]) -> None:
    """Make a problem's losses the sums of its terms again, where terms are means over rows that they picked."""
    if not isinstance(problem, Problem) or not any(term.shapes.picks for term in problem.terms.values()):
        return
    loss = 0.0
    for key, terms in (("objective_loss", problem.objectives), ("penalty_loss", problem.constraints)):
        if any(f"{split}_{term.name}" not in means for term in terms):
            return
        means[f"{split}_{key}"] = sum(means[f"{split}_{term.name}"] for term in terms)
        loss += means[f"{split}_{key}"]
    means[f"{split}_loss"] = loss
