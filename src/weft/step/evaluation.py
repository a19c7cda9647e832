"""Evaluation and prediction: the forward pass over a whole split, without updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weft.data.batches import num_examples, outermost, rows_in, within
from weft.devices.precision import in_precision, numerics
from weft.problem.reading import needs_grad_in_eval
from weft.step.forward import Forward
from weft.step.metrics import DENOMINATOR, Means, whole_metrics
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
    """Means over all examples of `split` as floats, of what `forward` reports and logs, and metrics of all its rows.

    Of a split of several datasets each is gone through once; see `_by_part`. ValueError if there is nothing to report.
    """
    source = state.source(split)
    uneven = getattr(source, "is_uneven", False)
    state.processes.average_buffers(state.problem)
    with evaluating(state.problem), state.processes.gathered(state.problem):
        try:
            metrics = _by_part(state, split, source, forward) if uneven else _by_batch(state, split, forward)
        finally:
            state.step.evaluating = None
    if not metrics:
        raise ValueError(f"The {split} data gave nothing to report: no batch, or no scalar in what the step returned.")
    return metrics


def _by_batch(state: RunState, split: str, forward: Forward) -> dict[str, float]:
    means, skips = Means(whole_metrics(state.trainer.metric_functions, split)), state.processes.skips_empty
    for batch in state.batches_of(split):
        examples = num_examples(batch)
        if examples or not skips:  # of several processes one may have no row of a short batch
            means.add(_scalars(state, forward, batch, means, examples), examples)
    return means.compute(state.processes.gather)


def _scalars(state: RunState, forward: Forward, batch: Any, means: Means, examples: int) -> dict[str, Any]:
    state.step.evaluating = (means, examples)  # where `log` adds to until the step is over
    return forward(batch)[1]


def _by_part(state: RunState, split: str, source: Any, forward: Forward) -> dict[str, float]:
    """Means over a split of several datasets, each gone through once while the others stay at their first rows.

    Nobody can tell which part a scalar was computed from. But where it is a sum of what it is on each part (a term of
    one part, or a loss that adds them up), how it changes along one part is known from the batches of that part alone,
    weighted by its rows. So its mean over all is the sum of its means along each part, less its value at the first rows
    of all for every part but one: exact, whatever the sizes of parts and batches are.
    """
    if whole := whole_metrics(state.trainer.metric_functions, split):
        raise ValueError(
            f"The metric {next(iter(whole))!r} needs each row of the {split} data once, and its parts "
            f"{list(source.parts)} have different numbers of batches; take each part in one batch (batch_size=None)."
        )
    found: dict[str, list[tuple[dict[str, Any], int]]] = {part: [] for part in ("", *source.parts)}
    logged = {part: Means() for part in found}
    limit = within(state.config.limit(split), source)
    for part, batch in source.passes(state.progress.epoch, limit):
        examples = num_examples(batch[part]) if part else 1
        if examples or not state.processes.skips_empty:
            scalars = _scalars(state, forward, batch, logged[part], examples)
            found[part].append((dict(scalars.items()), examples))
    means = {part: _means_along(state, rows, logged[part]) for part, rows in found.items()}
    first = means.pop("")
    names = [name for name in first if all(name in along for along in means.values())]
    return {name: sum(along[name] for along in means.values()) - (len(means) - 1) * first[name] for name in names}


def _means_along(state: RunState, rows: list[tuple[dict[str, Any], int]], means: Means) -> dict[str, float]:
    """Means over batches of one part: by what the step returned as their denominators, if these change along it."""
    gather = state.processes.gather
    counts = set().union(*gather({float(scalars.get(DENOMINATOR, 0.0)) for scalars, _ in rows}))
    for scalars, examples in rows:
        if len(counts) < 2:
            scalars.pop(DENOMINATOR, None)
        means.add(scalars, examples)
    return means.compute(gather)


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
    """What `step` returns for each batch of the predict set, concatenated in order on the CPU, by key.

    One row for each row of the data; ValueError names what has another number. What is one number for a batch of
    several rows belongs to none of them, and is left out.
    """
    if getattr(state.source("predict"), "is_uneven", False):
        raise ValueError(
            "predict: the parts of the data have different numbers of batches, so rows of the smaller ones would come "
            "several times; predict each part by itself, or take each in one batch (batch_size=None)."
        )
    found: list[dict[str, Tensor | None]] = []
    step, processes = in_precision(state.fabric, step), state.processes
    with (
        numerics(state.fabric, state.config.deterministic, state.problem),
        evaluating(state.problem),
        processes.gathered(state.problem),
    ):
        for batch in state.batches_of("predict"):
            values = step(batch) if num_examples(batch) or not processes.skips_empty else {}
            found.append({key: _rows(key, value.detach().cpu(), batch) for key, value in values.items()})
    if processes.repeats:
        found = [{} for _ in found]
    # of each batch first the rows of process 0, then those of process 1, ...: their order in the data
    parts = [part for batch in zip(*processes.gather(found), strict=True) for part in batch if part]
    joined = {key: _joined(key, parts) for key in dict.fromkeys(key for part in parts for key in part)}
    return {key: value for key, value in joined.items() if value is not None}


def _rows(key: str, value: Tensor, batch: Any) -> Tensor | None:
    """An output that has a row for each of the batch, or is the number that a single row gave; None: another number."""
    parts = [part for part in batch.values() if isinstance(part, Mapping)] if isinstance(batch, Mapping) else []
    expected = [rows_in(part) for part in parts or [batch] if outermost(part)]
    if not value.dim():
        return None if key.startswith("predict_") or (expected and 1 not in expected) else value
    if expected and value.shape[0] not in expected:
        raise ValueError(
            f"predict: {key!r} has shape {tuple(value.shape)} for a batch of {' or '.join(map(str, expected))} rows; "
            "expected one row for each, along the first dimension. Put the rows first (.transpose(0, 1) where time "
            "comes first), leave it out of what is returned, or pass a predict_step."
        )
    return value


def _joined(key: str, parts: list[dict[str, Tensor | None]]) -> Tensor | None:
    """The rows of all batches; None for what is a number of a batch. A row that lost its dimension gets it back."""
    given = [part.get(key) for part in parts]
    rows = [value for value in given if value is not None]
    shapes = {tuple(value.shape[1:]) for value in rows if value.dim()}
    if not shapes and len(rows) < len(given):
        return None
    if len(shapes) == 1 and len(rows) == len(given) and (shapes == {()} or all(value.dim() for value in rows)):
        return torch.cat([value.reshape(-1, *value.shape[1:]) for value in rows])
    if not shapes:
        what = "is one number for one row, of which nobody can tell whether it is the row or belongs to all"
    else:
        missing = f", and {len(given) - len(rows)} batches gave no rows" if len(rows) < len(given) else ""
        what = f"has {'rows' if len(shapes) == 1 else 'rows of different'} shape {sorted(shapes)}{missing}"
    raise ValueError(
        f"predict: {key!r} {what}; expected one row of one shape for each row of the data. Is it squeezed "
        "(.squeeze(-1) leaves the rows alone)? Or pass a predict_step."
    )
