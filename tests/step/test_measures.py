"""Metrics that are no means are computed from all rows: by functions, and by objects with update, compute and reset."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from sklearn.metrics import r2_score
from torch import Tensor, nn

import weft

torchmetrics = pytest.importorskip("torchmetrics")


def rows_of(rows: int = 33, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, 1, generator=generator)
    return {"x": x, "y": 3 * x + 0.1 * torch.randn(rows, 1, generator=generator)}


def straight_line() -> weft.Problem:
    torch.manual_seed(0)
    return weft.Problem(
        [weft.Node(nn.Linear(1, 1), ["x"], ["u"])], [weft.objective(lambda u, y: (u - y) ** 2, name="mse")]
    )


def r2(u: Tensor, y: Tensor) -> float:
    return r2_score(y, u)


class Largest:
    """The largest error, as a plain object."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.value = 0.0

    def update(self, u: Tensor, y: Tensor) -> None:
        self.value = max(self.value, (u - y).abs().max().item())

    def compute(self) -> dict[str, float]:
        return {"error": self.value}


def metrics() -> dict[str, Any]:
    return {
        "r2": weft.whole(r2),
        "rmse": weft.whole(lambda u, y: (u - y).square().mean().sqrt()),
        "median": weft.whole(lambda u, y: {"u": u.median(), "y": y.median()}),
        "torch_r2": (torchmetrics.R2Score(), ["u", "y"]),
        "pearson": (torchmetrics.PearsonCorrCoef(), ["u_flat", "y_flat"]),
        "largest": Largest(),
        "mae": lambda u, y: (u - y).abs().mean(),
    }


