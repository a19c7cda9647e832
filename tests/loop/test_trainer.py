"""What the trainer does around the update: when it stops, what it keeps, what it measures, and what it leaves alone."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import weft
from tests.helpers.bitwise import same
from tests.helpers.byhand import BATCH, EPOCHS, OPTIMIZERS, ROWS, by_hand, data, problem, slices, tensors, trained
from weft.devices.seeding import random_state
from weft.step.evaluation import evaluating

ADAM, SGD = OPTIMIZERS["adam"], OPTIMIZERS["sgd"]


class Script(nn.Module):
    """A problem whose dev loss is written down beforehand, one value a validation; its weight counts the steps."""

    def __init__(self, *dev_losses: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))
        self.dev_losses = list(dev_losses)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        if batch["name"] == "train":
            return {"train_loss": -self.w}  # SGD with rate 1 adds 1 each step
        return {f"{batch['name']}_loss": torch.tensor(self.dev_losses.pop(0), dtype=torch.float64)}


def scripted(dev_losses: list[float], steps_per_epoch: int = 1, **options: Any) -> tuple[weft.FitResult, float]:
    """Fit a Script; returns the result and the weight that the problem holds: the number of steps it had."""
    module = Script(*dev_losses)
    given = weft.Data({"v": torch.ones(steps_per_epoch, 1)}, {"v": torch.ones(1, 1)}, batch_size=1)
    options = {"epochs": len(dev_losses), "progress": False, "optimizer": unit_sgd, **options}
    result = weft.Trainer(**options).fit(module, given)
    return result, module.w.item()


def unit_sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1.0)


# ---------------------------------------------------------------- best weights and early stopping


@pytest.mark.parametrize(
    ("dev_losses", "options", "epochs", "best"),
    [
        ([5, 4, 3, 4, 4, 4, 1], {"patience": 3}, 6, 2),
        ([5, 4, 3, 4, 4, 2, 1], {"patience": 3}, 7, 6),
        ([5, 4, 3, 4, 4, 4, 1], {}, 7, 6),  # without patience: to the end
        ([5, 4.9, 4.8, 4.7, 4.6], {"patience": 3, "min_delta": 0.25}, 5, 4),  # 4.7 is more than min_delta below 5
        ([5, 4.9, 4.8, 4.7, 4.6], {"patience": 2, "min_delta": 0.5}, 3, 2),  # the best weights know no min_delta
        ([1, 2, 3, 4, 5, 6, 7, 8], {"patience": 2, "warmup": 4}, 6, 0),  # epochs 0 to 3 do not count
        ([1, 2, 3, 4, 5, 6, 7, 8], {"patience": 2, "min_epochs": 5}, 5, 0),
        ([1, 2, 3, 4, 5, 6, 7, 8], {"patience": 2, "min_epochs": 2}, 3, 0),
        ([1, 2, 3, 2, 2, 2, 2, 2], {"patience": 3, "monitor_mode": "max"}, 6, 2),
        ([-1, -2, -3, -2, -5, -4, -4], {"monitor_mode": "max"}, 7, 0),  # negative values improve as well
        ([3, math.nan, 2, math.nan, math.nan, 1], {"patience": 2}, 5, 2),  # a NaN is no improvement
        ([math.nan, 3, 2], {}, 3, 2),
        ([math.inf, 3, 4], {}, 3, 1),
    ],
)
def test_early_stopping_and_best_weights_follow_the_dev_loss(
    dev_losses: list[float], options: dict[str, Any], epochs: int, best: int
) -> None:
    result, weight = scripted(dev_losses, **options)
    assert (result.epochs, result.best_epoch) == (epochs, best)
    assert result.best_metric == dev_losses[best]
    assert weight == best + 1  # the problem holds the weights of the best epoch
    assert result.last_weights["w"].item() == epochs
    assert result.stop_reason == ("epochs" if epochs == len(dev_losses) else "patience")
    assert result.history["dev_loss"] == pytest.approx(dev_losses[:epochs], nan_ok=True)


def test_a_nan_is_never_the_best_and_then_the_last_weights_stay() -> None:
    with pytest.warns(UserWarning, match="dev_loss, which is monitored, was not finite in any of 3 epochs"):
        result, weight = scripted([math.nan] * 3)
    assert (result.best_metric, result.best_epoch, weight) == (None, None, 3)


def test_patience_counts_validations_and_unvalidated_epochs_are_nan() -> None:
    result, weight = scripted([5, 6, 7, 8], epochs=20, validate_every=3, patience=2)
    assert result.epochs == 9
    expected = [math.nan, math.nan, 5, math.nan, math.nan, 6, math.nan, math.nan, 7]
    assert result.history["dev_loss"] == pytest.approx(expected, nan_ok=True)
    assert result.history["train_loss"] == [-float(i) for i in range(9)]
    assert (result.best_epoch, weight) == (2, 3)


def test_the_last_epoch_is_always_validated() -> None:
    result, _ = scripted([5, 4, 3], epochs=7, validate_every=3)
    assert [i for i, v in enumerate(result.history["dev_loss"]) if not math.isnan(v)] == [2, 5, 6]
    result, _ = scripted([5, 4], epochs=7, validate_every=3, max_steps=4)
    assert [i for i, v in enumerate(result.history["dev_loss"]) if not math.isnan(v)] == [2, 3]


def test_any_metric_may_decide() -> None:
    def step(trainer: Any, batch: dict[str, Any]) -> dict[str, Any]:
        return {"loss": trainer.problem(batch)["dev_loss"], "score": [1.0, 3.0, 2.0][trainer.current_epoch]}

    result, weight = scripted([9, 8, 7], validation_step=step, monitor_metric="dev_score", monitor_mode="max")
    assert (result.best_epoch, result.best_metric, weight) == (1, 3.0, 2)
    assert result.monitor == "dev_score"


def test_without_a_dev_set_the_training_loss_decides() -> None:
    result = trained(problem(), optimizer=ADAM)
    assert result.monitor == "train_loss"
    assert result.best_metric == min(result.history["train_loss"])


def test_with_nothing_monitored_the_last_weights_stay() -> None:
    def uphill(trainer: Any, batch: Any) -> None:  # so the first epoch is the best
        trainer.optimizer.param_groups[0]["lr"] = -0.1

    for given, is_last in ((False, True), (None, False)):
        grown = problem()
        result = trained(grown, hooks={"on_step_start": uphill}, optimizer=ADAM, monitor_metric=given)
        assert (result.monitor, result.best_epoch) == ((None, None) if is_last else ("train_loss", 0))
        assert same(result.last_weights, dict(grown.state_dict())) == is_last
    with pytest.warns(UserWarning, match=r"No effect in this fit: monitor_metric \(patience looks at the loss\)"):
        assert trained(problem(), monitor_metric=False, patience=9).monitor == "train_loss"


# ---------------------------------------------------------------- limits


def test_max_steps_ends_in_the_middle_of_an_epoch() -> None:
    ours, theirs = problem(), problem()
    result = trained(ours, optimizer=ADAM, max_steps=7)
    optimizer = ADAM(theirs.parameters())
    for batch in [*slices(), *slices()][:7]:
        optimizer.zero_grad()
        theirs(batch)["train_loss"].backward()
        optimizer.step()
    assert same(result.last_weights, dict(theirs.state_dict()))
    assert (result.steps, result.epochs, result.stop_reason) == (7, 2, "max_steps")
    assert trained(problem(), max_steps=0).steps == 0
    assert trained(problem(), epochs=0).epochs == 0


def test_max_time_stops_at_the_first_step_boundary_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)

    def second(trainer: Any, batch: Any, loss: Any) -> None:
        nonlocal now
        now += 1.0

    result = trained(problem(), epochs=99, max_time=7, hooks={"on_step_end": second})
    assert (result.steps, result.epochs, result.stop_reason, result.seconds) == (7, 2, "max_time", 7.0)
    result = trained(problem(), epochs=99, max_time="00:00:08", hooks={"on_step_end": second})
    assert result.steps == 8


def test_stop_ends_after_the_current_step_and_the_first_reason_is_reported() -> None:
    def stop(trainer: Any, batch: Any, loss: Any) -> None:
        if trainer.global_step == 3:
            trainer.stop("enough")
            trainer.stop("more than enough")

    result = trained(problem(), hooks={"on_step_end": stop})
    assert (result.steps, result.epochs, result.stop_reason) == (3, 1, "enough")


def test_limit_batches_limits_each_split() -> None:
    def counted(limit: Any) -> tuple[int, float]:
        seen = {"train": 0.0, "dev": 0.0}

        class Count(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w = nn.Parameter(torch.zeros(()))

            def forward(self, batch: dict[str, Any]) -> Tensor:
                seen[batch["name"]] += 1
                return self.w**2

        given = weft.Data(tensors(), tensors(), batch_size=BATCH)
        weft.Trainer(epochs=1, progress=False, limit_batches=limit).fit(Count(), given)
        return int(seen["train"]), int(seen["dev"])

    assert counted(None) == (5, 5)
    assert counted(2) == (2, 2)
    assert counted(0.5) == (2, 2)
    assert counted(0.01) == (1, 1)
    assert counted({"train": 3}) == (3, 5)
    assert counted({"dev": 1, "train": 1.0}) == (5, 1)


@pytest.mark.parametrize("batches", [True, 2])
def test_fast_dev_run_is_one_epoch_of_few_batches_that_leaves_nothing_behind(batches: Any, tmp_path: Path) -> None:
    module = problem()
    trainer = weft.Trainer(
        epochs=50,
        fast_dev_run=batches,
        progress=False,
        root_dir=str(tmp_path / "runs"),
        checkpoint=True,
        loggers=["csv", "tensorboard"],
        patience=3,
    )
    result = trainer.fit(module, weft.Data(tensors(), tensors(), batch_size=BATCH))
    assert (result.epochs, result.steps) == (1, int(batches))
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- again


def test_a_second_fit_of_the_same_problem_goes_on() -> None:
    ours, theirs = problem(), problem()
    trainer = weft.Trainer(epochs=2, progress=False, optimizer=OPTIMIZERS["momentum"])
    first = trainer.fit(ours, data())
    assert first.best_epoch == 1  # its last: the problem goes on from there
    second = trainer.fit(ours, data())
    by_hand(theirs, OPTIMIZERS["momentum"](theirs.parameters()), epochs=4)
    assert same(second.last_weights, dict(theirs.state_dict()))
    assert (first.epochs, second.epochs, second.steps) == (2, 4, 20)
    assert [len(first.history["train_loss"]), len(second.history["train_loss"])] == [2, 4]
    assert second.history["train_loss"][:2] == first.history["train_loss"]


def test_a_second_fit_starts_from_the_best_weights_and_keeps_the_best() -> None:
    module, given = Script(5, 1, 4, 3, 2, 0.5), weft.Data({"v": torch.ones(1, 1)}, {"v": torch.ones(1, 1)})
    trainer = weft.Trainer(epochs=3, progress=False, optimizer=unit_sgd)
    assert trainer.fit(module, given).best_epoch == 1
    assert module.w.item() == 2
    result = trainer.fit(module, given)
    assert module.w.item() == 2 + 3  # the last of the second fit was the best
    assert (result.best_epoch, result.best_metric, result.epochs) == (5, 0.5, 6)


def test_another_problem_starts_anew() -> None:
    trainer = weft.Trainer(epochs=2, progress=False, optimizer=ADAM)
    trainer.fit(problem(), data())
    ours, theirs = problem(), problem()
    result = trainer.fit(ours, data())
    by_hand(theirs, ADAM(theirs.parameters()), epochs=2)
    assert same(result.last_weights, dict(theirs.state_dict()))
    assert result.epochs == 2


def test_after_an_interruption_fit_does_what_was_left() -> None:
    def interrupt(trainer: Any, batch: Any, loss: Any) -> None:
        if trainer.global_step == 12:
            raise KeyboardInterrupt

    module = problem()
    trainer = weft.Trainer(epochs=4, progress=False, hooks={"on_step_end": interrupt})
    with pytest.raises(KeyboardInterrupt):  # a script: re-raised
        trainer.fit(module, data())
    assert trainer.run is not None
    assert trainer.run.result is not None
    assert (trainer.run.result.stop_reason, trainer.run.result.epochs) == ("interrupted", 2)
    result = trainer.fit(module, data())
    assert (result.epochs, result.stop_reason) == (4, "epochs")
    assert trainer.fit(module, data()).epochs == 8


def test_an_interactive_interruption_returns_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.ps1", ">>> ", raising=False)

    def interrupt(trainer: Any, metrics: Any) -> None:
        if trainer.current_epoch == 2:
            raise KeyboardInterrupt

    module = problem()
    trainer = weft.Trainer(epochs=6, progress=False, optimizer=ADAM, hooks={"on_epoch_end": interrupt})
    result = trainer.fit(module, data())
    assert (result.stop_reason, result.epochs) == ("interrupted", 3)
    assert result.best_metric == min(result.history["train_loss"])
    assert trainer.fit(module, data()).epochs == 6


# ---------------------------------------------------------------- phases


def test_phases_train_one_after_the_other_with_their_own_optimizer_and_frozen_parts() -> None:
    def two_layers() -> nn.Module:
        module = problem()
        module.first, module.last = module.net[0], module.net[2]  # pyright: ignore[reportIndexIssue]
        return module

    ours, theirs = two_layers(), two_layers()
    phases = [
        weft.Phase(epochs=2, freeze=["first"]),
        weft.Phase(epochs=1),
        weft.Phase(epochs=1, optimizer=SGD, freeze=["last"]),
    ]
    trainer = weft.Trainer(phases=phases, progress=False, optimizer=ADAM)
    result = trainer.fit(ours, data())
    adam, sgd = ADAM(theirs.parameters()), SGD(theirs.parameters())
    for optimizer, frozen in ((adam, theirs.first), (adam, theirs.first), (adam, None), (sgd, theirs.last)):
        for batch in slices():
            theirs.zero_grad()
            theirs(batch)["train_loss"].backward()
            for p in frozen.parameters() if frozen is not None else ():  # pyright: ignore[reportAttributeAccessIssue,reportCallIssue]
                p.grad = None
            optimizer.step()
    assert same(result.last_weights, dict(theirs.state_dict()))
    assert all(p.requires_grad for p in ours.parameters())  # unfrozen at the end
    assert (result.epochs, len(result.history["train_loss"])) == (4, 4)
    again = trainer.fit(ours, data())  # the stages once more, from the first one's optimizer on
    assert (again.epochs, type(trainer.optimizer).__name__) == (8, "SGD")


def test_a_phase_may_change_data_weights_and_anything_else_and_ends_by_its_own_patience() -> None:
    seen: list[tuple[int, int, float]] = []

    def note(trainer: Any, batch: dict[str, Any], loss: Any) -> None:
        seen.append((trainer.current_epoch, len(batch["x"]), trainer.problem.terms["fit"].weight.item()))

    module = weft.Problem(
        [weft.Node(problem().net, ["x"], ["y"], name="net")], [weft.objective(lambda y, t: (y - t) ** 2, name="fit")]
    )
    phases = [
        weft.Phase(epochs=50, patience=2),
        weft.Phase(
            epochs=2,
            data=weft.Data(tensors(12)),
            weights={"fit": 3.0},
            patience=99,
            setup=lambda trainer: setattr(trainer, "note", "second"),
        ),
    ]
    trainer = weft.Trainer(
        phases=phases,
        progress=False,
        monitor_metric="bad",
        optimizer=SGD,
        hooks=[
            {"on_step_end": note},
            {"on_step_start": lambda trainer, batch: trainer.log("bad", trainer.current_epoch)},
        ],
    )
    result = trainer.fit(module, weft.Data(tensors(24)))
    assert [s[:2] for s in seen] == [(0, 24), (1, 24), (2, 24), (3, 12), (4, 12)]
    assert [s[2] for s in seen] == [1.0, 1.0, 1.0, 3.0, 3.0]
    assert trainer.note == "second"  # pyright: ignore[reportAttributeAccessIssue]
    assert (result.epochs, result.stop_reason) == (5, "epochs")


def test_the_last_epoch_of_a_phase_is_validated_even_if_it_ended_early() -> None:
    phases = [weft.Phase(epochs=9, patience=1), weft.Phase(epochs=3, patience=9)]
    result, _ = scripted([1, 2, 0.5, 0.4], phases=phases, epochs=12, validate_every=2)
    # phase one: validated after epochs 1 and 3, ends; phase two: epochs 4, 5, 6
    assert [i for i, v in enumerate(result.history["dev_loss"]) if not math.isnan(v)] == [1, 3, 5, 6]


# ---------------------------------------------------------------- hooks and errors


def test_hooks_fire_exactly_this_often() -> None:
    counts: dict[str, int] = {}
    batches, dev_batches = math.ceil(ROWS / BATCH), math.ceil(20 / BATCH)
    forwards = {"train": 0, "dev": 0}
    module = problem()
    module.register_forward_pre_hook(lambda _, args: forwards.update({args[0]["name"]: forwards[args[0]["name"]] + 1}))

    class Counter(weft.Hook):
        def __getattribute__(self, name: str) -> Any:
            if name.startswith("on_") and name in events:
                return lambda *args: counts.update({name: counts.get(name, 0) + 1})
            return super().__getattribute__(name)

        def __dir__(self) -> list[str]:
            return events

    events = [
        "on_fit_start",
        "on_epoch_start",
        "on_step_start",
        "on_before_optimizer_step",
        "on_step_end",
        "on_validation_start",
        "on_validation_end",
        "on_epoch_end",
        "on_fit_end",
        "on_exception",
    ]
    trainer = weft.Trainer(epochs=EPOCHS, progress=False, validate_every=2, accumulate=2, hooks=Counter())
    trainer.fit(module, weft.Data(tensors(), tensors(20), batch_size=BATCH))
    steps = EPOCHS * math.ceil(batches / 2)
    assert counts == {
        "on_fit_start": 1,
        "on_epoch_start": EPOCHS,
        "on_step_start": steps,
        "on_before_optimizer_step": steps,
        "on_step_end": steps,
        "on_validation_start": EPOCHS // 2,
        "on_validation_end": EPOCHS // 2,
        "on_epoch_end": EPOCHS,
        "on_fit_end": 1,
    }
    assert forwards == {"train": EPOCHS * batches, "dev": EPOCHS // 2 * dev_batches}  # no dry runs
    before = dict(counts)
    trainer.validate()
    assert counts == before  # hooks belong to a fit


def test_hooks_see_what_they_are_promised() -> None:
    order: list[str] = []
    batches: list[Any] = []

    class Look(weft.Hook):
        def on_step_start(self, trainer: Any, batch: Any) -> None:
            batches.append(batch)

        def on_before_optimizer_step(self, trainer: Any, optimizer: Any) -> None:
            assert optimizer is trainer.optimizer
            assert all(p.grad is not None for p in trainer.problem.parameters())

        def on_step_end(self, trainer: Any, batch: Any, loss: Tensor) -> None:
            assert batch is batches[-1]
            assert not loss.requires_grad
            assert loss.dim() == 0
            assert all(p.grad is None for p in trainer.problem.parameters())

        def on_validation_end(self, trainer: Any, metrics: dict[str, float]) -> None:
            order.append("validated")
            assert all(type(v) is float for v in metrics.values())
            assert set(metrics) == {"dev_loss"}

        def on_epoch_end(self, trainer: Any, metrics: dict[str, float]) -> None:
            order.append("closed")
            assert set(metrics) == {"train_loss", "dev_loss"}

        def on_fit_end(self, trainer: Any, result: weft.FitResult) -> None:
            assert result is trainer.run.result

    trainer = weft.Trainer(epochs=2, progress=False, hooks=Look())
    trainer.fit(problem(), weft.Data(tensors(), tensors(20), batch_size=BATCH))
    assert order == ["validated", "closed"] * 2
    assert len(batches) == 10


@pytest.mark.parametrize("place", ["on_fit_start", "on_step_end", "on_validation_end", "on_epoch_end", "step"])
def test_after_an_error_the_last_hooks_are_called_and_the_trainer_stays_usable(place: str) -> None:
    calls: list[str] = []
    fail = True

    def broken(trainer: Any, *args: Any) -> Any:
        if fail and (place == "on_fit_start" or trainer.global_step >= 7):
            raise OSError("the disk is full")
        return trainer.problem(*args) if place == "step" else None

    hooks: list[Any] = [
        {"on_exception": lambda trainer, error: calls.append(str(error))},
        {"on_fit_end": lambda trainer, result: calls.append(result.stop_reason)},
    ]
    options = {"training_step": broken} if place == "step" else {"hooks": [*hooks, {place: broken}]}
    module = problem()
    trainer = weft.Trainer(**{"epochs": 4, "progress": False, "hooks": hooks, **options})
    given = weft.Data(tensors(), tensors(20), batch_size=BATCH)
    with pytest.raises(OSError, match="disk"):
        trainer.fit(module, given)
    assert calls == ["the disk is full", "error"]
    fail = False
    result = trainer.fit(module, given)
    done = {"on_fit_start": 0, "on_epoch_end": 2}.get(place, 1)  # an epoch whose training is through is over
    assert result.epochs == done + 4
    assert all(len(column) == result.epochs for column in result.history.values())


def test_every_last_hook_is_called_even_if_one_raises() -> None:
    calls: list[str] = []

    def broken(trainer: Any, *args: Any) -> None:
        calls.append("broken")
        raise OSError("no")

    hooks = [{"on_fit_end": broken}, {"on_fit_end": lambda *args: calls.append("second")}]
    with pytest.raises(OSError, match="no"):
        trained(problem(), hooks=hooks)
    assert calls == ["broken", "second"]


def test_log_records_means_of_the_epoch_wherever_it_is_called() -> None:
    class Log(weft.Hook):
        def on_fit_start(self, trainer: Any) -> None:
            trainer.log("at_start", 1.0)

        def on_step_end(self, trainer: Any, batch: Any, loss: Tensor) -> None:
            trainer.log({"loss_again": loss, "steps": trainer.global_step})

        def on_epoch_end(self, trainer: Any, metrics: dict[str, float]) -> None:
            trainer.log("half", torch.tensor(metrics["train_loss"] / 2, dtype=torch.float64))
            assert "half" in metrics

        def on_fit_end(self, trainer: Any, result: Any) -> None:
            with pytest.raises(RuntimeError, match="after the end of the run"):
                trainer.log("late", 1.0)

    history = trained(problem(), weft.Data(tensors(64), batch_size=BATCH), epochs=2, hooks=Log()).history
    assert history["steps"] == [2.5, 6.5]
    assert history["loss_again"] == pytest.approx(history["train_loss"], rel=1e-12)
    assert history["half"] == [value / 2 for value in history["train_loss"]]
    assert history["at_start"] == pytest.approx([1.0, math.nan], nan_ok=True)
    assert "late" not in history


def test_a_part_that_a_hook_puts_in_eval_mode_stays_there() -> None:
    module = nn.Module()
    module.frozen, module.net = nn.BatchNorm1d(2), nn.Sequential(nn.Linear(2, 1), nn.Dropout(0.5))
    module.forward = lambda batch: module.net(module.frozen(batch["x"])).square().mean()
    modes: list[tuple[bool, bool]] = []
    hooks = {
        "on_fit_start": lambda trainer: module.frozen.eval(),
        "on_step_end": lambda *args: modes.append((module.frozen.training, module.net.training)),
        "on_validation_end": lambda *args: None,
    }
    module.eval()  # as the last evaluation left it
    weft.Trainer(epochs=2, progress=False, hooks=hooks).fit(module, weft.Data(tensors(8), tensors(8)))
    assert modes == [(False, True)] * 2
    assert module.frozen.running_mean.eq(0).all()


# ---------------------------------------------------------------- randomness


class Noisy(nn.Module):
    """Draws random numbers in each training step."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))

    def forward(self, batch: dict[str, Any]) -> Tensor:
        return ((nn.functional.dropout(batch["x"], 0.3) @ self.w - batch["t"][:, 0]) ** 2).mean()


