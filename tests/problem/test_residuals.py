"""Terms that are sums of squares, and what says so of any problem."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from tests.helpers.bitwise import same
from tests.helpers.problems import tanh_net, tanh_points
from weft.optim.least_squares import LeastSquares
from weft.problem.residuals import residuals_of


def of_terms(**terms: Any) -> weft.Problem:
    torch.manual_seed(0)
    return weft.Problem([weft.Node(tanh_net(2, 1), ["x"], ["u"], name="net")], **terms)


def labelled() -> dict[str, Any]:
    return {**tanh_points(7), "name": "train"}


def test_a_residual_is_the_mean_of_its_square() -> None:
    as_residual = of_terms(objectives=[weft.residual(lambda u, y: u - y, weight=3.0, name="fit")])
    as_square = of_terms(objectives=[weft.objective(lambda u, y: (u - y).square(), weight=3.0, name="fit")])
    found, want = as_residual(labelled()), as_square(labelled())
    assert same(found["train_fit"], want["train_fit"]) and same(found["train_loss"], want["train_loss"])
    other = of_terms(objectives=[weft.objective(lambda u, y: (u - y).abs(), weight=3.0, name="fit")])
    assert not same(other(labelled())["train_loss"], want["train_loss"])


def test_the_mean_squares_of_all_residuals_add_up_to_the_loss() -> None:
    p = of_terms(
        objectives=[weft.residual(lambda u, y: u - y, weight=3.0), weft.residual(lambda u: u**2, name="small")],
        constraints=[weft.less_equal("u", -0.3, weight=2.0, norm=2), weft.equal("u", "y", norm=2, weight=0.5)],
    )
    residuals = residuals_of(p)(labelled())
    assert list(residuals) == ["objective_0", "small", "constraint_0", "constraint_1"]
    out = p(labelled())
    for name, r in residuals.items():
        torch.testing.assert_close(r.square().mean(), out[f"train_{name}"])
    assert float(out["train_constraint_0"].detach()) > 0


def test_a_residual_may_belong_to_a_part_of_the_batch() -> None:
    node = weft.Node(tanh_net(2, 1), ["inside.x"], ["inside.u"], name="net")
    terms = [weft.residual(lambda u, y: u - y, part="inside", name="fit")]
    limits = [weft.less_equal("u", -0.3, part="inside", norm=2, name="cap")]
    p, inside = weft.Problem([node], terms, limits), tanh_points(7)
    out, residuals = p({"inside": inside, "name": "train"}), residuals_of(p)({"inside": inside})
    torch.testing.assert_close(residuals["fit"], node.fn(inside["x"]) - inside["y"])
    torch.testing.assert_close(sum(r.square().mean() for r in residuals.values()), out["train_loss"])
    assert float(out["train_cap"].detach()) > 0


def test_terms_that_are_no_squares_say_what_to_write() -> None:
    mixed = of_terms(
        objectives=[weft.objective(lambda u: u, name="f")], constraints=[weft.less_equal("u", 0.1, name="cap")]
    )
    with pytest.raises(TypeError, match=r"objective 'f': write weft.residual.*constraint 'cap'.*norm=2"):
        residuals_of(mixed)
    barrier = of_terms(objectives=[weft.residual(lambda u: u)], loss=weft.BarrierLoss())
    with pytest.raises(TypeError, match="BarrierLoss"):
        residuals_of(barrier)
    with pytest.raises(TypeError, match=r"Linear does not say.*`residuals\(self, batch\)`"):
        residuals_of(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="must not be negative"):
        weft.residual(lambda u: u, weight=-1.0)


class Several(nn.Module):
    """A module of one's own, whose residuals come as a tensor, a list or a dict."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.w, self.kind = nn.Parameter(torch.tensor([1.0, 2.0])), kind

    def residuals(self, batch: Any) -> Any:
        first, second = batch["x"] * self.w, self.w[:1] - 3.0
        return {"tensor": first, "list": [first, second], "dict": {"a": first, "b": second}}[self.kind]


@pytest.mark.parametrize(("kind", "names"), [("tensor", 1), ("list", 2), ("dict", 2)])
def test_a_module_of_ones_own_may_return_one_or_several(kind: str, names: int) -> None:
    module, x = Several(kind), torch.tensor([[1.0, 1.0], [2.0, -1.0]])
    closure = LeastSquares(module, {"x": x})
    want = (x * module.w).square().mean() + ((module.w[0] - 3) ** 2 if names == 2 else 0)
    assert len(closure.parts()) == names
    torch.testing.assert_close(closure(), want.detach())
    (gradient,) = torch.autograd.grad(want, module.w)
    torch.testing.assert_close(module.w.grad, gradient)


def equality_of_power(power: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import neuromancer.loss as nm_loss
        import neuromancer.problem as nm_problem
        import neuromancer.system as nm_system
        from neuromancer.constraint import variable
    torch.manual_seed(0)
    node = nm_system.Node(tanh_net(2, 1), ["x"], ["u"], name="net")
    make: Any = variable
    u, y = make("u"), make("y")
    fit, cap = 2.0 * ((u == y) ^ power), 5.0 * ((u <= 0.1) ^ 2)
    return nm_problem.Problem([node], nm_loss.PenaltyLoss([fit.update_name("fit") or fit], [cap]))


def test_neuromancers_equalities_with_norm_2_are_residuals() -> None:
    p = equality_of_power(2)
    found: dict[str, Tensor] = residuals_of(p)(labelled())
    total = sum(r.square().mean() for r in found.values())
    torch.testing.assert_close(total, p(labelled())["train_loss"])
    with pytest.raises(TypeError, match=r"\^ 2"):
        residuals_of(equality_of_power(1))
