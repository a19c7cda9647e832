"""A script of several fits that is killed in a later one, and run again, ends where the undisturbed script ends."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from tests.helpers.patience import patience

X = torch.linspace(0, 1, 24)[:, None]


class Threefold(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(1, 1)

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {f"{batch['name']}_loss": (self.net(batch["x"]) - 3 * batch["x"]).square().mean()}


class Gone(BaseException):
    """As if the process were gone: nothing is saved any more."""


def script(root: Path, fits: tuple[int | None, ...] = (None, 2, 1), kill: int | None = None, **options: Any) -> Any:
    """What a user runs: the weights, and the result of the last fit."""

    def end(trainer: weft.Trainer, batch: Any, loss: Any) -> None:
        if trainer.global_step == kill:
            raise Gone

    trainer = weft.Trainer(
        epochs=3,
        seed=0,
        progress=False,
        checkpoint={"every_n_steps": 1},
        root_dir=str(root),
        run_name="a",
        hooks={"on_step_end": end},
        optimizer=lambda q: torch.optim.Adam(q, lr=0.05),
        **options,
    )
    problem, data = Threefold(), weft.Data({"x": X}, {"x": X[:6]}, batch_size=4)
    result = trainer.fit(problem, data, resume="auto")
    for epochs in fits[1:]:
        result = trainer.fit(problem, data, epochs=epochs)
    return [p.detach().clone() for p in problem.parameters()], result


@pytest.mark.parametrize("kill", [20, 32, *(pytest.param(n, marks=pytest.mark.long) for n in (5, 18, 24, 30, 31, 35))])
def test_a_script_that_is_run_again_ends_at_the_undisturbed_bits(kill: int, tmp_path: Path) -> None:
    """Six batches an epoch; the fits train epochs 0 to 2, 3 to 4, and 5."""
    expected, whole = script(tmp_path / "whole")
    with pytest.raises(Gone):
        script(tmp_path / "cut", kill=kill)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        weights, result = script(tmp_path / "cut")
    assert (result.epochs, result.steps) == (whole.epochs, whole.steps) == (6, 36)
    assert all(map(torch.equal, weights, expected))
    assert result.history == whole.history and result.best_epoch == whole.best_epoch
    said = [str(w.message) for w in told if "trains nothing now" in str(w.message)]
    # a checkpoint is of a later fit once that one has saved: after its first step
    assert len(said) == (0 if kill < 20 else 1 if kill < 32 else 2)


@pytest.mark.long
@pytest.mark.parametrize("kill", [11, 16])
def test_so_it_is_where_each_fit_starts_its_own_processes(kill: int, tmp_path: Path) -> None:
    processes = {"strategy": "ddp_fork", "devices": 2, "accelerator": "cpu", "timeout": patience()}
    expected, whole = script(tmp_path / "whole", **processes)
    with pytest.raises(BaseException, match="") as ended:
        script(tmp_path / "cut", kill=kill, **processes)
    assert "Gone" in repr(ended.value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weights, result = script(tmp_path / "cut", **processes)
    assert (result.epochs, result.steps) == (whole.epochs, whole.steps)
    assert all(map(torch.equal, weights, expected))
    assert result.history == whole.history and result.best_epoch == whole.best_epoch


def test_a_single_fit_of_as_many_epochs_says_that_it_was_over(tmp_path: Path) -> None:
    with pytest.raises(Gone):
        script(tmp_path, kill=20)
    with pytest.warns(UserWarning, match=r"saved in fit 2 of this run: fit 1, of epochs 0 to 2, was over and trains"):
        assert script(tmp_path, fits=(None,))[1].epochs == 3


def test_a_fit_of_another_length_goes_on_with_the_later_fit(tmp_path: Path) -> None:
    with pytest.raises(Gone):
        script(tmp_path, kill=20)
    trainer = weft.Trainer(epochs=3, seed=0, progress=False, optimizer=lambda q: torch.optim.Adam(q, lr=0.05))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = weft.Data({"x": X}, {"x": X[:6]}, batch_size=4)
        found = trainer.fit(Threefold(), data, resume=str(tmp_path / "a"), epochs=4)
        assert found.epochs == 7  # from the third on, four
        assert trainer.fit(trainer.problem, data, epochs=1).epochs == 8