def test_a_seed_makes_runs_equal_and_none_leaves_random_state_alone() -> None:
    def run(seed: int | None, state: int) -> tuple[dict[str, Tensor], int | None]:
        torch.manual_seed(state)
        module = Noisy()
        trainer = weft.Trainer(epochs=2, progress=False, seed=seed)
        result = trainer.fit(module, weft.Data(tensors(), batch_size=BATCH))
        return result.last_weights, result.seed

    assert same(run(3, state=0), run(3, state=1))
    assert not same(run(3, state=0)[0], run(4, state=0)[0])
    assert not same(run(None, state=0)[0], run(None, state=1)[0])
    assert same(run(None, state=0), run(None, state=0))
    assert run(None, state=12)[1] == 12
    module = problem()
    before = random_state()
    trained(module, weft.Data(tensors(), tensors(), batch_size=BATCH))
    assert same(before, random_state())
    trained(module, weft.Data(tensors(), tensors(), batch_size=BATCH), seed=0)
    assert not same(before, random_state())


def test_deterministic_holds_during_the_fit_alone() -> None:
    inside: list[bool] = []
    hooks = {"on_step_start": lambda *args: inside.append(torch.are_deterministic_algorithms_enabled())}
    trained(problem(), deterministic=True, epochs=1, hooks=hooks)
    assert set(inside) == {True}
    assert not torch.are_deterministic_algorithms_enabled()


