"""A number that a step reads from outside and that changes arrives at that very step, or the graph is left."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import weft
from weft.compile.watching import Watch

GLOBAL = 0.0
X = torch.rand(32, 1, generator=torch.Generator().manual_seed(1))

Loss = Callable[[Tensor], Tensor]
Change = Callable[[float], Any]


class Plain(SimpleNamespace):
    """An object of the user's own, with a property."""

    scale = 0.0

    @property
    def doubled(self) -> float:
        return 2 * self.lam


def a_closure() -> tuple[Loss, Change]:
    lam = 0.0

    def change(value: float) -> None:
        nonlocal lam
        lam = value

    return lambda u: lam * u**2, change


def a_global() -> tuple[Loss, Change]:
    def change(value: float) -> None:
        global GLOBAL
        GLOBAL = value

    change(0.0)
    return lambda u: GLOBAL * u**2, change


def an_attribute_of_a_module_of_python() -> tuple[Loss, Change]:
    settings = sys.modules[__name__]
    return partial(_by_module, settings), lambda value: setattr(settings, "GLOBAL", value)


def _by_module(settings: ModuleType, u: Tensor) -> Tensor:
    return GLOBAL * u**2


def a_default() -> tuple[Loss, Change]:
    def f(u: Tensor, lam: float = 0.0) -> Tensor:
        return lam * u**2

    return (lambda u: f(u)), lambda value: setattr(f, "__defaults__", (value,))


def a_keyword_default() -> tuple[Loss, Change]:
    def f(u: Tensor, *, lam: float = 0.0) -> Tensor:
        return lam * u**2

    return (lambda u: f(u)), lambda value: f.__kwdefaults__.update(lam=value)


def an_item_of_a_dict() -> tuple[Loss, Change]:
    cfg = {"lam": 0.0}
    return lambda u: cfg["lam"] * u**2, lambda value: cfg.update(lam=value)


def an_item_of_a_list() -> tuple[Loss, Change]:
    cfg = [0.0]
    return lambda u: cfg[0] * u**2, lambda value: cfg.__setitem__(0, value)


def a_longer_list() -> tuple[Loss, Change]:
    cfg = [0.0]
    return lambda u: sum(cfg) * u**2, lambda value: cfg.append(value)


def a_nested_item() -> tuple[Loss, Change]:
    cfg = {"a": [{"lam": 0.0}]}
    return lambda u: cfg["a"][0]["lam"] * u**2, lambda value: cfg["a"][0].update(lam=value)


def an_item_of_a_set() -> tuple[Loss, Change]:
    on: set[str] = set()
    return lambda u: (5.0 if "lam" in on else 0.0) * u**2, lambda value: on.add("lam") if value else on.clear()


def an_attribute_of_a_plain_object() -> tuple[Loss, Change]:
    cfg = Plain(lam=0.0)
    return lambda u: cfg.lam * u**2, lambda value: setattr(cfg, "lam", value)


def a_property_of_a_plain_object() -> tuple[Loss, Change]:
    cfg = Plain(lam=0.0)
    return lambda u: cfg.doubled / 2 * u**2, lambda value: setattr(cfg, "lam", value)


def an_attribute_of_a_class() -> tuple[Loss, Change]:
    class Settings:
        lam = 0.0

    return lambda u: Settings.lam * u**2, lambda value: setattr(Settings, "lam", value)


def what_a_called_function_reads() -> tuple[Loss, Change]:
    lam = [0.0]

    def weight() -> float:
        return lam[0]

    return lambda u: weight() * u**2, lambda value: lam.__setitem__(0, value)


def an_array() -> tuple[Loss, Change]:
    lam = np.zeros(1)
    return lambda u: float(lam[0]) * u**2, lambda value: lam.fill(value)


def a_tensor_put_in_the_place_of_another() -> tuple[Loss, Change]:
    held = {"lam": torch.zeros(())}
    return lambda u: held["lam"] * u**2, lambda value: held.update(lam=torch.tensor(value))


def a_tensor_changed_in_place() -> tuple[Loss, Change]:
    lam = torch.zeros(())
    return lambda u: lam * u**2, lam.fill_


def a_function_put_in_the_place_of_another() -> tuple[Loss, Change]:
    held: dict[str, Any] = {"f": lambda u: 0.0 * u}
    return lambda u: held["f"](u), lambda value: held.update(f=lambda u: value * u**2)


WAYS = [
    a_closure,
    a_global,
    an_attribute_of_a_module_of_python,
    a_default,
    a_keyword_default,
    an_item_of_a_dict,
    an_item_of_a_list,
    a_longer_list,
    a_nested_item,
    an_item_of_a_set,
    an_attribute_of_a_plain_object,
    a_property_of_a_plain_object,
    an_attribute_of_a_class,
    what_a_called_function_reads,
    an_array,
    a_tensor_put_in_the_place_of_another,
    a_tensor_changed_in_place,
    a_function_put_in_the_place_of_another,
]


