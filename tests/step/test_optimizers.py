"""Optimizers and schedules against loops written by hand, to the last bit."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.optim.swa_utils import SWALR

import weft
from tests.helpers.bitwise import same, weights


def regression_rows(rows: int = 24, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, 2, generator=generator, dtype=dtype)
    return {"x": x, "y": torch.sin(x.sum(-1, keepdim=True))}


class BodyAndHead(nn.Module):
    """A body and a head; the loss is their squared error."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.body = nn.Sequential(nn.Linear(2, 8), nn.Tanh()).to(dtype)
        self.head = nn.Linear(8, 1).to(dtype)

    def forward(self, batch: Any) -> dict[str, Tensor]:
        return {"loss": (self.head(self.body(batch["x"])) - batch["y"]).square().mean()}


def fit_quietly(problem: nn.Module, data: Any, **options: Any) -> tuple[weft.FitResult, weft.Trainer]:
    trainer = weft.Trainer(progress=False, **options)
    return trainer.fit(problem, data), trainer


def steps_by_hand(
    problem: nn.Module, data: dict[str, Tensor], epochs: int, optimizers: list[Any], after: Any = None
) -> None:
    for epoch in range(epochs):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = problem(data)["loss"]
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        if after is not None:
            after(epoch, loss)


def in_order(data: dict[str, Tensor]) -> weft.Data:
    return weft.Data(weft.DictDataset(data), shuffle=False)


# ---------------------------------------------------------------------------------------------------------- first order


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
        lambda params: torch.optim.AdamW(params, lr=1e-2),
        lambda params: torch.optim.RMSprop(params, lr=1e-2),
        lambda params: torch.optim.Muon([p for p in params if p.ndim == 2], lr=1e-2),
    ],
    ids=["sgd", "adamw", "rmsprop", "muon"],
)
def test_an_optimizer_steps_as_in_a_loop_written_by_hand(make: Callable[..., Any]) -> None:
    ours, theirs, data = BodyAndHead(), BodyAndHead(), regression_rows()
    result, _ = fit_quietly(ours, in_order(data), epochs=7, optimizer=make)
    steps_by_hand(theirs, data, 7, [make(list(theirs.parameters()))])
    assert same(result.last_weights, weights(theirs))
    steps_by_hand(theirs, data, 1, [make(list(theirs.parameters()))])
    assert not same(result.last_weights, weights(theirs))


def test_groups_of_parameters_keep_their_own_learning_rates() -> None:
    ours, theirs, data = BodyAndHead(), BodyAndHead(), regression_rows()

    def grouped(problem: BodyAndHead) -> torch.optim.Optimizer:
        body, head = problem.body.parameters(), problem.head.parameters()
        return torch.optim.Adam([{"params": body, "lr": 1e-3}, {"params": head, "lr": 1e-1}])

    result, _ = fit_quietly(ours, in_order(data), epochs=5, optimizer=grouped(ours))
    steps_by_hand(theirs, data, 5, [grouped(theirs)])
    assert same(result.last_weights, weights(theirs))


def test_an_optimizer_per_node_gets_the_parameters_of_that_node() -> None:
    ours, theirs, data = BodyAndHead(), BodyAndHead(), regression_rows()
    rates = {"body": 0.05, "head": 0.2}
    made = {name: lambda p, lr=lr: torch.optim.SGD(p, lr=lr) for name, lr in rates.items()}
    result, trainer = fit_quietly(ours, in_order(data), epochs=5, optimizer=made)
    steps_by_hand(
        theirs, data, 5, [torch.optim.SGD(getattr(theirs, name).parameters(), lr=lr) for name, lr in rates.items()]
    )
    assert same(result.last_weights, weights(theirs))
    assert list(trainer.optimizers) == ["body", "head"]


def test_an_optimizer_for_a_node_that_does_not_exist_is_an_error_with_a_suggestion() -> None:
    made = {"body": torch.optim.SGD, "heat": torch.optim.SGD}
    with pytest.raises(ValueError, match="no node or submodule 'heat'; did you mean 'head'"):
        fit_quietly(BodyAndHead(), in_order(regression_rows()), epochs=1, optimizer=made)


