"""Averages of weights, curricula, gradient norms, resampled points, parts loaded and frozen: hooks by name."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import weft
from tests.helpers.bitwise import same, weights
from tests.helpers.problems import plant_and_policy, tanh_points
from tests.helpers.resuming import Crash


def shuffled_data(dev: bool = True) -> weft.Data:
    return weft.Data(tanh_points(), dev=tanh_points(seed=2) if dev else None, batch_size=4)


def fit_with_hooks(of: weft.Problem, hooks: Any, epochs: int = 5, over: Any = None, **options: Any) -> weft.FitResult:
    trainer = weft.Trainer(epochs=epochs, progress=False, seed=3, hooks=hooks, **options)
    return trainer.fit(of, over or shuffled_data())


def crash_before(step: int | None) -> dict[str, Any]:
    def on_step_start(trainer: Any, batch: Any) -> None:
        if trainer.global_step == step:
            raise Crash

    return {"on_step_start": on_step_start}


# ----------------------------------------------------------------------------------------- averages


def trajectory(epochs: int) -> list[dict[str, Tensor]]:
    """The weights after each step of a run without averages."""
    seen: list[dict[str, Tensor]] = []
    fit_with_hooks(plant_and_policy(), {"on_step_end": lambda t, b, loss: seen.append(weights(t.problem))}, epochs)
    return seen


def dev_loss(state: dict[str, Tensor]) -> float:
    of = plant_and_policy()
    of.load_state_dict(state)
    with torch.no_grad():
        losses = [
            of({k: v[i : i + 4] for k, v in tanh_points(seed=2).items()} | {"name": "dev"})["dev_loss"]
            for i in range(0, 16, 4)
        ]
    return torch.stack(losses).double().mean().item()


def averaged(steps: list[dict[str, Tensor]], average: Any) -> list[dict[str, Tensor]]:
    """torch's own averages after each of `steps`."""
    live = plant_and_policy()
    model = AveragedModel(live, multi_avg_fn=average)
    found = []
    for state in steps:
        live.load_state_dict(state)
        model.update_parameters(live)
        found.append(weights(model.module))
    return found


def test_ema_is_that_of_torch_and_is_what_validation_sees_and_best_weights_are() -> None:
    steps = trajectory(5)
    expected = averaged(steps, get_ema_multi_avg_fn(0.8))
    of, live = plant_and_policy(), []
    result = fit_with_hooks(
        of, [weft.hooks.EMA(0.8), {"on_step_end": lambda t, b, loss: live.append(weights(t.problem))}]
    )
    assert same(live, steps)  # training itself is as without
    ends = expected[3::4]
    assert result.history["dev_loss"] == pytest.approx([dev_loss(state) for state in ends], rel=1e-12)
    assert result.best_epoch is not None
    assert same(weights(of), ends[result.best_epoch])
    assert same(result.last_weights, steps[-1])
    assert not same(weights(of), steps[-1])


def test_swa_is_the_mean_of_the_weights_at_the_ends_of_epochs() -> None:
    steps = trajectory(6)
    hook = weft.hooks.SWA(start_epoch=2)
    fit_with_hooks(plant_and_policy(), hook, epochs=6)
    for name, average in hook.averages.items():
        torch.testing.assert_close(
            average, torch.stack([steps[i][name] for i in (11, 15, 19, 23)]).mean(0), rtol=1e-5, atol=1e-7
        )
    from_torch = averaged([steps[i] for i in (11, 15, 19, 23)], None)[-1]
    for name, average in hook.averages.items():
        torch.testing.assert_close(average, from_torch[name], rtol=1e-6, atol=1e-8)


def test_without_validation_the_problem_holds_the_averages_at_the_end() -> None:
    of, hook = plant_and_policy(), weft.hooks.EMA(0.9)
    result = fit_with_hooks(of, hook, over=shuffled_data(dev=False))
    assert same(weights(of), dict(hook.averages))
    assert not same(weights(of), result.last_weights)


