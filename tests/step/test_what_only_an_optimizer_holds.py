"""What an optimizer holds and the problem does not register: kept, restored and brought back with all that belongs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft

X = torch.randn(24, 2, generator=torch.Generator().manual_seed(0))
DATA = {"x": X, "y": X.sum(1, keepdim=True)}


def two_nets() -> tuple[weft.Problem, nn.Module, Any]:
    """A problem whose second node closes over a net with a batch norm, and a factory of an optimizer of both."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    nodes = [weft.Node(nn.Linear(2, 1), ["x"], ["v"], name="a"), weft.Node(lambda x: net(x), ["x"], ["u"], name="b")]
    problem = weft.Problem(nodes, [weft.objective(lambda u, v, y: (u + v - y) ** 2, name="m")])
    return problem, net, lambda q: torch.optim.SGD([*q, *net.parameters()], lr=0.02)


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_the_best_weights_hold_the_buffers_of_the_modules_of_the_optimizer_too(precision: Any) -> None:
    problem, net, optimizer = two_nets()
    trains = {"on_epoch_start": lambda trainer: net.train()}
    first = problem.nodes[0].fn.bias
    worse = {"on_epoch_start": lambda trainer: first.data.add_(3.0 * (trainer.current_epoch >= 3))}
    evals = {"on_validation_start": lambda trainer: net.eval()}
    trainer = weft.Trainer(
        epochs=6, progress=False, hooks=[trains, worse, evals], optimizer=optimizer, precision=precision
    )
    result = trainer.fit(problem, weft.Data(DATA, DATA, batch_size=6))
    assert result.best_epoch is not None and result.best_epoch < 5
    net.eval()
    assert trainer.validate()["dev_loss"] == pytest.approx(result.best_metric, rel=1e-5)
    last = result.last_others
    assert {k.rpartition(".")[2] for k in last} >= {"running_mean", "running_var", "num_batches_tracked", "2"}
    assert int(net[1].num_batches_tracked) == 4 * (result.best_epoch + 1)  # type: ignore[arg-type, operator]


def test_what_only_an_optimizer_holds_comes_back_from_started_processes() -> None:
    ended = []
    for several in ({}, {"devices": 2, "strategy": "ddp_fork", "timeout": 60}):
        problem, net, optimizer = two_nets()
        for module in net.modules():  # means over halves of a batch are others
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
        size = 3 if several else 6
        options = {"epochs": 3, "progress": False, "accelerator": "cpu", "precision": "64-true"}
        trainer = weft.Trainer(optimizer=optimizer, **options, **several)
        result = trainer.fit(problem, weft.Data(DATA, batch_size=size, shuffle=False))
        result = trainer.fit(problem, weft.Data(DATA, batch_size=size, shuffle=False))
        ended.append([*net.parameters(), *problem.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(result.last_others.values(), net.parameters(), strict=False))
    before = [*two_nets()[1].parameters()]
    torch.testing.assert_close(ended[1], ended[0], rtol=1e-8, atol=1e-10)
    assert not torch.allclose(ended[1][0].float(), before[0])  # the negative control: they have moved


def test_a_weights_file_that_cannot_hold_them_says_so(tmp_path: Path) -> None:
    problem, _, optimizer = two_nets()
    trainer = weft.Trainer(epochs=1, progress=False, optimizer=optimizer, checkpoint=True, root_dir=str(tmp_path))
    result = trainer.fit(problem, DATA)
    with pytest.warns(UserWarning, match=r"save_weights: .* lacks optimizer\.default\.2, optimizer\.default\.3"):
        trainer.save_weights(tmp_path / "w.pt")
    with pytest.warns(UserWarning, match=r"also holds optimizer\.default\.2.* `resume` puts it back"):
        weft.load_weights(two_nets()[0], result.run_dir)
    assert weft.load_result(result.run_dir).last_others.keys() == result.last_others.keys()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weft.load_weights(two_nets()[0], tmp_path / "w.pt")


def test_a_problem_that_registers_all_says_nothing(tmp_path: Path, no_warnings: list[Any]) -> None:
    problem = weft.Problem(
        [weft.Node(nn.Linear(2, 1), ["x"], ["u"])], [weft.objective(lambda u, y: (u - y) ** 2, name="m")]
    )
    trainer = weft.Trainer(epochs=1, progress=False)
    result: weft.FitResult = trainer.fit(problem, DATA)
    trainer.save_weights(tmp_path / "w.pt")
    assert not result.last_others and not no_warnings
    assert all(isinstance(t, Tensor) for t in result.last_weights.values())
