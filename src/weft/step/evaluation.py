"""Evaluation and prediction: the forward pass over a whole split, without updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weft.data.batches import num_examples
from weft.devices.precision import in_precision, numerics
from weft.problem.reading import needs_grad_in_eval
from weft.step.forward import Forward
from weft.step.metrics import Means
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


def evaluate(state: RunState, split: str, forward: Forward) -> dict[str, float]:
    """Means over all examples of `split` as floats, of what `forward` reports and logs.

    ValueError if that is nothing.
    """
    means, skips = Means(), state.processes.skips_empty
    state.processes.average_buffers(state.problem)
    with evaluating(state.problem), state.processes.gathered(state.problem):
        try:
            for batch in state.batches_of(split):
                if (
                    examples := num_examples(batch)
                ) or not skips:  # of several processes one may have no row of a short batch
                    state.step.evaluating = (means, examples)  # where `log` adds to until the step is over
                    means.add(forward(batch)[1], examples)
        finally:
            state.step.evaluating = None
    metrics = means.compute(state.processes.gather)
    if not metrics:
        raise ValueError(f"The {split} data gave nothing to report: no batch, or no scalar in what the step returned.")
    return metrics


def monitored_metric(state: RunState, metrics: Mapping[str, float], by_default: bool = True) -> str | None:
    """The metric that decides about best weights and patience, None if nothing does.

    `by_default`: whether the loss is monitored without being named. Raises ValueError if a metric that was asked for
    never appears, listing those that do.
    """
    config, has_dev = state.config, state.has("dev")
    asked = config.monitor_metric is not None or any(
        (config.patience, *(phase.patience for phase in state.training.phases))
    )
    name = config.monitor_metric or (config.dev_metric if has_dev else config.train_metric)
    if not asked and not by_default:
        return None
    if name in metrics or name in state.history.values or (has_dev and not state.epoch.evaluated):
        return name
    found = f"the metrics are {sorted(metrics)}"
    if asked:
        raise ValueError(f"The monitored metric {name!r} never appears; {found}{suggest(name, metrics) or '.'}")
    state.warn_once(f"{name!r} does not appear ({found}), so no best weights are kept; name one as monitor_metric.")
    return None


def predict(state: RunState, step: Callable[[Any], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What `step` returns for each batch of the predict set, concatenated in order on the CPU, by key."""
    found: list[dict[str, Tensor]] = []
    step, processes = in_precision(state.fabric, step), state.processes
    with (
        numerics(state.fabric, state.config.deterministic, state.problem),
        evaluating(state.problem),
        processes.gathered(state.problem),
    ):
        for batch in state.batches_of("predict"):
            rows = step(batch) if num_examples(batch) or not processes.skips_empty else {}
            found.append({key: value.detach().cpu() for key, value in rows.items() if value.dim()})
    if processes.repeats:
        found = [{} for _ in found]
    # of each batch first the rows of process 0, then those of process 1, ...: their order in the data
    parts = [part for batch in zip(*state.processes.gather(found), strict=True) for part in batch if part]
    return {key: torch.cat([part[key] for part in parts]) for key in (parts[0] if parts else {})}
