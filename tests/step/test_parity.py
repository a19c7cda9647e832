"""weft's update against the same arithmetic written by hand in PyTorch: equal to the last bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import weft
from tests.helpers.bitwise import same
from tests.helpers.byhand import BATCH, EPOCHS, OPTIMIZERS, ROWS, Regression, by_hand, problem, slices, tensors, trained


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_trains_as_in_a_loop_by_hand(name: str) -> None:
    ours, theirs = problem(), problem()
    result = trained(ours, optimizer=OPTIMIZERS[name])
    curve = by_hand(theirs, OPTIMIZERS[name](theirs.parameters()))
    assert same(result.last_weights, dict(theirs.state_dict()))
    assert result.history["train_loss"] == pytest.approx(curve, rel=1e-12)


def test_the_default_optimizer_is_adam_without_momentum_fused() -> None:
    ours, theirs, other = problem(), problem(), problem()
    result = trained(ours)
    by_hand(theirs, torch.optim.Adam(theirs.parameters(), lr=1e-3, betas=(0.0, 0.9), fused=True))
    by_hand(other, torch.optim.Adam(other.parameters(), lr=1e-3, fused=True))
    assert same(result.last_weights, dict(theirs.state_dict()))
    assert not same(result.last_weights, dict(other.state_dict()))  # the comparison can fail


def test_without_a_dev_set_the_weights_with_the_best_epoch_mean_are_put_back() -> None:
    ours, theirs = problem(), problem()
    result = trained(ours, optimizer=lambda params: torch.optim.SGD(params, lr=0.5))  # too fast: the loss jumps
    kept: list[dict[str, Tensor]] = []
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.5)
    curve = by_hand(theirs, optimizer, after_epoch=lambda loss: kept.append(copy.deepcopy(theirs.state_dict())))
    best = curve.index(min(curve))
    assert best != EPOCHS - 1
    assert (result.best_epoch, result.best_metric) == (best, pytest.approx(curve[best], rel=1e-12))
    assert same(dict(ours.state_dict()), dict(kept[best]))


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_clips_what_pytorch_clips(algorithm: str) -> None:
    ours, theirs, free = problem(), problem(), problem()
    make = OPTIMIZERS["momentum"]
    result = trained(ours, optimizer=make, clip=0.05, clip_algorithm=algorithm)
    clip = {"norm": nn.utils.clip_grad_norm_, "value": nn.utils.clip_grad_value_}[algorithm]
    by_hand(theirs, make(theirs.parameters()), before_step=lambda: clip(theirs.parameters(), 0.05))
    by_hand(free, make(free.parameters()))
    assert same(result.last_weights, dict(theirs.state_dict()))
    assert not same(result.last_weights, dict(free.state_dict()))


def accumulated_by_hand(module: nn.Module, optimizer: torch.optim.Optimizer, size: int) -> None:
    batches = list(slices())
    for _ in range(EPOCHS):
        for first in range(0, len(batches), size):
            group = batches[first : first + size]
            rows = sum(len(batch["x"]) for batch in group)
            optimizer.zero_grad()
            for batch in group:
                loss = module(batch)["train_loss"]
                n = len(batch["x"])
                (loss * (n / rows) if n != rows else loss).backward()
            optimizer.step()


def test_accumulating_is_the_same_arithmetic_as_weighting_each_loss_by_its_share() -> None:
    ours, theirs = problem(), problem()
    make = OPTIMIZERS["adam"]
    result = trained(ours, optimizer=make, accumulate=3)  # 3 batches, then 2, the last of them short
    accumulated_by_hand(theirs, make(theirs.parameters()), 3)
    assert same(result.last_weights, dict(theirs.state_dict()))
    assert result.steps == 2 * EPOCHS


def test_accumulating_micro_batches_equals_one_big_batch() -> None:
    ours, big, small = problem(), problem(), problem()
    make = OPTIMIZERS["momentum"]
    accumulated = trained(ours, optimizer=make, accumulate=5)  # the short last batch is among them
    whole = trained(big, weft.DictDataset(tensors()), optimizer=make)
    unequal = trained(small, optimizer=make)
    assert accumulated.steps == whole.steps == EPOCHS
    for key, value in whole.last_weights.items():
        assert torch.allclose(accumulated.last_weights[key], value, rtol=1e-6, atol=1e-6)
    assert any(not torch.allclose(unequal.last_weights[k], v, atol=1e-4) for k, v in whole.last_weights.items())
    assert accumulated.history["train_loss"] == pytest.approx(whole.history["train_loss"], rel=1e-6)


SCHEDULERS = {
    "by step": (weft.Schedule(lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20), "step"), "step"),
    "by epoch": (lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5), "epoch"),
    "by metric": (lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.5), "metric"),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_steps_as_in_a_loop_by_hand(name: str) -> None:
    given, kind = SCHEDULERS[name]
    factory = given.factory if isinstance(given, weft.Schedule) else given
    ours, theirs, constant = problem(), problem(), problem()
    make = OPTIMIZERS["momentum"]
    result = trained(ours, optimizer=make, scheduler=given)
    optimizer = make(theirs.parameters())
    scheduler = factory(optimizer)
    by_hand(
        theirs,
        optimizer,
        after_step=scheduler.step if kind == "step" else lambda: None,
        after_epoch=lambda loss: (
            scheduler.step(loss) if kind == "metric" else scheduler.step() if kind == "epoch" else None
        ),
    )
    by_hand(constant, make(constant.parameters()))
    assert same(result.last_weights, dict(theirs.state_dict()))
    assert not same(result.last_weights, dict(constant.state_dict()))


def test_a_scheduler_with_a_metric_steps_only_after_epochs_that_were_validated() -> None:
    rates: list[float] = []
    plateau = weft.Schedule(
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.999), monitor="dev_loss"
    )
    trainer = weft.Trainer(
        epochs=7,
        validate_every=3,
        progress=False,
        scheduler=plateau,
        optimizer=OPTIMIZERS["sgd"],
        hooks={"on_epoch_start": lambda trainer: rates.append(trainer.optimizer.param_groups[0]["lr"])},
    )
    trainer.fit(problem(), weft.Data(tensors(), tensors(20), batch_size=BATCH))
    # validated: 2, 5 and the last, 6. The first sets the best; the next are bad.
    assert rates == pytest.approx([0.05] * 6 + [0.005])


class Pairs(nn.Module):
    """A problem whose batches are what TensorDataset yields: lists of two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.2), nn.Linear(8, 1))

    def forward(self, batch: list[Tensor]) -> Tensor:
        return ((self.net(batch[0]) - batch[1]) ** 2).mean()


