"""The tools of an update, or a loop, of one's own: `backward`, `step`, and the built-in update.

    def update(self, batch):                        # of a Trainer's subclass
        for _ in range(5):
            self.backward(self.critic_loss(batch))
            self.step("critic")

Inside an `update` the frame around it counts the step; in a loop of one's own each `step` counts as one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from weft.step.forward import reader
from weft.step.instrument import watched
from weft.step.microbatches import combiner, record, rows_of, total
from weft.step.optimizer_step import make_step
from weft.step.optimizers import parameters_of
from weft.step.own_loop import Moves
from weft.step.pairs import watched_for_pairs
from weft.step.reached import tell
from weft.step.trained import LOOKS, look, mark_of, outside_of
from weft.step.update import built_in

if TYPE_CHECKING:
    from weft.step.state import RunState, Update


class Manual:
    """What one phase of a run offers to code that trains by itself.

    begin, end: what frames every step (hooks, counting); see `weft.step.update.built_in`.
    """

    def __init__(
        self, state: RunState, begin: Callable[[Any], None], end: Callable[[Any, Tensor | None], None]
    ) -> None:
        self.state, self.begin, self.end = state, begin, end
        self.loss: Tensor | None = None
        """Of the last `backward`."""
        self._gradients_used = False  # a step came after the last `backward`
        self._framed: _Framed | None = None
        self._built_in: Update | None = None
        self._acted = self._differentiated = False
        self.moves: Moves | None = None
        self._steps: dict[tuple[str, ...], tuple[Callable[..., bool], Callable[..., Tensor] | None]] = {}

    def framed(self, update: Callable[[Any], Any]) -> Update:
        """The user's `update` as one step of the run. What it returns (a loss, a dict) is logged."""
        state = self.state
        read, unseen = reader(state.problem, "train", state.config.metric_of("train"), {}, ()), [True]
        self.moves = moves = Moves([p for o in state.training.optimizers.values() for p in parameters_of(o)])

        def framed_update(batch: Any) -> Tensor:
            self.begin(batch)
            self.loss, self._framed = None, _Framed()
            try:
                returned = watched_for_pairs(state, update, batch) if unseen else update(batch)
                unseen.clear()
                counted = self._framed.returned
            finally:
                self._framed = None
            loss, scalars = read(returned, batch)
            if returned is None or returned is not counted:  # super().update() has counted its own
                record(state, [(scalars, rows_of(batch))])
            loss = loss.detach() if isinstance(loss, Tensor) else self.loss
            loss = torch.zeros(()) if loss is None else loss
            moves.after_update(self._acted)
            self.end(batch, loss)
            return loss

        return framed_update

    def tell_of_no_move(self) -> None:
        """Say so, once, if an `update` of the user's own has trained nothing."""
        if self.moves is not None:
            self.moves.tell(self.state, self._differentiated)

    def update(self, batch: Any, whole: Update) -> Tensor:
        """The `whole` update; inside an `update` of the user's own the built-in one, without its frame."""
        if self._framed is None:
            return whole(batch)
        if self._built_in is None:
            self._built_in = built_in(self.state, lambda batch: None, lambda batch, loss: None)
        self._acted, self._framed.returned = True, self._built_in(batch)
        return self._framed.returned

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Gradients of `loss`, added to those that are there; outside an update it is also logged as the training loss.

        With several optimizers the first call after a step starts from no gradients: what the loss before it left in
        the parameters of the others (a generator's loss in the discriminator) is not added to this one's.
        """
        state, several = self.state, len(self.state.training.optimizers) > 1
        if self._gradients_used and several:
            for optimizer in state.training.optimizers.values():
                optimizer.zero_grad()
        if state.training.outside is None:
            prepare_late_look(state)
        if state.training.looks:
            look(state, loss)
        self.loss, self._gradients_used, self._differentiated = loss.detach(), False, True
        rows = rows_of(state.step.batch)
        if self._framed is None and not several:
            state.epoch.means.add({state.config.metric_of("train"): loss}, rows)
        scaled = loss * rows if state.processes.in_shards else loss
        watched(state.hooks, "backward", state.fabric.backward)(scaled, **kwargs)

    def step(self, optimizer: Optimizer | str | None = None) -> bool:
        """Step one optimizer (itself or its name) or all; outside an update this counts as a step of the run.

        With several optimizers it counts when the first one steps. Raises ValueError for an optimizer of another run.
        """
        state, known = self.state, self.state.training.optimizers
        names = tuple(name for name, own in known.items() if optimizer is None or optimizer in (own, name))
        if not names:
            raise ValueError(f"{optimizer!r} is none of this run's optimizers: {list(known)}.")
        if names not in self._steps:
            self._steps[names] = make_step(state, [known[name] for name in names]), combiner(state, names)
        step, combine = self._steps[names]
        if state.training.outside is None:
            prepare_late_look(state)
        if state.training.looks:
            look_at_gradients(state)
        if combine is not None:
            examples, loss = rows_of(state.step.batch), total(state, []) if self.loss is None else self.loss
            loss = combine(loss * examples if state.processes.in_shards else loss, examples)
            self.loss = None if self.loss is None else loss
        if all(p.grad is None for name in names for p in parameters_of(known[name])):
            state.warn_once(
                f"step: no parameter of {', '.join(map(repr, names))} has a gradient, so nothing moves. Call "
                "backward(loss) before it, with a loss that depends on them."
            )
        self._acted = True
        done, self._gradients_used = step(self.loss, ()), True
        if self._framed is None and names[0] == next(iter(known)):
            self.end(state.step.batch, self.loss)
        return done


class _Framed:
    """An `update` of the user's own that is under way, and what it got from the built-in one."""

    returned: Tensor | None = None


def prepare_late_look(state: RunState) -> None:
    """The same within a step of which nothing told the beginning: what it made itself cannot be told from the rest,
    so only parameters count."""
    found = outside_of(state)
    state.training.watch_for({k: v for k, v in found.items() if isinstance(v.place.value, nn.Parameter)}, LOOKS)


def look_at_gradients(state: RunState) -> None:
    """The same for a loss that was not given to weft's `backward`: what it reached has a gradient."""
    outside = (state.training.outside or {}).values()
    tell(state, [found for found in outside if found.place.value.grad is not None and found.gradient != mark_of(found)])
