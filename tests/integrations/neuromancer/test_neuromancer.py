"""A real NeuroMANCER Problem in weft.Trainer: the same losses as NeuroMANCER's own Trainer, batch by batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import weft
from tests.helpers.neuromancer_problems import (
    FORMULATIONS,
    Callback,
    Formulation,
    NeuromancerTrainer,
    augmented_rosenbrock,
    neuromancer_loader,
    rosenbrock,
    rosenbrock_rows,
    splits,
)
from weft.loop.trainer import Trainer

# What NeuroMANCER's constraints and cvxpylayers say of themselves.
pytestmark = [pytest.mark.filterwarnings("ignore:Using a target size", "ignore:__array__ implementation")]

TUTORIAL = Formulation("Rosenbrock", lambda: rosenbrock(80, 4), lambda: splits(rosenbrock_rows, 500, 200), 64)


class LossRecorder(Callback):
    """The loss of every training batch; those of dev batches are read from the problem's outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.train: list[float] = []

    def end_batch(self, trainer: Any, output: Any) -> None:
        self.train.append(output["train_loss"].item())


def dev_losses(problem: torch.nn.Module) -> list[float]:
    """A list that fills with the loss of every dev batch that `problem` sees."""
    found: list[float] = []

    def read(module: Any, args: Any, out: Any) -> None:
        if "dev_loss" in out:
            found.append(out["dev_loss"].item())

    problem.register_forward_hook(read)
    return found


def losses_of_neuromancer(formulation: Formulation, epochs: int, lr: float | None = None) -> tuple[list, list, list]:
    problem, recorder, means = formulation.make(), LossRecorder(), []
    dev = dev_losses(problem)
    recorder.end_epoch = lambda trainer, output: means.append(output["mean_train_loss"].item())  # type: ignore[method-assign]
    optimizer = torch.optim.AdamW(formulation.trained(problem), lr=lr or formulation.lr)
    NeuromancerTrainer(
        problem, *formulation.loaders(), optimizer=optimizer, epochs=epochs, callback=recorder, patience=epochs
    ).train()
    return recorder.train, dev, means


def losses_of_weft(formulation: Formulation, epochs: int, by_loader: bool = False) -> tuple[list, list, weft.FitResult]:
    problem, train = formulation.make(), []
    dev = dev_losses(problem)
    trainer = Trainer(
        epochs=epochs,
        optimizer=lambda params: torch.optim.AdamW(list(formulation.trained(problem)), lr=formulation.lr),
        clip=100.0,
        hooks={"on_step_end": lambda trainer, batch, loss: train.append(loss.item())},
        progress=False,
    )
    if by_loader:
        result = trainer.fit(problem, *formulation.loaders())
    else:
        *data, _ = formulation.datasets()
        result = trainer.fit(problem, weft.Data(*data, batch_size=formulation.batch_size, shuffle=False))
    return train, dev, result


def relative(ours: list[float], theirs: list[float]) -> float:
    """The largest relative difference of two lists of equal length."""
    assert len(ours) == len(theirs) and theirs
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("by_loader", [False, True], ids=["datasets", "its DataLoader"])
def test_every_batch_of_the_rosenbrock_tutorial_has_the_loss_it_has_in_neuromancer(
    by_loader: bool, capsys: pytest.CaptureFixture
) -> None:
    train, dev, _ = losses_of_neuromancer(TUTORIAL, epochs=20)
    ours_train, ours_dev, _ = losses_of_weft(TUTORIAL, epochs=20, by_loader=by_loader)
    assert len(train) == 20 * math.ceil(500 / 64) and len(dev) == 20 * math.ceil(200 / 64)
    assert relative(ours_train, train) <= 1e-6
    assert relative(ours_dev, dev) <= 1e-6


def test_the_comparison_of_losses_can_fail(capsys: pytest.CaptureFixture) -> None:
    train, dev, _ = losses_of_neuromancer(TUTORIAL, epochs=2, lr=1.001e-3)
    ours_train, ours_dev, _ = losses_of_weft(TUTORIAL, epochs=2)
    assert relative(ours_train, train) > 1e-6 and relative(ours_dev, dev) > 1e-6


def test_epoch_means_are_over_samples_where_neuromancers_are_over_batches(capsys: pytest.CaptureFixture) -> None:
    train, _, means = losses_of_neuromancer(TUTORIAL, epochs=1)
    _, _, result = losses_of_weft(TUTORIAL, epochs=1)
    rows = [64] * 7 + [52]  # 500 in batches of 64
    over_samples = sum(loss * n for loss, n in zip(train, rows, strict=True)) / 500
    assert result.history["train_loss"][0] == pytest.approx(over_samples, rel=1e-6)
    assert means[0] == pytest.approx(sum(train) / 8, rel=1e-6)
    assert abs(over_samples / means[0] - 1) > 1e-4


