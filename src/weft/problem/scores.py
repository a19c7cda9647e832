"""Metrics that come from all rows at once, and the usual ones of supervised learning by name.

What is a mean over rows is averaged over batches, weighted by their rows; R2 and RMSE are none, and come from all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from weft.types import suggest


class whole:
    """A metric computed from all rows of a split at once: `fn` gets each key it names, concatenated.

    For what is no mean over batches: R2, RMSE, maxima, quantiles, anything of scipy or sklearn (tensors come detached,
    in the order of the data; of several processes too). It returns a number, or a dict of numbers. The rows stay where
    they were computed until the epoch, or the evaluation, is over. Raises TypeError for what is no function.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        if not callable(fn):
            raise TypeError(f"whole: {fn!r} is no function of keys.")
        self.fn = fn


def accuracy(prediction: Tensor, y: Tensor, threshold: float = 0.0) -> Tensor:
    """The share of rows whose class is right, in [0, 1].

    y of shape (rows, ...) holds numbers of classes; predictions of shape (rows, classes, ...) name the largest, those
    of the shape of y are of two classes and say 1 above `threshold`.
    """
    if prediction.dim() == y.dim() + 1:
        return (prediction.argmax(1) == y).float().mean()
    if prediction.shape == y.shape:
        return ((prediction > threshold) == (y > 0.5)).float().mean()
    raise ValueError(
        f"accuracy: predictions of shape {tuple(prediction.shape)} and y of shape {tuple(y.shape)}; expected (rows, "
        "classes) and (rows,) with numbers of classes, or one shape for two classes."
    )


def mae(prediction: Tensor, y: Tensor) -> Tensor:
    """The mean absolute error, in the unit of y."""
    return (prediction - y).abs().mean()


def rmse(prediction: Tensor, y: Tensor) -> Tensor:
    """The root of the mean squared error, in the unit of y."""
    return (prediction - y).square().mean().sqrt()


def r2(prediction: Tensor, y: Tensor) -> Tensor:
    """The coefficient of determination, 1 - residual / total sum of squares; of several outputs the mean of theirs."""
    residual, total = (prediction - y).square().sum(0), (y - y.mean(0)).square().sum(0)
    return (1 - residual / total).mean()


def score(name: str, loss_fn: Any) -> Any:
    """The metric of this name. ValueError with a suggestion if there is none."""
    known: dict[str, Any] = {"accuracy": accuracy, "mae": mae, "rmse": whole(rmse), "r2": whole(r2)}
    of_probabilities = isinstance(loss_fn, nn.BCELoss) or loss_fn is nn.functional.binary_cross_entropy
    if name.lower() == "accuracy" and of_probabilities:
        return lambda prediction, y: accuracy(prediction, y, threshold=0.5)
    if name.lower() not in known:
        raise ValueError(
            f"Supervised: there is no metric {name!r}{suggest(name, known) or '.'} There are {', '.join(known)}; "
            "others are given as functions: metrics={name: function of (prediction, y)}."
        )
    return known[name.lower()]
