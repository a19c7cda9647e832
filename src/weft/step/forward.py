"""What a step returns, read into the loss to minimise and the scalars to report.

forward = forward_of(state, "train")
loss, scalars = forward(batch)        # scalars: {"train_loss": ..., "train_<term>": ...}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weft.data.batches import disagreement
from weft.devices.precision import in_precision
from weft.problem.reading import term_keys
from weft.step.instrument import watched
from weft.step.metrics import ALL_ROWS, DENOMINATOR, add_denominators, is_scalar, named
from weft.step.pairs import watched_for_pairs
from weft.types import suggest

if TYPE_CHECKING:
    from weft.step.state import RunState

Forward = Callable[[Any], tuple[Any, dict[str, Any]]]
"""Batch -> the loss (or a dict of losses by optimizer), scalars by their name in the history."""


def forward_of(state: RunState, split: str) -> Forward:
    """The step of `split` with what it returns read: a training step must give a loss, others may."""
    problem, metric = state.problem, metric_of(state, split)
    step = watched(state.hooks, "forward", in_precision(state.fabric, state.trainer.step_function(split, problem)))
    read = reader(problem, split, metric, state.metrics, list(state.training.optimizers))
    required, unseen = split == "train", [True]

    def forward(batch: Any) -> tuple[Any, dict[str, Any]]:
        try:
            out = watched_for_pairs(state, step, batch) if unseen else step(batch)
        except (RuntimeError, TypeError, AttributeError) as error:
            from weft.step.explaining import explained

            if (clearer := explained(error, batch, problem, split)) is None:
                raise
            raise clearer from None
        loss, scalars = read(out, batch)
        if unseen:
            unseen.clear()
            if DENOMINATOR not in scalars and (said := disagreement(batch)):
                state.warn_once(said)
        if required or loss is not None:
            if isinstance(loss, dict):
                loss = {name: checked(value, name, problem, out, split) for name, value in loss.items()}
            else:
                loss = checked(loss, metric, problem, out, split)
        return loss, scalars

    return forward


def metric_of(state: RunState, split: str) -> str:
    """The key of the loss of `split`."""
    config = state.config
    return {"train": config.train_metric, "dev": config.dev_metric}.get(split, config.test_metric)


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
        add_denominators(scalars, out, split)
        if whole:
            scalars[ALL_ROWS] = {name: metric.inputs(out, batch) for name, metric in whole.items()}
        return loss, scalars

    return read


def checked(loss: Any, key: str, problem: nn.Module, out: Any, split: str) -> Tensor:
    """`loss`, if it is a scalar tensor that can be minimised. Raises TypeError / ValueError that say what was found."""
    if isinstance(loss, Tensor) and loss.dim() == 0 and (loss.requires_grad or not torch.is_grad_enabled()):
        return loss
    who = f"Problem {getattr(problem, 'name', None) or type(problem).__name__!r}"
    if loss is None:
        known = list(map(str, out)) if isinstance(out, Mapping) else []
        found = f"got keys {sorted(known)}" if isinstance(out, Mapping) else f"got {type(out).__name__}"
        raise ValueError(
            f"{who} returned no {key!r}. The {split} step needs a scalar tensor under that key "
            f"(or 'loss', or the scalar itself); {found}{suggest(key, known) or '.'}"
        )
    if not isinstance(loss, Tensor):
        raise TypeError(f"{who}: {key!r} is {type(loss).__name__} {loss!r}; expected a scalar tensor.")
    if loss.numel() != 1:
        raise ValueError(f"{who}: {key!r} has shape {tuple(loss.shape)}; expected a scalar. Take its mean or sum.")
    if split == "train" and not loss.requires_grad:
        from weft.step.explaining import why_no_gradient

        raise ValueError(
            f"{who}: {key!r} does not depend on anything that requires grad, so nothing can be trained. "
            f"{why_no_gradient(problem)}"
        )
    return loss.reshape(())
