"""Names and options: whatever is given has its effect, or something is said."""

from __future__ import annotations

import math
from collections import UserDict, UserList
from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from weft.records.report import read_run

X = torch.linspace(0, 1, 16)[:, None]


class Fit(torch.nn.Module):
    """Returns what `also` names besides its loss."""

    def __init__(self, *also: str, value: float = 0.5) -> None:
        super().__init__()
        self.net, self.also, self.value = torch.nn.Linear(1, 1), also, value

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        loss = self.net(batch["x"]).square().mean()
        split = batch["name"]
        return {f"{split}_loss": loss, **{f"{split}_{name}": torch.tensor(self.value) for name in self.also}}


def trained(problem: Any = None, data: Any = None, **options: Any) -> weft.FitResult:
    return weft.Trainer(**{"epochs": 2, "progress": False} | options).fit(problem or Fit(), data or {"x": X})


NAMES = ["one_step", "step", "a_step_of_two", "loss_step", "seconds", "lr", "time step, with a comma"]


@pytest.mark.parametrize("log_every", [None, 1])
def test_metrics_of_any_name_are_read_back(log_every: int | None, tmp_path: Path) -> None:
    options = {"root_dir": str(tmp_path), "run_name": "a", "log_every": log_every, "checkpoint": True}
    problem = Fit(*NAMES)
    result = trained(problem, weft.Data({"x": X}, {"x": X}, batch_size=4), **options)
    assert {f"train_{name}" for name in NAMES} < set(result.history)
    assert weft.load_result(tmp_path / "a").history == result.history
    record = read_run(tmp_path / "a")
    assert set(record.metrics) == set(result.history)
    assert set(record.step_curves) == ({"train_loss_step"} if log_every else set())
    again = weft.Trainer(epochs=3, progress=False, **options | {"resume": "auto"}).fit(
        Fit(*NAMES), weft.Data({"x": X}, {"x": X}, batch_size=4)
    )
    assert weft.load_result(tmp_path / "a").history == again.history


def at(event: str, name: str) -> dict[str, Any]:
    return {event: lambda trainer, *_: trainer.log(name, 42.0)}


@pytest.mark.parametrize("event", ["on_epoch_start", "on_step_end", "on_epoch_end"])
@pytest.mark.parametrize("name", ["epoch", "step", "time", "train_loss", "dev_loss", "train_term", "dev_term"])
def test_logging_under_a_taken_name_is_refused(name: str, event: str) -> None:
    with pytest.raises(ValueError, match=rf"log: '{name}' is"):
        trained(Fit("term"), weft.Data({"x": X}, {"x": X}, batch_size=8), hooks=[at(event, name)])


def test_logging_what_a_validation_step_returns_is_refused() -> None:
    def step(trainer: Any, batch: Any) -> Any:
        trainer.log("dev_loss", 1.0)
        return trainer.problem(batch)

    with pytest.raises(ValueError, match="log: 'dev_loss' is taken"):
        trained(data=weft.Data({"x": X}, {"x": X}), validation_step=step)


def test_a_name_of_ones_own_is_logged_anywhere() -> None:
    result = trained(hooks=[at("on_step_end", "mine"), at("on_epoch_end", "late"), at("on_epoch_start", "early")])
    assert result.history["mine"] == result.history["late"] == result.history["early"] == [42.0, 42.0]


IDLE: dict[str, dict[str, Any]] = {
    "min_epochs": {"min_epochs": 1},
    "warmup": {"warmup": 1},
    "min_delta": {"min_delta": 0.1},
    "clip_algorithm": {"clip_algorithm": "value"},
    "validate_every": {"validate_every": 2},
    "run_name": {"run_name": "a"},
    "log_every": {"log_every": 5},
    "timeout": {"timeout": 5.0},
    "num_workers": {"data": weft.Data({"x": X}, num_workers=2)},
    "dev_metric": {"dev_metric": "dev_mine"},
    "strict_data": {"strict_data": True, "data": [{"x": X}]},
}


@pytest.mark.parametrize("option", IDLE)
def test_an_option_without_effect_says_so(option: str) -> None:
    with pytest.warns(UserWarning, match=rf"No effect in this fit: {option} \(.*\)\.$") as caught:
        trained(**IDLE[option])
    assert len(caught) == 1


