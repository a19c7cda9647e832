"""Ordinary supervised learning: (X, y) in, what a loop over torch by hand gives out."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torchmetrics
from sklearn.metrics import accuracy_score, r2_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import weft

X = torch.rand(40, 3, generator=torch.Generator().manual_seed(0))
TARGET = (X @ torch.tensor([1.0, -2.0, 0.5])).sin()[:, None]
LABELS = X.argmax(1)
X_DEV, TARGET_DEV, LABELS_DEV = X[:13] ** 2, TARGET[:13] ** 2, (X[:13] ** 2).argmax(1)


def regressor() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 3)


def regression(metrics: Any = None, net: nn.Module | None = None) -> weft.Supervised:
    return weft.Supervised(net or regressor(), nn.MSELoss(), metrics)


def flat(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in weights.values()])


def plain_sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def quiet_trainer(**options: Any) -> weft.Trainer:
    return weft.Trainer(**{"epochs": 4, "progress": False, "optimizer": plain_sgd, "monitor_metric": None} | options)


def loop_by_hand(net: nn.Module, y: Tensor, size: int, loss_fn: Any, epochs: int = 4) -> list[float]:
    """Losses of the same training by hand, in the order of the rows."""
    optimizer, losses = plain_sgd(net.parameters()), []
    for _ in range(epochs):
        total = 0.0
        for lo in range(0, len(X), size):
            loss = loss_fn(net(X[lo : lo + size]), y[lo : lo + size])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(X[lo : lo + size])
        losses.append(total / len(X))
    return losses


# ---- the same training


@pytest.mark.parametrize("size", [7, 40])
def test_a_fit_of_x_and_y_is_the_loop_loop_by_hand(size: int) -> None:
    problem = regression()
    result = quiet_trainer().fit(problem, weft.Data((X, TARGET), batch_size=size, shuffle=False))
    hand = regressor()
    losses = loop_by_hand(hand, TARGET, size, nn.MSELoss())
    assert torch.equal(torch.cat([p.flatten() for p in hand.parameters()]), flat(result.last_weights))
    assert result.history["train_loss"] == pytest.approx(losses, rel=1e-12)
    other = regressor()
    loop_by_hand(other, TARGET, 20, nn.MSELoss())
    assert not torch.equal(torch.cat([p.flatten() for p in other.parameters()]), flat(result.last_weights))


ARRAYS: dict[str, tuple[Any, Any]] = {
    "tensors": (X, TARGET),
    "float64 tensors": (X.double(), TARGET.double()),
    "arrays": (X.numpy(), TARGET.numpy()),
    "tables": (pd.DataFrame(X.numpy(), columns=list("abc")), pd.DataFrame({"t": TARGET.numpy()[:, 0]})),
    "lists in arrays": (np.array(X.tolist()), np.array(TARGET.tolist())),
    "lists": (X.double().tolist(), TARGET.double()[:, 0].tolist()),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_whatever_x_and_y_come_in_the_training_is_the_same(kind: str) -> None:
    ends = [quiet_trainer().fit(regression(), given).last_weights for given in (ARRAYS[kind], (X, TARGET))]
    assert torch.equal(*map(flat, ends))


LOADED: dict[str, Any] = {
    "pair": lambda: weft.Data((X, TARGET), batch_size=7, shuffle=False),
    "TensorDataset": lambda: weft.Data(TensorDataset(X, TARGET), batch_size=7, shuffle=False),
    "DataLoader of tuples": lambda: DataLoader(TensorDataset(X, TARGET), batch_size=7),
    "list of tuples": lambda: list(zip(X.split(7), TARGET.split(7), strict=True)),
    "lists of numbers": lambda: weft.Data((X.tolist(), TARGET.tolist()), batch_size=7, shuffle=False),
    "keys": lambda: weft.Data({"x": X, "y": TARGET}, batch_size=7, shuffle=False),
    "setup": lambda: lambda: (TensorDataset(X, TARGET), None, None, 7),
}


@pytest.mark.parametrize("kind", LOADED)
def test_loaders_datasets_and_pairs_train_alike(kind: str) -> None:
    result = quiet_trainer().fit(regression(), LOADED[kind]())
    losses = loop_by_hand(regressor(), TARGET, 7, nn.MSELoss())
    close = result.history["train_loss"] == pytest.approx(losses, rel=1e-12)
    assert close != (kind == "setup")  # which is shuffled, as nobody said otherwise: the control
    assert result.steps == 24


def test_a_list_of_two_arrays_is_the_pair_that_it_looks_like() -> None:
    ends = [quiet_trainer().fit(regression(), given).last_weights for given in ([X, TARGET], (X, TARGET))]
    batches = quiet_trainer().fit(regression(), [(X, TARGET), (X, TARGET)])  # two of them, as before: the control
    assert torch.equal(*map(flat, ends)) and batches.steps == 8
    assert not torch.equal(flat(batches.last_weights), flat(ends[0]))


@pytest.mark.parametrize("data", ["keys", "DataLoader of tuples"])
def test_the_loss_has_its_name_in_steps_and_loops_of_ones_own(data: str) -> None:
    def step(trainer: Any, batch: Any) -> Tensor:
        return trainer.problem(batch)[trainer.train_metric]

    losses = quiet_trainer().fit(regression(), LOADED[data]()).history
    assert quiet_trainer(training_step=step).fit(regression(), LOADED[data]()).history == losses
    trainer, dev = quiet_trainer(), (X_DEV, TARGET_DEV)
    with trainer.start(regression(), LOADED[data](), dev if data != "keys" else None) as run:
        for _ in run.epochs():
            for batch in run.batches("train"):
                run.backward(run.problem(batch)[trainer.train_metric])
                run.step()
            run.evaluate("dev")
    assert run.result is not None and run.result.history["train_loss"] == losses["train_loss"]
    assert set(run.result.history) <= {"train_loss", "dev_loss"}  # and under no second name


def test_a_tensor_dataset_is_sliced_and_not_collated() -> None:
    trainer = quiet_trainer(epochs=1)
    trainer.fit(regression(), TensorDataset(X, TARGET))
    assert trainer.run is not None and trainer.run.state.source("train").resident
    trainer.fit(classifier_of_three := TakesThree(), TensorDataset(X, TARGET, TARGET))
    assert not trainer.run.state.source("train").resident and classifier_of_three.kinds == {list}


class TakesThree(nn.Module):
    """A problem that reads batches by position, as its DataLoader yields them."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.kinds = nn.Linear(3, 1), set[type]()

    def forward(self, batch: Any) -> Tensor:
        self.kinds.add(type(batch))
        return (self.net(batch[0]) - batch[1]).square().mean()


