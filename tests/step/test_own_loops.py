"""Loops and updates of one's own: what they reach is looked at, and a loop that trains nothing is told so."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
import weft.step.trained

UNSEEN = "requires grad and is not trained"
X = torch.linspace(0.1, 1.0, 12)[:, None]
DATA = {"x": X, "y": 3 * X}
GLOBAL = nn.Linear(1, 1)


class Looped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(1, 1)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {f"{batch['name']}_loss": (self.net(batch["x"]) - batch["y"]).square().mean()}


def start_loop(**options: Any) -> Any:
    trainer = weft.Trainer(**{"epochs": 2, "seed": 0, "progress": False, **options})
    return trainer.start(Looped(), weft.Data(DATA, batch_size=4))


def train_by_hand(run: Any, loss_of: Callable[[Any, Any], Tensor]) -> None:
    for _ in run.epochs():
        for batch in run.batches("train"):
            run.backward(loss_of(run, batch))
            run.step()


# ---- what the loop reaches


def variable() -> None:
    k = nn.Parameter(torch.ones(1))
    with start_loop() as run:
        for _ in run.epochs():
            for batch in run.batches("train"):
                run.backward(run.problem(batch)["train_loss"] + (k * batch["x"]).mean())
                run.step()


def tensor_in_a_list() -> None:
    found = [torch.ones(1, requires_grad=True)]
    with start_loop() as run:
        for _ in run.epochs():
            for batch in run.batches("train"):
                run.backward(run.problem(batch)["train_loss"] * sum(found).sum())
                run.step()


def module_that_a_function_closes_over() -> None:
    k = nn.Linear(1, 1)
    with start_loop() as run:
        train_by_hand(run, lambda run, batch: run.problem(batch)["train_loss"] + k(batch["x"]).mean())


def attribute_of_a_script() -> None:
    class Script:
        def __init__(self) -> None:
            self.k = nn.Parameter(torch.ones(1))

        def go(self) -> None:
            with start_loop() as run:
                for _ in run.epochs():
                    for batch in run.batches("train"):
                        (run.problem(batch)["train_loss"] * self.k.sum()).backward()
                        run.step()

    Script().go()


def module_of_the_file() -> None:
    with start_loop() as run:
        for _ in run.epochs():
            for batch in run.batches("train"):
                run.backward(run.problem(batch)["train_loss"] + GLOBAL(batch["x"]).mean())
                run.step()


def loop_over_batches_of_its_own() -> None:
    k = nn.Parameter(torch.ones(1))
    with start_loop() as run:
        for _ in run.epochs():
            for _ in range(3):
                run.backward(run.problem({**DATA, "name": "train"})["train_loss"] * k.sum())
                run.step()


def update_inside_a_function() -> None:
    class Step(weft.Trainer):
        def training_step(self, batch: Any) -> Any:
            return self.problem(batch)["train_loss"] * held()

    k = nn.Parameter(torch.ones(1))

    def held() -> Tensor:
        return k.sum()

    with Step(epochs=2, progress=False).start(Looped(), weft.Data(DATA, batch_size=4)) as run:
        for _ in run.epochs():
            for batch in run.batches("train"):
                run.update(batch)


def of(told: Any, what: str) -> list[str]:
    """The messages that say it; other things may be told as well."""
    return [str(warning.message) for warning in told if re.search(what, str(warning.message))]


WAYS = [
    variable,
    tensor_in_a_list,
    module_that_a_function_closes_over,
    attribute_of_a_script,
    module_of_the_file,
    loop_over_batches_of_its_own,
    update_inside_a_function,
]


@pytest.mark.filterwarnings("ignore:'train_loss' does not appear")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_what_a_loop_of_ones_own_reaches_is_named_once(way: Callable[[], None]) -> None:
    with pytest.warns(UserWarning, match=UNSEEN) as told:
        way()
    assert len(of(told, UNSEEN)) == 1, "\n".join(of(told, UNSEEN))
    (said,) = of(told, UNSEEN)
    name = {tensor_in_a_list: "found", module_of_the_file: "GLOBAL.weight"}.get(way, "k")
    assert f"uses {name}" in said or (way is attribute_of_a_script and "self.k" in said) or ".k" in said, said


def test_with_the_loop_out_of_sight_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""
    monkeypatch.setattr(weft.step.trained, "_is_in_fit", lambda: True)
    monkeypatch.setattr(weft.step.trained, "LOOKS", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        variable()


def test_nothing_is_said_of_what_a_loop_makes_itself_or_trains_itself() -> None:
    theirs = nn.Linear(1, 1)
    own = torch.optim.SGD(theirs.parameters(), lr=0.1)
    idle = nn.Linear(1, 1)
    with warnings.catch_warnings(), start_loop() as run:
        warnings.simplefilter("error")
        for _ in run.epochs():
            for batch in run.batches("train"):
                point = batch["x"].clone().requires_grad_()
                loss = run.problem({**batch, "x": point})["train_loss"] + theirs(point).square().mean()
                run.backward(loss)
                run.step()
                own.step()
                own.zero_grad()
        assert idle.weight.grad is None
    with (
        warnings.catch_warnings(),
        start_loop() as run,
    ):  # nothing tells where a step begins: plain tensors may be its own
        warnings.simplefilter("error")
        for _ in run.epochs():
            point = X.clone().requires_grad_()
            run.backward(run.problem({**DATA, "x": point, "name": "train"})["train_loss"])
            run.step()


# ---- a loop that trains nothing


def forgets_the_step(run: Any, batch: Any) -> None:
    run.backward(run.problem(batch)["train_loss"])


def forgets_all(run: Any, batch: Any) -> None:
    run.problem(batch)


def steps_another_optimizer(run: Any, batch: Any) -> None:
    own = torch.optim.SGD(run.problem.parameters(), lr=0.1)
    run.problem(batch)["train_loss"].backward()
    own.step()
    own.zero_grad()


def go(act: Callable[[Any, Any], Any]) -> None:
    with start_loop() as run:
        for _ in run.epochs():
            for batch in run.batches("train"):
                act(run, batch)


@pytest.mark.filterwarnings("ignore:'train_loss' does not appear")
@pytest.mark.parametrize("act", [forgets_the_step, forgets_all, steps_another_optimizer])
def test_an_epoch_without_a_step_is_told_once(act: Callable[[Any, Any], None]) -> None:
    with pytest.warns(UserWarning, match="An epoch went through 3 batches .* made no step") as told:
        go(act)
    assert len(of(told, "made no step")) == 1


@pytest.mark.filterwarnings("ignore:'train_loss' does not appear")
def test_a_loop_without_batches_is_told() -> None:
    def loop() -> None:
        with start_loop() as run:
            assert list(run.epochs()) == [0, 1]

    with pytest.warns(UserWarning, match="An epoch asked for no batch of training data and made no step"):
        loop()


@pytest.mark.filterwarnings("ignore:'train_loss' does not appear")
def test_a_step_without_gradients_is_told() -> None:
    with pytest.warns(UserWarning, match=r"step: no parameter of 'default' has a gradient") as told:
        go(lambda run, batch: run.step())
    assert len(of(told, "has a gradient")) == 1


class Nothing(weft.Trainer):
    def update(self, batch: Any) -> Any:
        return self.problem(batch)["train_loss"]


class NoStep(weft.Trainer):
    def update(self, batch: Any) -> Any:
        loss = self.problem(batch)["train_loss"]
        self.backward(loss)
        return loss


class OwnOptimizer(weft.Trainer):
    def update(self, batch: Any) -> Any:
        loss = self.problem(batch)["train_loss"]
        loss.backward()
        with torch.no_grad():
            for p in self.problem.parameters():
                p.data -= 0.1 * p.grad  # which no count of changes sees
                p.grad = None
        return loss


class Rarely(weft.Trainer):
    def update(self, batch: Any) -> Any:
        loss = self.problem(batch)["train_loss"]
        self.backward(loss)
        if self.run.progress.batch == 3:
            self.step()
        return loss


@pytest.mark.parametrize("batch_size", [4, None])
@pytest.mark.parametrize(
    ("kind", "lacks"),
    [(Nothing, r"self\.backward\(loss\) and self\.step\(\)"), (NoStep, r"lacks self\.step\(\)")],
)
def test_an_update_that_trains_nothing_is_told_once(kind: Any, lacks: str, batch_size: int | None) -> None:
    with pytest.warns(UserWarning, match=rf"{kind.__name__}\.update has trained nothing.*{lacks}") as told:
        kind(epochs=3, progress=False).fit(Looped(), weft.Data(DATA, batch_size=batch_size))
    assert len(told) == 1


@pytest.mark.parametrize("kind", [OwnOptimizer, Rarely])
def test_an_update_that_trains_in_its_own_way_is_left_alone(kind: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kind(epochs=3, progress=False).fit(Looped(), weft.Data(DATA, batch_size=4))


def test_a_gradient_that_was_there_before_the_step_is_no_finding() -> None:
    idle = nn.Parameter(torch.ones(1))
    idle.grad = torch.ones(1)

    class Own(weft.Trainer):
        def update(self, batch: Any) -> Tensor:
            loss = self.problem(batch)["train_loss"]
            loss.backward()
            self.step()
            return loss if idle is not None else 0 * loss

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Own(epochs=2, progress=False).fit(Looped(), weft.Data(DATA, batch_size=4))
