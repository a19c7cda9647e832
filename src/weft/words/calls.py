"""Whether what a user gave can be called as it will be. Loaded where hooks or steps are given."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any


def check_call(what: str, function: Any, arguments: Sequence[str]) -> None:
    """Raise TypeError for what is no function, or takes fewer or more arguments; one that does not tell is left."""
    if not callable(function):
        raise TypeError(f"{what}={function!r}: expected a function ({', '.join(arguments)}).")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*arguments)
    except TypeError:
        shown = ", ".join(arguments)
        way = f"{function.__name__}({shown}, ...)" if isinstance(function, type) else "..."
        way = f"give a function of ({shown}), such as lambda {shown}: {way}"
        raise TypeError(f"{what} takes {signature}, and is called with ({shown}): {way}") from None


def check_hooks(hooks: list[Any], events: Mapping[str, Sequence[str]]) -> list[Any]:
    """The hooks, each function of which takes the arguments of its event, named in `events`."""
    for hook in hooks:
        for event, arguments in events.items():
            function = hook.get(event) if isinstance(hook, Mapping) else getattr(hook, event, None)
            owner = "" if isinstance(hook, Mapping) else f"{type(hook).__name__}."
            if function is not None:
                check_call(f"hooks: {owner}{event}", function, arguments)
    return hooks
