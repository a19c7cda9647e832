"""Predictions of some keys alone. Loaded where some are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from weft.problem.terms import with_parts
from weft.types import Batch, suggest


def nodes_for(problem: Any, keys: Sequence[str]) -> Callable[[Batch], dict[str, Tensor]]:
    """A function of a batch that returns these keys and runs the nodes they need; ValueError for an unknown key."""
    written = [key for node in problem.nodes for key in node.output_keys]
    for key in keys:
        if key not in written:
            raise _no_such_key(key, written)
    needed, nodes = set(keys), []
    for node in reversed(problem.nodes):
        if needed.intersection(node.output_keys):
            needed |= set(node.input_keys)
            nodes.insert(0, node)

    def forward(batch: Batch) -> dict[str, Tensor]:
        data = with_parts(batch)
        for node in nodes:
            data.update(node(data))
        return {key: data[key] for key in keys}

    return forward


def picked(step: Callable[[Any], Any], keys: Sequence[str]) -> Callable[[Any], Any]:
    """`step` with these keys of what it returns alone. ValueError for one that is not there."""

    def only_these(batch: Any) -> dict[str, Tensor]:
        found = step(batch)
        for key in keys:
            if key not in found:
                raise _no_such_key(key, found)
        return {key: found[key] for key in keys}

    return only_these


def _no_such_key(key: str, known: Iterable[str]) -> ValueError:
    known = list(known)
    return ValueError(f"predict: nothing computes {key!r}; there are {known}{suggest(key, known) or '.'}")