def test_averages_are_resumed_to_the_last_bit() -> None:
    saved = {"checkpoint": {"every_n_steps": 1}, "run_name": "it"}
    whole, again, hook, other = plant_and_policy(), plant_and_policy(), weft.hooks.EMA(0.8), weft.hooks.EMA(0.8)
    one = fit_with_hooks(whole, hook)
    with pytest.raises(Crash):
        fit_with_hooks(plant_and_policy(), [weft.hooks.EMA(0.8), crash_before(10)], **saved)
    two = fit_with_hooks(again, [other, crash_before(None)], resume="auto", **saved)
    assert same(weights(again), weights(whole)) and same(one.last_weights, two.last_weights)
    assert same(hook.state_dict(), other.state_dict()) and hook.count == 20


def test_training_after_an_evaluation_in_the_middle_of_an_epoch_goes_on_with_the_trained_weights() -> None:
    trainer = weft.Trainer(epochs=3, progress=False, seed=3, hooks=weft.hooks.EMA(0.8))
    with trainer.start(plant_and_policy(), shuffled_data()) as run:
        for _ in run.epochs():
            for batch in run.batches("train"):
                run.update(batch)
                run.evaluate("dev")
    assert run.result is not None
    assert same(run.result.last_weights, trajectory(3)[-1])


def test_weights_that_cannot_be_copied_deeply_are_averaged() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.ones(2))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # beta state
                self.register_buffer("a", torch.eye(2).to_sparse_csr())

        def forward(self, batch: Any) -> Tensor:
            return (self.a @ self.p[:, None] - batch["x"].mean()).square().sum()

    of = Sparse()
    with pytest.raises(NotImplementedError):
        AveragedModel(of)
    weft.Trainer(epochs=3, progress=False, hooks=weft.hooks.EMA(0.5)).fit(
        of, weft.Data(tanh_points(), dev=tanh_points())
    )


# ----------------------------------------------------------------------------------------- curriculum


def test_a_curriculum_sets_weights_and_attributes_by_epoch_and_logs_them() -> None:
    plant = weft.Node(nn.Linear(2, 2), ["x"], ["x"], name="plant")
    lengths: list[int] = []
    of = weft.Problem(
        [weft.Rollout([plant], steps=1, name="loop")],
        [
            weft.objective(lambda x: lengths.append(x.shape[1]) or x**2, name="track"),
            weft.objective(lambda x: x.abs(), name="effort"),
        ],
    )
    schedule = weft.hooks.Curriculum(lambda epoch: {"loop.steps": 2 + epoch, "effort": 0.5**epoch})
    trainer = weft.Trainer(epochs=4, progress=False, hooks=schedule)
    result = trainer.fit(of, weft.Data({"x": torch.randn(4, 1, 2)}))
    assert lengths == [3, 4, 5, 6]
    assert result.history["loop.steps"] == [2, 3, 4, 5]
    assert result.history["weight_effort"] == [1.0, 0.5, 0.25, 0.125]
    assert result.history["train_effort"][3] < result.history["train_effort"][0] * 0.5
    with pytest.raises(ValueError, match="'loop' has no attribute 'stps'; did you mean 'steps'"):
        weft.Trainer(epochs=1, progress=False, hooks=weft.hooks.Curriculum(lambda e: {"loop.stps": 2})).fit(
            of, shuffled_data()
        )
    with pytest.raises(ValueError, match=r"'efort' is no term of the problem; did you mean 'effort'"):
        weft.Trainer(epochs=1, progress=False, hooks=weft.hooks.Curriculum(lambda e: {"efort": 2})).fit(
            of, shuffled_data()
        )


def test_a_resumed_curriculum_goes_on_where_it_was() -> None:
    def run(crash: int | None = None, **options: Any) -> weft.FitResult:
        curriculum = weft.hooks.Curriculum(lambda epoch: {"size": 0.1 + epoch})
        return fit_with_hooks(plant_and_policy(), [curriculum, crash_before(crash)], **options)

    saved = {"checkpoint": {"every_n_steps": 1}, "run_name": "it"}
    whole = run()
    with pytest.raises(Crash):
        run(crash=10, **saved)
    again = run(resume="auto", **saved)
    assert same(again.last_weights, whole.last_weights) and again.history == whole.history


