"""Terms and losses against hand arithmetic and NeuroMANCER's own classes; tracing them."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from tests.helpers.problems import batch_of_rows
from weft.problem.barrier import BarrierLoss
from weft.problem.constraints import equal, greater_equal, less_equal
from weft.problem.lagrangian import AugmentedLagrangian
from weft.problem.losses import PenaltyLoss
from weft.problem.nodes import Node
from weft.problem.problem import Problem
from weft.problem.terms import objective
from weft.problem.weights import set_term_weights

# ---------------------------------------------------------------------------------------------------------------- terms


def test_an_objective_is_its_weight_times_the_mean_of_what_its_function_returns():
    x, a = torch.randn(5, 2), torch.randn(5, 2)
    f = objective(lambda x, a, power=2: (x - a) ** power, weight=3.0, name="f")
    assert f.keys == ["x", "a"]  # the argument with a default is a constant
    assert torch.equal(f({"x": x, "a": a}), 3.0 * ((x - a) ** 2).mean())
    assert not torch.equal(f({"x": x, "a": a}), 3.0 * ((x - a) ** 2).sum())


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize(
    ("make", "violation_of"),
    [
        (less_equal, lambda lhs, rhs: (lhs - rhs).clamp(min=0)),
        (greater_equal, lambda lhs, rhs: (rhs - lhs).clamp(min=0)),
        (equal, lambda lhs, rhs: (lhs - rhs).abs()),
    ],
)
def test_a_constraint_costs_its_weight_times_the_mean_violation_to_the_norm(make, violation_of, norm):
    data = {"x": torch.randn(6, 2), "p": torch.randn(6, 2)}
    penalty, violation = make(lambda x: x**2, "p", weight=7.0, norm=norm, name="c")(data)
    truth = violation_of(data["x"] ** 2, data["p"])
    torch.testing.assert_close(penalty, 7.0 * (truth**norm).mean())
    torch.testing.assert_close(violation, truth.mean())
    wrong_way = violation_of(data["p"], data["x"] ** 2).mean()
    assert make is equal or not torch.isclose(violation, wrong_way)


@pytest.mark.parametrize("limit", [0.25, torch.tensor([0.25, 0.25]), lambda: torch.tensor(0.25), "limit"])
def test_a_side_is_a_number_a_tensor_a_function_or_a_key(limit):
    data = {"x": torch.rand(4, 2), "limit": torch.full((4, 2), 0.25)}
    penalty, _ = less_equal("x", limit)(data)
    torch.testing.assert_close(penalty, (data["x"] - 0.25).clamp(min=0).mean())


def test_a_weight_moves_with_the_module_is_changed_in_place_and_is_not_saved():
    term = objective(lambda x: x, weight=0.1, name="f")
    assert term.weight.shape == () and not term.state_dict()
    assert float(term.double().weight) == 0.1  # not the float32 nearest to it
    term.weight.fill_(0.5)
    assert float(term.float().double().weight) == 0.5  # what was changed stays changed
    assert float(term({"x": torch.ones(3, dtype=torch.float64)})) == 0.5


def test_a_tensor_side_moves_with_the_module_and_is_not_saved():
    term = less_equal("x", torch.tensor([0.1, 0.2]), name="c").double()
    value = term.value({"x": torch.zeros(3, 2, dtype=torch.float64)})
    assert value.dtype == torch.float64 and not term.state_dict()


def test_the_parameters_of_a_module_or_its_method_used_in_a_term_are_trained():
    class Size(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            return self.scale * x

        def squared(self, x):
            return self.scale**2 * x

    size = Size()
    assert [p is size.scale for p in objective(size).parameters()] == [True]
    assert [p is size.scale for p in less_equal(size.squared, 1.0).parameters()] == [True]
    assert objective(size).name == "size" and objective(size.squared).name == "squared"
    copied = copy.deepcopy(less_equal(size.squared, 1.0))
    with torch.no_grad():
        next(copied.parameters()).zero_()
        assert float(copied({"x": 3 * torch.ones(1)})[0]) == 0.0 and float(size.scale) == 2.0


@pytest.mark.parametrize("fn", [lambda *x: x[0], lambda **x: x["x"], lambda *, x: x, torch.abs])
def test_a_function_that_does_not_name_its_keys_is_an_error_that_says_what_to_do(fn):
    with pytest.raises(TypeError, match="lambda x"):
        objective(fn, name="f")


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: objective("x"), TypeError, "function of keys"),  # type: ignore[arg-type]
        (lambda: objective(lambda x: x, weight=float("nan"), name="f"), ValueError, "'f' must be one finite number"),
        (lambda: objective(lambda x: x, weight=torch.ones(2)), ValueError, "one finite number"),
        (lambda: objective(lambda x: x, weight=nn.Parameter(torch.ones(()))), ValueError, "is not trained"),
        (lambda: objective(lambda x: x, name=3), TypeError, "non-empty text"),  # type: ignore[arg-type]
        (lambda: less_equal("x", 1.0, weight=-1.0), ValueError, "must not be negative"),
        (lambda: less_equal("x", 1.0, norm=3), ValueError, "norm .* must be 1 .* or 2"),
        (lambda: less_equal("x", None), TypeError, "a key, a number or a tensor; got NoneType"),  # type: ignore[arg-type]
        (lambda: less_equal(1.0, 2.0, name="c"), ValueError, "'c' compares 1.0 with 2.0"),
    ],
)
def test_a_term_that_makes_no_sense_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_a_term_that_returns_no_float_tensor_is_named():
    with pytest.raises(TypeError, match="objective 'f' returned NoneType"):
        objective(lambda x: None, name="f")({"x": torch.ones(2)})  # type: ignore[arg-type,return-value]
    with pytest.raises(TypeError, match=r"objective 'f' returned a tensor of torch.int64"):
        objective(lambda x: x, name="f")({"x": torch.ones(2, dtype=torch.int64)})
    with pytest.raises(ValueError, match="constraint 'c' cannot compare its sides: left NoneType"):
        less_equal(lambda x: None, 1.0, name="c")({"x": torch.ones(2)})  # type: ignore[arg-type,return-value]


def test_sides_that_do_not_broadcast_are_named_with_their_shapes():
    data = {"x": torch.ones(5, 3), "y": torch.ones(5, 2)}
    with pytest.raises(ValueError, match=r"constraint 'c' .* left \(5, 3\), right \(5, 2\)"):
        less_equal("x", "y", name="c")(data)


def test_comparing_a_row_with_every_other_row_is_an_error_and_honest_broadcasts_are_not():
    with pytest.raises(ValueError, match=r"left \(5, 1\) with right \(5,\), every row with every other"):
        equal("x", lambda y: y, name="c")({"x": torch.ones(5, 1), "y": torch.ones(5)})
    for y in (torch.ones(5, 1), torch.ones(1), torch.ones(()), torch.ones(5, 4), torch.ones(4)):
        equal("x", "y")({"x": torch.ones(5, 1 if y.shape == (5, 1) else 4), "y": y})


def test_an_error_of_the_users_function_keeps_its_type_and_says_in_which_term():
    with pytest.raises(RuntimeError) as caught:
        objective(lambda x, y: x @ y, name="f")({"x": torch.ones(2, 3), "y": torch.ones(2, 3)})
    assert caught.value.__notes__ == ["raised in objective 'f', which reads x (2, 3), y (2, 3)"]
    with pytest.raises(KeyError, match="^'own'"):  # a KeyError of their own stays as it is
        objective(lambda x: {}["own"], name="f")({"x": torch.ones(2)})


# ---------------------------------------------------------------------------------------------------------------- sums


def judge(loss: nn.Module, objectives: list, constraints: list, data: dict[str, Any]) -> dict[str, Tensor]:
    return Problem([], objectives, constraints, loss=loss)(data)


def test_every_term_is_reported_and_they_add_up():
    data = {"x": torch.randn(6, 2), "name": "dev"}
    out = judge(
        PenaltyLoss(),
        [objective(lambda x: x**2, name="f"), objective(lambda x: x.sum(), weight=2.0)],
        [less_equal("x", 0.1, weight=5.0, norm=2, name="c"), equal("x", 0.0)],
        data,
    )
    assert list(out) == ["dev_f", "dev_objective_1", "dev_c", "dev_c_violation", "dev_constraint_1"] + [
        "dev_constraint_1_violation",
        "dev_objective_loss",
        "dev_penalty_loss",
        "dev_loss",
    ]
    torch.testing.assert_close(out["dev_f"] + out["dev_objective_1"], out["dev_objective_loss"])
    torch.testing.assert_close(out["dev_c"] + out["dev_constraint_1"], out["dev_penalty_loss"])
    torch.testing.assert_close(out["dev_objective_loss"] + out["dev_penalty_loss"], out["dev_loss"])
    torch.testing.assert_close(out["dev_c_violation"], (data["x"] - 0.1).clamp(min=0).mean())


@pytest.mark.parametrize("loss", [PenaltyLoss(), BarrierLoss(), AugmentedLagrangian()])
def test_a_sum_of_no_terms_is_zero(loss):
    data = batch_of_rows(3, x=torch.ones(3, 1))
    only_f = judge(loss, [objective(lambda x: x, name="f")], [], data)
    assert float(only_f["train_penalty_loss"]) == 0.0 and float(only_f["train_loss"]) == 1.0
    only_c = judge(copy.deepcopy(loss), [], [greater_equal("x", 3.0, name="c")], data)
    assert float(only_c["train_objective_loss"]) == 0.0 and torch.equal(only_c["train_loss"], only_c["train_c"])


NEUROMANCER_BARRIERS = ["log10", "log", "inverse", "softexp", "softlog", "expshift"]


def neuromancer_and_weft(loss_name: str, norm: int, **kwargs: Any) -> tuple[Any, Problem]:
    """The same terms in both: f, x0 <= p, x0^2 >= 0.2, and with the penalty also x0 == x1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from neuromancer.constraint import variable
        from neuromancer.loss import BarrierLoss as TheirBarrier
        from neuromancer.loss import PenaltyLoss as TheirPenalty

    x, p = (variable(key) for key in ("x", "p"))  # pyright: ignore[reportCallIssue]
    x0, x1 = x[:, [0]], x[:, [1]]
    theirs = [3.0 * ((x0 <= p) ^ norm), 0.5 * ((x0**2 >= 0.2) ^ norm)]
    ours: list[Any] = [
        less_equal(lambda x: x[:, :1], "p", weight=3.0, norm=norm),
        greater_equal(lambda x: x[:, :1] ** 2, 0.2, weight=0.5, norm=norm),
    ]
    if loss_name == "penalty":
        theirs.append(2.0 * ((x0 == x1) ^ norm))
        ours.append(equal(lambda x: x[:, :1], lambda x: x[:, 1:], weight=2.0, norm=norm))
    their_objective = ((x0 - p) ** 2 + x1**2).minimize(weight=1.5, name="f")
    our_objective = objective(lambda x, p: (x[:, :1] - p) ** 2 + x[:, 1:] ** 2, weight=1.5, name="f")
    their_loss = {"penalty": TheirPenalty, "barrier": TheirBarrier}[loss_name]([their_objective], theirs, **kwargs)
    our_loss = {"penalty": PenaltyLoss, "barrier": BarrierLoss}[loss_name](**kwargs)
    return their_loss, Problem([], [our_objective], ours, loss=our_loss)


