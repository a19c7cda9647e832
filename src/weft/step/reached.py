"""What a loss reaches besides what is trained. Loaded where something else requires grad."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from weft.problem.pairs import tensors_in

if TYPE_CHECKING:
    from weft.step.state import RunState


def tell(state: RunState, reached: list[Any]) -> None:
    """Name those of a first update that are `reached` and not trained (`trained.Outside`), each once."""
    if not reached:
        return
    for key in [id(found.place.value) for found in reached]:
        del state.training.outside[key]  # type: ignore[union-attr]
    reached.sort(key=lambda found: not found.of_node)
    from weft.step.explaining import reached_outside

    message = reached_outside(reached)
    if reached[0].of_node:
        raise ValueError(message)
    state.warn_once(message)


def leaves(value: Any) -> dict[int, Tensor]:
    """What the graphs of the tensors in `value` begin with: by id, the tensors that get their gradients."""
    found: dict[int, Tensor] = {}
    nodes = []
    for tensor in tensors_in(value):
        if tensor.grad_fn is not None:
            nodes.append(tensor.grad_fn)
        else:
            found[id(tensor)] = tensor
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if (leaf := getattr(node, "variable", None)) is not None:
            found[id(leaf)] = leaf
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    return found
