"""Evaluation and prediction: the forward pass over a whole split, without updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from weft.data.batches import num_examples
from weft.problem.reading import needs_grad_in_eval
from weft.problem.terms import picks_rows
from weft.step.forward import Forward
from weft.step.metrics import Means, whole_metrics
from weft.types import suggest

if TYPE_CHECKING:
    from weft.step.state import RunState


@contextmanager
def evaluating(problem: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, unless the problem asks for them (`grad_inference`); then all modes as before."""
    modules = list(problem.modules())
    training = [m for m in modules if m.training]
    if all(map(_switches_plainly, modules)):  # what eval() does, without the 2 us that nn.Module takes to set a flag
        flags = [module.__dict__ for module in training]
        for flag in flags:
            flag["training"] = False
    else:
        flags = []
        problem.eval()
    try:
        with torch.set_grad_enabled(needs_grad_in_eval(modules)):
            yield
    finally:
        for flag in flags:
            flag["training"] = True
        for module in () if flags else training:
            module.training = True


def _switches_plainly(module: nn.Module) -> bool:
    # Nobody's own train(), eval() or __setattr__ is passed over; scripted modules keep their flag elsewhere.
    kind, own = type(module), module.__dict__
    inherits = (
        kind.train is nn.Module.train and kind.eval is nn.Module.eval and kind.__setattr__ is nn.Module.__setattr__
    )
    return inherits and "training" in own and "train" not in own and "eval" not in own


Measuring = Callable[["RunState", str, Forward], dict[str, float]]
"""(State, split, forward) -> metrics."""


def evaluate(state: RunState, split: str, forward: Forward, measure: Measuring | None = None) -> dict[str, float]:
    """Means over all examples of `split` as floats, of what `forward` reports and logs, and metrics of all its rows.

    `measure`: how the split is gone through; None: batch by batch. ValueError if there is nothing to report.
    """
    state.training.turn("eval")
    state.processes.average_buffers(state.problem)
    with evaluating(state.problem), state.processes.gathered(state.problem):
        try:
            metrics = (measure or _by_batch)(state, split, forward)
            add_up_terms(state, split, metrics)
        finally:
            state.step.evaluating = None
    if not metrics:
        raise ValueError(f"The {split} data gave nothing to report: no batch, or no scalar in what the step returned.")
    return metrics


def add_up_terms(state: RunState, split: str, means: dict[str, float]) -> None:
    """Make the losses of `split` the sums of their terms again, where the problem itself is the step."""
    if picks_rows(state.problem) and state.trainer.step_function(split, state.problem) is state.problem:
        from weft.problem.picked import add_up

        add_up(state.problem, split, means)


def _by_batch(state: RunState, split: str, forward: Forward) -> dict[str, float]:
    means, skips = Means(whole_metrics(state.metrics, split)), state.processes.skips_empty
    for batch in state.batches_of(split):
        examples = num_examples(batch)
        if examples or not skips:  # of several processes one may have no row of a short batch
            means.add(scalars_of(state, forward, batch, means, examples), examples)
    return means.compute(state.processes.gather)


def scalars_of(state: RunState, forward: Forward, batch: Any, means: Means, examples: int) -> dict[str, Any]:
    """What `forward` reports of a batch; what its step logs is added to `means`."""
    state.step.evaluating = (means, examples)  # where `log` adds to until the step is over
    return forward(batch)[1]


def monitored_metric(state: RunState, metrics: Mapping[str, float], by_default: bool = True) -> str | None:
    """The metric that decides about best weights and patience, None if nothing does.

    `by_default`: whether the loss is monitored without being named. Raises ValueError if a metric that was asked for
    never appears, listing those that do.
    """
    config, has_dev = state.config, state.has("dev")
    asked = bool(config.monitor_metric) or any(
        (config.patience, *(phase.patience or (phase.until and phase.until.watches) for phase in state.training.phases))
    )
    name = config.monitor_metric or (config.dev_metric if has_dev else config.train_metric)
    if not asked and (config.monitor_metric is False or not by_default):
        return None
    if name in metrics or name in state.history.values or (has_dev and not state.epoch.evaluated):
        return name
    found = f"the metrics are {sorted(metrics)}"
    if asked:
        raise ValueError(f"The monitored metric {name!r} never appears; {found}{suggest(name, metrics) or '.'}")
    state.warn_once(f"{name!r} does not appear ({found}), so no best weights are kept; name one as monitor_metric.")
    return None