# ----------------------------------------------------------------------------------------- gradient norms


def test_gradient_norms_are_those_of_autograd_and_the_training_is_as_without() -> None:
    of, seen = plant_and_policy(), []
    clip = 1e-3

    def by_hand(trainer: Any, batch: Any) -> None:
        out, params = of(batch), list(of.parameters())
        losses = {"fit": out["train_fit"], "size": out["train_size"], "": out["train_loss"]}
        for name, loss in losses.items():
            grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
            norm = torch.cat([g.flatten() for g in grads if g is not None]).norm().item()
            seen.append((f"grad_norm_{name}".rstrip("_"), norm))

    over = weft.Data(tanh_points(), shuffle=False)
    result = fit_with_hooks(of, [weft.hooks.GradientNorms(terms=True), {"on_step_start": by_hand}], 4, over, clip=clip)
    for name in ("grad_norm", "grad_norm_fit", "grad_norm_size"):
        assert result.history[name] == pytest.approx([norm for key, norm in seen if key == name], rel=1e-5)
    assert min(result.history["grad_norm"]) > clip  # before clipping
    assert same(result.last_weights, fit_with_hooks(plant_and_policy(), None, 4, over, clip=clip).last_weights)


def test_gradient_norms_of_several_optimizers_are_told_apart_and_taken_every_n_steps() -> None:
    made = {name: lambda p: torch.optim.SGD(p, lr=0.1) for name in ("plant", "policy")}
    norms: list[bool] = []
    hook = weft.hooks.GradientNorms(every=3)
    result = fit_with_hooks(plant_and_policy(), hook, 2, optimizer=made)
    assert {"grad_norm_plant", "grad_norm_policy"} <= set(result.history)
    watch = {"on_before_optimizer_step": lambda t, o: norms.append(bool(t.run.state.epoch.logged))}
    fit_with_hooks(plant_and_policy(), [hook, watch], 1)
    assert norms == [True] * 4


# ----------------------------------------------------------------------------------------- collocation points


