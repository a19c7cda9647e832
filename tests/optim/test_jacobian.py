"""Residuals and their Jacobian, row by row and by products, against torch's own Jacobian of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import weft
from tests.helpers.problems import points, tanh_net
from weft.optim.least_squares import LeastSquares


class LaplaceOfNet(nn.Module):
    """The Laplacian of a network minus its value, by nested `torch.autograd.grad`, and boundary values beside it."""

    def __init__(self, kind: str = "row by row") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.kind = tanh_net(2, 1).double(), kind
        self.factor: Tensor
        self.register_buffer("factor", torch.tensor(1.0, dtype=torch.float64))
        self.shift = 0.0

    def residuals(self, batch: Any) -> dict[str, Tensor]:
        x = batch["inside"]["x"].requires_grad_()
        u = self.net(x)
        if self.kind == "mixes rows":
            u = u - u.mean()
        first = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
        second = [torch.autograd.grad(first[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
        several = self.net(batch["edge"]) * torch.tensor([[1.0, -2.0]], dtype=torch.float64)
        return {"equation": self.factor * sum(second) - u[:, 0] + self.shift, "edge": several}


def inside_and_edge() -> dict[str, Any]:
    return {"inside": points(9), "edge": points(5, seed=1)["x"], "name": "train"}


def dense(closure: LeastSquares) -> tuple[Tensor, Tensor]:
    blocks = list(closure.blocks())
    return torch.cat([r for r, _ in blocks]), torch.cat([jacobian for _, jacobian in blocks])


def by_torch(module: nn.Module, closure: LeastSquares) -> Tensor:
    """One gradient for each entry."""
    rows = []
    r = torch.cat([p.reshape(-1) / p.numel() ** 0.5 for p in closure.parts().values()])
    for entry in r:
        found = torch.autograd.grad(entry, closure.params, retain_graph=True, allow_unused=True)
        pairs = zip(found, closure.params, strict=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in pairs]))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["row by row", "mixes rows"])
def test_the_jacobian_is_that_of_each_entry(kind: str) -> None:
    module = LaplaceOfNet(kind)
    closure = LeastSquares(module, inside_and_edge())
    r, jacobian = dense(closure)
    torch.testing.assert_close(jacobian, by_torch(module, closure), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(r @ r, closure())
    how = {name: graph is not None for name, (_, graph) in closure.rows.graphs.items()}
    assert how == {"equation": kind == "row by row", "edge": True}


def test_a_jacobian_of_another_point_is_another() -> None:
    module: Any = LaplaceOfNet()
    closure = LeastSquares(module, inside_and_edge())
    before = by_torch(module, closure)
    with torch.no_grad():
        module.net[0].weight[0, 0] += 1e-3
    after = dense(closure)[1]
    torch.testing.assert_close(after, by_torch(module, closure), rtol=1e-11, atol=1e-12)
    assert not torch.allclose(after, before, rtol=1e-5)


@pytest.mark.parametrize("rows", [3, 9, pytest.param(60, marks=pytest.mark.long)])
def test_by_products_it_is_made_of_columns_or_of_rows(rows: int) -> None:
    """33 parameters: fewer than 60 entries, more than 9."""
    torch.manual_seed(0)
    net: Any = tanh_net(2, 1).double()
    x = points(rows)["x"]

    def around_the_mean(u: Tensor) -> Tensor:
        return (u - u.mean())[:, 0]

    net.residuals = lambda batch: around_the_mean(net(x))
    closure = LeastSquares(net, {"x": x})
    params = {k: p.detach() for k, p in net.named_parameters()}
    whole = jacrev(lambda p: around_the_mean(functional_call(net, p, (x,))))(params)
    want = torch.cat([whole[k].reshape(rows, -1) for k in params], dim=1) / rows**0.5
    torch.testing.assert_close(dense(closure)[1], want)


def test_products_are_those_of_the_matrix() -> None:
    closure = LeastSquares(LaplaceOfNet(), inside_and_edge())
    _, jacobian = dense(closure)
    generator = torch.Generator().manual_seed(3)
    v, w = (torch.randn(n, generator=generator, dtype=torch.float64) for n in reversed(jacobian.shape))
    torch.testing.assert_close(closure.product(v), jacobian @ v)
    torch.testing.assert_close(closure.transposed(w), jacobian.T @ w)
    assert not torch.allclose(closure.product(v), -(jacobian @ v))


def test_a_buffer_that_changes_is_seen_by_the_graphs() -> None:
    module = LaplaceOfNet()
    closure = LeastSquares(module, inside_and_edge())
    dense(closure)
    module.factor.fill_(3.0)
    torch.testing.assert_close(dense(closure)[1], by_torch(module, closure), rtol=1e-11, atol=1e-12)


def test_large_jacobians_come_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    module = LaplaceOfNet()
    want = dense(LeastSquares(module, inside_and_edge()))[1]
    monkeypatch.setattr("weft.optim.least_squares.CHUNK", 200)
    closure = LeastSquares(module, inside_and_edge())
    assert len(list(closure.blocks())) > 2
    torch.testing.assert_close(dense(closure)[1], want, rtol=1e-12, atol=1e-14)


def test_frozen_parameters_have_no_column() -> None:
    module = LaplaceOfNet()
    module.net[0].requires_grad_(False)
    closure = LeastSquares(module, inside_and_edge())
    torch.testing.assert_close(dense(closure)[1], by_torch(module, closure), rtol=1e-11, atol=1e-12)
    assert dense(closure)[1].shape[1] == 9


def test_a_net_in_two_places_keeps_its_parameters() -> None:
    net = tanh_net(1, 1).double()
    terms = [weft.residual(lambda u: u - 1.0, part=part, name=part) for part in ("inside", "ends")]
    problem = weft.Problem([*weft.Node(net, ["x"], ["u"]).on("inside", "ends")], terms)
    before = [*net.parameters()]
    x = torch.linspace(0, 1, 6, dtype=torch.float64)[:, None]
    closure = LeastSquares(problem, {"inside": {"x": x}, "ends": {"x": x[::5]}, "name": "train"})
    list(closure.blocks())
    assert [graph is not None for _, graph in closure.rows.graphs.values()] == [True, True]
    assert all(p is q for p, q in zip(net.parameters(), before, strict=True))
