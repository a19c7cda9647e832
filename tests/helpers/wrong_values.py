"""Random values for every option, for data, and for what a step returns; and whether errors are in weft's own words."""

from __future__ import annotations

import array
import datetime
import linecache
import random
import traceback
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import weft
from tests.helpers.allowed import ALLOWED
from weft.config import TrainerConfig
from weft.loop.options import OBJECTS

SOURCE = str(Path(weft.__file__).parent)
STARTS_PROCESSES = {"devices", "num_nodes"}
"""Only with values that are refused before any process is started."""
OF_DATA = ("batch_size", "shuffle", "drop_last", "pre_batch", "refresh_every", "inputs_require_grad", "num_workers")
RETURNED = ("returned", "a metric", "a key")


def values(draw: random.Random) -> Any:
    """A value of any kind, mostly wrong."""
    numbers = [0, 1, 2, -1, 3, 2**31, 2**63, -(2**63), 10**30, 0.0, 0.5, 1.0, -0.5, 1e308, 1e-320]
    numbers += [
        float("nan"),
        float("inf"),
        -float("inf"),
        True,
        False,
        1j,
        Fraction(1, 3),
        np.float64(0.5),
        np.int64(2),
    ]
    texts = [
        "",
        "auto",
        "all",
        "min",
        "x",
        "train_loss",
        "data.csv",
        "1",
        "1:00",
        "nan",
        "\0",
        "\ud800",
        "a" * 300,
        b"x",
        bytearray(b"xy"),
    ]
    tensors: list[Any] = [torch.tensor(1.0), torch.ones(4), torch.ones(4, 2), torch.ones(0, 2), torch.ones(2, 3, 4)]
    tensors += [
        torch.ones(4, 2, dtype=torch.complex64),
        torch.ones(4, 2, dtype=torch.int64),
        torch.ones(4, 2).to_sparse(),
    ]
    tensors += [
        torch.ones(4, 2, dtype=torch.float64),
        torch.full((4, 2), float("nan")),
        torch.ones(4, dtype=torch.bool),
    ]
    arrays = [np.ones((4, 2)), np.ones(()), np.array(["a", "b"]), np.array([None]), np.ones((4, 2), dtype=np.uint16)]
    arrays += [memoryview(b"xy"), memoryview(np.ones((4, 2))), memoryview(np.ones(())), array.array("d", [1.0, 2.0])]
    objects: list[Any] = [None, object(), len, lambda: 1, lambda *a: a, nn.Linear, nn.Linear(2, 1), int, weft, range(3)]
    objects += [
        datetime.timedelta(1),
        Path("x"),
        iter([]),
        {1, 2},
        Ellipsis,
        NotImplemented,
        Exception("x"),
        torch.float32,
    ]
    objects += [
        slice(1),
        torch.optim.SGD,
        torch.device("cpu"),
        weft.DictDataset({"x": torch.ones(4, 2)}),
    ]
    kind = draw.randrange(8)
    if kind < 5:
        return draw.choice([numbers, texts, tensors, arrays, objects][kind])
    inner = [values(draw) for _ in range(draw.randrange(4))]
    if kind == 5:
        return inner
    if kind == 6:
        return tuple(inner)
    keys: list[Any] = ["x", "train", "dev", "name", "epoch", 1, None, "", "every_n_steps", ("a",), "train_loss"]
    return {draw.choice(keys): value for value in inner}


class Fits(nn.Module):
    """A problem that takes what comes under "x"."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, batch: Any) -> dict[str, Any]:
        return {f"{batch['name']}_loss": self.layer(batch["x"]).square().mean()}


def attempt(draw: random.Random) -> tuple[str, Any, Callable[[], Any]]:
    """A place for a random value, the value, and a fit with it there."""
    options = [name for name in (*TrainerConfig.__dataclass_fields__, *OBJECTS) if name != "strategy"]
    place = draw.choice([*options, *OF_DATA, *["train", "dev", "data", "column", *RETURNED] * 4])
    value = values(draw)
    if place in STARTS_PROCESSES and _is_accepted(place, value):
        value = 0
    if (place == "compile" and _is_one_of(value, True, "auto")) or (
        place == "num_workers" and not _is_one_of(value, 0, -1, None)
    ):
        value = "x"
    trainer: dict[str, Any] = {"epochs": 1, "accelerator": "cpu", "progress": False, "max_steps": 3}
    data: dict[str, Any] = {"train": {"x": torch.ones(4, 2)}, "dev": {"x": torch.ones(4, 2)}, "batch_size": 2}
    whole: Any = None
    if place in options:
        trainer[place] = value
    elif place in (*OF_DATA, "train", "dev"):
        data[place] = value
    elif place == "column":
        data["train"] = {"x": torch.ones(4, 2), "y": value}
    elif place == "data":
        whole = [value]
    else:
        loss = {"returned": lambda out: value, "a metric": lambda out: {**out, "m": value}}
        loss["a key"] = lambda out: {**out, value if _hashable(value) else 3: torch.ones(())}
        step = loss[place]
        trainer["training_step"] = lambda t, batch: step(t.problem(batch))

    def fit() -> Any:
        return weft.Trainer(**trainer).fit(Fits(), whole[0] if whole else weft.Data(**data))

    return place, value, fit


def _is_accepted(name: str, value: Any) -> bool:
    try:
        TrainerConfig(**{name: value})
    except (TypeError, ValueError):
        return False
    return True


def _is_one_of(value: Any, *others: Any) -> bool:
    return any(
        type(value) is not bool or value is other
        for other in others
        if isinstance(value, type(other)) and value == other
    )


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except (TypeError, ValueError):  # a memoryview of what may change
        return False
    return True


def is_own(error: BaseException) -> bool:
    """Whether weft raised the error itself, and in words: not what something below it, or Python, said."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1]
    ours = [frame for frame in frames if frame.filename.startswith(SOURCE) or frame.filename == __file__]
    if ours[-1].filename == __file__ and ours[-1].name in ("forward", "<lambda>"):
        return True  # the user's own code, which does not like what it got
    raised = linecache.getline(last.filename, last.lineno or 0).strip().startswith("raise")
    return (
        last.filename.startswith(SOURCE)
        and raised
        and isinstance(error, TypeError | ValueError | RuntimeError | OSError)
    )


def raw_errors(seed: int, size: int) -> dict[str, list[str]]:
    """What `size` random values gave that is not in weft's words, by the place that raised it.

    Under "accepted" are those that an option took though its sentence does not allow them.
    """
    draw, found = random.Random(seed), dict[str, list[str]]()
    for _ in range(size):
        place, value, fit = attempt(draw)
        torch.manual_seed(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                fit()
            if place in ALLOWED and not ALLOWED[place](value):
                found.setdefault("accepted", []).append(f"{place}={str(value)[:60]!r} ({type(value).__name__})")
        except Exception as error:  # noqa: BLE001, judged here
            if not is_own(error):
                last = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(SOURCE)][-1:]
                where = f"{Path(last[0].filename).name}:{last[0].lineno}" if last else "?"
                text = (
                    f"{place}={str(value)[:60]!r} ({type(value).__name__}): {type(error).__name__}: {str(error)[:150]}"
                )
                found.setdefault(where, []).append(text)
    return found