# ---------------------------------------------------------------- validate, test, predict


def test_validate_and_test_give_the_means_of_the_history_under_its_names() -> None:
    module, dev = problem(), tensors(20)
    trainer = weft.Trainer(epochs=3, progress=False, optimizer=ADAM)
    result = trainer.fit(module, weft.Data(tensors(), dev, tensors(30), batch_size=BATCH))
    assert result.best_epoch is not None
    assert trainer.validate() == {"dev_loss": result.best_metric}
    with torch.no_grad():
        exact = {n: module({**tensors(n), "name": "test"})["test_loss"].item() for n in (30, 40)}
    assert trainer.test() == {"test_loss": pytest.approx(exact[30], rel=1e-6)}
    others = [tensors(40), weft.DictDataset(tensors(40)), weft.Data(None, None, tensors(40), batch_size=7)]
    others += [
        DataLoader(weft.DictDataset(tensors(40)), 7),
        [{k: v[i : i + 8] for k, v in tensors(40).items()} for i in range(0, 40, 8)],
    ]
    for other in others:
        assert trainer.test(other) == {"test_loss": pytest.approx(exact[40], rel=1e-6)}
    assert trainer.test(lambda n: (None, None, tensors(n), 9), n=40) == {
        "test_loss": pytest.approx(exact[40], rel=1e-6)
    }
    assert trainer.test() == {"test_loss": pytest.approx(exact[30], rel=1e-6)}  # the data of the fit are still there
    fresh = weft.Trainer(progress=False)
    assert fresh.test(tensors(40), problem=module) == {"test_loss": pytest.approx(exact[40], rel=1e-6)}
    assert fresh.run is None


