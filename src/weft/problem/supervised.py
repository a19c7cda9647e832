"""Ordinary supervised learning: a net, a loss function, and data `(X, y)`.

problem = weft.Supervised(net, torch.nn.CrossEntropyLoss(), metrics=["accuracy"])
trainer.fit(problem, weft.Data((X, y), batch_size=32), dev=(X_dev, y_dev))
trainer.predict(X_new)                             # what the net returns, one row per row
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from weft.data.datasets import DictDataset, is_array
from weft.problem.pairs import PairWatch
from weft.words.foreign import told

KEYS = ["prediction", "y"]
"""What a loss function and a metric are given, in this order."""


class Supervised(nn.Module):
    """A problem over `(X, y)`: minimises `loss_fn(net(X), y)`, averaged over the rows.

    net: a module of one argument, X of shape (rows, ...), or a batch of whatever a loader yields first.
    loss_fn: a function or module of (prediction, y) that returns a scalar, the mean over its rows; or any tensor, which
        is averaged.
    metrics: a name of "accuracy", "mae", "rmse", "r2", or a list of these; or a dict by name of these and of functions
        of (prediction, y), averaged over batches, of `weft.whole(fn)` and objects with `update`, `compute` and
        `reset` (torchmetrics), which see all rows. They are reported as `train_accuracy`, `dev_accuracy`, ...

    Batches are dicts with the keys `x` and `y`, which is what `(X, y)` becomes, or pairs, as a DataLoader yields them.
    X and y of floating point numbers are cast to the dtype of the net and of its prediction. Torch's losses that
    compare number with number (MSELoss, L1Loss, BCEWithLogitsLoss, ...) see y in the dtype and shape of a prediction
    (rows, 1) where y is (rows,), or the other way round; its losses of classes (CrossEntropyLoss, NLLLoss) see a column
    of class numbers as (rows,). `predict(X)` returns what the net returns, without gradients.
    Raises TypeError for classes in the place of objects, and ValueError where a loss function of one's own compares
    every row with every other: predictions of shape (n, 1) and a y of shape (n,).
    """

    @told
    def __init__(self, net: nn.Module, loss_fn: nn.Module | Callable[..., Tensor], metrics: Any = None) -> None:
        super().__init__()
        if not isinstance(net, nn.Module):
            raise TypeError(f"Supervised: net is {_found(net)}; expected a torch.nn.Module.")
        if isinstance(loss_fn, type) or not callable(loss_fn):
            raise TypeError(
                f"Supervised: loss_fn is {_found(loss_fn)}; expected a function of (prediction, y), such as "
                "torch.nn.MSELoss() or torch.nn.functional.cross_entropy."
            )
        self.net, self.loss_fn = net, loss_fn
        self._metrics = _by_name(metrics, loss_fn)
        self._shapes_seen = False

    @property
    def own_metrics(self) -> dict[str, Any]:
        """The metrics by name, each with the keys that it reads."""
        return {name: (metric, KEYS) for name, metric in self._metrics.items()}

    def forward(self, batch: Any) -> dict[str, Any]:
        """{"loss": a scalar, "prediction": what the net returned, "y": what it was compared with}.

        The loss also stands under the name that it has in the history ("train_loss"), of a pair in training alone.
        """
        x, y = _pair(batch)
        split = batch.get("name", "train") if isinstance(batch, Mapping) else "train" if self.training else None
        prediction = self.net(self._cast(x))
        if isinstance(prediction, Tensor) and isinstance(y, Tensor):
            y = self._comparable(prediction, y)
        loss = self._loss(prediction, y) if self._shapes_seen else self._first_loss(prediction, y)
        loss = loss.mean() if loss.dim() else loss
        named = {} if split is None else {f"{split}_loss": loss}
        return {"loss": loss, **named, "prediction": prediction, "y": y}

    def step(self, batch: Any) -> dict[str, Tensor]:
        """What the net returns for the rows of `x`, by key; y may be missing."""
        if isinstance(batch, Mapping):
            x = batch["x"] if "x" in batch else _pair(batch)[0]
        else:
            x = batch[0] if isinstance(batch, list | tuple) else batch
        out = self.net(self._cast(x))
        if isinstance(out, Mapping):
            return dict(out)
        return {f"{_PART}{i}": part for i, part in enumerate(out if isinstance(out, tuple | list) else [out])}

    def own_output(self, found: Mapping[str, Tensor]) -> Any:
        """What `step` made of the net's output, as found by key, put back: a tensor, a tuple or a dict."""
        parts = [found[key] for key in found if key.startswith(_PART)]
        return dict(found) if len(parts) < len(found) else parts[0] if len(parts) == 1 else tuple(parts)

    def own_data(self, source: Any) -> Any:
        """The rows of a TensorDataset of two tensors under "x" and "y", to be sliced; any other source as it is.

        A list of two arrays, which are no batches of pairs, is taken for such a pair.
        """
        if type(source) is TensorDataset:
            source = list(source.tensors) if len(source.tensors) == 2 else source
        if type(source) is list and len(source) == 2 and all(map(is_array, source)):
            return DictDataset({"x": source[0], "y": source[1]})
        return source

    def _cast(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        dtype = next((p.dtype for p in self.net.parameters() if p.is_floating_point()), x.dtype)
        return x if x.dtype == dtype else x.to(dtype)

    def _comparable(self, prediction: Tensor, y: Tensor) -> Tensor:
        """y as the loss function takes it: of torch's losses the dtype and shape are known."""
        name = getattr(self.loss_fn, "__name__", type(self.loss_fn).__name__)
        is_torchs = (getattr(self.loss_fn, "__module__", None) or "").startswith("torch.")
        if is_torchs and name in _OF_NUMBERS:
            is_column = prediction.shape == (*y.shape, 1) or y.shape == (*prediction.shape, 1)
            return (y.reshape(prediction.shape) if is_column else y).to(prediction.dtype)
        if is_torchs and name in _OF_CLASSES and not y.is_floating_point():
            is_column = y.shape == (len(prediction), 1) and prediction.dim() == 2 and prediction.shape[1] > 1
            return (y[:, 0] if is_column else y).long()
        return y.to(prediction.dtype) if y.is_floating_point() and prediction.is_floating_point() else y

    def _loss(self, prediction: Any, y: Any) -> Tensor:
        try:
            loss = self.loss_fn(prediction, y)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is raised with what was compared
            from weft.problem.mistakes import loss_raised

            raise loss_raised(error, self.loss_fn, prediction, y) from None
        if not isinstance(loss, Tensor):
            from weft.problem.mistakes import no_loss

            raise no_loss(loss, self.loss_fn)
        return loss

    def _first_loss(self, prediction: Any, y: Any) -> Tensor:
        """The loss of a first batch; ValueError where it pairs every row with every other."""
        if torch.compiler.is_compiling() or not (isinstance(prediction, Tensor) and isinstance(y, Tensor)):
            return self._loss(prediction, y)
        with warnings.catch_warnings(), PairWatch([prediction, y]) as watch:
            warnings.filterwarnings("ignore", message="Using a target size")  # torch's, of the same
            loss = self._loss(prediction, y)
        if watch.found is not None and {prediction.dim(), y.dim()} != {2} and abs(prediction.dim() - y.dim()) == 1:
            raise ValueError(
                f"Supervised: the net's prediction has shape {tuple(prediction.shape)} and y {tuple(y.shape)}: "
                f"{type(self.loss_fn).__name__} would compare every row with every other. Give both the same shape: "
                + ("y.reshape(-1, 1) makes y a column." if y.dim() == 1 else "y.reshape(-1) makes y flat.")
            )
        self._shapes_seen = prediction.dim() == 0 or len(prediction) > 1
        return loss

    def __repr__(self) -> str:
        parameters = sum(p.numel() for p in self.parameters())
        loss = getattr(self.loss_fn, "__name__", type(self.loss_fn).__name__)
        return f"Supervised({type(self.net).__name__}, {loss}, {parameters:,} parameters)"


_PART = "prediction_"
_OF_NUMBERS = {
    *[
        "MSELoss",
        "L1Loss",
        "SmoothL1Loss",
        "HuberLoss",
        "BCELoss",
        "BCEWithLogitsLoss",
        "PoissonNLLLoss",
        "SoftMarginLoss",
    ],
    *[
        "mse_loss",
        "l1_loss",
        "smooth_l1_loss",
        "huber_loss",
        "binary_cross_entropy",
        "binary_cross_entropy_with_logits",
    ],
    *["poisson_nll_loss", "soft_margin_loss"],
}
"""Torch's losses that compare number with number."""
_OF_CLASSES = {"CrossEntropyLoss", "NLLLoss", "cross_entropy", "nll_loss"}
"""Torch's losses whose y holds numbers of classes, (rows,)."""


def _pair(batch: Any) -> tuple[Any, Any]:
    """X and y of a batch: under "x" and "y", or its two items."""
    if isinstance(batch, Mapping) and "x" in batch and "y" in batch:
        return batch["x"], batch["y"]
    if isinstance(batch, tuple | list) and len(batch) == 2:
        x, y = batch
        is_row = getattr(x, "ndim", 0) > 0 and (isinstance(y, int | float) or getattr(y, "ndim", None) == 0)
        if not is_row and not isinstance(x, np.ndarray):
            return x, y
        found = f"one row, (x of shape {tuple(x.shape)}, a number)" if is_row else f"a pair of arrays, x is {_found(x)}"
        way = "Rows are cut into batches by weft.Data((X, y), batch_size=32), where X and y are arrays of all rows."
        raise TypeError(f"Supervised: a batch is {found}; expected tensors of several rows. {way}")
    keys = [k for k in batch if k not in ("name", "epoch", "index")] if isinstance(batch, Mapping) else []
    found = f"has the keys {keys}" if isinstance(batch, Mapping) else f"is {_found(batch)}"
    raise TypeError(
        f'Supervised: a batch {found}; expected "x" and "y", or a pair. Give the data as (X, y), with '
        'weft.Data((X, y), batch_size=32) for batches; of a table: (table[["a", "b"]], table[["target"]]). What reads '
        "other keys is a weft.Problem."
    )


def _found(value: Any) -> str:
    """A value in a few words: a class, a tensor by its shape."""
    if isinstance(value, type):
        return f"the class {value.__name__} (give an object, {value.__name__}(...))"
    shape = getattr(value, "shape", None)
    return type(value).__name__ + (f" of shape {tuple(shape)}" if shape is not None else "")


def _by_name(given: Any, loss_fn: Any) -> dict[str, Any]:
    """The metrics by name, those that are named made."""
    if given is None:
        return {}
    names = [given] if isinstance(given, str) else given
    if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
        given = {name: name for name in names}
    if not isinstance(given, Mapping):
        raise TypeError(f"Supervised: metrics={given!r}; expected names, or a dict of functions by name.")
    from weft.problem.scores import score

    return {name: score(metric, loss_fn) if isinstance(metric, str) else metric for name, metric in given.items()}