def test_several_options_without_effect_are_named_in_one_line() -> None:
    with pytest.warns(UserWarning, match=r"min_epochs \(.*; timeout \(") as caught:
        trained(min_epochs=1, timeout=5.0)
    assert len(caught) == 1


def test_options_with_effect_say_nothing(tmp_path: Path) -> None:
    data = weft.Data({"x": X}, {"x": X})
    trained(
        data=data, min_epochs=1, warmup=1, min_delta=0.1, patience=3, clip=1.0, clip_algorithm="value", validate_every=2
    )
    trained(root_dir=str(tmp_path), run_name="a", log_every=1)
    weft.Trainer(min_epochs=1, progress=False, phases=[weft.Phase(epochs=1, patience=1)]).fit(Fit(), {"x": X})


@pytest.mark.parametrize(
    "name", ["epochs", "clip", "precision", "scheduler", "optimizer", "seed", "loggers", "metrics"]
)
def test_setting_an_option_on_a_trainer_raises_and_says_how(name: str) -> None:
    trainer = weft.Trainer()
    more = r"fit\(\.\.\., epochs=50\)" if name == "epochs" else ""
    with pytest.raises(
        AttributeError, match=rf"trainer.{name} = 50 would have no effect.*{more}.*new Trainer\({name}="
    ):
        setattr(trainer, name, 50)


def test_everything_else_may_be_set_on_a_trainer() -> None:
    trainer = weft.LitTrainer(save_weights=False)
    trainer.hooks, trainer.phases, trainer.mine, trainer.shuffle = [], [], 1, False
    trainer.training_step = lambda batch: trainer.problem(batch)

    class Own(weft.Trainer):
        seed = 3

    Own().seed = 4


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("trainig_step", "training_step"),
        ("validaton_step", "validation_step"),
        ("configure_optimizer", "configure_optimizers"),
        ("trainingStep", "training_step"),
        ("updtae", "update"),
        ("predict_setp", "predict_step"),
        ("on_epoch_ned", "on_epoch_end"),
    ],
)
def test_a_misspelt_override_raises_as_a_misspelt_hook_does(wrong: str, right: str) -> None:
    with pytest.raises(TypeError, match=f"Mine has '{wrong}', which training never calls; did you mean '{right}'"):
        type("Mine", (weft.Trainer,), {wrong: lambda self, batch: None})()


@pytest.mark.parametrize(
    "name",
    [
        "train_step",
        "updates",
        "update_weights",
        "training_steps",
        "training_step_of_a_gan",
        "test_steps",
        "helper",
        "fitted",
        "restart",
        "step_training",
        "plot_step",
        "on_plot",
        "evaluate",
        "make_optimizers",
        "configure",
        "log_all",
        "_trainig_step",
        "validate_all",
    ],
)
def test_helpers_of_a_subclass_are_no_misspelt_overrides(name: str) -> None:
    type("Mine", (weft.Trainer,), {name: lambda self, batch: None})()


def test_a_helper_beside_the_override_that_it_is_named_after_is_none() -> None:
    own = {"configure_optimizers": lambda self: None, "configure_optimizer": lambda self, name: None}
    type("Mine", (weft.Trainer,), own)()


@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
def test_a_monitored_metric_that_is_never_finite_is_told(value: float) -> None:
    with pytest.warns(UserWarning, match=r"dev_odd, which is monitored, was not finite in any of 2 epochs"):
        result = trained(Fit("odd", value=value), weft.Data({"x": X}, {"x": X}), monitor_metric="dev_odd")
    assert result.best_epoch is None


def test_containers_of_other_libraries_are_lists_and_dicts() -> None:
    """As OmegaConf's are: a Sequence and a Mapping that are no list and no dict."""
    trainer = weft.Trainer(devices=UserList([0]), limit_batches=UserDict(train=2), checkpoint=UserDict(keep=3))
    assert trainer.config.devices == [0] and type(trainer.config.devices) is list
    assert trainer.config.limit("train") == 2 and trainer.config.checkpointing.keep == 3  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="devices"):
        weft.Trainer(devices=UserList([0.5]))
