"""What to say where a problem or a node cannot be, or returned what it should not. Loaded when it has happened."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def wrong_number(node: Any, value: Any) -> TypeError:
    """Of a node whose function returned another number of outputs than it has keys."""
    found = f"{len(value)} values" if isinstance(value, tuple | list) else f"one {type(value).__name__}"
    return TypeError(
        f"{node} returned {found}; expected {len(node.output_keys)} for the keys {node.output_keys}: "
        + ("a tensor." if len(node.output_keys) == 1 else "a tuple of tensors.")
    )


def no_keys(problem: Any, batch: Any) -> TypeError:
    """Of a batch that is no dict."""
    return TypeError(
        f"{problem} reads batches by key, and got one of type {type(batch).__name__}; give the data keys: "
        'weft.DictDataset({"x": x, "y": y}), or a collate_fn that returns a dict.'
    )


def written_late(problem: Any, node: Any, key: str, later: Any) -> ValueError:
    """Of a node that reads what only a later one writes."""
    return ValueError(
        f"{problem}: node {node.name!r} reads {key!r}, which only the later node {later.name!r} writes; "
        "list the nodes in the order in which they run, or make a Rollout of a loop."
    )


def taken_key(problem: Any, node: Any, key: str, writer: Any) -> ValueError:
    """Of a node that writes what another one (`writer`) writes, or what describes the batch."""
    if writer is None:
        return ValueError(f"{problem}: node {node.name!r} writes {key!r}, which describes the batch; rename it.")
    return ValueError(f"{problem}: nodes {writer.name!r} and {node.name!r} both write {key!r}; rename one output.")


def loss_raised(error: Exception, loss_fn: Any, prediction: Any, y: Any) -> Exception:
    """What a loss function of (prediction, y) raised, with what it was given, and what it takes."""
    name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    given = f"{str(error).rstrip('.')}. {name} got a prediction of {_facts(prediction)} and y of {_facts(y)}"
    if name in ("CrossEntropyLoss", "NLLLoss", "cross_entropy", "nll_loss") and getattr(prediction, "ndim", 0) > 1:
        classes = prediction.shape[1]
        given += (
            f". It takes y of shape (rows,), whole numbers from 0 to {classes - 1} (y.long()): one of {classes} classes"
        )
        given += ", the last size of what the net returns"
    try:
        return type(error)(f"{given}.").with_traceback(error.__traceback__)
    except TypeError:  # an error of another signature
        return error


def no_loss(value: Any, loss_fn: Any) -> TypeError:
    """Of a loss function of (prediction, y) that returned no tensor."""
    name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    found = f"{type(value).__name__} {value!r}"[:80] if value is not None else "None (is a return missing?)"
    more = ""
    if isinstance(value, dict):
        more = " Several terms that are told apart are a weft.Problem's objectives, or what a training_step returns."
    return TypeError(
        f"Supervised: the loss function {name} returned {found}; expected a tensor, the mean over its rows.{more}"
    )


def _facts(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"type {type(value).__name__}"
    span = ""
    if value.numel() and not value.is_floating_point() and not value.is_complex() and value.device.type == "cpu":
        span = f", from {int(value.min())} to {int(value.max())}"
    return f"shape {tuple(value.shape)} ({str(value.dtype).removeprefix('torch.')}{span})"
