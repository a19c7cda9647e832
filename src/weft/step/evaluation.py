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
from weft.step.forward import forward_of
from weft.step.metrics import Means
from weft.types import suggest

if TYPE_CHECKING:
    from weft.loop.run import Run


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
    inherits = kind.train is nn.Module.train and kind.eval is nn.Module.eval and kind.__setattr__ is nn.Module.__setattr__
    return inherits and "training" in own and "train" not in own and "eval" not in own


def evaluate(run: Run, split: str) -> dict[str, float]:
    """Means over all examples of `split` as floats, of what the steps return and log. ValueError if that is nothing."""
    if split not in run.forwards:
        run.forwards[split] = forward_of(run, split)
    means, forward, skips = Means(), run.graphs.forward(split, run.forwards[split]), run.processes.skips_empty
    run.processes.average_buffers(run.problem)
    with evaluating(run.problem), run.processes.gathered(run.problem):
        try:
            for batch in run.batches_of(split):
                if (examples := num_examples(batch)) or not skips:  # of several processes one may have no row of a short batch
                    run.evaluating = (means, examples)  # where `log` adds to until the step is over
                    means.add(forward(batch)[1], examples)
        finally:
            run.evaluating = None
    metrics = means.compute(run.processes.gather)
    if not metrics:
        raise ValueError(f"The {split} data gave nothing to report: no batch, or no scalar in what the step returned.")
    return metrics


def monitored_metric(run: Run, metrics: Mapping[str, float]) -> str | None:
    """The metric that decides about best weights and patience, None if nothing does.

    Raises ValueError if one that was asked for never appears, listing those that do.
    """
    config, has_dev = run.config, run.has("dev")
    asked = config.monitor_metric is not None or any((config.patience, *(phase.patience for phase in run.phases)))
    name = config.monitor_metric or (config.dev_metric if has_dev else config.train_metric)
    if not asked and not (run.trainer.monitors_by_default and run.monitors_by_default):
        return None
    if name in metrics or name in run.history.values or (has_dev and not run.evaluated):
        return name
    found = f"the metrics are {sorted(metrics)}"
    if asked:
        raise ValueError(f"The monitored metric {name!r} never appears; {found}{suggest(name, metrics) or '.'}")
    run.warn_once(f"{name!r} does not appear ({found}), so no best weights are kept; name one as monitor_metric.")
    return None


def predict(run: Run, step: Callable[[Any], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What `step` returns for each batch of the predict set, concatenated in order on the CPU, by key."""
    found: list[dict[str, Tensor]] = []
    step, processes = in_precision(run.fabric, step), run.processes
    with numerics(run.fabric, run.config.deterministic, run.problem), evaluating(run.problem), processes.gathered(run.problem):
        for batch in run.batches_of("predict"):
            rows = step(batch) if num_examples(batch) or not processes.skips_empty else {}
            found.append({key: value.detach().cpu() for key, value in rows.items() if value.dim()})
    if processes.repeats:
        found = [{} for _ in found]
    # of each batch first the rows of process 0, then those of process 1, ...: their order in the data
    parts = [part for batch in zip(*run.processes.gather(found), strict=True) for part in batch if part]
    return {key: torch.cat([part[key] for part in parts]) for key in (parts[0] if parts else {})}