def test_evaluation_restores_every_mode_and_the_gradient_switch() -> None:
    module = problem()
    trainer = weft.Trainer(epochs=1, progress=False)
    trainer.fit(module, weft.Data(tensors(), tensors(20)))
    module.train()
    module.net[1].eval()
    modes = [m.training for m in module.modules()]
    trainer.validate()
    assert [m.training for m in module.modules()] == modes
    broken = tensors(20) | {"x": torch.rand(20, 3)}
    with pytest.raises(RuntimeError):
        trainer.validate(broken)
    assert [m.training for m in module.modules()] == modes
    assert torch.is_grad_enabled()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_a_part_with_its_own_eval_or_a_scripted_one_is_put_in_eval_mode_by_it() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[bool] = []

        def train(self, mode: bool = True) -> Stubborn:
            self.seen.append(mode)
            return self  # stays as it was made: in train mode

        def forward(self, x: Tensor) -> Tensor:
            return x

    for layer in (Stubborn(), torch.jit.script(nn.Dropout(0.5))):
        module = nn.Sequential(nn.Linear(2, 2), layer)
        with evaluating(module):
            assert not module[0].training
            assert layer.training == isinstance(layer, Stubborn)
        assert all(m.training for m in module.modules())
        assert getattr(layer, "seen", [False]) == [False]
    plain = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.5)).eval())
    with evaluating(plain):
        assert not any(m.training for m in plain.modules())
    assert [m.training for m in plain.modules()] == [True, True, False, False]


