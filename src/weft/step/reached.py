"""What a loss reaches besides what is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from weft.places import Place
from weft.problem.pairs import tensors_in
from weft.problem.problem import Problem
from weft.step.optimizers import parameters_of

if TYPE_CHECKING:
    from weft.step.state import RunState


class Outside(NamedTuple):
    """A tensor that is not trained: where it is, and what it has as a gradient before the step."""

    place: Place
    of_node: bool
    """Whether it is a node or term of a `weft.Problem` that reaches it."""
    gradient: Any = None


def tell_of_met(state: RunState, losses: Any) -> None:
    """Name what losses reach that is not trained, and parameters that no attribute leads to: those met again."""
    training, found = state.training, leaves(losses)
    outside = training.outside or {}
    tell(state, [outside[key] for key in found if key in outside])
    known = {*training.judged, *map(id, state.problem.parameters())}
    known |= {id(p) for optimizer in training.optimizers.values() for p in parameters_of(optimizer)}
    in_shards = state.processes.in_shards  # where graphs begin with whole parameters that are nobody's
    unknown = [p for key, p in found.items() if isinstance(p, nn.Parameter) and not (in_shards or key in known)]
    if again := list(filter(training.meets_again, unknown)):
        is_step = state.trainer.step_function("train", state.problem) is state.problem
        of_batch = leaves(state.step.batch) if is_step else {}  # to which a hook may have added it
        places = [Place("", "The loss", "a parameter that no attribute leads to,", p, p.detach, None) for p in again]
        of_node = is_step and isinstance(state.problem, Problem)
        _say(state, [Outside(place, of_node and id(place.value) not in of_batch) for place in places])


def tell(state: RunState, reached: list[Outside]) -> None:
    """Name those of a first update that are `reached` and not trained, each once."""
    if reached:
        for key in [id(found.place.value) for found in reached]:
            del state.training.outside[key]  # type: ignore[union-attr]
        _say(state, reached)


def _say(state: RunState, reached: list[Outside]) -> None:
    """Raise or warn, by who reaches it."""
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
