"""A net that grows while it is trained: the fit ends well, and says which weights the problem holds."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft

X = torch.linspace(0, 1, 16)[:, None]


class Widening(nn.Module):
    """Its loss gets worse from epoch 2 on, where it grows: the best epoch is one of the small net."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
        self.worse = 0.0

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {f"{batch['name']}_loss": (self.net(batch["x"]) - 3 * batch["x"]).square().mean() + self.worse}


def wider(problem: Widening) -> None:
    problem.net = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1))


def deeper(problem: Widening) -> None:
    problem.net.append(nn.Linear(1, 1))


def with_a_buffer_too(problem: Widening) -> None:
    problem.net.append(nn.BatchNorm1d(1))


def shallower(problem: Widening) -> None:
    problem.net = nn.Sequential(nn.Linear(1, 1))


def fit(grow: Callable[[Widening], None] | None, **options: Any) -> tuple[Widening, weft.FitResult, list[str]]:
    def change(trainer: weft.Trainer) -> None:
        if trainer.current_epoch == 2 and grow is not None:
            grow(trainer.problem)
            trainer.problem.worse = 5.0
            optimizer = trainer.optimizer
            optimizer.param_groups[0]["params"] = list(trainer.problem.parameters())
            optimizer.state.clear()

    trainer = weft.Trainer(
        epochs=4,
        progress=False,
        optimizer=lambda q: torch.optim.SGD(q, lr=0.01),
        hooks=[{"on_epoch_start": change}, *options.pop("hooks", [])],
        **options,
    )
    problem = Widening()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = trainer.fit(problem, weft.Data({"x": X}, {"x": X}, batch_size=4))
    return problem, result, [str(w.message) for w in told if "weights" in str(w.message)]


@pytest.mark.parametrize("grow", [wider, deeper, with_a_buffer_too, shallower])
def test_best_weights_that_do_not_fit_any_more_are_told_and_the_last_ones_stay(grow: Any) -> None:
    problem, result, told = fit(grow)
    assert result.epochs == 4 and result.best_epoch == 1
    assert len(told) == 1 and "those of epoch 1, do not fit the problem as it is now" in told[0]
    state = problem.state_dict()
    assert state.keys() == result.last_weights.keys()
    assert all(torch.equal(state[name], value) for name, value in result.last_weights.items())


def test_a_net_that_does_not_grow_gets_its_best_weights_without_a_word() -> None:
    problem, result, told = fit(None)
    assert result.best_epoch == 3 and not told
    problem, result, told = fit(lambda problem: None)
    assert result.best_epoch == 1 and not told
    assert not torch.equal(problem.net[0].weight, result.last_weights["net.0.weight"])


@pytest.mark.parametrize("average", [lambda: weft.hooks.EMA(0.5), lambda: weft.hooks.SWA()])
def test_averages_of_a_net_that_grows_begin_anew(average: Callable[[], Any]) -> None:
    hook = average()
    problem, _, told = fit(wider, hooks=[hook])
    assert told and {name: a.shape for name, a in hook.averages.items()} == {
        name: p.shape for name, p in problem.named_parameters()
    }
    assert hook.count < 16


@pytest.mark.long
def test_a_net_that_grew_in_started_processes_is_told_and_its_weights_are_in_the_result() -> None:
    problem, result, told = fit(wider, strategy="ddp_fork", devices=2, accelerator="cpu")
    assert "keeps its weights of before, result.last_weights are the new" in told[-1]
    assert problem.net[0].weight.shape == (4, 1) and result.last_weights["net.0.weight"].shape == (6, 1)


def test_a_problem_that_holds_a_scripted_module_ends_with_its_best_weights() -> None:
    problem = Widening()
    problem.net = torch.jit.script(problem.net)
    trainer = weft.Trainer(epochs=3, progress=False, optimizer=lambda q: torch.optim.SGD(q, lr=0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        result = trainer.fit(problem, weft.Data({"x": X}, {"x": X}, batch_size=4))
    assert result.best_epoch == 2 and trainer.validate()["dev_loss"] == result.best_metric