def test_predict_gives_what_the_nodes_compute_in_order_without_inputs_losses_and_targets() -> None:
    module, x = problem(), tensors(50)["x"]
    trainer = weft.Trainer(epochs=2, progress=False)
    trainer.fit(module, weft.Data(tensors(), predict={"x": x[:33]}, batch_size=BATCH))
    with torch.no_grad():
        y = module.net(x)
    weft_problem = weft.Problem([weft.Node(module.net, ["x"], ["y"], name="net")], [weft.objective(lambda y, t: y - t)])
    with pytest.raises(KeyError, match="'t'"):  # a plain module computes its loss as well
        trainer.predict()
    assert torch.allclose(trainer.predict(problem=weft_problem, data={"x": x[:33]})["y"], y[:33])
    dev = weft.DictDataset(tensors(50), name="dev")  # a name of another split is no error here
    for given in (tensors(50), dev, DataLoader(dev, 16), weft.Data(None, predict=dev, batch_size=3)):
        found = trainer.predict(given)
        assert list(found) == ["y"]
        assert torch.allclose(found["y"], y)
    bare = trainer.predict({"x": x}, problem=weft_problem)  # no target t
    assert list(bare) == ["y"]
    assert torch.allclose(bare["y"], y)
    assert not bare["y"].requires_grad
    assert trainer.problem is module


