"""Reading any problem: its terms and what it asks for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

from weft.problem.problem import Problem


def is_neuromancer(problem: nn.Module) -> bool:
    """Whether `problem` has the shape of a NeuroMANCER Problem: nodes, a step, and a loss that holds the terms."""
    loss = getattr(problem, "loss", None)
    return all(hasattr(problem, k) for k in ("nodes", "step")) and all(
        hasattr(loss, k) for k in ("objectives", "constraints")
    )


def term_keys(problem: nn.Module, split: str) -> dict[str, str] | None:
    """Which scalars to report: their name in the history -> their key in the problem's output. None: every scalar.

    In a NeuroMANCER problem a violation is a tensor with an entry for each constraint and row: take its mean.
    """
    keys: dict[str, str] = {}
    if isinstance(problem, Problem):
        for name, term in problem.terms.items():
            keys[name] = name
            if term.kind == "constraint":
                keys[f"{name}_violation"] = f"{name}_violation"
    elif is_neuromancer(problem):
        for name, term in neuromancer_terms(problem).items():
            keys[name] = term.output_keys[0]
            if len(term.output_keys) > 2:  # a constraint: penalty, value, violation
                keys[f"{name}_violation"] = term.output_keys[2]
    else:
        return None
    keys |= {k: k for k in ("objective_loss", "penalty_loss", "loss")}
    return {f"{split}_{name}": f"{split}_{key}" for name, key in keys.items()}


def needs_grad_in_eval(modules: Iterable[nn.Module]) -> bool:
    """Whether one of a problem's modules asks for autograd in evaluation, by a true `grad_inference`."""
    # not getattr: where there is no such attribute, nn.Module takes 1.4 us a module to say so
    return any(vars(m).get("grad_inference", getattr(type(m), "grad_inference", False)) for m in modules)


def neuromancer_terms(problem: Any) -> dict[str, Any]:
    """Its terms by name; `objective_0`, `constraint_0` where a name is used twice or holds a memory address."""
    numbered = [(f"objective_{i}", term) for i, term in enumerate(problem.loss.objectives)]
    numbered += [(f"constraint_{i}", term) for i, term in enumerate(problem.loss.constraints)]
    counts = Counter(term.name for _, term in numbered)
    return {
        fallback if counts[term.name] > 1 or _ADDRESS.search(str(term.name)) else term.name: term
        for fallback, term in numbered
    }


_ADDRESS = re.compile(r"0x[0-9a-f]{6,}|\d{10,}", re.IGNORECASE)  # new in every process: no name for a history