def fitted(way: Callable[[], tuple[Loss, Change]], compile: bool) -> tuple[dict[str, list[float]], Tensor]:
    """The history of a fit in which the value changes in the middle of the sixth epoch, and the last weights."""
    torch.manual_seed(0)
    penalty, change = way()
    net = nn.Linear(1, 1)
    problem = weft.Problem(
        [weft.Node(net, ["x"], ["u"])],
        [weft.objective(lambda u, x: (u - 3 * x) ** 2, name="m"), weft.objective(penalty, name="p")],
    )

    def late(trainer: weft.Trainer, *_: Any) -> None:
        if trainer.global_step == 22:
            change(5.0)

    trainer = weft.Trainer(
        epochs=9,
        progress=False,
        compile=compile,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.05),
        hooks={"on_step_end": late},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = trainer.fit(problem, weft.Data({"x": X}, {"x": X[:9]}, batch_size=8, shuffle=False))
    change(0.0)
    return result.history, torch.cat([w.flatten() for w in result.last_weights.values()])


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_value_that_changes_late_arrives_at_that_step(way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    history, weights = fitted(way, False)
    found, compiled = fitted(way, True)
    for name, values in history.items():
        assert found[name] == pytest.approx(values, rel=1e-4), name
    torch.testing.assert_close(compiled, weights, rtol=1e-4, atol=1e-6)
    if way is an_item_of_a_dict:  # without the watch it is lost, in training and in evaluation
        monkeypatch.setattr(Watch, "glance", lambda _: True)
        monkeypatch.setattr(Watch, "changed", lambda _: None)
        monkeypatch.setattr("weft.compile.choosing.difference", lambda *_: None)
        stale, _ = fitted(way, True)
        assert stale["train_loss"][-1] != pytest.approx(history["train_loss"][-1], rel=1e-2)
        assert stale["dev_loss"][-1] != pytest.approx(history["dev_loss"][-1], rel=1e-2)


def _with_penalty(cfg: dict[str, float], u: Tensor, y: Tensor) -> Tensor:
    return (u - y) ** 2 + cfg["lam"] * u**2


def test_the_snippet_of_a_late_penalty_ends_where_eager_does() -> None:
    """A closed-over number that changes in epoch 33, long after the last comparison with eager."""
    x = torch.rand(64, 1, generator=torch.Generator().manual_seed(0))
    ends = []
    for compile in (False, True):
        torch.manual_seed(0)
        cfg = {"lam": 0.0}
        loss = partial(_with_penalty, cfg)

        def change(trainer: weft.Trainer, cfg: dict[str, float] = cfg) -> None:
            cfg["lam"] = 5.0 * (trainer.current_epoch >= 33)

        problem = weft.Problem(
            [weft.Node(nn.Linear(1, 1), ["x"], ["u"])],
            [weft.objective(loss, name="m")],
        )
        trainer = weft.Trainer(
            epochs=60,
            seed=0,
            progress=False,
            compile=compile,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
            hooks={"on_epoch_start": change},
        )
        result = trainer.fit(problem, weft.Data({"x": x, "y": 3 * x}, batch_size=32))
        ends.append(result.history["train_loss"][-1])
    assert ends[1] == pytest.approx(ends[0], rel=1e-4)
    assert ends[0] > 1


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    "read", [lambda t: t.item(), lambda t: t.tolist(), lambda t: t.numpy(), lambda t: float(t), np.asarray]
)
def test_the_value_of_a_tensor_is_never_frozen_into_a_graph(read: Callable[[Tensor], Any]) -> None:
    """Whether the graph reads it anew or the update stays eager: what is read is the value of the moment."""
    ends = []
    for compile in (False, True):
        torch.manual_seed(0)
        lam = torch.zeros(())
        net = nn.Linear(1, 1)

        def step(trainer: Any, batch: dict[str, Any], lam: Tensor = lam) -> Tensor:
            u = trainer.problem(batch["x"])
            return (u - 3 * batch["x"]).square().mean() + float(read(lam)) * u.square().mean()

        def change(trainer: weft.Trainer, lam: Tensor = lam) -> None:
            lam.fill_(5.0 if trainer.current_epoch >= 5 else 0.0)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = weft.Trainer(
                epochs=8, progress=False, compile=compile, training_step=step, hooks={"on_epoch_start": change}
            )
            ends.append(trainer.fit(net, weft.Data({"x": X}, batch_size=8, shuffle=False)).history["train_loss"][-1])
    assert ends[1] == pytest.approx(ends[0], rel=1e-4)


def test_values_that_are_equal_are_no_change_and_a_step_that_counts_is_put_back() -> None:
    count, cfg = [0], {"lam": 1e3}
    net = nn.Linear(1, 1)
    watch = Watch(net, SimpleNamespace(), [lambda x: count[0] * cfg["lam"] * net(x)])
    cfg["lam"] = float("1e3")  # another object
    assert watch.glance()
    assert watch.changed() is None
    with watch.untouched():
        count[0] += 1
        cfg["new"] = 2.0
        net.weight.requires_grad_(True)
        assert not watch.glance()
        assert watch.changed() is not None
    assert count == [0]
    assert cfg == {"lam": 1e3}
    assert watch.changed() is None