def step(trainer: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    out = trainer.problem(batch)
    return {**out, "u_flat": out["u"][:, 0], "y_flat": batch["y"][:, 0]}


STEPS = {"training_step": step, "validation_step": step, "test_step": step}


def expected(made: nn.Module, rows: dict[str, Tensor]) -> dict[str, float]:
    with torch.no_grad():
        u, y = made.nodes[0].fn(rows["x"]), rows["y"]  # type: ignore[index]
    error = u - y
    return {
        "r2": r2_score(y, u),
        "torch_r2": r2_score(y, u),
        "rmse": error.square().mean().sqrt().item(),
        "median_u": u.median().item(),
        "median_y": y.median().item(),
        "pearson": torch.corrcoef(torch.stack([u[:, 0], y[:, 0]]))[0, 1].item(),
        "largest_error": error.abs().max().item(),
        "mae": error.abs().mean().item(),
    }


@pytest.mark.parametrize("batch_size", [None, 2, 10])
def test_metrics_of_all_rows_do_not_depend_on_the_batch_size(batch_size: int | None) -> None:
    made = straight_line()
    trainer = weft.Trainer(epochs=2, progress=False, metrics=metrics(), **STEPS)
    result = trainer.fit(made, weft.Data(rows_of(34), rows_of(20, 1), batch_size=batch_size))
    last = {name: values[-1] for name, values in result.history.items()}
    found = trainer.validate()
    for name, value in expected(made, rows_of(20, 1)).items():
        assert found[f"dev_{name}"] == pytest.approx(value, rel=1e-3, abs=1e-5), name
        assert last[f"dev_{name}"] == pytest.approx(value, rel=1e-3, abs=1e-5), name
        assert f"train_{name}" in last
    again = trainer.validate()
    assert again == found  # each evaluation starts anew


def test_a_training_metric_of_all_rows_is_that_of_the_epoch_alone() -> None:
    seen: list[Tensor] = []
    count = weft.whole(lambda y: float(len(y)))
    watch = {"on_step_start": lambda trainer, batch: seen.append(batch["y"])}
    given = {"count": count, "top": weft.whole(lambda y: y.max())}
    trainer = weft.Trainer(epochs=3, progress=False, metrics=given, hooks=watch)
    result = trainer.fit(straight_line(), weft.Data(rows_of(), batch_size=10))
    assert sum(map(len, seen)) == 99
    assert result.history["train_count"] == [33.0] * 3
    assert result.history["train_top"] == [rows_of()["y"].max().item()] * 3


def test_the_users_own_object_is_not_changed_and_each_split_has_a_copy() -> None:
    mine = Largest()
    weft.Trainer(epochs=1, progress=False, metrics={"largest": mine}).fit(
        straight_line(), weft.Data(rows_of(), rows_of())
    )
    assert mine.value == 0.0


@pytest.mark.parametrize("rows", [20, 21])
def test_metrics_of_all_rows_are_gathered_over_two_processes(rows: int) -> None:
    made = straight_line()
    trainer = weft.Trainer(
        epochs=1,
        progress=False,
        metrics=metrics() | {"first": weft.whole(lambda x: float(x[1, 0]))},
        devices=2,
        strategy="ddp_fork",
        accelerator="cpu",
        timeout=60,
        **STEPS,
    )
    result = trainer.fit(made, weft.Data(rows_of(), rows_of(rows, 1), batch_size=4))
    for name, value in expected(made, rows_of(rows, 1)).items():
        assert result.history[f"dev_{name}"][-1] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    assert result.history["dev_first"] == [
        pytest.approx(rows_of(rows, 1)["x"][1, 0].item())
    ]  # in the order of the data


@pytest.mark.parametrize("options", [{"accumulate": 2}, {"optimizer": torch.optim.LBFGS}, {"compile": True}])
def test_every_way_of_training_sees_each_row_once(options: dict[str, Any]) -> None:
    count = {"count": weft.whole(lambda y: float(len(y)))}
    trainer = weft.Trainer(epochs=3, progress=False, metrics=count, **options)
    if "compile" in options:
        with pytest.warns(UserWarning, match="stays eager: metrics of all rows"):
            result = trainer.fit(straight_line(), weft.Data(rows_of(), rows_of(), batch_size=5))
    else:
        result = trainer.fit(straight_line(), weft.Data(rows_of(), rows_of(), batch_size=5))
    assert result.history["train_count"] == result.history["dev_count"] == [33.0] * 3


class Killed(Exception):
    pass


def test_a_run_that_resumes_in_the_middle_of_an_epoch_has_the_rows_of_before() -> None:
    def fit(name: str, stop: bool = False, **options: Any) -> dict[str, list[float]]:
        def on_step_end(trainer: Any, batch: Any, loss: Any) -> None:
            if stop and trainer.global_step == 6:  # in epoch 1, after two of its four batches
                raise Killed

        trainer = weft.Trainer(
            epochs=3,
            seed=3,
            progress=False,
            metrics=metrics(),
            root_dir=os.getcwd(),
            run_name=name,
            checkpoint={"every_n_steps": 1},
            hooks={"on_step_end": on_step_end},
            **STEPS,
            **options,
        )
        try:
            return trainer.fit(straight_line(), weft.Data(rows_of(), rows_of(20, 1), batch_size=9)).history
        except Killed:
            return {}

    whole, _ = fit("whole"), fit("cut", stop=True)
    resumed = fit("cut", resume="auto")
    assert resumed == whole


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"r2": torchmetrics.R2Score()}, r"Metric 'r2' reads 'preds'.*metrics=\{'r2': \(metric, \[keys\]\)\}"),
        ({"r2": torchmetrics.R2Score}, r"is the class R2Score; give an instance"),
        ({"r2": (torchmetrics.R2Score(), "uy")}, r"the keys are 'uy'; expected a list of names"),
        ({"r2": 3}, r"is 3; expected a function of keys, weft.whole\(function\)"),
        ({"r2": weft.whole(lambda u: u)}, r"'train_r2' is of shape \(33, 1\); expected a number"),
        ({"r2": lambda u, flat: u - flat}, r"Metric 'r2' has shape \(33, 33\), every row with every other"),
    ],
)
def test_a_metric_that_cannot_be_is_named(given: dict[str, Any], says: str) -> None:
    rows = {**rows_of(), "flat": rows_of()["y"][:, 0]}
    with pytest.raises((TypeError, KeyError, ValueError), match=says):
        weft.Trainer(epochs=1, progress=False, metrics=given).fit(straight_line(), rows)


def test_a_metric_of_all_rows_is_refused_where_rows_of_parts_come_again() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, batch: Any) -> Tensor:
            return self.layer(batch["a"]["x"]).mean() + self.layer(batch["b"]["x"]).mean()

    split = {"a": weft.DictDataset({"x": torch.rand(9, 1)}), "b": weft.DictDataset({"x": torch.rand(4, 1)})}
    trainer = weft.Trainer(epochs=1, progress=False, metrics={"n": weft.whole(lambda b: 1.0)})
    with pytest.raises(ValueError, match="'dev_n' needs each row of the dev data once"):
        trainer.fit(Parts(), weft.Data(split, split, batch_size=2))
