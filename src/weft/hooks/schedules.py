"""Curriculum: weights of terms and attributes of nodes as a function of the epoch.

weft.hooks.Curriculum(lambda epoch: {"rollout.steps": min(50, 5 + epoch // 20), "smoothness": 0.99**epoch})
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from weft.events import Hook
from weft.problem.named import submodule
from weft.problem.weights import set_term_weights, term_weights
from weft.types import suggest


class Curriculum(Hook):
    """Sets what `schedule(epoch)` returns before each epoch, and logs it.

    A name in the dict is a term's, whose weight is set (logged as `weight_<term>`), or "<node>.<attribute>"
    ("rollout.steps", NeuroMANCER's "system.nsteps"). The epoch counts from 0; as nothing else decides, a resumed run
    goes on as it was. Raises ValueError for a name that is neither.

    Losses of different epochs then measure different things: a fixed dev problem or `monitor_metric` keeps best
    comparable.
    """

    def __init__(self, schedule: Callable[[int], Mapping[str, Any]]) -> None:
        self.schedule = schedule

    def on_epoch_start(self, trainer: Any) -> None:
        terms = term_weights(trainer.problem)
        for name, value in self.schedule(trainer.current_epoch).items():
            if name in terms:
                set_term_weights(trainer.problem, {name: value})
                trainer.log({f"weight_{name}": value})
                continue
            set_attribute(trainer.problem, name, value)
            if isinstance(value, int | float):
                trainer.log({name: value})


def set_attribute(problem: nn.Module, name: str, value: Any) -> None:
    """Set "<node>.<attribute>" of a node or submodule. Raises ValueError where there is none of that name."""
    node, _, attribute = name.rpartition(".")
    if not node:
        terms = list(term_weights(problem))
        raise ValueError(
            f"{name!r} is no term of the problem{suggest(name, terms) or f' ({terms})'}, nor 'node.attribute'."
        )
    owner = submodule(problem, node)
    if not hasattr(owner, attribute):
        known = [k for k in vars(owner) if not k.startswith("_")]
        raise ValueError(f"{node!r} has no attribute {attribute!r}{suggest(attribute, known)}. It has {known}.")
    setattr(owner, attribute, value)