def test_metrics_of_ones_own_are_functions_of_outputs_and_data() -> None:
    metrics = {"mae": lambda y, t: (y - t).abs().mean(), "loss_twice": lambda loss: 2 * loss}
    module, dev = problem(), tensors(20)
    trainer = weft.Trainer(epochs=2, progress=False, metrics=metrics, monitor_metric="dev_mae")
    result = trainer.fit(module, weft.Data(tensors(), dev, batch_size=BATCH))
    assert {"train_mae", "dev_mae", "train_loss_twice", "dev_loss_twice"} < set(result.history)
    with torch.no_grad():
        exact = (module.net(dev["x"]) - dev["t"]).abs().mean().item()
    assert trainer.validate()["dev_mae"] == pytest.approx(exact, rel=1e-6)
    assert result.history["train_loss_twice"] == pytest.approx([2 * v for v in result.history["train_loss"]], rel=1e-6)
    bare = weft.Trainer(
        epochs=1,
        progress=False,
        metrics={"rows": lambda x: len(x)},
        training_step=lambda t, b: t.problem(b)["train_loss"],
    )
    assert bare.fit(problem(), tensors()).history["train_rows"] == [70.0]


# ---------------------------------------------------------------- what is left behind


def test_nothing_is_printed_or_written_unless_asked(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], no_warnings: list[Any]
) -> None:
    trainer = weft.Trainer(epochs=2, progress=False, patience=1)
    trainer.fit(problem(), weft.Data(tensors(), tensors(), tensors(), batch_size=BATCH))
    trainer.test()
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
    assert [str(w.message) for w in no_warnings] == []
    weft.Trainer(epochs=2).fit(problem(), data())
    out, err = capfd.readouterr()
    assert out == ""
    assert "epoch 2/2" in err  # one progress line, on stderr