def test_a_parameter_in_two_optimizers_is_an_error_that_names_it() -> None:
    problem = BodyAndHead()
    twice = {
        "all": torch.optim.SGD(problem.parameters(), lr=0.1),
        "head": torch.optim.SGD(problem.head.parameters(), lr=0.1),
    }
    with pytest.raises(ValueError, match=r"'head.weight', 'head.bias'.*belong to several optimizers"):
        fit_quietly(problem, in_order(regression_rows()), epochs=1, optimizer=twice)


class TwoLosses(nn.Module):
    """Two numbers, each with a loss of its own by the name of its optimizer; data can make `b`'s gradient infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))

    def forward(self, batch: Any) -> dict[str, Tensor]:
        breaks = batch["x"].sum() > 1e6
        b = (self.b - 1).sqrt() if breaks else self.b.square()  # finite, but not its derivative at 1
        return {"one": self.a.square().sum(), "two": b.sum()}


@pytest.mark.parametrize("breaks", [True, False])
def test_either_all_optimizers_step_or_none(breaks: bool) -> None:
    problem = TwoLosses()
    optimizers = {name: torch.optim.SGD([p], lr=0.1) for name, p in (("one", problem.a), ("two", problem.b))}
    data = weft.DictDataset({"x": torch.full((2, 1), 1e9 if breaks else 0.0)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit_quietly(problem, data, epochs=1, optimizer=optimizers, on_nonfinite="skip")
    assert (problem.a.item() == 1.0, problem.b.item() == 1.0) == (breaks, breaks)


# -------------------------------------------------------------------------------------------------------------
# schedules


def sequential(o: Any) -> Any:
    return SequentialLR(o, [LinearLR(o, 0.1, total_iters=3), ExponentialLR(o, 0.5)], milestones=[3])


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: LambdaLR(o, lambda n: 0.9**n),
    "MultiplicativeLR": lambda o: MultiplicativeLR(o, lambda n: 0.95),
    "StepLR": lambda o: StepLR(o, 2),
    "MultiStepLR": lambda o: MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: LinearLR(o, 0.1, total_iters=4),
    "ExponentialLR": lambda o: ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: PolynomialLR(o, 8, 2.0),
    "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: CyclicLR(o, 0.01, 0.1, 3, cycle_momentum=False),
    "OneCycleLR": lambda o: OneCycleLR(o, 0.1, total_steps=20),
    "SequentialLR": sequential,
    "ChainedScheduler": lambda o: ChainedScheduler([ConstantLR(o, 0.5, 3), ExponentialLR(o, 0.9)]),
    "SWALR": lambda o: SWALR(o, 0.001, anneal_epochs=3),
    "ReduceLROnPlateau": lambda o: ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=0.5),
}


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.5)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_kind_of_scheduler_steps_as_in_a_loop_written_by_hand_and_is_resumed(name: str) -> None:
    ours, theirs, data = BodyAndHead(), BodyAndHead(), regression_rows()
    result, _ = fit_quietly(ours, in_order(data), epochs=9, optimizer=sgd, scheduler=SCHEDULERS[name])
    optimizer = sgd(theirs.parameters())
    scheduler = SCHEDULERS[name](optimizer)
    steps_by_hand(theirs, data, 9, [optimizer], lambda _, loss: step_scheduler(scheduler, loss))
    assert same(result.last_weights, weights(theirs))

    interrupted, resumed = BodyAndHead(), BodyAndHead()
    options = {"optimizer": sgd, "scheduler": SCHEDULERS[name], "checkpoint": True, "run_name": "it"}
    fuse = [5]  # the power goes when this epoch begins
    options["hooks"] = {"on_epoch_start": lambda t: t.current_epoch in fuse and 1 / 0}
    with pytest.raises(ZeroDivisionError):
        fit_quietly(interrupted, in_order(data), epochs=9, **options)
    fuse.clear()
    again, _ = fit_quietly(resumed, in_order(data), epochs=9, resume="auto", **options)
    assert same(again.last_weights, weights(theirs))

    without = BodyAndHead()
    constant, _ = fit_quietly(without, in_order(data), epochs=9, optimizer=sgd)
    assert not same(constant.last_weights, weights(theirs))


def step_scheduler(scheduler: Any, loss: Tensor) -> None:
    scheduler.step(loss.item()) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()


@pytest.mark.parametrize(("interval", "frequency"), [("step", 1), ("step", 3), ("epoch", 2)])
def test_a_schedule_steps_at_its_interval_and_frequency(interval: Any, frequency: int) -> None:
    data, rates = regression_rows(rows=24), []
    schedule = weft.Schedule(lambda o: ExponentialLR(o, 0.5), interval=interval, frequency=frequency)
    watch = {"on_step_end": lambda t, b, loss: rates.append(t.optimizer.param_groups[0]["lr"])}
    fit_quietly(BodyAndHead(), weft.Data(data, batch_size=8), epochs=4, optimizer=sgd, scheduler=schedule, hooks=watch)
    # 3 steps an epoch; a schedule by steps has stepped before on_step_end
    counts = [(n + 1) if interval == "step" else n // 3 for n in range(12)]
    assert rates == [0.1 * 0.5 ** (count // frequency) for count in counts]


def test_a_plateau_by_steps_is_refused_because_its_metric_is_known_once_an_epoch() -> None:
    schedule = weft.Schedule(ReduceLROnPlateau, interval="step")
    with pytest.raises(ValueError, match="follows a metric, which is known once an epoch: use interval='epoch'"):
        fit_quietly(BodyAndHead(), in_order(regression_rows()), epochs=4, optimizer=sgd, scheduler=schedule)


def test_a_monitored_schedule_waits_in_epochs_without_validation_and_misses_a_wrong_name() -> None:
    data = regression_rows()
    both = weft.Data(data, dev=data, shuffle=False)

    def plateau(monitor: str) -> weft.Schedule:
        return weft.Schedule(lambda o: ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=0.9), monitor=monitor)

    rates: list[float] = []
    watch = {"on_epoch_start": lambda t: rates.append(t.optimizer.param_groups[0]["lr"])}
    options = {"optimizer": sgd, "validate_every": 2, "hooks": watch}
    fit_quietly(BodyAndHead(), both, epochs=7, scheduler=plateau("dev_loss"), **options)
    assert rates == [0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.025]  # validated after epochs 1, 3, 5
    with pytest.raises(ValueError, match="needs the metric 'dev_los', .* did you mean 'dev_loss'"):
        fit_quietly(BodyAndHead(), both, epochs=7, scheduler=plateau("dev_los"), **options)


# -----------------------------------------------------------------------------------------------------------------
# LBFGS


def lbfgs(params: Any, **options: Any) -> torch.optim.LBFGS:
    return torch.optim.LBFGS(params, **{"max_iter": 6, "line_search_fn": "strong_wolfe", **options})


class CountedRegression(BodyAndHead):
    """Counts how often it is evaluated with gradients."""

    evaluations = 0

    def forward(self, batch: Any) -> dict[str, Tensor]:
        self.evaluations += torch.is_grad_enabled()
        return super().forward(batch)


@pytest.mark.parametrize("search", ["strong_wolfe", None])
@pytest.mark.parametrize("rows", [None, 10])
def test_lbfgs_evaluates_and_ends_as_in_a_loop_written_by_hand(search: str | None, rows: int | None) -> None:
    data, epochs = regression_rows(dtype=torch.float64), 5
    ours, theirs = CountedRegression(torch.float64), CountedRegression(torch.float64)
    size = rows or len(data["x"])
    batches = [{k: v[i : i + size] for k, v in data.items()} for i in range(0, len(data["x"]), size)]
    result, _ = fit_quietly(
        ours,
        weft.Data(data, batch_size=rows, shuffle=False),
        epochs=epochs,
        precision="64-true",
        optimizer=lambda p: lbfgs(p, line_search_fn=search, lr=0.5),
        monitor_metric="train_loss",
    )
    optimizer = lbfgs(theirs.parameters(), line_search_fn=search, lr=0.5)
    for _ in range(epochs):
        for batch in batches:

            def closure(batch: Any = batch) -> Tensor:
                optimizer.zero_grad()
                loss = theirs(batch)["loss"]
                loss.backward()
                return loss

            optimizer.step(closure)
    assert result.evaluations == ours.evaluations == theirs.evaluations > epochs * len(batches)
    assert same(result.last_weights, weights(theirs))
    mean = sum(result.history["lbfgs_evaluations"]) / epochs
    assert mean * epochs * len(batches) == pytest.approx(theirs.evaluations, rel=1e-12)
    if search and rows is None:  # the logged loss is that of the weights after the step, and cost no evaluation
        with torch.no_grad():
            assert result.history["train_loss"][-1] == theirs(data)["loss"].item()


def test_accumulated_batches_are_one_loss_for_a_line_search() -> None:
    data = regression_rows(dtype=torch.float64)
    whole, parts = BodyAndHead(torch.float64), BodyAndHead(torch.float64)
    options = {"epochs": 3, "precision": "64-true", "optimizer": lbfgs}
    one, _ = fit_quietly(whole, in_order(data), **options)
    many, _ = fit_quietly(parts, weft.Data(data, batch_size=10, shuffle=False), accumulate=3, **options)
    assert many.evaluations == one.evaluations
    for name, value in one.last_weights.items():
        torch.testing.assert_close(many.last_weights[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_iter": 2, "max_eval": 50}, "max_iter"),
        ({"max_iter": 50, "max_eval": 3}, "max_eval"),
        ({"max_iter": 500, "max_eval": 5000, "tolerance_grad": 1e-3, "tolerance_change": 0.0}, "tolerance_grad"),
        ({"tolerance_grad": 1e3}, "tolerance_grad"),
        (
            {"max_iter": 500, "max_eval": 5000, "tolerance_grad": 0.0, "tolerance_change": 1e-5},
            "tolerance_change (loss)",
        ),
        ({"tolerance_change": 1e6}, "tolerance_change (slope)"),
        ({"lr": 1e-12, "line_search_fn": None, "tolerance_change": 1e-10}, "tolerance_change (step)"),
    ],
)
def test_lbfgs_says_which_of_its_options_ended_it(options: dict[str, Any], reason: str) -> None:
    problem = BodyAndHead(torch.float64)
    data = in_order(regression_rows(dtype=torch.float64))
    result, _ = fit_quietly(problem, data, epochs=1, precision="64-true", optimizer=lambda p: lbfgs(p, **options))
    assert result.search_stop == reason
    assert f"the last ended by {reason}" in result._repr_html_()


def test_lbfgs_at_the_end_of_float32_says_so_once_and_in_float64_goes_on(no_warnings: list[Any]) -> None:
    def ends(precision: str) -> float:
        options = {"epochs": 12, "precision": precision, "monitor_metric": "train_loss"}
        problem, data = BodyAndHead(), in_order(regression_rows())
        result, _ = fit_quietly(
            problem, data, optimizer=lambda p: lbfgs(p, max_iter=100, tolerance_grad=0.0), **options
        )
        assert result.best_metric is not None
        return result.best_metric

    in_float64 = ends("64-true")
    assert not no_warnings
    in_float32 = ends("32-true")
    assert [str(w.message).split(" where ")[0] for w in no_warnings] == ["LBFGS no longer finds a lower loss"]
    assert in_float64 < in_float32


def test_a_number_that_is_not_finite_in_a_search_gives_weights_and_search_back() -> None:
    class Breaking(BodyAndHead):
        broken = False

        def forward(self, batch: Any) -> dict[str, Tensor]:
            out = super().forward(batch)
            return {"loss": out["loss"] * (math.nan if self.broken else 1.0)}

    def run(breaks_in: int | None) -> tuple[dict[str, Tensor], Any]:
        problem = Breaking(torch.float64)
        before: dict[str, Any] = {}

        def on_step_start(trainer: Any, batch: Any) -> None:
            problem.broken = trainer.global_step == breaks_in
            if problem.broken:
                before.update(weights=weights(problem), state=state_of(trainer.optimizer))

        def on_step_end(trainer: Any, batch: Any, loss: Tensor) -> None:
            if problem.broken:
                assert same(before["weights"], weights(problem))
                assert same(before["state"], state_of(trainer.optimizer))

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result, trainer = fit_quietly(
                problem,
                in_order(regression_rows(dtype=torch.float64)),
                epochs=4,
                precision="64-true",
                optimizer=lbfgs,
                on_nonfinite="skip",
                hooks={"on_step_start": on_step_start, "on_step_end": on_step_end},
            )
        return result.last_weights, trainer

    broken, trainer = run(breaks_in=2)
    assert trainer.run is not None and trainer.run.progress.skipped_total == 1
    assert all(value.isfinite().all() for value in broken.values())
    whole, _ = run(breaks_in=None)
    assert not same(broken, whole)


def test_an_error_in_the_middle_of_a_search_leaves_the_weights_from_before_it() -> None:
    class Failing(CountedRegression):
        def forward(self, batch: Any) -> dict[str, Tensor]:
            if self.evaluations == 3:
                raise ArithmeticError("the plant blew up")
            return super().forward(batch)

    problem, before = Failing(torch.float64), weights(Failing(torch.float64))
    with pytest.raises(ArithmeticError, match="the plant blew up"):
        fit_quietly(
            problem, in_order(regression_rows(dtype=torch.float64)), epochs=1, precision="64-true", optimizer=lbfgs
        )
    assert same(weights(problem), before)


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {k: copied(v) for state in optimizer.state_dict()["state"].values() for k, v in state.items()}


def copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else list(value) if isinstance(value, list) else value


def test_lbfgs_is_resumed_to_the_last_bit() -> None:
    data = in_order(regression_rows(dtype=torch.float64))
    fuse: list[int] = []  # the power goes when this epoch begins
    options = {"epochs": 6, "precision": "64-true", "optimizer": lbfgs}
    options["hooks"] = {"on_epoch_start": lambda t: t.current_epoch in fuse and 1 / 0}
    whole, _ = fit_quietly(BodyAndHead(torch.float64), data, **options)
    fuse.append(3)
    with pytest.raises(ZeroDivisionError):
        fit_quietly(BodyAndHead(torch.float64), data, checkpoint=True, run_name="it", **options)
    fuse.clear()
    again, _ = fit_quietly(BodyAndHead(torch.float64), data, checkpoint=True, run_name="it", resume="auto", **options)
    assert same(again.last_weights, whole.last_weights)
    assert (again.evaluations, again.search_stop) == (whole.evaluations, whole.search_stop)


def test_clipping_has_no_effect_on_a_line_search_and_says_so() -> None:
    data = in_order(regression_rows(dtype=torch.float64))
    options = {"epochs": 2, "precision": "64-true", "optimizer": lbfgs}
    free, _ = fit_quietly(BodyAndHead(torch.float64), data, **options)
    with pytest.warns(UserWarning, match="clip=0.001 has no effect with LBFGS"):
        clipped, _ = fit_quietly(BodyAndHead(torch.float64), data, clip=1e-3, **options)
    assert same(free.last_weights, clipped.last_weights)


class Sam(torch.optim.SGD):
    """A closure optimizer of one's own whose signature does not tell that it needs a closure."""

    needs_closure = True

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        for _ in range(2):
            loss = closure()
            super().step()
        return loss


