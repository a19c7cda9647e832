"""A parameter that is kept where no attribute leads is named all the same.

Before the first update where it can be found in what the problem holds, else in the second: what a loss meets again was
not made in its step.
"""

from __future__ import annotations

import contextvars
import functools
import itertools
import queue
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
from torch import Tensor, nn

import weft
import weft.step.trained

X = torch.linspace(0.1, 1.0, 16)[:, None]
KEPT: list[Any] = []


def one() -> nn.Parameter:
    return nn.Parameter(torch.ones(1))


def array_of_objects() -> Any:
    held = np.array([None], dtype=object)
    held[0] = one()
    return lambda x: held[0] * x


def weak_values() -> Any:
    held: Any = weakref.WeakValueDictionary()
    KEPT[:] = [one()]
    held["w"] = KEPT[0]
    return lambda x: held["w"] * x


def weak_reference() -> Any:
    KEPT[:] = [one()]
    held = weakref.ref(KEPT[0])
    return lambda x: held() * x  # type: ignore[operator]


def queue_of_one() -> Any:
    held: Any = queue.Queue()
    held.put(one())

    def turn(x: Tensor) -> Tensor:
        w = held.get()
        held.put(w)
        return w * x

    return turn


def context() -> Any:
    held: Any = contextvars.ContextVar("held")
    held.set(one())
    return lambda x: held.get() * x


def proxy() -> Any:
    held = types.MappingProxyType({"w": one()})
    return lambda x: held["w"] * x


def cycle() -> Any:
    held = itertools.cycle([one()])
    return lambda x: next(held) * x


def generator() -> Any:
    def numbers() -> Iterator[Tensor]:
        w = one()
        while True:
            yield w

    held = numbers()
    next(held)
    return lambda x: next(held) * x


def cached() -> Any:
    get = functools.lru_cache(one)
    get()
    return lambda x: get() * x


def method_of_a_dict() -> Any:
    get = {"w": one()}.__getitem__
    return lambda x: get("w") * x


def view() -> Any:
    held = nn.Parameter(torch.ones(2))[:1]
    return lambda x: held * x


def mean_of_a_distribution() -> Any:
    held = torch.distributions.MultivariateNormal(one(), torch.eye(1))
    return lambda x: held.mean * x


def in_a_package() -> Any:
    package, inner = types.ModuleType("physics_of_mine"), types.ModuleType("physics_of_mine.plant")
    package.plant, inner.W = inner, one()  # type: ignore[attr-defined]
    return eval("lambda x: physics_of_mine.plant.W * x", {"physics_of_mine": package})


def imported_inside() -> Any:
    sys.modules["physics_of_mine"] = module = types.ModuleType("physics_of_mine")
    module.W = one()  # type: ignore[attr-defined]

    def node(x: Tensor) -> Tensor:
        from physics_of_mine import W  # pyright: ignore[reportMissingImports]

        return W * x

    return node


class Strange:
    """An object whose `__getattr__` raises something else than AttributeError."""

    def __init__(self) -> None:
        self.store = {"w": one()}

    def __getattr__(self, name: str) -> Any:
        return vars(self)["store"][name]


def strange_object() -> Any:
    held = Strange()
    return lambda x: held.w * x


FOUND = [
    array_of_objects,
    weak_values,
    weak_reference,
    queue_of_one,
    context,
    proxy,
    cycle,
    generator,
    cached,
    method_of_a_dict,
    view,
    mean_of_a_distribution,
    strange_object,
]


def name_in_a_text() -> Any:
    globals()["HIDDEN"] = one()
    return lambda x: globals()["HID" + "DEN"] * x


def of_a_metaclass() -> Any:
    class Meta(type):
        w = one()

    class Plant(metaclass=Meta):
        pass

    return lambda x: Plant.w * x


def made_at_the_first_call() -> Any:
    get = functools.lru_cache(one)
    return lambda x: get() * x


HIDDEN = [name_in_a_text, of_a_metaclass, made_at_the_first_call, in_a_package, imported_inside]


@pytest.fixture(autouse=True)
def no_module_stays() -> Iterator[None]:
    yield
    sys.modules.pop("physics_of_mine", None)


def problem(fn: Callable[..., Any] | None) -> weft.Problem:
    torch.manual_seed(0)
    nodes = [weft.Node(nn.Linear(1, 1), ["x"], ["v"], name="a")]
    nodes += [weft.Node(fn, ["x"], ["u"], name="b")] if fn is not None else []
    term = (lambda u, v, x: (u + v - 3 * x) ** 2) if fn is not None else (lambda v, x: (v - 3 * x) ** 2)
    return weft.Problem(nodes, [weft.objective(term, name="m")])


