"""What Fabric is asked for is checked before anything starts, and errors say what this machine has."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from lightning.fabric.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn

import weft
from weft.config import TrainerConfig
from weft.devices.fabric import fabric_for_calls, make_fabric, start_method

NO_GPU = not torch.cuda.is_available()


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {f"{batch['name']}_loss": self.layer(batch["x"]).square().mean()}


def start_line(**options: Any) -> weft.Run:
    return weft.Trainer(progress=False, **options).start(Line(), {"x": [[1.0], [2.0]]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accelerator": "quantum"}, "invalid accelerator name.*quantum"),
        ({"strategy": "ddq", "accelerator": "cpu"}, "invalid strategy name.*ddq"),
        ({"devices": 0, "accelerator": "cpu"}, "devices=0"),
        ({"devices": -1, "accelerator": "cpu"}, "int > 0"),
        (
            {"strategy": FSDPStrategy(cpu_offload=True), "accelerator": "cpu", "devices": 2},
            "cpu_offload cannot be used here",
        ),
        (
            {"strategy": DDPStrategy(gradient_as_bucket_view=True), "accelerator": "cpu"},
            "gradient_as_bucket_view.*no effect",
        ),
        pytest.param(
            {"accelerator": "gpu"}, "No supported gpu backend", marks=pytest.mark.skipif(not NO_GPU, reason="a GPU")
        ),
        pytest.param(
            {"accelerator": "cuda", "devices": 2}, "not available", marks=pytest.mark.skipif(not NO_GPU, reason="a GPU")
        ),
    ],
)
def test_what_cannot_be_had_is_an_error_that_says_what_this_machine_has(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"(?s){message}.*This machine has .*CPU cores"):
        start_line(**options)


def test_a_strategy_that_would_be_something_else_here_is_refused() -> None:
    with pytest.raises(ValueError, match="is not supported; use 'ddp'"):
        start_line(strategy="dp", accelerator="cpu", devices=2, timeout=1)


def test_a_strategy_object_serves_one_fit_after_the_other() -> None:
    trainer = weft.Trainer(progress=False, strategy=SingleDeviceStrategy(device="cpu"), accelerator="cpu")
    for _ in range(2):
        assert isinstance(trainer.start(Line(), {"x": [[1.0], [2.0]]}).fabric.strategy, SingleDeviceStrategy)


@pytest.mark.parametrize("devices", [1, "1", [0]])
@pytest.mark.skipif(not NO_GPU, reason="names one CPU")
def test_one_device_may_be_named_in_every_way_that_fabric_knows(devices: Any) -> None:
    if devices == [0]:
        with pytest.raises(TypeError, match="This machine has"):
            start_line(devices=devices, accelerator="cpu")
    else:
        assert start_line(devices=devices, accelerator="cpu").fabric.world_size == 1


def test_strategies_and_accelerators_may_be_objects() -> None:
    assert isinstance(start_line(strategy=SingleDeviceStrategy(device="cpu")).fabric.strategy, SingleDeviceStrategy)


@pytest.mark.parametrize(
    ("strategy", "method"),
    [
        ("ddp", None),
        ("ddp_find_unused_parameters_true", None),
        ("ddp_spawn", "spawn"),
        ("ddp_fork", "fork"),
        ("ddp_notebook", "fork"),
    ],
)
def test_names_of_strategies_are_those_of_fabric(strategy: str, method: str | None) -> None:
    fabric = make_fabric(TrainerConfig(strategy=strategy, devices=2, accelerator="cpu", timeout=7.0))
    assert isinstance(fabric.strategy, DDPStrategy) and start_method(fabric) == method and fabric.world_size == 2
    assert (
        fabric.strategy._timeout is not None and fabric.strategy._timeout.total_seconds() == 300
    )  # until all are there


def test_several_devices_in_a_notebook_are_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    several = TrainerConfig(devices=2, accelerator="cpu", strategy="ddp_notebook")
    assert fabric_for_calls(several, None, None) is not None
    assert fabric_for_calls(TrainerConfig(devices=1, accelerator="cpu"), None, None) is None
