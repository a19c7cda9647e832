"""Adaptive weights of loss terms: each method against its paper's formula, on a problem whose gradients are known."""

from __future__ import annotations

import math
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import weft
from tests.helpers.bitwise import same
from weft.hooks.balancing import Balancing
from weft.problem.weights import set_term_weights, term_weights
from weft.step.state import RunState

DTYPE = torch.float64


class Parabola(nn.Module):
    """u(x) = theta . (1, x, x^2): residuals and losses are polynomials of theta with derivatives by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([0.3, -0.7, 1.1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.theta[0] + self.theta[1] * x + self.theta[2] * x**2


def line_problem(weight: float = 2.0) -> weft.Problem:
    terms = [
        weft.objective(lambda u, f: (u - f) ** 2, name="pde"),
        weft.objective(lambda u, x: (u - x) ** 2, weight=weight, name="data"),
    ]
    return weft.Problem([weft.Node(Parabola(), ["x"], ["u"], name="line")], terms)


def line_data(rows: int = 12) -> dict[str, Tensor]:
    x = torch.linspace(-1.0, 1.0, rows, dtype=DTYPE)[:, None]
    return {"x": x, "f": torch.sin(3 * x)}


class KnownGradients:
    """The losses and their gradients in theta, in numpy, from formulas written out by hand."""

    def __init__(self, data: dict[str, Tensor]) -> None:
        self.x, self.f = data["x"].numpy()[:, 0], data["f"].numpy()[:, 0]
        self.jacobian = np.stack([np.ones_like(self.x), self.x, self.x**2], axis=1)

    def residuals(self, theta: np.ndarray) -> list[np.ndarray]:
        return [self.jacobian @ theta - self.f, self.jacobian @ theta - self.x]

    def losses(self, theta: np.ndarray) -> np.ndarray:
        return np.array([np.mean(r**2) for r in self.residuals(theta)])

    def gradients(self, theta: np.ndarray) -> np.ndarray:
        return np.stack([2 * self.jacobian.T @ r / len(r) for r in self.residuals(theta)])


def run_balanced(hook: Any, steps: int = 6, problem: weft.Problem | None = None, **options: Any) -> dict[str, Any]:
    """Weights before each step and after the last, theta and losses of each step, as numpy arrays."""
    problem, data = problem or line_problem(), line_data()
    seen: dict[str, Any] = {"used": [], "theta": []}

    def note(trainer: Any, optimizer: Any) -> None:  # the weights this step's loss was made with
        seen["used"].append([float(w) for w in term_weights(problem).values()])
        seen["theta"].append(problem.nodes[0].fn.theta.detach().numpy().copy())

    trainer = weft.Trainer(
        epochs=steps,
        precision="64-true",
        optimizer=lambda p: torch.optim.SGD(p, lr=0.05),
        progress=False,
        hooks=[hook, {"on_before_optimizer_step": note}],
        **{"seed": 1, **options},
    )
    seen["result"] = trainer.fit(problem, weft.Data(data, shuffle=False))
    known = KnownGradients(data)
    seen["used"], seen["losses"] = np.array(seen["used"]), [known.losses(theta) for theta in seen["theta"]]
    seen["gradients"] = [known.gradients(theta) for theta in seen["theta"]]
    seen["after"] = np.array([float(w) for w in term_weights(problem).values()])
    return seen


def close(a: Any, b: Any) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


# ------------------------------------------------------------------------------------------------ formulas of the
# papers


@pytest.mark.parametrize("rho", [1.0, 0.0])
def test_relobralo_follows_its_formula(rho: float) -> None:
    alpha, temperature = 0.9, 0.5
    seen = run_balanced(weft.hooks.ReLoBRaLo(alpha=alpha, temperature=temperature, rho=rho))
    losses, expected = seen["losses"], [np.array([1.0, 2.0]), np.ones(2)]

    def bal(t: int, before: int) -> np.ndarray:
        return 2 * softmax(losses[t] / (temperature * losses[before]))

    expected.append(bal(1, 0))
    for t in range(2, 6):
        history = expected[-1] if rho == 1.0 else bal(t, 0)
        expected.append(alpha * history + (1 - alpha) * bal(t, t - 1))
    close(seen["used"], expected[:6])
    close(seen["after"], expected[6])
    assert abs(seen["after"] - 1).max() > 1e-3


def test_relobralo_looks_back_as_often_as_rho_says_and_leaves_global_random_state_alone() -> None:
    hook = weft.hooks.ReLoBRaLo(rho=0.7)
    state = RunState.of(weft.Trainer(seed=3), torch.nn.Linear(1, 1))
    before = torch.get_rng_state()
    kept = [hook._keeps_history(state) for _ in range(2000)]
    assert torch.get_rng_state().equal(before)
    assert abs(np.mean(kept) - 0.7) < 4 * math.sqrt(0.7 * 0.3 / 2000)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("loss_weighted", [False, True])
def test_softadapt_follows_its_formulas(normalized: bool, loss_weighted: bool) -> None:
    beta = 0.8
    seen = run_balanced(weft.hooks.SoftAdapt(beta, normalized=normalized, loss_weighted=loss_weighted))
    losses, expected = seen["losses"], [np.array([1.0, 2.0])] * 2
    for t in range(1, 6):
        s = losses[t] - losses[t - 1]
        s = s / np.abs(s).sum() if normalized else s
        w = softmax(beta * s) * (losses[t] if loss_weighted else 1.0)
        expected.append(w / w.sum())
    np.testing.assert_allclose(seen["used"], expected[:6], rtol=1e-9)
    np.testing.assert_allclose(seen["after"], expected[6], rtol=1e-9)


@pytest.mark.parametrize("power", [1, 2])
def test_self_adaptive_weights_go_up_the_gradient_of_the_loss(power: int) -> None:
    rate = 0.3
    seen = run_balanced(weft.hooks.SelfAdaptive(ascent_rate=rate, power=power))
    v, expected = np.array([1.0, 2.0]) ** (1 / power), []
    for losses in seen["losses"]:
        expected.append(v**power)
        v = v + rate * power * v ** (power - 1) * losses
    close(seen["used"], expected)
    close(seen["after"], v**power)


def test_gradnorm_follows_its_formula() -> None:
    alpha, rate = 0.6, 0.1
    seen = run_balanced(weft.hooks.GradNorm(alpha=alpha, learning_rate=rate, of="line"))
    w, first = np.array([1.0, 2.0]), seen["losses"][0]
    for t in range(6):
        norms = np.linalg.norm(seen["gradients"][t], axis=1)
        ratios = seen["losses"][t] / first
        target = (w * norms).mean() * (ratios / ratios.mean()) ** alpha
        w = w - rate * np.sign(w * norms - target) * norms
        w = w * 2 / w.sum()
        close(seen["used"][t], w)
    assert w[0] != pytest.approx(2 / 3)


def test_gradnorm_descends_the_loss_it_is_defined_by() -> None:
    """Its slope is that of sum |G_i - target| with the target held constant: compare with autograd."""
    norms, target = torch.tensor([0.7, 2.0, 0.1], dtype=DTYPE), torch.tensor([1.0, 1.0, 1.0], dtype=DTYPE)
    w = torch.tensor([1.0, 1.5, 0.5], dtype=DTYPE, requires_grad=True)
    (slope,) = torch.autograd.grad((w * norms - target).abs().sum(), w)
    assert torch.equal(slope, torch.sign(w.detach() * norms - target) * norms)


def test_learning_rate_annealing_follows_its_formula() -> None:
    alpha = 0.1
    seen = run_balanced(weft.hooks.LearningRateAnnealing("pde", alpha=alpha, every=2))
    w = 2.0
    for t in range(6):
        if t % 2 == 0:
            pde, data = seen["gradients"][t]
            w = (1 - alpha) * w + alpha * np.abs(pde).max() / np.abs(data).mean()
        close(seen["used"][t], [1.0, w])


def test_ntk_weights_follow_their_formula() -> None:
    """With residuals 5 (u - f) and (u - x) the Jacobians are 5 A and A: the traces are known."""
    residuals: dict[str, Any] = {"pde": lambda u, f: 5 * (u - f), "data": lambda u, x: u - x}
    seen = run_balanced(weft.hooks.NTKWeights(residuals, points=None, every=3))
    known = KnownGradients(line_data())
    trace = np.mean(np.sum(known.jacobian**2, axis=1))
    traces = np.array([25 * trace, trace])
    close(seen["used"], [traces.sum() / traces] * 6)
    some = run_balanced(weft.hooks.NTKWeights(residuals, points=4, every=3))
    rows = np.mean(np.sum(known.jacobian[::3] ** 2, axis=1))  # every third of twelve points
    close(some["used"][0], np.array([26 * rows]) / np.array([25 * rows, rows]))


def test_ntk_traces_are_those_of_the_full_kernel_of_a_network() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)).to(DTYPE)
    problem = weft.Problem(
        [weft.Node(net, ["x"], ["u"], name="net")],
        [weft.objective(lambda u: u**2, name="a"), weft.objective(lambda u: u**4, name="b")],
    )
    params = {name: p.detach() for name, p in net.named_parameters()}
    x = line_data()["x"]
    traces = []
    for residual in (lambda u: u, lambda u: u**2):
        jacobian = torch.func.jacrev(lambda p, r=residual: r(torch.func.functional_call(net, p, x)).flatten())(params)
        kernel = sum((j.flatten(1) @ j.flatten(1).T for j in jacobian.values()), torch.zeros(()))
        traces.append(kernel.trace().item() / len(x))
    hook = weft.hooks.NTKWeights({"a": "u", "b": lambda u: u**2}, points=None)
    weft.Trainer(epochs=1, progress=False, precision="64-true", hooks=hook).fit(problem, weft.Data({"x": x}))
    close([float(w) for w in term_weights(problem).values()], sum(traces) / np.array(traces))


# ------------------------------------------------------------------------------------------------ in a run


METHODS: dict[str, Callable[[], Balancing]] = {
    "relobralo": lambda: weft.hooks.ReLoBRaLo(alpha=0.9, rho=0.5),
    "softadapt": lambda: weft.hooks.SoftAdapt(0.5),
    "self-adaptive": lambda: weft.hooks.SelfAdaptive(0.01),
    "gradnorm": lambda: weft.hooks.GradNorm(every=2),
    "annealing": lambda: weft.hooks.LearningRateAnnealing("pde", every=3),
    "ntk": lambda: weft.hooks.NTKWeights({"pde": lambda u, f: u - f, "data": lambda u, x: u**2 - x}, every=4),
}


def fit_long(method: str, hooks: tuple[Any, ...] = (), **options: Any) -> tuple[Any, weft.Problem]:
    problem, data = line_problem(), line_data()
    trainer = weft.Trainer(
        phases=[weft.Phase(3), weft.Phase(3, optimizer=lambda p: torch.optim.SGD(p, lr=0.01))],
        seed=1,
        progress=False,
        precision="64-true",
        hooks=[METHODS[method](), *hooks],
        **options,
    )
    return trainer.fit(problem, weft.Data(data, batch_size=6)), problem


def weight_values(problem: weft.Problem) -> list[float]:
    return [float(w) for w in term_weights(problem).values()]


@pytest.mark.parametrize("method", METHODS)
def test_weights_and_what_a_method_remembers_survive_a_killed_process_and_a_phase(method: str) -> None:
    whole, whole_problem = fit_long(method)
    saved = {"checkpoint": {"every_n_steps": 2, "best": False}, "run_name": "killed"}
    child = os.fork()
    if child == 0:  # killed in the second phase, in the middle of an epoch, a step after the last checkpoint
        kill = {"on_step_start": lambda t, batch: t.global_step == 9 and os.kill(os.getpid(), signal.SIGKILL)}
        try:
            fit_long(method, (kill,), **saved)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert not Path("runs/killed/result.json").exists()
    resumed, problem = fit_long(method, ({"on_step_start": lambda t, batch: None},), resume="auto", **saved)
    assert weight_values(problem) == weight_values(whole_problem)
    assert same(resumed.last_weights, whole.last_weights)
    assert resumed.history == whole.history
    assert resumed.history["weight_data"][-1] != resumed.history["weight_data"][0]
    fresh = line_problem()
    assert weight_values(problem) != weight_values(fresh)


@pytest.mark.parametrize("method", METHODS)
def test_a_second_fit_goes_on_and_another_problem_starts_anew(method: str) -> None:
    hook, data = METHODS[method](), weft.Data(line_data(), shuffle=False)
    trainer = weft.Trainer(epochs=5, precision="64-true", progress=False, hooks=hook, seed=1)
    problem, other, alone = line_problem(), line_problem(), line_problem()
    trainer.fit(problem, data)
    reached = weight_values(problem)
    started: list[list[float]] = []
    trainer.hooks.append({"on_fit_start": lambda t: started.append(weight_values(t.problem))})
    trainer.fit(problem, data)
    assert started == [reached]
    trainer.fit(other, data)
    weft.Trainer(epochs=5, precision="64-true", progress=False, hooks=METHODS[method](), seed=1).fit(alone, data)
    assert weight_values(other) == weight_values(alone)


def test_weights_are_logged_and_the_training_itself_sees_them() -> None:
    seen = run_balanced(weft.hooks.SelfAdaptive(0.3))
    history, problem = seen["result"].history, line_problem()
    close(history["weight_pde"], [*seen["used"][1:, 0], seen["after"][0]])  # after the step, for the next one
    for t in range(6):
        total = float(np.dot(seen["used"][t], seen["losses"][t]))
        assert history["train_loss"][t] == pytest.approx(total, rel=1e-12)
    set_term_weights(problem, {"pde": 1.0})


def test_only_the_named_terms_are_balanced() -> None:
    hook = weft.hooks.SelfAdaptive(0.3, terms=["data"])
    seen = run_balanced(hook)
    assert (seen["used"][:, 0] == 1.0).all() and (np.diff(seen["used"][:, 1]) > 0).all()
    assert "weight_pde" not in seen["result"].history


@pytest.mark.parametrize("method", ["self-adaptive", "gradnorm"])
def test_accumulated_batches_give_the_weights_of_one_big_batch(method: str) -> None:
    def after(**options: Any) -> list[float]:
        problem, size = line_problem(), options.pop("batch_size", None)
        trainer = weft.Trainer(epochs=4, precision="64-true", progress=False, hooks=METHODS[method](), **options)
        trainer.fit(problem, weft.Data(line_data(), batch_size=size, shuffle=False))
        return weight_values(problem)

    close(after(batch_size=5, accumulate=3), after())


def test_a_constraint_that_holds_keeps_its_weight_and_stays_finite() -> None:
    for make in (lambda: weft.hooks.LearningRateAnnealing("pde", every=1), weft.hooks.ReLoBRaLo, weft.hooks.GradNorm):
        terms = [weft.objective(lambda u, f: (u - f) ** 2, name="pde")]
        problem = weft.Problem(
            [weft.Node(Parabola(), ["x"], ["u"])], terms, [weft.less_equal("u", 100.0, name="bound")]
        )
        weft.Trainer(epochs=5, precision="64-true", progress=False, hooks=make()).fit(problem, weft.Data(line_data()))
        assert all(math.isfinite(w) and w > 0 for w in weight_values(problem))


def test_neuromancer_problems_are_balanced_too() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import neuromancer.loss as nm_loss
        import neuromancer.problem as nm_problem
        import neuromancer.system as nm_system
        from neuromancer.constraint import variable
    u, f, x = variable("u"), variable("f"), variable("x")
    pde, data = ((u - f) ** 2).minimize(weight=1.0, name="pde"), ((u - x) ** 2).minimize(weight=2.0, name="data")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = nm_problem.Problem(
            [nm_system.Node(Parabola(), ["x"], ["u"], name="line")], nm_loss.PenaltyLoss([pde, data], [])
        )
    for make in METHODS.values():
        ours = line_problem()
        for problem in (theirs, ours):
            set_term_weights(problem, {"pde": 1.0, "data": 2.0})
            line = problem.nodes[0].callable if problem is theirs else problem.nodes[0].fn
            line.theta.data = torch.tensor([0.3, -0.7, 1.1], dtype=DTYPE)
            trainer = weft.Trainer(epochs=5, precision="64-true", progress=False, hooks=make(), seed=1)
            trainer.fit(problem, weft.Data(line_data(), shuffle=False))
        close([float(w) for w in term_weights(theirs).values()], weight_values(ours))


def test_what_cannot_be_balanced_is_an_error_that_says_why() -> None:
    data = weft.Data(line_data())

    def fit(hook: Any, problem: nn.Module) -> None:
        weft.Trainer(epochs=1, progress=False, precision="64-true", hooks=hook).fit(problem, data)

    with pytest.raises(ValueError, match="ReLoBRaLo balances named terms, and Plain has none"):
        fit(weft.hooks.ReLoBRaLo(), type("Plain", (Parabola,), {})())
    with pytest.raises(ValueError, match="no term 'pd'; did you mean 'pde'"):
        fit(weft.hooks.SoftAdapt(terms=["pd"]), line_problem())
    with pytest.raises(ValueError, match=r"the weight of \['data'\] is 0"):
        fit(weft.hooks.GradNorm(), line_problem(weight=0.0))
    with pytest.raises(KeyError, match=r"NTKWeights 'pde' reads \['v'\]"):
        fit(weft.hooks.NTKWeights({"pde": "v"}), line_problem())
    with pytest.raises(ValueError, match="every=0; expected at least 1"):
        weft.hooks.GradNorm(every=0)
