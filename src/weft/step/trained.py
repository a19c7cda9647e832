"""What is trained, decided in one place: what the problem registers, and what the optimizers hold.

Both are moved, saved, restored as best and resumed; `Others` are those that only an optimizer holds. Whatever else
requires grad and is met by a loss is named before the first update of a phase: `look` walks once through its graph.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from weft.places import places, places_behind
from weft.problem.problem import Problem
from weft.step.optimizers import parameters_of
from weft.step.reached import Outside, leaves, tell_of_met

if TYPE_CHECKING:
    from weft.step.state import RunState


def adopt(state: RunState) -> None:
    """Take what the optimizers hold besides the problem's parameters into the run: to its device, in its precision."""
    found = hold(state, state.training.optimizers)
    state.training.register(state.problem)
    if not found:
        return
    probe = torch.nn.Linear(1, 1, dtype=torch.float32)
    wanted: Any = state.fabric.strategy.precision.convert_module(probe).weight.dtype
    for p in found:
        p.data = p.data.to(state.fabric.device, wanted if wanted != torch.float32 and p.is_floating_point() else None)
    if state.processes.world > 1:
        state.training.others.load_state_dict(state.processes.first(state.training.others.state_dict))


def tell_of_latecomers(state: RunState) -> None:
    """Warn once of parameters that require grad, came to the problem (or were thawed) after its optimizers were made,
    and are in none of them."""
    known, held = state.training.registered, None
    for name, p in state.problem.named_parameters():
        if p.requires_grad and id(p) not in known:
            held = held or {id(q) for optimizer in state.training.optimizers.values() for q in parameters_of(optimizer)}
            if id(p) not in held:
                from weft.step.explaining import came_late

                state.warn_once(came_late(name, p))
                return


def hold(state: RunState, optimizers: Mapping[str, Optimizer]) -> list[Tensor]:
    """Know of what `optimizers` hold besides the problem's parameters, and of the buffers that belong to it; the
    parameters that are new."""
    found, others = state.training.others.add(state.problem, optimizers), state.training.others
    if others.tensors:  # in each phase anew: they may be copies on the run's device
        from weft.step.held import buffers_beside

        others.hold_buffers(buffers_beside(state, steps_of(state)))
    return found


def steps_of(state: RunState) -> list[tuple[str, Any]]:
    """Whatever trains besides the problem, by what to call it: steps, hooks, the trainer's class."""
    trainer = state.trainer
    steps = [(f"the trainer's {name}", v) for name, v in vars(trainer).items() if name not in _OF_TRAINERS]
    steps += [("a hook" if isinstance(h, Mapping) else f"hook {type(h).__name__}", h) for h in state.hooks]
    return [*steps, (type(trainer).__name__, type(trainer))]


# ---- gradients belong to one step ------------------------------------------------------------------------------------


def rest_of(state: RunState) -> list[Tensor]:
    """The parameters that may get gradients and that no optimizer clears."""
    held = {id(p) for o in state.training.optimizers.values() for p in parameters_of(o)}
    return [p for p in (*state.problem.parameters(), *state.training.others.tensors.values()) if id(p) not in held]


def clear_gradients(state: RunState) -> None:
    """Begin from no gradients: those of an earlier fit or phase, or of a look at the loss, belong to no step."""
    for p in (*state.problem.parameters(), *state.training.others.tensors.values()):
        p.grad = None


# ---- what a loss reaches besides what is trained ---------------------------------------------------------------------


def mark_of(found: Outside) -> Any:
    """What changes when a backward reaches it."""
    grad = found.place.value.grad
    return None if grad is None else (id(grad), grad._version)


def outside_of(state: RunState) -> dict[int, Outside]:
    """The tensors that require grad, are not trained, and can be reached by the problem, the step or a hook.

    By id. Looked for before the step begins: what it makes itself is its own; and what the batch was made of is data.
    """
    problem, steps = state.problem, steps_of(state)
    trained = {id(p) for p in (*problem.parameters(), *state.training.others.tensors.values())}
    found: dict[int, Outside] = {}
    for place in places(problem, everything=True):
        found.setdefault(id(place.value), Outside(place, isinstance(problem, Problem)))
    if not _is_in_fit():
        from weft.step.own_loop import reached_by_the_loop

        steps += reached_by_the_loop()
    for place in places_behind(steps, problem):
        found.setdefault(id(place.value), Outside(place, False))
    # an optimizer that a hook, a step or a trainer steps by itself (ascent on a weight, say) trains what it holds
    others = [each.place.value for each in found.values() if isinstance(each.place.value, Optimizer)]
    trained |= {id(p) for optimizer in others for p in parameters_of(optimizer)}
    for each in [e for e in found.values() if isinstance(e.place.value, Tensor) and e.place.value.grad_fn is not None]:
        for key, leaf in leaves(each.place.value).items():  # of a view of a parameter, the parameter
            name = f"{each.place.name} (made of it)"
            found.setdefault(key, each._replace(place=each.place._replace(name=name, value=leaf)))
    state.training.judge({key for key, each in found.items() if isinstance(each.place.value, Tensor)} | trained)
    outside = {
        key: each._replace(gradient=mark_of(each))
        for key, each in found.items()
        if isinstance(p := each.place.value, Tensor) and p.requires_grad and p.is_leaf and key not in trained
    }
    of_data = leaves(state.step.batch)
    return {key: found for key, found in outside.items() if key not in of_data}


def _is_in_fit() -> bool:
    """Whether the loop that trains is weft's own."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "fit" and frame.f_globals["__name__"].startswith("weft."):
            return True
        frame = frame.f_back
    return False


LOOKS = 2  # updates of a phase: what is met again in the second was not made in the first


def prepare_look(state: RunState) -> None:
    """Before the first update of a phase, find what losses may reach besides."""
    training = state.training
    if training.outside is None:
        training.watch_for(outside_of(state), LOOKS)
    elif training.looks:
        training.watch_for({}, training.looks - 1)


_OF_TRAINERS = {"run", "options", "config", "phases", "callbacks", "launched", "recipe", "state", "hooks"}


def look(state: RunState, losses: Any) -> None:
    """Name what the losses of a first update reach that is not trained.

    ValueError where a node or term of a `weft.Problem` reaches it, else one warning.
    """
    tell_of_met(state, losses)