def compare(theirs: Any, ours: Problem, data: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Their loss, ours, their gradient of x, ours."""
    x = data["x"].requires_grad_()
    their_loss = theirs({**data})["loss"]
    our_loss = ours({**data, "name": "train"})["train_loss"]
    return their_loss, our_loss, *torch.autograd.grad(their_loss, x), *torch.autograd.grad(our_loss, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("barrier", ["", *NEUROMANCER_BARRIERS])
def test_penalty_and_barrier_are_neuromancers_in_loss_and_gradient(barrier, norm, dtype):
    kwargs: Any = {"barrier": barrier, "upper_bound": 2.0, "shift": 0.7, "alpha": 0.4} if barrier else {}
    theirs, ours = neuromancer_and_weft("barrier" if barrier else "penalty", norm, **kwargs)
    if barrier == "expshift":  # theirs overwrites what the backward of exp needs, and raises
        theirs.barrier = lambda value: torch.exp(value + 0.7).clone()
    generator = torch.Generator().manual_seed(norm)
    data = {k: torch.randn(64, n, generator=generator).to(dtype) for k, n in (("x", 2), ("p", 1))}
    loss, our_loss, gradient, our_gradient = compare(theirs, ours.to(dtype), data)
    torch.testing.assert_close(our_loss, loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(our_gradient, gradient, rtol=1e-5, atol=1e-7)
    assert our_loss.dtype == dtype
    set_term_weights(ours, {"constraint_0": 3.1})  # the comparison can fail
    assert not torch.isclose(ours({**data, "name": "train"})["train_loss"], loss, rtol=1e-6)


def test_a_barrier_has_finite_gradients_on_the_boundary_where_neuromancers_are_nan():
    x = torch.tensor([[0.0], [-1e-30], [-0.5], [0.5]], requires_grad=True)
    for barrier in NEUROMANCER_BARRIERS:
        out = judge(BarrierLoss(barrier, upper_bound=1e30), [], [less_equal("x", 0.0)], {"x": x})
        (gradient,) = torch.autograd.grad(out["train_loss"], x)
        assert gradient.isfinite().all(), barrier


def test_a_barrier_penalises_an_equality_on_both_sides():
    for x in (-3.0, 3.0):  # NeuroMANCER's log10 barrier lets -3 pass as free
        out = judge(BarrierLoss(), [], [equal("x", 0.0, weight=2.0)], {"x": torch.tensor([[x]])})
        assert float(out["train_loss"]) == 6.0


def test_a_barrier_does_not_hide_nan_and_takes_a_function():
    out = judge(BarrierLoss(), [], [less_equal("x", 0.0)], {"x": torch.tensor([[torch.nan]])})
    assert out["train_loss"].isnan()
    out = judge(BarrierLoss(lambda v: 0.25 - v), [], [less_equal("x", 0.0)], {"x": torch.tensor([[-0.5]])})
    assert float(out["train_loss"]) == 0.75


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BarrierLoss("log1O"), "no barrier 'log1O'; did you mean 'log10'"),
        (lambda: BarrierLoss(upper_bound=0.0), "upper_bound"),
        (lambda: BarrierLoss("softexp", alpha=0.0), "alpha"),
        (lambda: AugmentedLagrangian(mu=0.0), "needs mu > 0"),
        (lambda: AugmentedLagrangian(mu=10.0, mu_max=1.0), "mu_max >= mu"),
        (lambda: AugmentedLagrangian(growth=0.5), "growth >= 1"),
        (lambda: AugmentedLagrangian(eta=2.0), "0 < eta <= 1"),
        (lambda: AugmentedLagrangian(every=0), "every >= 1"),
        (lambda: AugmentedLagrangian(rows=0), "rows >= 1"),
    ],
)
def test_a_loss_out_of_range_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# ------------------------------------------------------------------------------------------------------------- tracing


@pytest.mark.parametrize("loss", [PenaltyLoss(), BarrierLoss(), BarrierLoss("softlog"), AugmentedLagrangian(rows=8)])
def test_a_problem_with_its_gradients_is_traced_into_one_graph_that_computes_the_same(loss):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    problem = Problem(
        [Node(net, ["a", "p"], ["x"], name="solution")],
        [objective(lambda x, a: (x - a) ** 2, name="f")],
        [less_equal("x", "p", weight=3.0), equal(lambda x: x.sum(-1), 0.5, norm=2), greater_equal("x", 0.1)],
        loss=loss,
    )
    parameters = list(problem.parameters())

    def batch(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(8, n, generator=generator) for n in (2, 1)] + [torch.randperm(8, generator=generator)]

    def gradients(a: Tensor, p: Tensor, index: Tensor) -> list[Tensor]:
        value = problem({"a": a, "p": p, "index": index, "name": "train"})["train_loss"]
        return [value, *torch.autograd.grad(value, parameters)]

    gradients(*batch(1))  # the buffers exist
    graph = make_fx(gradients, tracing_mode="fake", _allow_non_fake_inputs=True)(*batch(1))
    for seed in (2, 3):  # other signs of the constraints than those traced
        for traced, eager in zip(graph(*batch(seed)), gradients(*batch(seed)), strict=True):
            torch.testing.assert_close(traced, eager)
    assert not torch.allclose(graph(*batch(2))[0], graph(*batch(3))[0])
    values = graph(*batch(2)) and copy.deepcopy(dict(problem.loss.named_buffers())).get("values")
    if values is not None:  # the graph records them too, in the live buffer
        gradients(*batch(2))
        torch.testing.assert_close(values, problem.loss.values)