def fit(of: weft.Problem, **options: Any) -> tuple[int, list[str]]:
    """How many steps were done, and what was told of what is not trained."""
    trainer = weft.Trainer(epochs=2, progress=False, **options)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            trainer.fit(of, weft.Data({"x": X}, batch_size=4))
        except ValueError as error:
            return trainer.global_step, ["refused: " + str(error)]
    return trainer.global_step, [str(w.message) for w in told if "is not trained" in str(w.message)]


@pytest.mark.parametrize("make", FOUND, ids=lambda make: make.__name__)
def test_what_a_node_keeps_in_any_container_is_refused_before_the_first_update(make: Callable[[], Any]) -> None:
    steps, told = fit(problem(make()))
    assert steps == 0 and len(told) == 1 and told[0].startswith("refused: node 'b' uses ")
    steps, told = fit(problem(lambda x: x), training_step=in_a_step(make()))
    assert steps == 8 and len(told) == 1 and told[0].startswith("the trainer's training_step uses ")


def in_a_step(fn: Callable[..., Any]) -> Callable[..., Tensor]:
    return lambda trainer, batch: trainer.problem(batch)["train_loss"] + fn(batch["x"]).square().mean()


@pytest.mark.parametrize("more", [{}, {"compile": True}, {"accumulate": 2}], ids=["plain", "compiled", "accumulated"])
@pytest.mark.parametrize("make", HIDDEN, ids=lambda make: make.__name__)
def test_what_is_out_of_sight_is_told_in_the_second_update(
    make: Callable[[], Any], more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, told = fit(problem(make()), **more)
    assert steps == 1 and len(told) == 1 and "refused: The loss uses a parameter that no attribute leads to" in told[0]
    _, told = fit(problem(None), training_step=in_a_step(make()), **more)
    assert len(told) == 1 and told[0].startswith("The loss uses a parameter that no attribute leads to")
    monkeypatch.setattr(weft.step.trained, "LOOKS", 1)
    assert fit(problem(make()), **more)[1] == []


def test_parameters_that_each_step_makes_itself_are_no_finding() -> None:
    def inner(trainer: Any, batch: Any) -> Tensor:
        w = one()  # the start of an inner loop
        (slope,) = torch.autograd.grad((w * batch["x"] - 1).square().mean(), w, create_graph=True)
        return trainer.problem(batch)["train_loss"] + (w - slope).square().sum()

    assert fit(problem(None), training_step=inner) == (8, [])
    assert fit(problem(None), training_step=inner, accumulate=2) == (4, [])

    class Twice(weft.Trainer):
        def update(self, batch: Any) -> Tensor:
            w = one()
            for _ in range(2):
                self.backward(self.problem(batch)["train_loss"] * w.sum())
            self.step()
            return torch.zeros(())

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Twice(epochs=2, progress=False).fit(problem(None), weft.Data({"x": X}, batch_size=4))


def test_what_a_hidden_optimizer_of_a_hook_trains_is_no_finding() -> None:
    held = {"w": one()}
    ascent = torch.optim.SGD([held["w"]], lr=0.1, maximize=True)
    get = types.MappingProxyType(held)
    step = in_a_step(lambda x: get["w"] * x)
    assert fit(problem(None), training_step=step, hooks=[{"on_step_end": lambda *a: ascent.step()}]) == (8, [])


LIBRARIES = {
    "all modules": sys.modules,
    "a namespace": vars(torch.distributed),
    "its reader": vars(torch.distributed).get,
    "a proxy of it": types.MappingProxyType({"distributed": torch.distributed}),
    "modules to come": iter([torch, torch.distributed]),
}


@pytest.mark.parametrize("held", LIBRARIES)
def test_libraries_that_a_node_holds_are_not_looked_through(held: str) -> None:
    """Reading all that they hold would take long, recurse, and wake what warns when it is read."""
    steps, told = fit(problem(lambda x: (LIBRARIES[held], x)[1]))
    assert steps == 8 and told == []
    hidden = {"held": LIBRARIES[held], "net": nn.Linear(1, 1)}  # beside them everything is looked through
    steps, told = fit(problem(lambda x: hidden["net"](x)))
    assert steps == 0 and len(told) == 1
