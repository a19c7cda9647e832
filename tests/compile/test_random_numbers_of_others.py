"""Random numbers that are not torch's are drawn anew in every step, as in eager: such steps stay eager and say why."""

from __future__ import annotations

import itertools
import queue
import random
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import weft

GENERATOR = np.random.default_rng(3)
X = torch.rand(32, 1, generator=torch.Generator().manual_seed(1))

Draw = Callable[[], Any]


def python_s_random() -> Draw:
    return lambda: random.random()


def a_uniform_number_of_python() -> Draw:
    return lambda: random.uniform(0.5, 1.5)


def a_function_of_random_by_its_own_name() -> Draw:
    draw = random.gauss
    return lambda: draw(1.0, 0.1)


def a_branch_on_a_random_number() -> Draw:
    return lambda: 2.0 if random.random() < 0.5 else 0.5


def numpy_s_rand() -> Draw:
    return lambda: float(np.random.rand())


def an_array_made_a_tensor() -> Draw:
    return lambda: torch.as_tensor(np.random.rand(1, 1), dtype=torch.float32)


def a_random_of_its_own() -> Draw:
    own = random.Random(0)
    return lambda: own.random()


def a_default_rng() -> Draw:
    own = np.random.default_rng(0)
    return lambda: float(own.random())


def a_branch_on_a_default_rng() -> Draw:
    own = np.random.default_rng(0)
    return lambda: 2.0 if own.random() < 0.5 else 0.5


def a_random_state() -> Draw:
    held = {"own": np.random.RandomState(0)}
    return lambda: held["own"].uniform()


def a_global_generator() -> Draw:
    GENERATOR.bit_generator.state = np.random.default_rng(3).bit_generator.state
    return lambda: GENERATOR.normal()


def a_method_of_a_generator() -> Draw:
    draw = np.random.default_rng(0).random
    return lambda: draw()


def a_generator_of_an_object() -> Draw:
    own = SimpleNamespace(inner=SimpleNamespace(rng=random.Random(5)))
    return lambda: own.inner.rng.random()


def a_generator_of_torch() -> Draw:
    own = torch.Generator().manual_seed(0)
    return lambda: torch.rand((), generator=own)


def random_numbers_of_the_system() -> Draw:
    own = random.SystemRandom()
    return lambda: 1.0 if own.random() < 2 else 0.0


def an_iterator() -> Draw:
    numbers = iter(np.linspace(0, 2, 1000).tolist())
    return lambda: next(numbers)


def a_generator_function() -> Draw:
    def numbers() -> Iterator[float]:
        for i in itertools.count():
            yield (i % 7) / 5

    made = numbers()
    return lambda: next(made)


WAYS = [
    (python_s_random, "draws from python's random:"),
    (a_uniform_number_of_python, "draws from python's random:"),
    (a_function_of_random_by_its_own_name, "draws from python's random:"),
    (a_branch_on_a_random_number, "draws from python's random:"),
    (numpy_s_rand, "draws from numpy's np.random:"),
    (an_array_made_a_tensor, "draws from numpy's np.random:"),
    (a_random_of_its_own, "draws from the random generator own:"),
    (a_default_rng, "draws from the random generator own:"),
    (a_branch_on_a_default_rng, "draws from the random generator own:"),
    (a_random_state, "draws from the random generator held.own:"),
    (a_global_generator, "draws from the random generator GENERATOR:"),
    (a_method_of_a_generator, "draws from the random generator draw:"),
    (a_generator_of_an_object, "draws from the random generator own.inner.rng:"),
    (a_generator_of_torch, "makes a constant of Generator"),
    (random_numbers_of_the_system, "reaches own, a random.SystemRandom, "),
    (an_iterator, "reaches numbers, a list_iterator, "),
    (a_generator_function, "reaches made, a generator, "),
]


def fitted(way: Callable[[], Draw], compile: bool) -> tuple[dict[str, list[float]], Tensor, list[str], list[int]]:
    """History and last weights of a fit, what it warned of, and for each kind of batch how many graphs were made."""
    torch.manual_seed(0)
    draw, net = way(), nn.Linear(1, 1)

    def step(trainer: Any, batch: dict[str, Any]) -> Tensor:
        return (trainer.problem(batch["x"]) - 3 * batch["x"] * draw()).square().mean()

    trainer = weft.Trainer(
        epochs=6,
        seed=0,
        progress=False,
        compile=compile,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.05),
        training_step=step,
        validation_step=step,
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = trainer.fit(net, weft.Data({"x": X}, {"x": X[:9]}, batch_size=8, shuffle=False))
    assert trainer.run is not None
    made = list(trainer.run.graphs.made.values()) if trainer.run.graphs is not None else []
    weights = torch.cat([w.flatten() for w in result.last_weights.values()])
    return result.history, weights, [str(w.message) for w in told if "compile=" in str(w.message)], made


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("way", "reason"), WAYS, ids=lambda way: getattr(way, "__name__", ""))
def test_a_step_that_draws_elsewhere_than_from_torch_ends_bitwise_where_eager_does(way: Any, reason: str) -> None:
    history, weights, _, _ = fitted(way, False)
    found, compiled, told, made = fitted(way, True)
    assert found == history
    assert torch.equal(compiled, weights)
    assert set(made) == {-1}
    assert len(told) == 2  # of training and of evaluation
    assert all(reason in message for message in told), told


