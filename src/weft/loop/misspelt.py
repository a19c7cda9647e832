"""Methods of a trainer's subclass that are named almost like one that training calls."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import SequenceMatcher
from types import FunctionType
from typing import Any

from weft.events import EVENTS

STEPS = ("training_step", "validation_step", "test_step", "predict_step")
CLOSE = 0.9
"""How alike two names are of which one is taken for a slip of the other (1: the same)."""


def refuse_misspelt(kind: type, base: type, hooks: Any = None) -> None:
    """Raise TypeError for a method of a subclass that is named almost like one that training calls, or like an event.

    Not for one that goes on where the known name ends ("update_weights"), nor where the known one is overridden too.
    """
    known = (*STEPS, "configure_optimizers", "update", "fit", "start", *EVENTS)
    own = [cls for cls in kind.__mro__ if cls not in base.__mro__ and not cls.__module__.startswith("weft.")]
    names = {name for cls in own for name, value in vars(cls).items() if isinstance(value, FunctionType)}
    given = [
        fn
        for hook in (hooks if isinstance(hooks, list | tuple) else [hooks])
        if isinstance(hook, Mapping)
        for fn in hook.values()
    ]
    for name in sorted(names & EVENTS.keys() - {getattr(fn, "__name__", "") for fn in given}):
        raise TypeError(
            f"{kind.__name__} has {name!r}, which is an event: hooks listen to it, a trainer does not. "
            f"Give it in hooks={{{name!r}: function}}, or make it a method of a weft.Hook."
        )
    for name in sorted(names - {*dir(base), *known}):
        for right in known:
            if right not in names and _is_slip(name, right):
                raise TypeError(
                    f"{kind.__name__} has {name!r}, which training never calls; did you mean {right!r}?"
                    + (" (An event: give it in hooks=.)" if right.startswith("on_") else "")
                )


def _is_slip(name: str, right: str) -> bool:
    if name.startswith(("_", right)):
        return False
    plain, other = (text.replace("_", "").lower() for text in (name, right))
    if len(plain) == len(other) and sorted(plain) == sorted(other):  # the same letters: two changed places
        return sum(a != b for a, b in zip(plain, other, strict=True)) <= 2
    return SequenceMatcher(None, name, right).ratio() >= CLOSE
