"""Phases: stages of one run, with one history, one best and one resume."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from tests.helpers.bitwise import same, weights
from tests.helpers.problems import adam, plant_and_policy, tanh_points


def fit_phases(phases: list[weft.Phase], data: Any = None, of: weft.Problem | None = None, **options: Any) -> Any:
    of, trainer = of or plant_and_policy(), weft.Trainer(phases=phases, progress=False, **options)
    return trainer.fit(of, data or weft.Data(tanh_points(), shuffle=False)), of, trainer


def sgd_with_momentum(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def train_loss_of(of: weft.Problem, data: dict[str, Tensor]) -> Tensor:
    return of({**data, "name": "train"})["train_loss"]


def full_batches_by_hand(
    of: weft.Problem, optimizer: torch.optim.Optimizer, epochs: int, data: dict[str, Tensor]
) -> list[float]:
    losses = []
    for _ in range(epochs):
        optimizer.zero_grad()
        loss = train_loss_of(of, data)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    return losses


# ----------------------------------------------------------------------------------------- what a phase changes


def test_two_phases_equal_two_loops_written_by_hand_with_one_history() -> None:
    result, _, trainer = fit_phases(
        [weft.Phase(epochs=4, optimizer=adam), weft.Phase(epochs=3, optimizer=sgd_with_momentum)]
    )
    theirs, data = plant_and_policy(), tanh_points()
    losses = full_batches_by_hand(theirs, adam(theirs.parameters()), 4, data) + full_batches_by_hand(
        theirs, sgd_with_momentum(theirs.parameters()), 3, data
    )
    assert same(result.last_weights, weights(theirs))
    assert result.history["train_loss"] == losses
    assert (result.epochs, result.steps, result.stop_reason) == (7, 7, "epochs")
    assert result.best_metric == min(losses) and result.best_epoch == losses.index(min(losses))
    assert type(trainer.optimizer) is torch.optim.SGD
    other = plant_and_policy()
    full_batches_by_hand(other, adam(other.parameters()), 7, data)
    assert not same(result.last_weights, weights(other))


def test_what_a_phase_does_not_name_goes_on_as_it_was() -> None:
    one, *_ = fit_phases([weft.Phase(epochs=7)], optimizer=sgd_with_momentum)
    two, *_ = fit_phases([weft.Phase(epochs=4), weft.Phase(epochs=3)], optimizer=sgd_with_momentum)
    assert same(one.last_weights, two.last_weights)


def test_a_phase_has_its_own_schedule_and_loses_the_one_before() -> None:
    rates: list[float] = []
    watch = {"on_epoch_start": lambda t: rates.append(round(t.optimizer.param_groups[0]["lr"], 9))}

    def halving(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    fit_phases(
        [
            weft.Phase(epochs=3),
            weft.Phase(epochs=2, optimizer=sgd_with_momentum),
            weft.Phase(epochs=2, scheduler=halving),
        ],
        optimizer=adam,
        scheduler=halving,
        hooks=watch,
    )
    assert rates == [0.01, 0.005, 0.0025, 0.1, 0.1, 0.1, 0.05]


def test_frozen_parts_stand_still_in_their_phase_only_and_train_again_with_the_same_optimizer() -> None:
    seen: list[dict[str, Tensor]] = []
    watch = {"on_epoch_end": lambda t, m: seen.append(weights(t.problem))}
    _, of, _ = fit_phases([weft.Phase(1), weft.Phase(1, freeze=["plant"]), weft.Phase(1)], optimizer=adam, hooks=watch)
    plant, policy = "nodes.0.fn.0.weight", "nodes.1.fn.weight"
    assert [seen[i][plant].equal(seen[i + 1][plant]) for i in (0, 1)] == [True, False]
    assert [seen[i][policy].equal(seen[i + 1][policy]) for i in (0, 1)] == [False, False]
    assert all(p.requires_grad for p in of.parameters())


def test_a_name_to_freeze_that_does_not_exist_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(ValueError, match="no node or submodule 'plnt'; did you mean 'plant'"):
        fit_phases([weft.Phase(1), weft.Phase(1, freeze=["plnt"])])


def test_a_phase_sets_weights_and_calls_its_setup_once() -> None:
    calls, seen = [], []
    watch = {"on_epoch_start": lambda t: seen.append(t.problem.terms["size"].weight.item())}
    fit_phases(
        [weft.Phase(2), weft.Phase(2, weights={"size": 4.0}, setup=lambda t: calls.append(t.current_epoch))],
        hooks=watch,
    )
    assert calls == [2]
    assert seen == pytest.approx([0.1, 0.1, 4.0, 4.0])


def test_a_longer_rollout_begins_with_its_phase() -> None:
    plant = weft.Node(nn.Linear(2, 2), ["x"], ["x"], name="plant")
    rollout = weft.Rollout([plant], steps=2, name="loop")
    lengths: list[int] = []
    of = weft.Problem([rollout], [weft.objective(lambda x: lengths.append(x.shape[1]) or x**2, name="f")])

    def longer(trainer: weft.Trainer) -> None:
        rollout.steps *= 2

    data = weft.DictDataset({"x": torch.randn(4, 1, 2)})
    fit_phases([weft.Phase(2), weft.Phase(2, setup=longer)], data, of)
    assert lengths == [3, 3, 5, 5]


# ----------------------------------------------------------------------------------------- data


def drawing(rows: int, drawn: list[Tensor], refresh_every: int | None = 2) -> Any:
    def setup() -> weft.Data:
        x = torch.rand(rows, 2)
        drawn.append(x)
        return weft.Data({"x": x, "y": x.sum(-1, keepdim=True)}, refresh_every=refresh_every)

    return setup


@pytest.mark.parametrize("every", [None, 2])
def test_a_phase_trains_on_its_own_data_which_a_refresh_makes_anew(every: int | None) -> None:
    first, second, trained = [], [], []

    def note(trainer: Any, batch: Any) -> None:
        trained.append((len(batch["x"]), len(first), len(second)))

    fit_phases(
        [weft.Phase(3), weft.Phase(5, data=drawing(12, second))],
        drawing(8, first, every),
        seed=3,
        hooks={"on_step_start": note},
    )
    made = [1, 1, 2] if every else [1, 1, 1]
    assert trained == [(8, n, 0) for n in made] + [(12, made[-1], n) for n in (1, 1, 2, 2, 3)]
    drawn = first + second
    assert not any(a[:8].equal(b[:8]) for i, a in enumerate(drawn) for b in drawn[:i])  # never the same points again


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("stop_after", [1, 3, 4, 6])
def test_a_run_resumed_in_any_phase_ends_where_the_uninterrupted_one_does(seed: int | None, stop_after: int) -> None:
    def run(of: weft.Problem, stop: int | None = None, **options: Any) -> Any:
        torch.manual_seed(9)  # what the data functions draw from where seed is None
        if options.get("resume"):
            torch.rand(100)  # a resumed process stands elsewhere

        def fail(trainer: Any) -> None:  # a run that is told to stop would stay stopped
            if stop is not None and trainer.current_epoch == stop + 1:
                raise OSError("the power is gone")

        phases = [
            weft.Phase(epochs=3, optimizer=adam),
            weft.Phase(
                epochs=3, data=drawing(12, []), freeze=["plant"], weights={"size": 1.0}, optimizer=sgd_with_momentum
            ),
            weft.Phase(epochs=3, setup=lambda t: setattr(t.problem, "calls", getattr(t.problem, "calls", 0) + 1)),
        ]
        return fit_phases(
            phases, drawing(8, []), of, seed=seed, hooks={"on_epoch_start": fail}, checkpoint=True, **options
        )[0]

    whole = run(plant_and_policy(), run_name="whole")
    with pytest.raises(OSError, match="power"):
        run(plant_and_policy(), stop_after, run_name="broken")
    resumed = plant_and_policy()
    again = run(resumed, run_name="broken", resume="auto")
    assert same(again.last_weights, whole.last_weights)
    assert again.history == whole.history
    assert (again.best_metric, again.best_epoch, again.steps) == (whole.best_metric, whole.best_epoch, whole.steps)
    assert resumed.terms["size"].weight.item() == 1.0
    assert getattr(resumed, "calls", 0) == 1  # the setup of the last phase, whether it had begun before or not


# ----------------------------------------------------------------------------------------- ends and beginnings


def test_patience_counts_anew_in_each_phase_and_ends_only_its_own() -> None:
    class Scripted(nn.Module):
        """A dev loss that is written down beforehand, by epoch."""

        def __init__(self, losses: list[float]) -> None:
            super().__init__()
            self.p, self.losses = nn.Parameter(torch.ones(1)), losses

        def forward(self, batch: Any) -> Tensor:
            value = self.losses[batch["epoch"]] if batch["name"] == "dev" else 1.0
            return self.p.square().sum() * 0 + value

    #                       phase 0: best 1, ends after two worse      phase 1: 7 is its first, then two worse
    of = Scripted([3.0, 1.0, 2.0, 2.0] + [7.0, 6.0, 6.5, 6.5] + [9.0] * 20)
    data = {"x": torch.zeros(2, 1)}
    result, *_ = fit_phases([weft.Phase(10, patience=2), weft.Phase(10, patience=2)], weft.Data(data, dev=data), of)  # type: ignore[arg-type]
    assert result.history["dev_loss"] == [3.0, 1.0, 2.0, 2.0, 7.0, 6.0, 6.5, 6.5]
    assert (result.stop_reason, result.best_metric, result.best_epoch) == ("patience", 1.0, 1)


def test_the_last_epoch_of_each_phase_is_validated() -> None:
    data = weft.Data(tanh_points(), dev=tanh_points(seed=2), shuffle=False)
    result, *_ = fit_phases([weft.Phase(4), weft.Phase(5)], data, validate_every=3)
    validated = [epoch for epoch, value in enumerate(result.history["dev_loss"]) if not math.isnan(value)]
    assert validated == [2, 3, 5, 8]


def test_a_second_fit_goes_through_the_phases_again_from_the_first_optimizer() -> None:
    phases = [weft.Phase(epochs=2, optimizer=adam), weft.Phase(epochs=2, optimizer=sgd_with_momentum)]
    kinds: list[str] = []
    of, trainer = (
        plant_and_policy(),
        weft.Trainer(
            phases=phases, progress=False, hooks={"on_epoch_start": lambda t: kinds.append(type(t.optimizer).__name__)}
        ),
    )
    data = weft.Data(tanh_points(), shuffle=False)
    trainer.fit(of, data)
    result = trainer.fit(of, data)
    assert kinds == ["Adam", "Adam", "SGD", "SGD"] * 2
    assert result.epochs == 8 and len(result.history["train_loss"]) == 8


def test_a_second_fit_of_phases_that_share_an_optimizer_keeps_its_state() -> None:
    phases = [weft.Phase(epochs=2), weft.Phase(epochs=2, weights={"size": 0.1})]
    of, data = plant_and_policy(), weft.Data(tanh_points(), shuffle=False)
    trainer = weft.Trainer(phases=phases, progress=False, optimizer=sgd_with_momentum)
    trainer.monitors_by_default = False  # else the best weights are put back in between
    trainer.fit(of, data)
    result = trainer.fit(of, data)
    once, *_ = fit_phases([weft.Phase(epochs=8)], optimizer=sgd_with_momentum)
    assert same(result.last_weights, once.last_weights)


def test_an_interrupted_phase_is_taken_up_where_it_was_without_beginning_again() -> None:
    calls: list[int] = []
    phases = [
        weft.Phase(epochs=2, optimizer=sgd_with_momentum),
        weft.Phase(
            epochs=4,
            optimizer=adam,
            freeze=["plant"],
            weights={"size": 1.0},
            setup=lambda t: calls.append(1),
            data=weft.Data(tanh_points(seed=4), shuffle=False),
        ),
    ]

    def adapt(trainer: Any, batch: Any, loss: Tensor) -> None:  # a weight that moves on its own
        trainer.problem.terms["size"].weight.mul_(1.5)

    def interrupt(trainer: Any, metrics: Any) -> None:
        if trainer.current_epoch == 3 and not stopped:
            stopped.append(weights(trainer.problem) | {"weight": trainer.problem.terms["size"].weight.clone()})
            raise KeyboardInterrupt

    stopped: list[Any] = []
    begun: list[float] = []
    of = plant_and_policy()
    watch = {"on_epoch_start": lambda t: begun.append(t.problem.terms["size"].weight.item())}
    trainer = weft.Trainer(
        phases=phases, progress=False, hooks=[{"on_step_end": adapt, "on_epoch_end": interrupt}, watch]
    )
    trainer.monitors_by_default = False
    data = weft.Data(tanh_points(), shuffle=False)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(of, data)
    assert all(p.requires_grad for p in of.parameters())
    epochs_begun = len(begun)
    result = trainer.fit(of, data)
    assert calls == [1]
    assert begun[epochs_begun] == stopped[0].pop("weight").item() > 1.0  # not set to 1 again
    for name, value in result.last_weights.items():
        assert value.equal(stopped[0][name]) == name.startswith("nodes.0")  # the plant stayed frozen
    assert type(trainer.optimizer) is torch.optim.Adam


def test_no_epochs_train_nothing() -> None:
    of = plant_and_policy()
    before = weights(of)
    result = weft.Trainer(epochs=0, progress=False).fit(of, weft.Data(tanh_points()))
    assert (result.epochs, result.steps) == (0, 0) and same(weights(of), before)


# ----------------------------------------------------------------------------------------- Adam, then LBFGS


def burgers_residual(u: Tensor, x: Tensor, t: Tensor, viscosity: float = 0.01 / torch.pi) -> Tensor:
    """u_t + u u_x - viscosity u_xx."""
    u_x, u_t = torch.autograd.grad(u.sum(), (x, t), create_graph=True)
    (u_xx,) = torch.autograd.grad(u_x.sum(), x, create_graph=True)
    return u_t + u * u_x - viscosity * u_xx


class Burgers(nn.Module):
    """Burgers' equation on [-1, 1] x [0, 1], u(x, 0) = -sin(pi x), u = 0 at the ends."""

    grad_inference = True

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [m for _ in range(2) for m in (nn.Linear(16, 16), nn.Tanh())]
        self.net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), *layers, nn.Linear(16, 1))
        self.evaluations = 0

    def u(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(torch.cat([x, t], dim=-1))

    def forward(self, batch: Any) -> dict[str, Tensor]:
        self.evaluations += 1
        x, t, start, ends = batch["x"], batch["t"], batch["start"], batch["ends"]
        residual = burgers_residual(self.u(x, t), x, t)
        initial = self.u(start, torch.zeros_like(start)) + torch.sin(torch.pi * start)
        return {"loss": residual.square().mean() + initial.square().mean() + self.u(ends, t).square().mean()}


def collocation(rows: int = 100) -> weft.Data:
    generator = torch.Generator().manual_seed(1)
    x, t, start, ends = torch.rand(4, rows, 1, generator=generator)
    data = {"x": 2 * x - 1, "t": t, "start": 2 * start - 1, "ends": torch.sign(2 * ends - 1)}
    return weft.Data(data, shuffle=False, inputs_require_grad=("x", "t"))


def test_adam_then_lbfgs_ends_ten_times_lower_than_adam_after_as_many_evaluations() -> None:
    def by_adam(params: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=1e-3, fused=True)

    def by_lbfgs(params: Any) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(
            params, max_iter=20, history_size=50, line_search_fn="strong_wolfe", tolerance_grad=0, tolerance_change=0
        )

    phases = [weft.Phase(epochs=500, optimizer=by_adam), weft.Phase(epochs=40, optimizer=by_lbfgs)]
    both, alone, options = Burgers(), Burgers(), {"precision": "64-true", "progress": False}
    result = weft.Trainer(phases=phases, **options).fit(both, collocation())
    evaluations = 500 + result.evaluations
    assert both.evaluations == evaluations
    adam_alone = weft.Trainer(epochs=evaluations, optimizer=by_adam, **options).fit(alone, collocation())
    assert alone.evaluations == evaluations
    assert result.best_metric is not None and adam_alone.best_metric is not None
    factor = adam_alone.best_metric / result.best_metric
    print(f"Adam then LBFGS: {result.best_metric:.2e}, Adam: {adam_alone.best_metric:.2e}, {factor:.0f} times")
    assert factor > 10
    assert same(adam_alone.history["train_loss"][:500], result.history["train_loss"][:500])
