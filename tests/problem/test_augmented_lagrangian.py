"""The augmented Lagrangian against the textbook's formula, a KKT system and scipy; its state, sizes and errors."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from tests.helpers.problems import batch_of_rows
from weft.events import Hook
from weft.problem.constraints import equal, greater_equal, less_equal
from weft.problem.lagrangian import AugmentedLagrangian
from weft.problem.nodes import Node
from weft.problem.problem import Problem
from weft.problem.terms import objective


class Free(nn.Module):
    """One free point for each row: `x[index]` is what is optimised."""

    def __init__(self, rows: int, entries: int) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(rows, entries))

    def forward(self, index: Tensor) -> Tensor:
        return self.x[index]


def test_the_augmented_lagrangian_of_one_batch_is_the_textbooks():
    """Nocedal & Wright, ch. 17.3, 17.4: (max(0, lambda + mu v)^2 - lambda^2) / (2 mu), and lambda h + mu/2 h^2."""
    loss = AugmentedLagrangian(mu=4.0, every=1, rows=5)
    x, target = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)
    problem = Problem(
        [],
        [objective(lambda x: (x**2).sum(-1), name="f")],
        [less_equal("x", 0.1, weight=2.0, name="g"), equal(lambda x: x[:, :1], "b", name="h")],
        loss=loss,
    ).double()
    data = batch_of_rows(5, x=x.requires_grad_(), b=target)
    problem(data)
    loss.multipliers[:, :3] = torch.rand(5, 3)
    loss.multipliers[:, 3:] = torch.randn(5, 1)
    g, h, lam, mu = x - 0.1, x[:, :1] - target, loss.multipliers, 4.0
    inequality = ((torch.relu(lam[:, :3] + mu * g) ** 2 - lam[:, :3] ** 2) / (2 * mu)).sum(1).mean()
    equality = (lam[:, 3:] * h + mu / 2 * h**2).sum(1).mean()
    truth = (x**2).sum(-1).mean() + 2.0 * inequality + equality
    out = problem(data)
    torch.testing.assert_close(out["train_loss"], truth, rtol=1e-12, atol=0)
    torch.testing.assert_close(out["train_g"], 2.0 * inequality, rtol=1e-12, atol=1e-14)
    mine, theirs = (torch.autograd.grad(value, x)[0] for value in (out["train_loss"], truth))
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)

    before = lam.clone()
    loss.update()
    torch.testing.assert_close(loss.multipliers[:, :3], torch.relu(before[:, :3] + mu * g))
    torch.testing.assert_close(loss.multipliers[:, 3:], before[:, 3:] + mu * h)
    assert not torch.equal(loss.multipliers, before)


def minimise_once(problem: Problem, data: dict[str, Any]) -> None:
    optimizer = torch.optim.LBFGS(
        problem.parameters(), max_iter=300, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem(data)["train_loss"]
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]


def solve(problem: Problem, data: dict[str, Any], updates: int) -> None:
    """Minimise, update the multipliers, and again: what a trainer does with on_epoch_end."""
    for _ in range(updates):
        minimise_once(problem, data)
        problem(data)
        problem.loss.on_epoch_end(None, {})  # type: ignore[operator]


def test_multipliers_of_an_equality_constrained_qp_are_those_of_its_kkt_system():
    """min 1/2 x'Qx - c'x with A x = b, one (c, b) a row: [[Q, A'], [A, 0]] [x, lambda] = [c, b]."""
    torch.manual_seed(0)
    rows, n, m = 4, 3, 2
    root = torch.randn(n, n, dtype=torch.float64)
    Q, A = root @ root.T + torch.eye(n, dtype=torch.float64), torch.randn(m, n, dtype=torch.float64)
    c, b = torch.randn(rows, n, dtype=torch.float64), torch.randn(rows, m, dtype=torch.float64)
    kkt = torch.cat([torch.cat([Q, A.T], 1), torch.cat([A, torch.zeros(m, m, dtype=torch.float64)], 1)])
    truth = torch.linalg.solve(kkt, torch.cat([c, b], 1).T).T

    free, loss = Free(rows, n), AugmentedLagrangian(mu=10.0, growth=10.0, mu_max=200.0, eta=0.5, every=1)
    problem = Problem(
        [Node(free, ["index"], ["x"])],
        [objective(lambda x, c: 0.5 * (x @ Q * x).sum(-1) - (c * x).sum(-1), name="f")],
        [equal(lambda x: x @ A.T, "b", weight=0.5, name="h")],
        loss=loss,
    ).double()
    data = batch_of_rows(rows, c=c, b=b)
    solve(problem, data, updates=1)
    assert (loss.multipliers * 0.5 - truth[:, n:]).abs().max() > 1e-2  # one update is not enough
    solve(problem, data, updates=30)
    torch.testing.assert_close(free.x.detach(), truth[:, :n], rtol=0, atol=1e-6)
    torch.testing.assert_close(loss.multipliers * 0.5, truth[:, n:], rtol=0, atol=1e-5)  # weight * multipliers


def test_an_inequality_constrained_qp_ends_at_scipys_solution_with_nonnegative_complementary_multipliers():
    """min |x - c|^2 / 2 with x1 + x2 <= 1 and x >= 0, one c a row; solved point by point by SLSQP."""
    c = torch.tensor([[2.0, 1.0], [-1.0, 0.3], [0.2, 0.3], [0.9, -0.4]], dtype=torch.float64)
    free, loss = Free(4, 2), AugmentedLagrangian(mu=5.0, every=1)
    problem = Problem(
        [Node(free, ["index"], ["x"])],
        [objective(lambda x, c: 0.5 * ((x - c) ** 2).sum(-1), name="f")],
        [less_equal(lambda x: x.sum(-1), 1.0, name="sum"), greater_equal("x", 0.0, name="positive")],
        loss=loss,
    ).double()
    solve(problem, batch_of_rows(4, c=c), updates=30)
    limits: Any = [{"type": "ineq", "fun": lambda x: 1 - x.sum()}, {"type": "ineq", "fun": lambda x: x}]
    for row, center in enumerate(c.numpy()):
        truth = minimize(lambda x, k=center: 0.5 * ((x - k) ** 2).sum(), [0.1, 0.1], constraints=limits, tol=1e-12).x
        torch.testing.assert_close(free.x[row].detach(), torch.tensor(truth), rtol=0, atol=1e-6)
    # KKT: x - c + lambda_sum - lambda_positive = 0, lambda >= 0, lambda * v = 0
    x, lam = free.x.detach(), loss.multipliers
    torch.testing.assert_close(x - c + lam[:, :1] - lam[:, 1:], torch.zeros_like(x), rtol=0, atol=1e-6)
    v = torch.cat([x.sum(-1, keepdim=True) - 1, -x], 1)
    assert (lam >= 0).all() and (lam * v).abs().max() < 1e-6 and lam.max() > 0.5


def lagrangian_problem(rows: int | None = None, **kwargs: Any) -> tuple[Problem, AugmentedLagrangian]:
    loss = AugmentedLagrangian(rows=rows, **kwargs)
    terms = [less_equal("x", 0.0, name="g"), equal("x", 1.0, name="h")]
    return Problem([], [objective(lambda x: x**2, name="f")], terms, loss=loss), loss


def test_the_forward_changes_only_the_recorded_values_and_the_same_ones_each_time():
    problem, loss = lagrangian_problem()
    data = batch_of_rows(4, x=torch.randn(4, 1))
    first = problem(data)
    before = {k: v.clone() for k, v in loss.state_dict().items()}
    second = problem(data)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert all(torch.equal(v, before[k]) for k, v in loss.state_dict().items())
    torch.testing.assert_close(loss.values, torch.cat([data["x"], data["x"] - 1.0], 1), rtol=0, atol=0)
    loss.update()
    assert not torch.equal(loss.multipliers, before["multipliers"])


def test_evaluation_reports_the_penalty_loss_and_records_nothing():
    problem, loss = lagrangian_problem()
    data = batch_of_rows(3, x=torch.randn(3, 1))
    problem(data)
    loss.update()
    before = {k: v.clone() for k, v in loss.state_dict().items()}
    train = problem(data)["train_loss"]
    loss.values.fill_(torch.nan)
    out = problem.eval()({k: v for k, v in data.items() if k != "index"})
    penalty = Problem([], problem.objectives, problem.constraints)(data)  # type: ignore[arg-type]
    assert torch.equal(out["train_loss"], penalty["train_loss"]) and not torch.equal(out["train_loss"], train)
    assert all(torch.equal(v.nan_to_num(), before[k].nan_to_num()) for k, v in loss.state_dict().items())


def test_multipliers_move_every_so_many_epochs_and_only_for_rows_that_were_seen():
    problem, loss = lagrangian_problem(rows=4, every=2)
    assert isinstance(loss, Hook)
    problem({**batch_of_rows(2, x=torch.ones(2, 1)), "index": torch.tensor([0, 3])})
    loss.on_epoch_end(None, {})
    assert not loss.multipliers.any()
    loss.on_epoch_end(None, {})
    assert loss.multipliers[[0, 3], 0].all() and not loss.multipliers[[1, 2]].any()
    moved = loss.multipliers.clone()
    loss.on_epoch_end(None, {})
    loss.on_epoch_end(None, {})  # no row was seen since
    assert torch.equal(loss.multipliers, moved)


def test_the_penalty_parameter_of_a_row_grows_where_its_violation_did_not_shrink_and_not_beyond_its_limit():
    problem, loss = lagrangian_problem(rows=2, mu=1.0, growth=3.0, mu_max=5.0, eta=0.5)
    grown = []
    for a, b in ((1.0, 1.0), (1.0, 0.3), (1.0, 0.01), (1.0, 0.01)):  # row 0 never improves
        problem(batch_of_rows(2, x=1.0 + torch.tensor([[a], [b]])))
        loss.update()
        grown.append(loss.mu.flatten().tolist())
    assert grown[0] == [1.0, 1.0] and grown[1] == [3.0, 3.0]  # x > 0 violates g in both rows
    problem, loss = lagrangian_problem(rows=2, mu=1.0, growth=3.0, mu_max=5.0, eta=0.5)
    problem.constraints.pop(0)
    grown = []
    for a, b in ((1.0, 1.0), (1.0, 0.3), (1.0, 0.01), (1.0, 0.01)):
        problem(batch_of_rows(2, x=1.0 + torch.tensor([[a], [b]])))
        loss.update()
        grown.append(loss.mu.flatten().tolist())
    assert grown == [[1.0, 1.0], [3.0, 1.0], [5.0, 1.0], [5.0, 3.0]]


def test_buffers_grow_with_the_rows_seen_and_keep_what_is_known():
    problem, loss = lagrangian_problem()
    problem(batch_of_rows(2, x=torch.ones(2, 1)))
    loss.update()
    known = loss.multipliers.clone()
    problem({**batch_of_rows(1, x=torch.ones(1, 1)), "index": torch.tensor([5])})
    assert loss.multipliers.shape == (6, 2) and torch.equal(loss.multipliers[:2], known)
    assert not loss.multipliers[2:].any() and loss.mu.shape == (6, 1) and loss.violation[5].isinf()


def test_a_saved_state_of_any_size_is_loaded_and_training_goes_on_alike():
    problem, loss = lagrangian_problem(every=1)
    data = batch_of_rows(5, x=torch.randn(5, 1))
    problem(data)
    loss.on_epoch_end(None, {})
    fresh, fresh_loss = lagrangian_problem(every=1)
    fresh({**batch_of_rows(2, x=torch.ones(2, 1))})  # already has another size
    fresh.load_state_dict(copy.deepcopy(problem.state_dict()))
    for p, own in ((problem, loss), (fresh, fresh_loss)):
        p(data)
        own.on_epoch_end(None, {})
    assert all(torch.equal(v, problem.state_dict()[k]) for k, v in fresh.state_dict().items() if "values" not in k)
    assert torch.equal(fresh(data)["train_loss"], problem(data)["train_loss"]) and int(fresh_loss.num_epochs) == 2
    pickle.loads(pickle.dumps(loss))


def test_another_number_of_entries_starts_anew_with_a_warning():
    problem, loss = lagrangian_problem()
    problem(batch_of_rows(2, x=torch.ones(2, 1)))
    with pytest.warns(UserWarning, match="now have 6 entries a row, before 2"):
        problem(batch_of_rows(2, x=torch.ones(2, 3)))
    assert loss.multipliers.shape == (2, 6)


def test_the_augmented_lagrangian_says_what_it_misses():
    problem, _ = lagrangian_problem()
    with pytest.raises(KeyError, match=r"batch\['index'\]"):
        problem({"x": torch.ones(2, 1)})
    with pytest.raises(ValueError, match=r"constraint 'g' must have .* 3 rows .* shape \(2, 1\)"):
        problem(batch_of_rows(3, x=torch.ones(2, 1)))
    with pytest.raises(ValueError, match=r"rows=2"):
        lagrangian_problem(rows=2)[0](batch_of_rows(3, x=torch.ones(3, 1)))


def test_single_precision_values_under_autocast_keep_single_precision_multipliers():
    problem, loss = lagrangian_problem()
    problem(batch_of_rows(2, x=torch.ones(2, 1, dtype=torch.bfloat16)))
    assert loss.multipliers.dtype == torch.float32 and torch.equal(loss.values[:, 0], torch.ones(2))