def numbers_of_torch() -> Draw:
    return lambda: torch.rand(())


@pytest.mark.usefixtures("uncompiled")
def test_a_step_that_draws_from_torch_alone_is_compiled_and_draws_the_same() -> None:
    history, weights, _, _ = fitted(numbers_of_torch, False)
    found, compiled, told, made = fitted(numbers_of_torch, True)
    assert set(made) == {1}
    assert told == []
    assert found["train_loss"] == pytest.approx(history["train_loss"], rel=1e-5)
    torch.testing.assert_close(compiled, weights, rtol=1e-5, atol=1e-7)


def generators_that_are_reached_but_not_drawn_from() -> Draw:
    held, at_its_end = np.random.default_rng(0), (i for i in range(0))
    list(at_its_end)
    return lambda: 1.0 if held is not None and at_its_end is not None else 0.0


@pytest.mark.usefixtures("uncompiled")
def test_generators_that_a_step_does_not_draw_from_are_no_obstacle() -> None:
    _, _, told, made = fitted(generators_that_are_reached_but_not_drawn_from, True)
    assert set(made) == {1}
    assert told == []


def an_iterator_out_of_sight() -> Draw:
    hidden: Any = queue.Queue()
    hidden.put(iter(np.linspace(0, 2, 1000).tolist()))
    return lambda: next(hidden.queue[0])


@pytest.mark.usefixtures("uncompiled")
def test_the_warning_says_how_many_draws_of_a_hidden_iterator_were_spent() -> None:
    _, _, told, made = fitted(an_iterator_out_of_sight, True)
    assert set(made) == {-1}
    assert "done at least 4 times: an iterator or generator out of sight is now so many draws further" in told[0]


class OfAClass(nn.Module):
    noise = np.random.default_rng(0)

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return (self.net(batch["x"]) - self.noise.random() * batch["x"]).square().mean()


class OfAModule(OfAClass):
    def __init__(self) -> None:
        super().__init__()
        self.noise = np.random.default_rng(0)  # type: ignore[misc]


class OfATrainer(weft.Trainer):
    def training_step(self, batch: dict[str, Any]) -> Tensor:
        scale = self.noise.random()  # type: ignore[attr-defined]
        return (self.problem(batch["x"]) - scale * batch["x"]).square().mean()


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", [OfAClass, OfAModule, OfATrainer])
def test_generators_of_classes_modules_and_trainers_are_found_and_put_back(kind: Any, accumulate: int) -> None:
    ends, data = [], weft.Data({"x": X}, batch_size=8, shuffle=False)
    for compile in (False, True):
        torch.manual_seed(0)
        OfAClass.noise = np.random.default_rng(0)
        is_trainer = issubclass(kind, weft.Trainer)
        make = kind if is_trainer else weft.Trainer
        trainer = make(epochs=4, seed=0, progress=False, compile=compile, accumulate=accumulate)
        if is_trainer:
            trainer.noise = np.random.default_rng(0)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            ends.append(trainer.fit(nn.Linear(1, 1) if is_trainer else kind(), data).history["train_loss"])
    assert ends[0] == ends[1]
    assert any("draws from the random generator" in str(w.message) and "noise" in str(w.message) for w in told)


@pytest.mark.usefixtures("uncompiled")
def test_only_the_split_whose_step_draws_stays_eager() -> None:
    def training(trainer: Any, batch: dict[str, Any]) -> Tensor:
        return (trainer.problem(batch["x"]) - batch["x"]).square().mean()

    def validation(trainer: Any, batch: dict[str, Any]) -> Tensor:
        return training(trainer, batch) * np.random.rand()

    ends = []
    for compile in (False, True):
        torch.manual_seed(0)
        steps: Any = {"training_step": training, "validation_step": validation}
        trainer = weft.Trainer(epochs=4, seed=0, progress=False, compile=compile, **steps)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            data = weft.Data({"x": X}, {"x": X[:9]}, batch_size=8, shuffle=False)
            ends.append(trainer.fit(nn.Linear(1, 1), data).history["dev_loss"])
    assert ends[1] == pytest.approx(ends[0], rel=1e-5)
    assert trainer.run is not None
    assert trainer.run.graphs is not None
    assert sorted(trainer.run.graphs.made.values()) == [-1, -1, 1]
    assert ["the evaluation of 'dev'" in str(w.message) for w in told if "compile=" in str(w.message)] == [True]
