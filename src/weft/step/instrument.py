"""The parts of training, as a profiler wants them called. Without one, every part is called as it is.

    backward = watched(state.hooks, "backward", fabric.backward)

A hook of weft's own may have `watch_part(name, function)`, which returns what is called instead of that part. The parts
are "data", "forward", "backward", "optimizer", "evaluation", "checkpoint" and "hook <its name>". They are resolved when
a run or a phase begins, so a run that nobody watches pays nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from weft.events import bind

T = TypeVar("T")
WATCH_PART = "watch_part"
_END = object()  # equal to no batch: `iter` goes on to the StopIteration


def watched(hooks: Iterable[Any], part: str, function: Callable[..., T]) -> Callable[..., T]:
    """`function`, a part of the training, as the watching hooks want it called; without any, `function` itself."""
    for hook in hooks:
        if (watch := getattr(hook, WATCH_PART, None)) is not None:
            function = watch(part, function)
    return function


def watched_batches(hooks: Iterable[Any], batches: Iterable[Any]) -> Iterable[Any]:
    """`batches`, each waited for as the part "data"."""
    take = iter(batches).__next__
    call = watched(hooks, "data", take)
    return batches if call is take else iter(call, _END)


def bind_watched(hooks: Iterable[Any], event: str) -> list[Callable[..., Any]]:
    """The functions to call at `event`, each as the part "hook <name>"; what watches is not watched itself."""
    return [
        call if hasattr(getattr(call, "__self__", None), WATCH_PART) else watched(hooks, f"hook {_name(call)}", call)
        for call in bind(hooks, event)
    ]


def _name(call: Callable[..., Any]) -> str:
    owner = getattr(call, "__self__", None)
    return type(owner).__name__ if owner is not None else getattr(call, "__name__", type(call).__name__)