def test_a_loader_of_ones_own_is_iterated_as_it_is_so_that_a_script_keeps_its_curve() -> None:
    def loaders() -> tuple[nn.Module, DataLoader, DataLoader]:
        torch.manual_seed(5)
        module = Pairs()
        dataset = TensorDataset(*tensors().values())
        return module, DataLoader(dataset, BATCH, shuffle=True), DataLoader(dataset, 32)

    def train_by_hand(epochs: int) -> tuple[nn.Module, list[float]]:
        module, train, dev = loaders()
        optimizer, curve = torch.optim.SGD(module.parameters(), lr=0.05), []
        for _ in range(epochs):
            module.train()
            for batch in train:
                optimizer.zero_grad()
                module(batch).backward()
                optimizer.step()
            module.eval()
            with torch.no_grad():
                losses = [(module(batch).item(), len(batch[0])) for batch in dev]
            curve.append(sum(loss * n for loss, n in losses) / ROWS)
        return module, curve

    theirs, curve = train_by_hand(EPOCHS)
    after = torch.rand(3)
    ours, train, dev = loaders()
    result = weft.Trainer(epochs=EPOCHS, progress=False, optimizer=OPTIMIZERS["sgd"]).fit(ours, train, dev)
    assert torch.equal(torch.rand(3), after)  # as many random numbers were drawn
    assert same(result.last_weights, dict(theirs.state_dict()))
    assert result.history["dev_loss"] == pytest.approx(curve, rel=1e-12)


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_evaluates_the_closure_as_often_as_a_loop_by_hand(line_search: str | None) -> None:
    def counted() -> tuple[Regression, list[int]]:
        module, calls = problem().double(), []
        module.register_forward_pre_hook(lambda *args: calls.append(1))
        return module, calls

    def make(params: Any) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(params, lr=0.5, max_iter=8, line_search_fn=line_search)

    whole = {k: v.double() for k, v in tensors().items()}
    ours, our_calls = counted()
    result = trained(ours, whole, optimizer=make)
    theirs, their_calls = counted()
    optimizer = make(theirs.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = theirs({**whole, "name": "train"})["train_loss"]
        loss.backward()
        return loss

    for _ in range(EPOCHS):
        optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    assert same(result.last_weights, dict(theirs.state_dict()))
    assert len(our_calls) == len(their_calls) > EPOCHS
    assert result.steps == EPOCHS
    with torch.no_grad():
        final = theirs({**whole, "name": "train"})["train_loss"].item()
    if line_search:  # the search ends at a point that it evaluated: the logged loss is that of the weights
        assert result.history["train_loss"][-1] == final
    assert result.history["train_loss"][-1] < 0.5 * result.history["train_loss"][0]


def test_lbfgs_with_accumulation_sees_one_big_batch() -> None:
    def make(params: Any) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(params, lr=0.5, max_iter=5)

    whole = {k: v.double() for k, v in tensors().items()}
    ours, theirs = problem().double(), problem().double()
    pieces = weft.Data(whole, batch_size=BATCH, shuffle=False)
    accumulated = trained(ours, pieces, optimizer=make, accumulate=5)
    big = trained(theirs, whole, optimizer=make)
    for key, value in big.last_weights.items():
        assert torch.allclose(accumulated.last_weights[key], value, rtol=1e-9, atol=1e-12)


def test_metrics_are_means_over_samples_in_float64() -> None:
    class Number(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(()))

        def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
            return {"loss": self.w * 0 + batch["v"].mean(), "size": torch.tensor(float(len(batch["v"])))}

    values = torch.cat([torch.full((999,), 1e8), torch.full((2,), 3.0)])
    result = trained(Number(), weft.Data({"v": values}, batch_size=1, shuffle=False), epochs=1)
    exact = (999 * 1e8 + 6.0) / 1001
    assert result.history["train_loss"] == [pytest.approx(exact, rel=1e-15)]
    float32 = torch.cumsum(values, 0)[-1].item() / 1001
    assert abs(float32 - exact) > 1e-12 * exact  # in float32 it would have been lost
    sizes = trained(Number(), weft.Data({"v": values[:70]}, batch_size=16), epochs=1).history["train_size"]
    assert sizes == [pytest.approx((64 * 16 + 6 * 6) / 70, rel=1e-15)]