def points_on_a_line(rows: int = 30) -> weft.Data:
    x = torch.rand(rows, 1, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return weft.Data(weft.DictDataset({"x": x}), batch_size=10, inputs_require_grad=("x",))


def candidates(generator: torch.Generator) -> dict[str, Tensor]:
    return {"x": torch.rand(4000, 1, generator=generator) * 2 - 1}


class KnownResidual(nn.Module):
    """u(x) = a x with a fixed: the residual of du/dx = 3 x^2 + a is 3 x^2, known everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * 0 + x


def derivative_residual(u: Tensor, x: Tensor) -> Tensor:
    (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return du - 1 - 3 * x**2


def known_pinn() -> weft.Problem:
    node = weft.Node(KnownResidual(), ["x"], ["u"], name="u")
    return weft.Problem(
        [node], [weft.objective(lambda u, x: derivative_residual(u, x) ** 2, name="pde")], grad_inference=True
    )


def resampled(
    epochs: int = 3, problem: weft.Problem | None = None, over: Any = None, **options: Any
) -> tuple[Any, Tensor]:
    hook = weft.hooks.Resample(derivative_residual, candidates, **{"every": 2, **options})
    trainer = weft.Trainer(epochs=epochs, progress=False, seed=3, hooks=hook)
    result = trainer.fit(problem or known_pinn(), over or points_on_a_line())
    assert trainer.run is not None
    train = trainer.run.data.train
    return result, train["interior"].datadict["x"] if options.get("part") else train.datadict["x"]


@pytest.mark.parametrize(("k", "c"), [(1.0, 1.0), (2.0, 0.0)])
def test_rad_draws_points_with_the_density_of_the_paper(k: float, c: float) -> None:
    many, drawn = 40, []
    for number in range(many):
        trainer_seed = number
        hook = weft.hooks.Resample(derivative_residual, candidates, every=1, k=k, c=c)
        trainer = weft.Trainer(epochs=2, progress=False, seed=trainer_seed, hooks=hook)
        trainer.fit(known_pinn(), points_on_a_line(60))
        assert trainer.run is not None
        drawn.append(trainer.run.data.train.datadict["x"].numpy()[:, 0])
    x = np.concatenate(drawn)
    assert len(x) == 60 * many  # as many points as before
    edges = np.linspace(-1, 1, 9)
    # the integral over each bin of (e^k / E[e^k] + c) / (1 + c) / 2, with e = 3 x^2
    integral = edges ** (2 * k + 1) / 2
    expected = (np.diff(integral) + c * np.diff(edges) / 2) / (1 + c)
    assert expected.sum() == pytest.approx(1)
    found, _ = np.histogram(x, edges)
    spread = np.sqrt(expected * (1 - expected) / len(x))
    assert (np.abs(found / len(x) - expected) < 5 * spread + 0.01).all()  # a finite set of candidates
    assert np.abs(found / len(x) - 1 / 8).max() > 5 * spread.max()  # it is not the uniform density


def test_rar_adds_the_candidates_with_the_largest_residuals_and_keeps_the_others() -> None:
    result, x = resampled(epochs=5, method="rar", add=7)
    assert result.history["num_points"] == [30, 30, 37, 37, 44]
    assert result.history["data_version"] == [0, 0, 1, 1, 2]
    assert x[:30].equal(points_on_a_line().train.datadict["x"])
    generator = torch.Generator().manual_seed(3 * 1_000_003 + 2)
    first = candidates(generator)["x"]
    assert x[30:37].equal(first[(3 * first[:, 0] ** 2).topk(7).indices])
    assert result.steps == 3 + 3 + 4 + 4 + 5  # batches of ten


def test_rar_d_adds_drawn_points_and_logs_the_mean_residual() -> None:
    result, x = resampled(epochs=3, method="rar-d", add=5)
    assert len(x) == 35
    assert result.history["residual_mean"][2] == pytest.approx(1.0, abs=0.06)  # of 3 x^2 on [-1, 1]


def test_resampled_points_are_resumed_and_differ_from_epoch_to_epoch() -> None:
    def run(crash: int | None = None, **options: Any) -> tuple[Any, list[Tensor]]:
        seen: list[Tensor] = []
        note = {"on_epoch_start": lambda t: seen.append(t.run.data.train.datadict["x"].clone())}
        hooks = [weft.hooks.Resample(derivative_residual, candidates, every=2), note, crash_before(crash)]
        trainer = weft.Trainer(epochs=6, progress=False, seed=3, hooks=hooks, **options)
        return trainer.fit(known_pinn(), points_on_a_line()), seen

    saved = {"checkpoint": {"every_n_steps": 1}, "run_name": "it"}
    whole, points_seen = run()
    with pytest.raises(Crash):
        run(crash=10, **saved)  # in the middle of epoch 3
    again, points_again = run(resume="auto", **saved)
    assert same(points_again[1:], points_seen[4:])  # before epoch 3 opens again, the data is as it was made
    assert again.last_weights.keys() and same(again.last_weights, whole.last_weights)
    assert same(again.history, whole.history)
    assert points_seen[0].equal(points_seen[1]) and points_seen[2].equal(points_seen[3])
    assert not points_seen[2].equal(points_seen[4])


def test_one_part_of_nested_data_is_resampled_with_the_problem_at_hand() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.u = KnownResidual()

        def forward(self, batch: Any) -> Tensor:
            return (
                derivative_residual(self.u(batch["interior"]["x"]), batch["interior"]["x"]).square().mean()
                + self.u.a**2
            )

    interior, boundary = points_on_a_line().train, {"x": torch.ones(4, 1)}
    over = weft.Data({"interior": interior, "boundary": boundary}, batch_size=10, inputs_require_grad=("x",))
    hook = weft.hooks.Resample(
        lambda problem, x: derivative_residual(problem.u(x), x),
        candidates,
        every=1,
        part="interior",
        method="rar",
        add=4,
    )
    trainer = weft.Trainer(epochs=3, progress=False, seed=3, hooks=hook)
    trainer.fit(Nested(), over)
    assert trainer.run is not None
    train = trainer.run.data.train
    assert len(train["interior"]) == 38 and len(train["boundary"]["x"]) == 4


def test_candidates_and_residuals_that_do_not_fit_are_errors_that_say_why() -> None:
    def fails(match: str, residual: Any = derivative_residual, points: Any = candidates, **options: Any) -> None:
        hook = weft.hooks.Resample(residual, points, **{"every": 1, **options})
        with pytest.raises((ValueError, KeyError, FloatingPointError), match=match):
            weft.Trainer(epochs=2, progress=False, hooks=hook).fit(known_pinn(), points_on_a_line())

    fails(r"candidates have the keys \['y'\], the training data \['x'\]", points=lambda g: {"y": torch.zeros(99, 1)})
    fails("at least 30", points=lambda g: {"x": torch.zeros(9, 1)})
    fails(r"residual has shape \(\)", residual=lambda u: u.mean())
    fails("not finite at 4000 candidates", residual=lambda u: u / 0 * 0)
    fails(r"reads \['v'\]", residual="v")
    fails("no part 'interior'", part="interior")
    rows = weft.Problem(
        [weft.Node(KnownResidual(), ["x"], ["u"])],
        [],
        [weft.equal(derivative_residual, 0.0)],
        weft.AugmentedLagrangian(),
        grad_inference=True,
    )
    with pytest.raises(ValueError, match="multipliers for each row"):
        weft.Trainer(epochs=2, progress=False, hooks=weft.hooks.Resample("u", candidates)).fit(rows, points_on_a_line())
    with pytest.raises(ValueError, match="method='radd'; expected 'rad', 'rar-d' or 'rar'"):
        weft.hooks.Resample("u", candidates, method="radd")  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------- parts, names


def test_the_weights_of_one_node_are_loaded_by_its_name_and_frozen() -> None:
    identified, control = plant_and_policy(seed=1), plant_and_policy(seed=2)
    weft.save_weights(identified, "identified.pt")
    policy, plant = weights(control), weights(identified)
    assert weft.hooks.load_node(control, "plant", "identified.pt") is control
    weft.hooks.freeze(control, "plant")
    fit_with_hooks(control, None, 3)
    after = weights(control)
    for name in after:
        assert after[name].equal(plant[name]) == name.startswith("nodes.0")
        assert not after[name].equal(policy[name])
    weft.hooks.unfreeze(control, "plant")
    fit_with_hooks(control, None, 3)
    assert not weights(control)["nodes.0.fn.0.weight"].equal(plant["nodes.0.fn.0.weight"])


def test_a_node_is_loaded_from_another_place_of_another_problem() -> None:
    torch.manual_seed(8)
    source = weft.Problem(
        [
            weft.Node(lambda x: 2 * x, ["x"], ["z"], name="scale"),
            weft.Node(nn.Sequential(nn.Linear(2, 4), nn.Tanh()), ["z"], ["h"], name="dynamics"),
        ],
        [weft.objective(lambda h: h**2, name="f")],
    )
    weft.save_weights(source, "source.pt")
    of = weft.hooks.load_node(plant_and_policy(), "plant", "source.pt", source="nodes.1")
    assert weights(of)["nodes.0.fn.0.weight"].equal(weights(source)["nodes.1.fn.0.weight"])
    with pytest.raises(ValueError, match="source.pt"):
        weft.hooks.load_node(plant_and_policy(), "policy", "source.pt", source="nodes.1")
    with pytest.raises(ValueError, match="no node or submodule 'plnt'"):
        weft.hooks.load_node(plant_and_policy(), "plnt", "source.pt")


def test_hooks_are_loaded_when_first_named_and_a_wrong_name_gets_a_suggestion() -> None:
    code = (
        "import sys, weft\nassert 'weft.hooks' not in sys.modules\nweft.hooks.EMA\n"
        "assert 'weft.hooks.averaging' in sys.modules and 'weft.hooks.balancing' not in sys.modules\n"
        "assert 'lightning' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'EMa'; did you mean 'EMA'"):
        weft.hooks.EMa  # noqa: B018
