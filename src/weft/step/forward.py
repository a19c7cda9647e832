"""What a step returns, read into the loss to minimise and the scalars to report.

forward = forward_of(state, "train")
loss, scalars = forward(batch)        # scalars: {"train_loss": ..., "train_<term>": ...}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weft.data.batches import num_examples
from weft.devices.precision import in_precision
from weft.problem.reading import term_keys
from weft.step.instrument import watched
from weft.step.metrics import ALL_ROWS, DENOMINATOR, add_denominators, is_scalar, named
from weft.step.microbatches import tell_of_counting
from weft.step.pairs import looked_at

if TYPE_CHECKING:
    from weft.step.state import RunState

Forward = Callable[[Any], tuple[Any, dict[str, Any]]]
"""Batch -> the loss (or a dict of losses by optimizer), scalars by their name in the history."""


def forward_of(state: RunState, split: str) -> Forward:
    """The step of `split` with what it returns read: a training step must give a loss, others may."""
    problem, metric = state.problem, state.config.metric_of(split)
    step = watched(state.hooks, "forward", in_precision(state.fabric, state.trainer.step_function(split, problem)))
    read = reader(problem, split, metric, state.metrics, list(state.training.optimizers))
    required, calls = split == "train", 0

    def forward(batch: Any) -> tuple[Any, dict[str, Any]]:
        nonlocal calls
        calls += 1
        try:
            out = step(batch) if calls > 2 else looked_at(state, step, batch, calls)
        except (RuntimeError, TypeError, AttributeError) as error:
            from weft.step.explaining import explained

            if (clearer := explained(error, batch, problem, split)) is None:
                raise
            raise clearer from None
        loss, scalars = read(out, batch)
        if calls == 1:
            tell_of_counting(state, split, batch, loss, scalars)
        if required or loss is not None:
            if isinstance(loss, dict) and loss.keys() == state.training.optimizers.keys():
                loss = {name: checked(value, name, problem, out, split) for name, value in loss.items()}
            else:
                loss = checked(loss, metric, problem, out, split)
        return loss, scalars

    return forward


def reader(
    problem: nn.Module, split: str, metric: str, metrics: Mapping[str, Callable], optimizers: Sequence[str]
) -> Callable[[Any, Any], tuple[Any, dict[str, Any]]]:
    """A function (what a step returned, batch) -> (loss or None, scalars by their name in the history).

    The loss is under `metric` (or "loss", where `metric` is the usual name; a term's name in the history will do), or
    is what was returned; a dict keyed by the names of several optimizers gives one loss each. Terms of a weft or
    NeuroMANCER problem are picked by name; of any other dict, every scalar is reported. `metrics` are further functions
    of (output, batch), and metrics of all rows.

    What a step returned as "num_examples" is what it is a mean over, "{term}_weight" what one term is; they stand under
    `DENOMINATOR`, and what metrics of all rows read under `ALL_ROWS`.
    """
    whole: dict[str, Any] = {
        named(name, split): fn for name, fn in metrics.items() if getattr(fn, "of_all_rows", False)
    }
    metrics = {named(name, split): fn for name, fn in metrics.items() if not getattr(fn, "of_all_rows", False)}
    keys, usual, names = term_keys(problem, split), f"{split}_loss", set(optimizers)
    loss_keys = (metric, "loss") if metric == usual else (metric, (keys or {}).get(metric, metric))
    not_reported, new = {*loss_keys, "num_examples"}, {*metrics, *whole}
    picked = {f"{split}_{name}_weight" for name in getattr(problem, "terms", ())} if keys is not None else set()

    def read(out: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        if isinstance(out, Tensor):
            out = {metric: out}
        elif not isinstance(out, Mapping):
            return None, {}
        loss = next((out[key] for key in loss_keys if key in out), None)
        scalars = {metric: loss} if loss is not None else {}
        if len(names) > 1 and names <= out.keys():
            loss = {name: out[name] for name in optimizers}
            scalars = {usual: sum(value.detach() for value in loss.values() if isinstance(value, Tensor))}
        if keys is not None and keys[usual] in out:
            scalars = {name: out[key] for name, key in keys.items() if key in out} | scalars
        else:
            others = {named(k, split): v for k, v in out.items() if is_scalar(v) and k not in not_reported}
            scalars = others | scalars
        if not new.isdisjoint(scalars):
            from weft.step.explaining import name_taken

            raise name_taken(new.intersection(scalars), split)
        for name, fn in metrics.items():
            scalars[name] = fn(out, batch)
        add_denominators(scalars, out, split, of_terms=keys is not None)
        if picked <= out.keys() and len(picked) == 1:  # it is the term that counts for those rows alone
            scalars |= {DENOMINATOR + name: num_examples(batch) for name in metrics}
        if whole:
            scalars[ALL_ROWS] = {name: metric.inputs(out, batch) for name, metric in whole.items()}
        return loss, scalars

    return read


def checked(loss: Any, key: str, problem: nn.Module, out: Any, split: str) -> Tensor:
    """`loss`, if it is a scalar tensor that can be minimised. Raises TypeError / ValueError that say what was found."""
    if isinstance(loss, Tensor) and loss.dim() == 0 and (loss.requires_grad or not torch.is_grad_enabled()):
        return loss
    from weft.step.explaining import wrong_loss

    if (error := wrong_loss(loss, key, problem, out, split)) is not None:
        raise error
    assert isinstance(loss, Tensor)
    return loss.reshape(())
