"""Evaluation and prediction: the forward pass over a whole split, without updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weft.devices import in_precision, numerics
from weft.metrics import Means, num_examples
from weft.problem import needs_grad_in_eval

if TYPE_CHECKING:
    from weft.run import Run


@contextmanager
def evaluating(problem: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, unless the problem asks for them (`grad_inference`); then all modes as before."""
    training = [m for m in problem.modules() if m.training]
    problem.eval()
    try:
        with torch.set_grad_enabled(needs_grad_in_eval(problem)):
            yield
    finally:
        for module in training:
            module.training = True


def evaluate(run: Run, split: str) -> dict[str, float]:
    """Means over all examples of `split` as floats. Raises ValueError if nothing was measured."""
    means, forward = Means(), run.forward(split)
    with evaluating(run.problem):
        for batch in run.batches_of(split):
            means.add(forward(batch)[1], num_examples(batch))
            run.interruption.check()
    metrics = means.compute(run.reduce)
    if not metrics:
        raise ValueError(f"The {split} data gave nothing to report: no batch, or no scalar in what the step returned.")
    return metrics


def predict(run: Run, step: Callable[[Any], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What `step` returns for each batch of the predict set, concatenated in order on the CPU, by key."""
    found: dict[str, list[Tensor]] = {}
    step = in_precision(run.fabric, step)
    with numerics(run.fabric, run.config.deterministic), evaluating(run.problem):
        for batch in run.batches_of("predict"):
            for key, value in step(batch).items():
                found.setdefault(key, []).append(value.detach().cpu())
    return {key: torch.cat(values) for key, values in found.items()}
