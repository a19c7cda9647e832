"""What only optimizers hold, and what belongs to it. Loaded where one holds more than the problem registers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from weft.places import named, places, places_behind
from weft.step.optimizers import parameters_of

if TYPE_CHECKING:
    from weft.step.state import RunState


def buffers_beside(state: RunState, steps: Iterable[tuple[str, Any]]) -> dict[str, Tensor]:
    """The buffers of the modules whose parameters only an optimizer holds: they are trained as well.

    `steps`: whatever trains besides the problem, by what to call it.
    """
    held = {id(p) for p in state.training.others.tensors.values()}
    reached = [*places(state.problem, everything=True), *places_behind(steps, state.problem)]
    modules = {id(place.module) for place in reached if place.module is not None and id(place.value) in held}
    found = [place for place in reached if id(place.module) in modules and type(place.value) is Tensor]
    return {
        f"buffer.{name}": place.value for name, place in named(p for p in found if not p.value.requires_grad).items()
    }


def held_by(given: Any, problem: nn.Module) -> list[Tensor]:
    """What optimizers will hold: the parameters of an instance, the tensors that a factory of one may read."""
    if isinstance(given, Optimizer):
        return list(parameters_of(given))
    if isinstance(given, Mapping):
        return [p for one in given.values() for p in held_by(one, problem)]
    found = places_behind([("the optimizer", given)], problem)
    tensors = [p.value for p in found if isinstance(p.value, Tensor)]
    return [p for p in tensors if p.is_leaf and (p.requires_grad or isinstance(p, nn.Parameter))]


def to_be_trained(state: RunState) -> list[Tensor]:
    """The tensors that the optimizers of all phases hold, as far as that can be known before they are made."""
    given = [state.trainer.options["optimizer"], *(phase.optimizer for phase in state.training.phases)]
    if state.trainer.overrides("configure_optimizers"):
        given.append(state.trainer.configure_optimizers)
    return [p for one in (*given, state.training.optimizers) if one is not None for p in held_by(one, state.problem)]
