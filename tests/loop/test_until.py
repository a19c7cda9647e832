"""Phases that end by themselves: `Phase(until=...)`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from tests.helpers.bitwise import same
from tests.helpers.problems import Clock, adam, plant_and_policy, tanh_points


class WrittenDown(nn.Module):
    """A dev loss that is written down beforehand, by epoch."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__()
        self.p, self.losses = nn.Parameter(torch.ones(1)), losses

    def forward(self, batch: Any) -> Tensor:
        return self.p.square().sum() * 0 + (self.losses[int(batch["epoch"])] if batch["name"] == "dev" else 1.0)


def ended_by(losses: list[float], *phases: weft.Phase, **options: Any) -> weft.FitResult:
    problem = WrittenDown([*losses, *[losses[-1]] * 50])
    trainer = weft.Trainer(phases=list(phases), progress=False, **options)
    return trainer.fit(problem, weft.Data({"x": torch.zeros(2, 1)}, dev={"x": torch.zeros(2, 1)}))


@pytest.mark.parametrize(
    ("losses", "until", "epochs", "reason"),
    [
        ([4.0, 3.0, 2.0, 1.0, 0.5], {"target": 2.0}, 3, "target"),
        ([4.0, 3.0, 2.0, 1.0, 0.5], {"target": 1.99}, 4, "target"),
        ([4.0, 3.0, 2.0], {"target": 0.0}, 9, "epochs"),
        ([math.nan, math.nan, 5.0, 1.0], {"target": 2.0}, 4, "target"),
        # 0.9 of 8 in two validations: 6, then 5.5 is more than 0.9 of 6
        ([10.0, 8.0, 6.0, 5.6, 5.5], {"plateau": 2}, 5, "plateau"),
        ([10.0, 8.0, 6.0, 5.0, 4.0, 3.0, 2.9, 2.8], {"plateau": 2}, 8, "plateau"),
        ([10.0, 9.0, 8.0, 7.0, 6.0], {"plateau": 2, "gain": 0.3}, 3, "plateau"),
        ([10.0, 5.0, 20.0, 20.0], {"plateau": 2}, 4, "plateau"),
        ([-10.0, -10.5, -10.6], {"plateau": 2}, 3, "plateau"),
        ([-10.0, -10.5, -11.6, -11.7, -11.8], {"plateau": 2}, 5, "plateau"),
    ],
)
def test_a_phase_ends_at_its_target_or_on_a_plateau(
    losses: list[float], until: dict[str, Any], epochs: int, reason: str
) -> None:
    result = ended_by(losses, weft.Phase(epochs=9, until=until))
    assert (result.epochs, result.stop_reason) == (epochs, reason)


def test_larger_may_be_better() -> None:
    result = ended_by([1.0, 2.0, 3.0, 4.0], weft.Phase(9, until=weft.Until(target=3.0)), monitor_mode="max")
    assert (result.epochs, result.stop_reason) == (3, "target")


def test_each_phase_counts_by_itself_and_the_next_one_begins() -> None:
    kinds: list[str] = []
    hooks = {"on_epoch_start": lambda trainer: kinds.append(type(trainer.optimizer).__name__)}
    phases = [
        weft.Phase(epochs=20, optimizer=adam, until={"plateau": 1}),
        weft.Phase(epochs=20, optimizer=lambda params: torch.optim.SGD(params, lr=0.1), until={"plateau": 1}),
        weft.Phase(epochs=2, optimizer=adam),
    ]
    result = ended_by([4.0, 2.0, 1.9, 3.0, 1.0, 0.95], *phases, hooks=hooks)
    assert kinds == ["Adam"] * 3 + ["SGD"] * 3 + ["Adam"] * 2
    assert result.stop_reason == "epochs"


def test_a_phase_ends_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("time.perf_counter", clock)

    def pass_time(trainer: Any, metrics: dict[str, float]) -> None:
        clock.now += 10.0

    phases = [weft.Phase(20, until={"time": 35.0}), weft.Phase(20, until={"time": "00:00:01:00"})]
    result = ended_by([1.0], *phases, hooks={"on_epoch_end": pass_time})
    assert (result.epochs, result.stop_reason) == (4 + 6, "time")


def test_wrong_words_and_values_are_named() -> None:
    with pytest.raises(ValueError, match="did you mean 'plateau'"):
        weft.Phase(2, until={"plateu": 3})
    with pytest.raises(ValueError, match="plateau=0"):
        weft.Phase(2, until={"plateau": 0})
    with pytest.raises(TypeError, match="got 3"):
        weft.Phase(2, until=3)
    with pytest.raises(ValueError, match="time=-1"):
        weft.Until(time=-1.0)
    with pytest.raises(ValueError, match="'nowhere' never appears"):
        ended_by([1.0], weft.Phase(3, until={"target": 0.0}), monitor_metric="nowhere")


def in_two_phases(folder: Path, epochs: int | None = None, **options: Any) -> weft.FitResult:
    phases = [
        weft.Phase(epochs=30, optimizer=adam, until={"plateau": 3, "gain": 0.2}),
        weft.Phase(epochs=3, optimizer=lambda params: torch.optim.SGD(params, lr=0.01)),
    ]
    options = {"root_dir": str(folder), "run_name": "run", "checkpoint": True} | options
    trainer = weft.Trainer(phases=phases, progress=False, max_steps=epochs, **options)
    return trainer.fit(plant_and_policy(), weft.Data(tanh_points(), shuffle=False))


def test_a_resumed_phase_ends_where_the_undisturbed_one_does(tmp_path: Path) -> None:
    whole = in_two_phases(tmp_path / "whole")
    ended = whole.epochs - 3
    assert 4 < ended < 30
    in_two_phases(tmp_path / "torn", epochs=ended - 1)
    resumed = in_two_phases(tmp_path / "torn", resume="last")
    assert resumed.epochs == whole.epochs and same(resumed.last_weights, whole.last_weights)