def test_the_result_shows_itself(tmp_path: Path) -> None:
    trainer = weft.Trainer(epochs=3, progress=False, root_dir=str(tmp_path), run_name="a", checkpoint=True)
    result = trainer.fit(problem(), weft.Data(tensors(), tensors(20), batch_size=BATCH))
    assert result.run_dir == tmp_path / "a"
    assert repr(result).startswith("FitResult(3 epochs, 15 steps, best dev_loss=")
    page = result._repr_html_()
    assert "dev_loss" in page
    assert "<table>" in page
    frame = result.to_dataframe()
    assert list(frame.columns) == list(result.history)
    assert frame["dev_loss"].tolist() == result.history["dev_loss"]
    assert len(result.plot().get_lines()) >= 2
    import matplotlib.pyplot as plt

    plt.close("all")
    loaded = weft.load_result(tmp_path / "a")
    assert same(loaded.last_weights, result.last_weights)
    plain = {k: v for k, v in vars(result).items() if k != "last_weights"}
    assert {k: v for k, v in vars(loaded).items() if k != "last_weights"} == plain
    again = trainer.fit(trainer.problem, weft.Data(tensors(), tensors(20), batch_size=BATCH))
    assert again.run_dir == result.run_dir
    assert weft.load_result(tmp_path / "a").history == again.history


