"""`renew` for schedulers that are objects, and for a LightningModule: as if it had been so from the beginning."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

import weft
from tests.helpers.lightning_tools import LineModule, line, loaders

X = torch.linspace(0, 1, 16)[:, None]


class Straight(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(1, 1)

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {f"{batch['name']}_loss": (self.net(batch["x"]) - 3 * batch["x"]).square().mean()}


def objects(problem: Any, lr: float, make: Any) -> dict[str, Any]:
    optimizer = torch.optim.SGD(problem.parameters(), lr=lr, momentum=0.9)
    return {"optimizer": optimizer, "scheduler": make(optimizer)}


def fit_objects(root: Path, epochs: int, lr: float, make: Any, renew: Any = ()) -> list[float]:
    """The rates by epoch."""
    rates: list[float] = []
    hooks = {"on_epoch_start": lambda trainer: rates.append(trainer.optimizer.param_groups[0]["lr"])}
    problem = Straight()
    trainer = weft.Trainer(
        epochs=epochs,
        progress=False,
        checkpoint=True,
        root_dir=str(root),
        run_name="a",
        hooks=hooks,
        **objects(problem, lr, make),
    )
    resume = "auto" if (root / "a").is_dir() else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(problem, {"x": X}, resume=resume, renew=renew if resume else ())
    return rates


SCHEDULES: dict[str, Any] = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "steps": lambda o: lr_scheduler.StepLR(o, 3, 0.1),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda e: 0.9**e),
    "warmup": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=6),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=9),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, step_size_up=3),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.9),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_scheduler_that_is_an_object_is_renewed(name: str, tmp_path: Path) -> None:
    expected = fit_objects(tmp_path / "whole", 8, 0.01, SCHEDULES[name])
    fit_objects(tmp_path / "cut", 4, 0.01, lambda o: lr_scheduler.ExponentialLR(o, 0.5))
    assert fit_objects(tmp_path / "cut", 8, 0.01, SCHEDULES[name], renew="scheduler") == pytest.approx(expected[4:])


@pytest.mark.parametrize("name", ["cosine", "steps", "warmup"])
def test_both_are_renewed_with_another_rate(name: str, tmp_path: Path) -> None:
    expected = fit_objects(tmp_path / "whole", 8, 0.05, SCHEDULES[name])
    fit_objects(tmp_path / "cut", 4, 0.01, lambda o: lr_scheduler.ExponentialLR(o, 0.5))
    renew = ("optimizer", "scheduler")
    assert fit_objects(tmp_path / "cut", 8, 0.05, SCHEDULES[name], renew=renew) == pytest.approx(expected[4:])


# ---- a LightningModule


class ScheduledLine(LineModule):
    """A module whose rate and schedule are given from outside."""

    lr, make, interval = 0.1, SCHEDULES["steps"], "epoch"

    def on_train_epoch_start(self) -> None:
        RATES.append(self.optimizers().param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=type(self).lr)
        scheduler = {"scheduler": type(self).make(optimizer), "interval": self.interval, "monitor": "val_loss"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


RATES: list[float] = []


def fit_scheduled_line(
    root: Path, epochs: int, lr: float, make: Any, renew: Any = (), interval: str = "epoch"
) -> list[float]:
    RATES.clear()
    kind = type("Kind", (ScheduledLine,), {"lr": lr, "make": staticmethod(make), "interval": interval})
    module = kind()
    module.load_state_dict(line().state_dict())
    trainer = weft.Trainer(
        epochs=epochs, progress=False, checkpoint=True, root_dir=str(root), run_name="a", accelerator="cpu"
    )
    resume = "auto" if (root / "a").is_dir() else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, resume=resume, renew=renew if resume else (), **loaders())
    return list(RATES)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("name", "interval"),
    [("cosine", "epoch"), ("steps", "epoch"), ("plateau", "epoch"), ("cosine", "step"), ("warmup", "step")],
)
def test_a_lightning_modules_scheduler_and_optimizer_are_renewed(name: str, interval: str, tmp_path: Path) -> None:
    expected = fit_scheduled_line(tmp_path / "whole", 6, 0.05, SCHEDULES[name], interval=interval)
    fit_scheduled_line(tmp_path / "cut", 3, 0.05, lambda o: lr_scheduler.ExponentialLR(o, 0.5), interval=interval)
    renew = ("optimizer", "scheduler")
    rates = fit_scheduled_line(tmp_path / "cut", 6, 0.05, SCHEDULES[name], renew=renew, interval=interval)
    assert rates == pytest.approx(expected[3:], rel=1e-6)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_lightning_modules_optimizer_alone_is_renewed_and_its_scheduler_goes_on(tmp_path: Path) -> None:
    expected = fit_scheduled_line(tmp_path / "whole", 6, 0.05, SCHEDULES["steps"])
    fit_scheduled_line(tmp_path / "cut", 4, 0.01, SCHEDULES["steps"])
    assert fit_scheduled_line(tmp_path / "cut", 6, 0.05, SCHEDULES["steps"], renew="optimizer") == pytest.approx(
        expected[4:]
    )
    fit_scheduled_line(tmp_path / "old", 4, 0.01, SCHEDULES["steps"])
    assert fit_scheduled_line(tmp_path / "old", 6, 0.05, SCHEDULES["steps"]) != pytest.approx(
        expected[4:]
    )  # without renew
