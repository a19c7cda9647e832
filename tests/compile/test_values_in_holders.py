"""A number that changes late arrives in a graph, in whatever object of python's own it is kept."""

from __future__ import annotations

import argparse
import array
import collections
import contextvars
import ctypes
import functools
import math
import mmap
import multiprocessing
import os
import threading
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import weft
from weft.compile import watching

X = torch.rand(24, 2, generator=torch.Generator().manual_seed(0))


class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 1)

    def forward(self, batch: Any) -> dict[str, Tensor]:
        return {f"{batch['name']}_loss": (self.layer(batch["x"]) - 1).square().mean()}


class WithSlots:
    __slots__ = ("lam",)

    def __init__(self) -> None:
        self.lam = 0.0


class Referred:
    lam = 0.0


KEPT = Referred()


def put_attribute(thing: Any, value: float) -> None:
    thing.lam = value


def item(thing: Any, value: Any) -> None:
    thing["lam"] = value


def put_first(thing: Any, value: float) -> None:
    thing[0] = value


class Cached:
    """A number behind a cache that is cleared when it changes."""

    def __init__(self) -> None:
        held = {"lam": 0.0}

        @functools.cache
        def get() -> float:
            return held["lam"]

        self.held, self.get = held, get

    def put(self, value: float) -> None:
        self.held["lam"] = value
        self.get.cache_clear()


def put_value(thing: Any, value: float) -> None:
    thing.value = value


HOLDERS: dict[str, tuple[Callable[[], Any], Callable[[Any, float], Any], Callable[[Any], float]]] = {
    "SimpleNamespace": (lambda: types.SimpleNamespace(lam=0.0), put_attribute, lambda c: c.lam),
    "Namespace": (lambda: argparse.Namespace(lam=0.0), put_attribute, lambda c: c.lam),
    "slots": (WithSlots, put_attribute, lambda c: c.lam),
    "local": (threading.local, put_attribute, lambda c: getattr(c, "lam", 0.0)),
    "deque": (lambda: collections.deque([0.0]), put_first, lambda c: c[0]),
    "array": (lambda: array.array("d", [0.0]), put_first, lambda c: c[0]),
    "UserDict": (lambda: collections.UserDict(lam=0.0), item, lambda c: c["lam"]),
    "UserList": (lambda: collections.UserList([0.0]), put_first, lambda c: c[0]),
    "ChainMap": (lambda: collections.ChainMap({"lam": 0.0}), item, lambda c: c["lam"]),
    "a view": (
        lambda: (d := {"lam": 0.0}, types.MappingProxyType(d)),
        lambda c, v: item(c[0], v),
        lambda c: c[1]["lam"],
    ),
    "ContextVar": (lambda: contextvars.ContextVar("lam", default=0.0), lambda c, v: c.set(v), lambda c: c.get()),
    "ctypes": (lambda: ctypes.c_double(0.0), put_value, lambda c: c.value),
    "shared memory": (lambda: multiprocessing.Value("d", 0.0), put_value, lambda c: c.value),
    "bytearray": (lambda: bytearray(1), lambda c, v: put_first(c, int(v)), lambda c: float(c[0])),
    "a table": (lambda: pd.DataFrame({"lam": [0.0]}), lambda c, v: item(c, [v]), lambda c: float(c["lam"][0])),
    "a cache": (Cached, lambda c, v: c.put(v), lambda c: c.get()),
    "0.0 and -0.0": (
        lambda: types.SimpleNamespace(lam=0.0),
        lambda c, v: put_attribute(c, -0.0 if v else 0.0),
        lambda c: 1 - math.copysign(1, c.lam),
    ),
    "the order of a dict": (
        lambda: {"a": 0.0, "b": 1.0},
        lambda c, v: c.update(a=c.pop("a")) if v else None,
        lambda c: next(iter(c.values())),
    ),
    "weakref": (lambda: weakref.ref(KEPT), lambda c, v: put_attribute(c(), v), lambda c: c().lam),
    "environ": (lambda: "WEFT_TEST_LAM", lambda c, v: os.environ.update({c: str(v)}), lambda c: float(os.environ[c])),
}


def last_loss(name: str, compile: bool) -> float:
    make, put, get = HOLDERS[name]
    held = make()
    put(held, 0.0)

    def step(trainer: Any, batch: Any) -> Tensor:
        return trainer.problem(batch)["train_loss"] * (1 + get(held))

    change = {"on_epoch_start": lambda trainer: put(held, 1.0 * (trainer.current_epoch >= 5))}
    trainer = weft.Trainer(epochs=8, progress=False, compile=compile, training_step=step, hooks=change)
    result = trainer.fit(Affine(), weft.Data({"x": X}, batch_size=8, shuffle=False))
    return result.history["train_loss"][-1]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", HOLDERS)
def test_a_number_that_changes_between_two_checks_arrives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are compared in epochs 4 and 8; this one changes in the fifth."""
    monkeypatch.setenv("WEFT_TEST_LAM", "0.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert last_loss(name, compile=True) == pytest.approx(last_loss(name, compile=False), rel=1e-5)


@pytest.mark.usefixtures("uncompiled")
def test_where_nobody_looks_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""
    monkeypatch.setattr(watching, "HOLDERS", set())
    assert last_loss("SimpleNamespace", compile=True) != pytest.approx(last_loss("SimpleNamespace", False), rel=1e-3)


@pytest.mark.usefixtures("uncompiled")
def test_a_step_that_reads_the_learning_rate_sees_it_change() -> None:
    def step(trainer: Any, batch: Any) -> Tensor:
        factor = 2.0 if trainer.optimizer.param_groups[0]["lr"] < 0.06 else 1.0
        return trainer.problem(batch)["train_loss"] * factor

    found = []
    for compile in (False, True):
        trainer = weft.Trainer(
            epochs=8,
            progress=False,
            compile=compile,
            training_step=step,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
            scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.5),
        )
        found.append(trainer.fit(Affine(), weft.Data({"x": X}, batch_size=8, shuffle=False)).history["train_loss"])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


class Matrix:
    """As casadi has them: `size` is a method."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails

    def size(self) -> tuple[int, int]:
        return (1, 1)

    def __array__(self, *_: Any, **__: Any) -> Any:
        if self.fails:
            raise RuntimeError("no numbers")
        return np.ones((1, 1))


class Numbers(Matrix):
    size = 1  # type: ignore[assignment]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("held", [Matrix(), Numbers(fails=True), mmap.mmap(-1, 2 * watching.MAX_MEMORY)])
def test_an_object_that_does_not_show_its_numbers_stops_no_fit(held: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Matrix, Numbers):
        monkeypatch.setattr(kind, "__module__", "numpy.elsewhere")  # of a library

    def step(trainer: Any, batch: Any) -> Tensor:
        return trainer.problem(batch)["train_loss"] * (held is not None)

    ends = [
        weft.Trainer(epochs=4, progress=False, compile=compile, training_step=step)
        .fit(Affine(), weft.Data({"x": X}, batch_size=8, shuffle=False))
        .history["train_loss"][-1]
        for compile in (False, True)
    ]
    assert ends[1] == pytest.approx(ends[0], rel=1e-5)
