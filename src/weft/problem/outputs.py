"""What a problem predicts: all of its outputs by key, or some alone. Loaded where predictions are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from weft.problem.problem import Problem
from weft.problem.reading import is_neuromancer
from weft.problem.terms import RESERVED_KEYS, with_parts
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


def forward_nodes(problem: nn.Module, keys: Sequence[str] | None = None) -> Callable[[Batch], dict[str, Tensor]]:
    """A function of a batch that returns the problem's tensors without its inputs and losses, for prediction.

    keys: the ones to return; only the nodes that they need are run. ValueError for one that nothing writes.
    """
    nodes_only = isinstance(problem, Problem) or is_neuromancer(problem)
    if keys is not None:
        return nodes_for(problem, keys) if nodes_only else picked(forward_nodes(problem), keys)
    if hasattr(problem, "own_output"):  # Supervised
        return cast(Any, problem).step
    function = cast(Callable[..., Any], problem.step if nodes_only else problem)

    def forward(batch: Batch) -> dict[str, Tensor]:
        out = function(dict(batch))
        if not isinstance(out, Mapping):
            raise TypeError(
                f"Prediction needs a problem that returns a dict of tensors; {type(problem).__name__} returned "
                f"{type(out).__name__}. Return a dict, or pass a predict_step."
            )
        return {k: v for k, v in out.items() if _is_prediction(k, v, batch) and (nodes_only or not _is_loss(k))}

    return forward


def _is_prediction(key: str, value: Any, batch: Batch) -> bool:
    """A tensor that did not come with the batch; a node may have put a new one under a key of the batch."""
    return isinstance(value, Tensor) and key not in RESERVED_KEYS and value is not batch.get(key)


def _is_loss(key: str) -> bool:
    return key == "loss" or key.endswith("_loss")
