"""The shared vocabulary: what a batch, a metric and a piece of saved state are."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from types import UnionType
from typing import Any, Protocol, Union, get_args, get_origin, runtime_checkable

Batch = Mapping[str, Any]
"""What a loader yields: tensors by key, plus "name" (the split), "epoch" (int) and "index" (row numbers)."""

WRITTEN_KEYS = ("name", "epoch", "index")
"""Keys that describe a batch and are no data."""

Metrics = dict[str, float]
"""Plain floats by name, as they stand in the history."""


@runtime_checkable
class Stateful(Protocol):
    """Anything that can be saved and resumed."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> object: ...


def suggest(word: object, known: object) -> str:
    """`"; did you mean 'x'?"` for the closest of `known` (an iterable of names), or an empty string."""
    close = get_close_matches(str(word), [str(k) for k in known], n=1)  # type: ignore[attr-defined]
    return f"; did you mean {close[0]!r}?" if close else ""


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The types that a union is made of; of any other type itself."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