def test_any_optimizer_that_needs_a_closure_is_given_one() -> None:
    ours, theirs, data = CountedRegression(), BodyAndHead(), regression_rows()
    result, _ = fit_quietly(ours, in_order(data), epochs=3, optimizer=lambda p: Sam(p, lr=0.1))
    steps_by_hand(theirs, data, 6, [torch.optim.SGD(theirs.parameters(), lr=0.1)])
    assert same(result.last_weights, weights(theirs))
    assert result.evaluations == ours.evaluations == 6
    assert result.history["sam_evaluations"] == [2.0, 2.0, 2.0]
    assert result.search_stop is None


def test_a_closure_optimizer_beside_another_is_an_error() -> None:
    made = {"body": torch.optim.SGD, "head": torch.optim.LBFGS}
    with pytest.raises(ValueError, match=r"\['body', 'head'\]: LBFGS, which needs a closure, must be the only one"):
        fit_quietly(BodyAndHead(), in_order(regression_rows()), epochs=1, optimizer=made)


# -------------------------------------------------------------------------------------------------------------------
# GAN


class Gan(nn.Module):
    """A generator of points and a discriminator; one forward, both losses by the names of their optimizers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
        self.discriminator = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))

    def judged(self, points: Tensor, real: float) -> Tensor:
        score = self.discriminator(points)
        return nn.functional.binary_cross_entropy_with_logits(score, torch.full_like(score, real))

    def discriminator_loss(self, batch: Any) -> Tensor:
        return self.judged(batch["x"], 1.0) + self.judged(self.generator(batch["z"]).detach(), 0.0)

    def generator_loss(self, batch: Any) -> Tensor:
        return self.judged(self.generator(batch["z"]), 1.0)

    def forward(self, batch: Any) -> dict[str, Tensor]:
        return {"generator": self.generator_loss(batch), "discriminator": self.discriminator_loss(batch)}


def gan_data() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    return {name: torch.randn(32, 2, generator=generator) for name in ("x", "z")}


def gan_optimizers(problem: Gan) -> dict[str, torch.optim.Optimizer]:
    return {
        "generator": torch.optim.Adam(problem.generator.parameters(), lr=1e-2, fused=True),
        "discriminator": torch.optim.Adam(problem.discriminator.parameters(), lr=2e-2, fused=True),
    }


def test_a_gan_that_returns_both_losses_takes_all_gradients_before_any_step() -> None:
    ours, theirs, data = Gan(), Gan(), gan_data()
    result, _ = fit_quietly(
        ours, in_order(data), epochs=6, optimizer=gan_optimizers(ours), monitor_metric="train_generator"
    )
    optimizers = gan_optimizers(theirs)
    for _ in range(6):
        losses = theirs(data)
        gradients = {
            name: torch.autograd.grad(losses[name], list(getattr(theirs, name).parameters()), retain_graph=True)
            for name in optimizers
        }
        for name, optimizer in optimizers.items():
            for p, g in zip(getattr(theirs, name).parameters(), gradients[name], strict=True):
                p.grad = g
            optimizer.step()
    assert same(result.last_weights, weights(theirs))
    assert set(result.history) == {"train_generator", "train_discriminator", "train_loss"}

    alternating = Gan()
    alternate(alternating, data, ["discriminator", "generator"], 6)
    assert not same(result.last_weights, weights(alternating))


def alternate(problem: Gan, data: Any, order: list[str], epochs: int) -> None:
    optimizers = gan_optimizers(problem)
    for _ in range(epochs):
        for name in order:
            optimizers[name].zero_grad()
            getattr(problem, f"{name}_loss")(data).backward()
            optimizers[name].step()


@pytest.mark.parametrize("order", [["discriminator", "generator"], ["generator", "discriminator"]])
def test_alternating_updates_written_with_backward_and_step_equal_the_loop_written_by_hand(order: list[str]) -> None:
    class GanTrainer(weft.Trainer):
        def update(self, batch: Any) -> dict[str, Tensor]:
            losses = {}
            for name in order:
                losses[name] = getattr(self.problem, f"{name}_loss")(batch)
                self.backward(losses[name])
                self.step(name)
            return losses

    ours, theirs, data = Gan(), Gan(), gan_data()
    trainer = GanTrainer(epochs=6, optimizer=gan_optimizers(ours), monitor_metric="train_generator", progress=False)
    result = trainer.fit(ours, in_order(data))
    alternate(theirs, data, order, 6)
    assert same(result.last_weights, weights(theirs))
    assert result.steps == 6


def test_losses_taken_before_any_step_are_not_lost_when_the_first_optimizer_steps() -> None:
    """backward, backward, step, step: the gradients of the second optimizer wait for its step."""

    class GanTrainer(weft.Trainer):
        def update(self, batch: Any) -> None:
            for name, optimizer in self.optimizers.items():
                loss = getattr(self.problem, f"{name}_loss")(batch)
                params = [p for group in optimizer.param_groups for p in group["params"]]
                self.backward(loss, inputs=params)
            for name in self.optimizers:
                self.step(name)

    at_once, apart, data = Gan(), Gan(), gan_data()
    one, _ = fit_quietly(
        at_once, in_order(data), epochs=4, optimizer=gan_optimizers(at_once), monitor_metric="train_generator"
    )
    trainer = GanTrainer(epochs=4, optimizer=gan_optimizers(apart), progress=False)
    trainer.monitors_by_default = False
    assert same(trainer.fit(apart, in_order(data)).last_weights, one.last_weights)
