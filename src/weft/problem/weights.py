"""The weights of the terms of a problem: read and set. Loaded where they change or are saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weft.problem.problem import Problem
from weft.problem.reading import is_neuromancer, neuromancer_terms
from weft.problem.terms import Term
from weft.types import suggest


def term_weights(problem: nn.Module) -> dict[str, Tensor | float]:
    """The weight of each term by name, as it is now; empty for a plain module. A weft term's is the live tensor."""
    return {name: term.weight for name, term in _terms(problem).items()}


def set_term_weights(problem: nn.Module, weights: Mapping[str, float | Tensor]) -> None:
    """Set the weights of the named terms, from the next batch on. Raises ValueError for a name that no term has."""
    terms = _terms(problem)
    for name in weights:
        if name not in terms:
            known = f"its terms are {list(terms)}" if terms else "it has no named terms"
            raise ValueError(f"The problem has no term {name!r}: {known}{suggest(name, terms) or '.'}")
    with torch.no_grad():
        for name, value in weights.items():
            if isinstance(terms[name], Term) or isinstance(terms[name].weight, nn.Parameter):
                terms[name].weight.fill_(value)
            else:
                terms[name].weight = value


def _terms(problem: nn.Module) -> dict[str, Any]:
    if isinstance(problem, Problem):
        return dict(problem.terms)
    return neuromancer_terms(problem) if is_neuromancer(problem) else {}
