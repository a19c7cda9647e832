"""What was in `.grad` before a fit or phase, or gathers where no optimizer clears it, enters no later step.

The truth is a loop by hand that sets every gradient to None before each step.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
import weft.loop.run
import weft.step.optimizer_step

X = {"x": torch.ones(4, 1)}


class Two(nn.Module):
    """Two layers in a row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(1, 1), nn.Linear(1, 1)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {f"{batch['name']}_loss": (self.b(self.a(batch["x"])) - 1).square().mean()}


def loss(module: nn.Module) -> Tensor:
    return module({**X, "name": "train"})["train_loss"]


def by_hand(optimizers: list[tuple[Callable[[Two], torch.optim.Optimizer], int]]) -> dict[str, Tensor]:
    """The weights after so many steps with each of the optimizers in turn."""
    module = Two()
    for make, steps in optimizers:
        optimizer = make(module)
        for _ in range(steps):
            module.zero_grad()

            def closure() -> Tensor:
                module.zero_grad()
                value = loss(module)
                value.backward()
                return value

            optimizer.step(closure)  # type: ignore[arg-type]
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def first(module: Two) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.a.parameters(), lr=1e-4)


def search(module: Two) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(module.a.parameters(), lr=1e-3, max_iter=3)


def second(module: Two) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=1e-2)


def phases(module: Two, make: Callable[[Two], torch.optim.Optimizer], epochs: int = 10) -> list[weft.Phase]:
    return [
        weft.Phase(epochs=epochs, optimizer=make(module)),
        weft.Phase(epochs=1, optimizer=lambda p: torch.optim.SGD(p, lr=1e-2)),
    ]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("make", [first, search])
def test_gradients_of_an_earlier_phase_do_not_enter_the_next(make: Callable[[Two], torch.optim.Optimizer]) -> None:
    module = Two()
    result = weft.Trainer(progress=False, phases=phases(module, make)).fit(module, X)
    assert same(result.last_weights, by_hand([(make, 10), (second, 1)]))


def test_with_the_clearing_switched_off_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weft.loop.run, "clear_gradients", lambda state: None)
    monkeypatch.setattr(weft.loop.run.Run, "begin_update", weft.loop.run.Run.begin_step)
    monkeypatch.setattr(weft.step.optimizer_step, "rest_of", lambda state: [])
    module = Two()
    result = weft.Trainer(progress=False, phases=phases(module, first)).fit(module, X)
    assert not same(result.last_weights, by_hand([(first, 10), (second, 1)]))


def test_a_backward_before_the_fit_or_in_a_hook_at_its_start_changes_nothing() -> None:
    options: dict[str, Any] = {"epochs": 1, "progress": False, "optimizer": lambda p: torch.optim.SGD(p, lr=1e-2)}
    module = Two()
    (1000 * loss(module)).backward()
    assert same(weft.Trainer(**options).fit(module, X).last_weights, by_hand([(second, 1)]))
    module = Two()
    look = {"on_fit_start": lambda trainer: (1000 * loss(module)).backward()}
    assert same(weft.Trainer(**options, hooks=[look]).fit(module, X).last_weights, by_hand([(second, 1)]))


def test_a_backward_between_two_fits_changes_nothing() -> None:
    module = Two()
    trainer = weft.Trainer(epochs=1, progress=False, optimizer=lambda p: torch.optim.SGD(p, lr=1e-2))
    trainer.fit(module, X)
    (1000 * loss(module)).backward()
    assert same(trainer.fit(module, X).last_weights, by_hand([(second, 2)]))


def test_what_only_the_optimizer_holds_begins_without_gradients_too() -> None:
    w = nn.Parameter(torch.ones(1))
    w.grad = torch.full((1,), 1000.0)
    net = weft.Node(nn.Linear(1, 1), ["x"], ["v"], name="a")
    terms = [weft.objective(lambda u: u.square(), name="m"), weft.objective(lambda v: v.square(), name="r")]
    problem = weft.Problem([net, weft.Node(lambda x: w * x, ["x"], ["u"], name="b")], terms)
    optimizer = {"optimizer": lambda q: torch.optim.SGD([*q, w], lr=0.1)}
    weft.Trainer(epochs=1, progress=False, **optimizer).fit(problem, X)
    assert w.item() == pytest.approx(0.8)


def test_an_update_of_ones_own_leaves_nothing_in_parameters_of_no_optimizer() -> None:
    seen: list[Any] = []

    class Own(weft.Trainer):
        def update(self, batch: Any) -> Tensor:
            seen.append(self.problem.b.bias.grad)  # pyright: ignore[reportAttributeAccessIssue]
            found = self.problem(batch)["train_loss"]
            self.backward(found)
            self.step()
            return found

    module = Two()
    Own(epochs=4, progress=False, optimizer=first(module)).fit(module, X)
    assert seen == [None] * 4


def test_a_run_killed_in_the_first_phase_ends_at_the_same_bits(tmp_path: Path) -> None:
    class Dies(weft.Hook):
        def __init__(self, at: int) -> None:
            self.at = at

        def on_step_end(self, trainer: Any, batch: Any, loss: Tensor) -> None:
            if trainer.global_step == self.at:
                raise InterruptedError

    def fit(at: int, **options: Any) -> dict[str, Tensor]:
        module = Two()
        kept = {"checkpoint": {"every_n_steps": 1}, "root_dir": str(tmp_path), "run_name": "r", "progress": False}
        trainer = weft.Trainer(phases=phases(module, first), hooks=[Dies(at)], **kept, **options)
        return trainer.fit(module, X).last_weights

    with pytest.raises(InterruptedError):
        fit(5)
    assert same(fit(-1, resume="auto"), by_hand([(first, 10), (second, 1)]))