def test_dev_and_test_data_may_be_pairs_wherever_data_is_given() -> None:
    net = regressor()
    expected = nn.functional.mse_loss(net(X_DEV), TARGET_DEV).item()
    frozen = quiet_trainer(epochs=1, optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    for given in (
        lambda p: frozen.fit(p, (X, TARGET), dev=(X_DEV, TARGET_DEV)),
        lambda p: frozen.fit(p, ((X, TARGET), (X_DEV, TARGET_DEV), None, 16)),
        lambda p: frozen.fit(p, lambda: ((X, TARGET), (X_DEV, TARGET_DEV), None, 16)),
        lambda p: frozen.fit(p, weft.Data((X, TARGET), (X_DEV, TARGET_DEV), batch_size=5)),
    ):
        result = given(regression(net=copy.deepcopy(net)))
        assert result.history["dev_loss"] == [pytest.approx(expected, rel=1e-6)]
    assert frozen.validate((X_DEV, TARGET_DEV))["dev_loss"] == pytest.approx(expected, rel=1e-6)
    assert frozen.test((X_DEV, TARGET_DEV))["test_loss"] == pytest.approx(expected, rel=1e-6)
    assert frozen.test((X, TARGET))["test_loss"] != pytest.approx(expected, rel=1e-2)


# ---- metrics


def test_metrics_by_name_are_those_of_sklearn_over_all_rows() -> None:
    trainer, problem = quiet_trainer(), regression(["r2", "mae", "rmse"])
    result = trainer.fit(problem, weft.Data((X, TARGET), (X_DEV, TARGET_DEV), batch_size=5))
    found = trainer.predict(X_DEV).numpy()
    measured = trainer.validate()
    assert measured["dev_r2"] == pytest.approx(r2_score(TARGET_DEV.numpy(), found), rel=1e-5)
    assert measured["dev_mae"] == pytest.approx(np.abs(found - TARGET_DEV.numpy()).mean(), rel=1e-5)
    assert measured["dev_rmse"] == pytest.approx(measured["dev_loss"] ** 0.5, rel=1e-5)
    by_batch = [r2_score(TARGET_DEV[lo : lo + 5].numpy(), found[lo : lo + 5]) for lo in (0, 5, 10)]
    assert measured["dev_r2"] != pytest.approx(np.mean(by_batch), rel=0.1)  # what a mean over batches would be
    assert set(result.history) == {f"{s}_{m}" for s in ("train", "dev") for m in ("loss", "r2", "mae", "rmse")}


def test_accuracy_is_the_share_of_right_classes_however_they_are_written() -> None:
    trainer = quiet_trainer(epochs=20)
    result = trainer.fit(
        weft.Supervised(classifier(), nn.CrossEntropyLoss(), "accuracy"),
        weft.Data((X, LABELS), (X_DEV, LABELS_DEV), batch_size=16),
    )
    labels = trainer.predict(X_DEV).argmax(1)
    assert trainer.validate()["dev_accuracy"] == pytest.approx(accuracy_score(LABELS_DEV, labels), rel=1e-6)
    assert result.history["train_accuracy"][-1] > result.history["train_accuracy"][0]
    is_first = (LABELS == 0).float()[:, None]
    for loss_fn, last in ((nn.BCEWithLogitsLoss(), nn.Identity()), (nn.BCELoss(), nn.Sigmoid())):
        half = nn.Linear(3, 1)
        half.weight.data[:], half.bias.data[:] = torch.tensor([4.0, -2.0, -2.0]), 0.3
        trainer = quiet_trainer(epochs=1)
        trainer.fit(weft.Supervised(nn.Sequential(half, last), loss_fn, "accuracy"), (X, is_first), (X, is_first))
        found = trainer.predict(X) > (0.5 if isinstance(last, nn.Sigmoid) else 0.0)
        assert 0 < found.sum() < 40
        assert trainer.validate()["dev_accuracy"] == pytest.approx((found == is_first.bool()).float().mean().item())


def test_functions_whole_metrics_and_torchmetrics_stand_beside_names() -> None:
    metrics = {
        "r2": torchmetrics.R2Score(),
        "r2 too": "r2",
        "worst": weft.whole(lambda prediction, y: (prediction - y).abs().max()),
        "bias": lambda prediction, y: (prediction - y).mean(),
    }
    trainer = quiet_trainer()
    trainer.fit(regression(metrics), weft.Data((X, TARGET), (X_DEV, TARGET_DEV), batch_size=5))
    measured, off = trainer.validate(), trainer.predict(X_DEV) - TARGET_DEV
    assert measured["dev_r2"] == pytest.approx(measured["dev_r2 too"], rel=1e-5)
    assert measured["dev_worst"] == pytest.approx(off.abs().max().item(), rel=1e-6)
    assert measured["dev_bias"] == pytest.approx(off.mean().item(), abs=1e-6)


def test_the_metrics_of_a_trainer_read_prediction_and_y() -> None:
    trainer = quiet_trainer(metrics={"bias": lambda prediction, y: (prediction - y).mean()})
    trainer.fit(regression("mae"), (X, TARGET), (X_DEV, TARGET_DEV))
    off = trainer.predict(X_DEV) - TARGET_DEV
    assert trainer.validate()["dev_bias"] == pytest.approx(off.mean().item(), abs=1e-6)
    assert trainer.validate()["dev_mae"] == pytest.approx(off.abs().mean().item(), abs=1e-6)


# ---- predictions


class SeveralOutputs(nn.Module):
    """Two outputs, in the container that is asked for."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.net, self.kind = nn.Linear(3, 2), kind

    def forward(self, x: Tensor) -> Any:
        out = self.net(x)
        return {"a": out[:, :1], "b": out[:, 1:]} if self.kind is dict else (out[:, :1], out[:, 1:])


@pytest.mark.parametrize(
    "given", [X, X.numpy(), X.tolist(), {"x": X}, (X, TARGET), DataLoader(TensorDataset(X, TARGET), batch_size=7)]
)
def test_predict_returns_what_the_net_returns_one_row_per_row(given: Any) -> None:
    trainer, problem = quiet_trainer(), regression()
    trainer.fit(problem, weft.Data((X, TARGET), batch_size=7))
    found = trainer.predict(given)
    assert found.shape == (40, 1) and not found.requires_grad
    assert torch.allclose(found, problem.net(X).detach(), atol=1e-6)
    assert not torch.allclose(found, TARGET, atol=1e-6)


@pytest.mark.parametrize("kind", [tuple, dict])
def test_a_net_of_several_outputs_predicts_them_as_it_returns_them(kind: type) -> None:
    first = (lambda out: out["a"]) if kind is dict else (lambda out: out[0])
    problem = weft.Supervised(SeveralOutputs(kind), lambda out, y: (first(out) - y).square())
    trainer = quiet_trainer()
    trainer.fit(problem, weft.Data((X, TARGET), batch_size=7))
    found = trainer.predict(X)
    assert isinstance(found, kind) and len(found) == 2 and torch.equal(first(found), first(problem.net(X)).detach())


def test_predicting_before_a_fit_needs_the_problem_alone() -> None:
    problem = regression()
    assert torch.equal(quiet_trainer().predict(X, problem=problem), problem.net(X).detach())


# ---- mistakes


def mistakes() -> dict[str, tuple[Any, type[Exception], str]]:
    flat = TARGET[:, 0]
    return {
        "net forgotten": (
            lambda t: t.fit(X, TARGET),
            TypeError,
            r"problem is Tensor of shape \(40, 3\).*Supervised\(net, l",
        ),
        "net alone": (
            lambda t: t.fit(regressor(), (X, TARGET)),
            TypeError,
            r"not dict.*is a net.*weft.Supervised\(net, loss",
        ),
        "X and y apart": (
            lambda t: t.fit(regression(), X, TARGET),
            TypeError,
            r"Tensor of shape \(40, 3\).*\(X, y\)\)",
        ),
        "net, X and y": (
            lambda t: t.fit(regressor(), X, TARGET),
            TypeError,
            r"fit\(weft.Supervised\(net, loss_fn\), \(X, y\)",
        ),
        "flat y": (
            lambda t: t.fit(weft.Supervised(regressor(), lambda p, y: (p - y).square().mean()), (X, flat)),
            ValueError,
            r"\(40, 1\) and y \(40,\).*y.reshape\(-1, 1\)",
        ),
        "labels of floats": (
            lambda t: t.fit(weft.Supervised(classifier(), nn.CrossEntropyLoss()), (X, LABELS.float())),
            RuntimeError,
            r"CrossEntropyLoss got a prediction of shape \(40, (\d)\) .*y of shape \(40,\) \(float32\).*\(y.long\(\)\)",
        ),
        "labels that are too large": (
            lambda t: t.fit(weft.Supervised(classifier(), nn.CrossEntropyLoss()), (X, LABELS + 5)),
            IndexError,
            r"out of bounds\. CrossEntropyLoss got.*int64, from 5 to \d\).*whole numbers from 0 to",
        ),
        "train_test_split": (
            lambda t: t.fit(regression(), (X, X_DEV, TARGET, TARGET_DEV)),
            TypeError,
            r"tuple of 4 arrays.*weft.Data\(\(X_train, y_train\), dev=\(X_dev, y_dev\)\)",
        ),
        "its list": (
            lambda t: t.fit(regression(), [X, X_DEV]),
            ValueError,
            r"unequal lengths \{'x': 40, 'y': 13\}",
        ),
        "batches of arrays": (
            lambda t: t.fit(regression(), [(X.numpy(), TARGET.numpy())]),
            TypeError,
            r"a pair of arrays, x is ndarray of shape \(40, 3\); expected tensors.*weft.Data\(\(X, y\)",
        ),
        "rows of arrays": (
            lambda t: t.fit(regression(), list(zip(X.numpy(), flat.numpy(), strict=True))),
            TypeError,
            "a batch is one row.*weft.Data",
        ),
        "no return": (
            lambda t: t.fit(weft.Supervised(regressor(), lambda p, y: None), (X, TARGET)),
            TypeError,
            r"returned None \(is a return missing\?\); expected a tensor",
        ),
        "a number": (
            lambda t: t.fit(weft.Supervised(regressor(), lambda p, y: (p - y).square().mean().item()), (X, TARGET)),
            TypeError,
            r"returned float 0\.\d+; expected a tensor",
        ),
        "several losses": (
            lambda t: t.fit(weft.Supervised(regressor(), lambda p, y: {"loss": (p - y).mean()}), (X, TARGET)),
            TypeError,
            r"returned dict .*expected a tensor.*weft.Problem's objectives",
        ),
        "whole numbers": (
            lambda t: t.fit(weft.Supervised(classifier(), nn.CrossEntropyLoss()), ((9 * X).int(), LABELS)),
            TypeError,
            r"The data has \{'x': 'torch.int32'\}.*give \['x'\] as floats",
        ),
        "test of X, y": (lambda t: t.test(X, TARGET), TypeError, r"Give the data once: .*the pair \(X, y\)"),
        "three": (lambda t: t.fit(regression(), (X, TARGET, flat)), TypeError, r'tuple of 3 arrays.*"w": w'),
        "rows": (
            lambda t: t.fit(regression(), list(zip(X, flat, strict=True))),
            TypeError,
            "a batch is one row.*weft.Data",
        ),
        "other keys": (
            lambda t: t.fit(regression(), {"X": X, "y": flat}),
            TypeError,
            r"keys \['X', 'y'\]; expected .x. and",
        ),
        "class of a loss": (
            lambda t: weft.Supervised(regressor(), nn.MSELoss),
            TypeError,
            r"class MSELoss.*MSELoss\(...\)",
        ),
        "class of a net": (lambda t: weft.Supervised(nn.Linear, nn.MSELoss()), TypeError, "net is the class Linear"),
        "metric": (lambda t: regression("acuracy"), ValueError, "no metric 'acuracy'; did you mean 'accuracy'"),
        "metrics": (lambda t: regression([len]), TypeError, "metrics=.*expected names, or a dict"),
        "accuracy of numbers": (
            lambda t: t.fit(weft.Supervised(nn.Linear(3, 2), lambda p, y: p.mean(), "accuracy"), (X, TARGET)),
            ValueError,
            r"accuracy: predictions of shape \(40, 2\)",
        ),
    }


@pytest.mark.parametrize("mistake", mistakes())
def test_a_mistake_of_the_first_minutes_is_told_with_the_line_to_write(mistake: str) -> None:
    call, kind, says = mistakes()[mistake]
    with pytest.raises(kind, match=f"(?s){says}") as caught:
        call(quiet_trainer())
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.functional.l1_loss, nn.HuberLoss()])
def test_torchs_losses_of_numbers_take_a_flat_y_as_the_column_it_is(loss: Any) -> None:
    flat_y = TARGET[:, 0]
    flat_net = lambda: nn.Sequential(regressor(), nn.Flatten(0))
    ends = []
    for net, y in ((regressor(), TARGET), (regressor(), flat_y), (flat_net(), TARGET), (flat_net(), flat_y)):
        trainer = quiet_trainer(seed=1)
        result = trainer.fit(weft.Supervised(net, loss, "r2"), weft.Data((X, y), batch_size=8))
        ends.append((flat(result.last_weights), result.history, trainer.predict(X).shape))
    for weights, history, shape in ends[1:]:
        assert torch.equal(weights, ends[0][0]) and history == ends[0][1] and shape in ((40, 1), (40,))
    assert history["train_r2"] != history["train_loss"] and ends[2][2] == (40,)
    own = weft.Supervised(regressor(), lambda p, y: (p[:, 0] - y).square().mean())  # one's own function gets y as it is
    assert quiet_trainer(seed=1).fit(own, (X, flat_y)).epochs


def test_whole_numbers_and_columns_of_labels_are_taken_as_what_the_loss_compares() -> None:
    zeros_and_ones, net = (X[:, 0] > 0.5).long(), regressor()
    given = weft.Supervised(net, nn.BCEWithLogitsLoss(), "accuracy")({"x": X, "y": zeros_and_ones})
    by_hand = nn.functional.binary_cross_entropy_with_logits(net(X)[:, 0], zeros_and_ones.float())
    torch.testing.assert_close(given["loss"], by_hand)
    net = classifier()
    column = weft.Supervised(net, nn.CrossEntropyLoss())({"x": X, "y": LABELS[:, None]})
    assert torch.equal(column["loss"], nn.functional.cross_entropy(net(X), LABELS))
    assert not torch.equal(column["loss"], nn.functional.cross_entropy(net(X), LABELS.roll(1)))
    for dtype in (torch.int32, torch.int8, torch.uint8):
        narrow = weft.Supervised(net, nn.CrossEntropyLoss())({"x": X, "y": LABELS.to(dtype)})
        assert torch.equal(narrow["loss"], column["loss"])
    two = weft.Supervised(net, nn.functional.cross_entropy)({"x": X, "y": LABELS == 1})
    assert torch.equal(two["loss"], nn.functional.cross_entropy(net(X), (LABELS == 1).long()))


def test_one_batch_of_many_rows_is_told_once_and_not_where_a_size_was_given() -> None:
    x, y = torch.rand(10_001, 3), torch.rand(10_001, 1)
    trainer, problem = quiet_trainer(epochs=1), regression()
    with pytest.warns(
        UserWarning, match=r"training set, 10001 rows, is one batch.*weft.Data\(\(X, y\), batch_size=64\)"
    ):
        trainer.fit(problem, (x, y))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.fit(problem, (x, y))
        for quiet in (weft.Data((x, y), batch_size=10_001), weft.Data((x, y), batch_size=5000), (x[1:], y[1:])):
            quiet_trainer(epochs=1).fit(regression(), quiet)


# ---- wherever it trains


def test_two_processes_end_where_one_does() -> None:
    ends = []
    for number in (1, 2):
        several = {"devices": 2, "strategy": "ddp_fork"} if number == 2 else {}
        trainer = quiet_trainer(epochs=2, seed=1, precision="64-true", accelerator="cpu", **several)
        problem = regression("r2")
        result = trainer.fit(problem, weft.Data((X, TARGET), (X_DEV, TARGET_DEV), batch_size=8 // number))
        ends.append((flat(result.last_weights), result.history, trainer.predict(X)))
    (one, history, predicted), (two, history_of_two, predicted_by_two) = ends
    torch.testing.assert_close(two, one, rtol=0, atol=1e-12)
    torch.testing.assert_close(predicted_by_two, predicted, rtol=0, atol=1e-12)
    assert history_of_two.keys() == history.keys()
    assert all(history_of_two[name] == pytest.approx(values, rel=1e-10) for name, values in history.items())


@pytest.mark.long
def test_a_compiled_fit_is_the_eager_one() -> None:
    ends = []
    for compile in (False, True):
        trainer = quiet_trainer(seed=1, compile=compile, epochs=2)
        data = weft.Data((X, LABELS), (X_DEV, LABELS_DEV), batch_size=20)
        ends.append(trainer.fit(weft.Supervised(classifier(), nn.CrossEntropyLoss(), "accuracy"), data))
        assert trainer.run is not None and (not compile or all(trainer.run.graphs.made.values()))
    for name, values in ends[0].history.items():
        assert ends[1].history[name] == pytest.approx(values, rel=1e-5), name
    torch.testing.assert_close(flat(ends[1].last_weights), flat(ends[0].last_weights), rtol=1e-5, atol=1e-6)


def test_a_resumed_fit_ends_where_the_undisturbed_one_does(tmp_path: Path) -> None:
    def fit(epochs: int, name: str, **more: Any) -> weft.FitResult:
        trainer = quiet_trainer(epochs=epochs, seed=1, checkpoint=True, root_dir=str(tmp_path), run_name=name)
        return trainer.fit(regression("r2"), weft.Data((X, TARGET), (X_DEV, TARGET_DEV), batch_size=7), **more)

    whole = fit(4, "whole")
    fit(2, "parts")
    resumed = fit(4, "parts", resume="auto")
    assert torch.equal(flat(resumed.last_weights), flat(whole.last_weights))
    assert resumed.history == whole.history and len(whole.history["dev_r2"]) == 4
    weights = weft.load_weights(
        regression(net=nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))), whole.run_dir
    )
    assert set(weights.state_dict()) == {"net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"}


CONFIG = """
problem:
  class_path: weft.Supervised
  init_args:
    net: {class_path: torch.nn.Linear, init_args: {in_features: 3, out_features: 3}}
    loss_fn: LOSS
    metrics: [accuracy]
data: DATA
trainer: {epochs: 3, seed: 0, progress: false}
"""
SETUP = """
import torch
def data(rows: int = 40):
    X = torch.rand(rows, 3, generator=torch.Generator().manual_seed(0))
    return (X, X.argmax(1)), (X, X.argmax(1)), None, 8
"""


@pytest.mark.parametrize("loss", ["torch.nn.functional.cross_entropy", "{class_path: torch.nn.CrossEntropyLoss}"])
def test_a_config_names_net_and_loss_by_their_class_paths(loss: str, tmp_path: Path) -> None:
    from weft.recipes.recipe import check, make, read

    (tmp_path / "d.py").write_text(SETUP)
    (tmp_path / "run.yaml").write_text(CONFIG.replace("LOSS", loss).replace("DATA", "d.py:data"))
    result = make(check(read(tmp_path / "run.yaml"))).fit()
    assert result.epochs == 3 and 0 < result.history["dev_accuracy"][-1] < 1