def test_the_terms_of_a_neuromancer_problem_are_reported_by_their_names() -> None:
    _, _, result = losses_of_weft(TUTORIAL, epochs=1)
    terms = ["f", "order", "order_violation", "inner", "inner_violation", "outer", "outer_violation"]
    sums = ["objective_loss", "penalty_loss", "loss"]
    assert set(result.history) == {f"{split}_{name}" for split in ("train", "dev") for name in terms + sums}
    parts = sum(result.history[f"train_{name}"][0] for name in ("f", "order", "inner", "outer"))
    assert result.history["train_loss"][0] == pytest.approx(parts, rel=1e-5)


@pytest.mark.parametrize("name", ["linear system", "NODE", "Burgers PINN", "UDE", "reference tracking", "cvxpy layer"])
def test_a_neuromancer_problem_trains_as_it_stands(name: str) -> None:
    formulation = FORMULATIONS[name]
    problem = formulation.make()
    first = {k: v.detach().clone() for k, v in problem.named_parameters()}
    train, dev, _ = formulation.datasets()
    trainer = Trainer(epochs=15, optimizer=formulation.optimizer(problem), progress=False)
    result = trainer.fit(problem, weft.Data(train, dev, batch_size=formulation.batch_size))
    curve = result.history["train_loss"]
    assert all(map(math.isfinite, curve)) and curve[-1] < curve[0]
    trained = {id(p) for p in formulation.trained(problem)}
    moved = {k for k, p in problem.named_parameters() if not torch.equal(p, first[k])}
    assert moved and moved <= {k for k, p in problem.named_parameters() if id(p) in trained}
    if dev is not None:
        assert trainer.validate()["dev_loss"] == pytest.approx(result.best_metric, rel=1e-6)


def test_a_pinn_is_evaluated_with_gradients_only_because_it_asks_for_them() -> None:
    formulation = FORMULATIONS["Burgers PINN"]
    problem = formulation.make()
    problem.grad_inference = False
    train, dev, _ = formulation.datasets()
    with pytest.raises(RuntimeError, match="does not require grad"):
        Trainer(epochs=1, progress=False).fit(problem, weft.Data(train, dev, batch_size=16))


def test_what_a_validation_step_logs_is_a_mean_over_the_examples_of_that_evaluation() -> None:
    formulation = FORMULATIONS["pNLP"]
    sizes = [12, 4]  # of 16 dev rows in batches of 12

    def validation_step(trainer: Any, batch: Any) -> Any:
        trainer.log("rows", float(len(batch["p"])))
        return trainer.problem(batch)

    trainer = Trainer(epochs=2, validation_step=validation_step, progress=False)
    train, dev, _ = formulation.datasets()
    result = trainer.fit(formulation.make(), weft.Data(train, dev, batch_size=12))
    expected = sum(n * n for n in sizes) / 16
    assert result.history["rows"] == [expected, expected]
    assert trainer.validate()["rows"] == expected  # also after the fit


def test_a_rollout_made_longer_between_two_fits_trains_on() -> None:
    formulation = FORMULATIONS["linear system"]
    problem = formulation.make()
    trainer = Trainer(epochs=2, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3), progress=False)
    data = weft.Data(*formulation.datasets()[:2], batch_size=16)
    trainer.fit(problem, data)
    problem.nodes[0].nsteps = 7
    result = trainer.fit(problem, data)
    assert result.epochs == 4 and result.history["train_loss"][2] > result.history["train_loss"][1]
    assert trainer.run is not None and trainer.run.history.num_epochs == 4


def test_neuromancers_augmented_lagrangian_trains_on_one_full_batch_and_updates_once_an_epoch() -> None:
    torch.manual_seed(0)
    tensors = rosenbrock_rows(20)
    problem = augmented_rosenbrock(neuromancer_loader(tensors, "train", 20))
    calls: list[int] = []
    problem.loss.register_forward_hook(lambda module, args, out: calls.append(args[0]["epoch"]))
    result = Trainer(epochs=5, progress=False).fit(problem, weft.DictDataset(tensors))
    assert calls == [0, 1, 2, 3, 4]  # no dry runs: its multipliers change in every forward
    assert float(problem.loss.mu.max()) > 0.001 and result.epochs == 5
    weights = result.last_weights
    fresh = augmented_rosenbrock(neuromancer_loader(tensors, "train", 20))
    torch.save({"state_dict": weights}, "weights.ckpt")
    weft.load_weights(fresh, "weights.ckpt")  # lm and penalty_best have grown since they were made
    assert torch.equal(fresh.loss.lm, weights["loss.lm"]) and fresh.loss.lm.shape == (20, 3)
