"""Metrics that are no means are computed from all rows: by functions, and by objects with update, compute and reset."""

from __future__ import annotations

import os
import re
from typing import Any

import numpy as np
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


@pytest.mark.parametrize("options", [{"accumulate": 2}, {"optimizer": torch.optim.LBFGS}])
def test_every_way_of_training_sees_each_row_once(options: dict[str, Any]) -> None:
    count = {"count": weft.whole(lambda y: float(len(y)))}
    trainer = weft.Trainer(epochs=3, progress=False, metrics=count, **options)
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


@pytest.mark.parametrize("given", [lambda u, y: u.nothing(), weft.whole(lambda u, y: u.nothing())])
def test_what_a_metric_raises_says_in_which_metric(given: Any) -> None:
    with pytest.raises(AttributeError, match="nothing") as caught:
        weft.Trainer(epochs=1, progress=False, metrics={"odd": given}).fit(straight_line(), rows_of())
    assert re.search(r"raised in metric 'odd', which reads u \(\d+, 1\), y \(\d+, 1\)", "".join(caught.value.__notes__))


def test_a_metric_that_computes_with_numpy_is_told_of_whole() -> None:
    def middle(u: Any, y: Any) -> float:
        return float(np.median(u.numpy() - y.numpy()))

    with pytest.raises(RuntimeError, match="requires grad") as caught:
        weft.Trainer(epochs=1, progress=False, metrics={"m": middle}).fit(straight_line(), rows_of())
    assert any("metrics={'m': weft.whole(fn)} gives it all rows" in note for note in caught.value.__notes__)
    assert weft.Trainer(epochs=1, progress=False, metrics={"m": weft.whole(middle)}).fit(straight_line(), rows_of())


class OfParts(nn.Module):
    """What it computes of each part, and a loss of both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(1, 1)

    def forward(self, batch: Any) -> dict[str, Tensor]:
        u, v = (self.layer(batch[part]["x"]) for part in "ab")
        return {"loss": u.square().mean() + v.abs().mean(), "u": u, "v": v, "y": batch["b"]["y"], "both": u + v.mean()}


def split_of(a: int = 9, b: int = 4) -> dict[str, weft.DictDataset]:
    return {"a": weft.DictDataset({"x": rows_of(a, 1)["x"]}), "b": weft.DictDataset(rows_of(b, 2))}


OF_PARTS: dict[str, Any] = {
    "largest_u": weft.whole(lambda u: u.max()),
    "rmse": weft.whole(lambda v, y: (v - y).square().mean().sqrt()),
    "rows": weft.whole(lambda u: len(u)),
    "rows_of_b": weft.whole(lambda v: len(v)),
    "of_the_batch": weft.whole(lambda b: b["y"].max()),
    "r2": (torchmetrics.R2Score(), ["v", "y"]),
    "largest": (Largest(), ["v", "y"]),
}


@pytest.mark.parametrize(
    ("batch_size", "devices"),
    [(2, 1), ({"a": 4, "b": 3}, 1), ({"a": 2, "b": 4}, 1), ({"a": 9, "b": 1}, 1), (2, 2)],
)
def test_metrics_of_all_rows_of_a_part_see_each_of_its_rows_once(batch_size: Any, devices: int) -> None:
    more = {"devices": 2, "strategy": "ddp_fork", "accelerator": "cpu", "timeout": 60} if devices == 2 else {}
    problem, data = OfParts(), split_of(9, 5)
    still = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.0), "epochs": 1, "progress": False}
    history = weft.Trainer(metrics=OF_PARTS, **still, **more).fit(problem, weft.Data(data, data, batch_size=batch_size))
    dev = {name.removeprefix("dev_"): v[0] for name, v in history.history.items() if name.startswith("dev_")}
    x, (y,) = {p: data[p].datadict["x"] for p in "ab"}, [data["b"].datadict["y"]]
    with torch.no_grad():
        u, v = problem.layer(x["a"]), problem.layer(x["b"])
    assert dev["rows"] == 9
    assert dev["rows_of_b"] == 5
    assert dev["largest_u"] == pytest.approx(float(u.max()), rel=1e-5)
    assert dev["rmse"] == pytest.approx(float((v - y).square().mean().sqrt()), rel=1e-5)
    assert dev["of_the_batch"] == pytest.approx(float(y.max()))
    assert dev["r2"] == pytest.approx(r2_score(y, v), rel=1e-4)
    assert dev["largest_error"] == pytest.approx(float((v - y).abs().max()), rel=1e-5)


def test_a_metric_that_reads_rows_of_several_parts_is_refused_with_the_parts() -> None:
    metrics = {"n": weft.whole(lambda u, v: 1.0)}
    trainer = weft.Trainer(epochs=1, progress=False, metrics=metrics)
    with pytest.raises(ValueError, match="'dev_n' reads rows of several parts, a and b, .* a metric of its own"):
        trainer.fit(OfParts(), weft.Data(split_of(), split_of(), batch_size=2))
    weft.Trainer(epochs=1, progress=False, metrics=metrics).fit(OfParts(), weft.Data(split_of(), split_of()))
