"""The tools of an update, or a loop, of one's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from weft.data.batches import num_examples
from weft.step.forward import metric_of, reader
from weft.step.instrument import watched
from weft.step.microbatches import Update, _rows_of, _sum, combiner, record
from weft.step.optimizer_step import make_step
from weft.step.update import built_in

if TYPE_CHECKING:
    from weft.loop.run import Run


def make_update(run: Run) -> Update:
    """The function that updates the parameters once from a batch (a list of batches when accumulating).

    It returns the loss, detached and still on the device.
    """
    if run.trainer.overrides("update"):
        return _custom(run)
    return built_in(run, run.begin_step, run.end_step)


def _custom(run: Run) -> Update:
    """The user's `update`, framed by the same hooks and counting. What it returns (a loss, a dict) is logged."""
    read = reader(run.problem, "train", metric_of(run, "train"), {}, ())
    begin, end, trainer = run.begin_step, run.end_step, run.trainer

    def update(batch: Any) -> Tensor:
        begin(batch)
        run.in_update, run.last_loss, run.built_in_loss = True, None, None
        try:
            returned = trainer.update(batch)
        finally:
            run.in_update = False
        loss, scalars = read(returned, batch)
        if returned is None or returned is not run.built_in_loss:  # super().update() has counted its own
            record(run, [(scalars, sum(map(num_examples, batch)) if isinstance(batch, list) else num_examples(batch))])
        loss = loss.detach() if isinstance(loss, Tensor) else run.last_loss
        loss = torch.zeros(()) if loss is None else loss
        end(batch, loss)
        return loss

    return update


# ---------------------------------------------------------------- in a loop, or an `update`, of the user's own


def own_backward(run: Run, loss: Tensor, **kwargs: Any) -> None:
    """Gradients of `loss`, added to those that are there; outside an update it is also logged as the training loss.

    With several optimizers the first call after a step starts from no gradients: what the loss before it left in the
    parameters of the others (a generator's loss in the discriminator) is not added to this one's.
    """
    if run.has_stepped and len(run.optimizers) > 1:
        for optimizer in run.optimizers.values():
            optimizer.zero_grad()
    run.last_loss, run.has_stepped = loss.detach(), False
    if not run.in_update and len(run.optimizers) == 1:
        run.means.add({metric_of(run, "train"): loss}, num_examples(run.batch))
    scaled = loss * _rows_of(run) if run.processes.in_shards else loss
    watched(run.hooks, "backward", run.fabric.backward)(scaled, **kwargs)


def own_update(run: Run, batch: Any) -> Tensor:
    """The built-in update; inside an `update` of the user's own without its frame."""
    if not run.in_update:
        return run.update(batch)
    if run.plain_update is None:
        run.plain_update = built_in(run, lambda batch: None, lambda batch, loss: None)
    run.built_in_loss = run.plain_update(batch)
    return run.built_in_loss


def own_step(run: Run, optimizer: Optimizer | str | None) -> bool:
    """Step one optimizer (itself or its name) or all; outside an update this counts as a step of the run.

    With several optimizers it counts when the first one steps. Raises ValueError for an optimizer of another run.
    """
    names = [name for name, known in run.optimizers.items() if optimizer is None or optimizer is known or optimizer == name]
    if not names:
        raise ValueError(f"{optimizer!r} is none of this run's optimizers: {list(run.optimizers)}.")
    if (key := tuple(names)) not in run.own_steps:
        run.own_steps[key] = make_step(run, [run.optimizers[name] for name in names]), combiner(run, names)
    step, combine = run.own_steps[key]
    if combine is not None:
        examples, loss = _rows_of(run), _sum(run, []) if run.last_loss is None else run.last_loss
        loss = combine(loss * examples if run.processes.in_shards else loss, examples)
        run.last_loss = None if run.last_loss is None else loss
    done, run.has_stepped = step(run.last_loss, ()), True
    if not run.in_update and names[0] == next(iter(run.optimizers)):
        run.end_step(run.batch, run.last_loss)
    return done