def test_a_trainer_takes_attributes_and_says_what_it_is() -> None:
    trainer = weft.Trainer(epochs=3, patience=2, optimizer=SGD)
    trainer.anything = {"goes": 1}  # pyright: ignore[reportAttributeAccessIssue]
    assert repr(trainer).startswith("Trainer(epochs=3, patience=2, optimizer=")
    assert (trainer.current_epoch, trainer.global_step) == (0, 0)
    with pytest.raises(RuntimeError, match="call fit"):
        _ = trainer.problem
    options = inspect.signature(weft.Trainer).parameters
    assert options["epochs"].default == 1000
    assert {"optimizer", "hooks", "training_step", "patience", "clip_algorithm"} < set(options)
    assert all(p.kind is p.KEYWORD_ONLY for p in options.values())
    weft.Trainer(**{name: p.default for name, p in options.items()})  # what it shows, it takes


def test_weights_are_saved_and_loaded(tmp_path: Path) -> None:
    module = problem()
    trainer = weft.Trainer(epochs=1, progress=False)
    trainer.fit(module, data())
    trainer.save_weights(tmp_path / "w.pt")
    fresh = problem(9)
    assert not same(dict(fresh.state_dict()), dict(module.state_dict()))
    assert weft.load_weights(fresh, tmp_path / "w.pt") is fresh
    assert same(dict(fresh.state_dict()), dict(module.state_dict()))


def test_a_new_run_under_a_name_that_was_used_keeps_the_files_of_every_run_before(tmp_path: Path) -> None:
    written = []
    for epochs in (1, 2, 3):
        weft.Trainer(epochs=epochs, progress=False, root_dir=str(tmp_path), run_name="same").fit(problem(), data())
        written.append((tmp_path / "same" / "metrics.csv").read_text())
    kept = [tmp_path / "same" / "old" / number / "metrics.csv" for number in "12"]
    assert [path.read_text() for path in kept] == written[:2] and written[0] != written[1]
    assert weft.load_result(tmp_path / "same").epochs == 3 and weft.load_result(kept[0].parent).epochs == 1
