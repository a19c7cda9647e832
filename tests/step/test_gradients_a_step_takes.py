"""A step that calls backward itself, or clears gradients: what is lost or added is told. Complex gradients clip."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft

X = torch.rand(16, 2, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))

    def forward(self, batch: Any) -> dict[str, Tensor]:
        return {f"{batch['name']}_loss": (self.layer(batch["x"]) - 1).square().mean()}


def attack(problem: Any, batch: Any, way: str) -> Tensor:
    """FGSM: the loss at the worst point nearby (Goodfellow et al., arXiv:1412.6572)."""
    x = batch["x"].clone().requires_grad_()
    loss = problem({**batch, "x": x})["train_loss"]
    if way == "autograd.grad":
        (grad,) = torch.autograd.grad(loss, x)
    else:
        loss.backward()
        grad = x.grad
        if way == "zero_grad":
            problem.zero_grad()
        elif way == "zeros":
            problem.zero_grad(set_to_none=False)
    return problem({**batch, "x": (x + 0.1 * grad.sign()).detach()})["train_loss"]


def fit_attacked(way: str, accumulate: int = 1, **options: Any) -> list[Tensor]:
    problem = Small()
    options = {"epochs": 2, "seed": 0, "progress": False, "optimizer": lambda p: torch.optim.SGD(p, lr=0.1), **options}
    trainer = weft.Trainer(
        accumulate=accumulate, training_step=lambda t, batch: attack(t.problem, batch, way), **options
    )
    trainer.fit(problem, weft.Data({"x": X}, batch_size=4, shuffle=False))
    return [p.detach() for p in problem.parameters()]


def attacked_by_hand(accumulate: int) -> list[Tensor]:
    problem = Small()
    for _ in range(2):
        for first in range(0, 16, 4 * accumulate):
            total = torch.zeros(())
            for part in X[first : first + 4 * accumulate].split(4):
                total = total + attack(problem, {"x": part, "name": "train"}, "autograd.grad") / accumulate
            grads = torch.autograd.grad(total, [*problem.parameters()])
            with torch.no_grad():
                for p, grad in zip(problem.parameters(), grads, strict=True):
                    p -= 0.1 * grad
    return [p.detach() for p in problem.parameters()]


@pytest.mark.parametrize("way", ["zero_grad", "zeros"])
def test_a_step_that_clears_gradients_is_told_where_it_clears_those_of_other_parts(way: str) -> None:
    with pytest.warns(UserWarning, match="The step clears the gradients of what is trained") as told:
        lost = fit_attacked(way, accumulate=2)
    assert len(told) == 1
    assert not all(map(torch.allclose, lost, attacked_by_hand(2)))  # it is told with reason


def test_a_step_that_leaves_gradients_is_told() -> None:
    with pytest.warns(UserWarning, match="The step adds to the gradients of what is trained") as told:
        fit_attacked("backward")
    assert len(told) == 1


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("way", ["autograd.grad", "zero_grad"])
def test_other_attacks_train_as_by_hand(way: str, accumulate: int, no_warnings: list[Any]) -> None:
    if way == "zero_grad" and accumulate == 2:
        return
    torch.testing.assert_close(fit_attacked(way, accumulate), attacked_by_hand(accumulate))
    assert not no_warnings


# ---- complex parameters


class Waves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w, self.b = nn.Parameter(torch.randn(2, 1, dtype=torch.complex64)), nn.Parameter(torch.zeros(1))

    def forward(self, batch: Any) -> dict[str, Tensor]:
        out = batch["x"].to(torch.complex64) @ self.w + self.b - (3 - 2j)
        return {f"{batch['name']}_loss": out.abs().square().mean()}


@pytest.mark.parametrize("algorithm", ["value", "norm"])
@pytest.mark.parametrize("limit", [0.5, 3.0])
def test_complex_gradients_are_clipped(algorithm: Any, limit: float) -> None:
    problem, expected = Waves(), Waves()
    trainer = weft.Trainer(
        epochs=3,
        progress=False,
        clip=limit,
        clip_algorithm=algorithm,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    )
    trainer.fit(problem, {"x": X})
    for _ in range(3):
        grads = torch.autograd.grad(expected({"x": X, "name": "train"})["train_loss"], [*expected.parameters()])
        if algorithm == "value":
            parts = [torch.view_as_real(g) if g.is_complex() else g for g in grads]
            parts = [p.clamp(-limit, limit) for p in parts]
            grads = tuple(torch.view_as_complex(p) if g.is_complex() else p for p, g in zip(parts, grads, strict=True))
        else:
            norm = torch.cat([(torch.view_as_real(g) if g.is_complex() else g).flatten() for g in grads]).norm()
            grads = tuple(g * (limit / (norm + 1e-6)).clamp(max=1.0) for g in grads)
        with torch.no_grad():
            for p, grad in zip(expected.parameters(), grads, strict=True):
                p -= 0.1 * grad
    torch.testing.assert_close([*problem.parameters()], [*expected.parameters()])
    free = copy.deepcopy(Waves())
    weft.Trainer(epochs=3, progress=False, optimizer=lambda p: torch.optim.SGD(p, lr=0.1)).fit(free, {"x": X})
    assert not torch.allclose(free.w, problem.w)  # the negative control: it makes a difference


def test_a_step_that_makes_an_unseeded_generator_stays_eager() -> None:
    """It matters one time in a thousand: repeating the step would not show it."""
    import numpy as np

    def rare(trainer: Any, batch: Any) -> Tensor:
        return trainer.problem(batch)["train_loss"] * (2.0 if np.random.default_rng().random() < 0.001 else 1.0)

    with pytest.warns(UserWarning, match=r"makes random numbers by default_rng \(in rare\)"):
        weft.Trainer(epochs=3, progress=False, compile=True, training_step=rare).fit(Small(), {"x": X})


def test_an_attack_is_compiled_to_the_same_weights() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = fit_attacked("autograd.grad", compile=True)
    torch.testing.assert_close(compiled, attacked_by_hand(1), rtol=1e-4, atol=1e-6)
