"""Parts of a batch are keys that nodes and terms read: interior and boundary points of one net."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft

INTERIOR = {"x": torch.linspace(0.05, 0.95, 12)[:, None]}
BOUNDARY = {"x": torch.tensor([[0.0], [1.0], [0.0]]), "u0": torch.tensor([[0.0], [1.0], [0.0]])}
PARTS = ("interior", "boundary")


def slope(of: Tensor, by: Tensor) -> Tensor:
    return torch.autograd.grad(of.sum(), by, create_graph=True)[0]


def excess(u: Tensor, x: Tensor) -> Tensor:
    """Of u' = 2 x."""
    return (slope(u, x) - 2 * x).square()


def net_of_points() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))


def slope_and_ends(net: nn.Module | None = None) -> weft.Problem:
    net = net or net_of_points()
    return weft.Problem(
        [weft.Node(net, [f"{part}.x"], [f"{part}.u"], name=part) for part in PARTS],
        [weft.objective(excess, part="interior", name="pde")],
        [weft.equal("boundary.u", "boundary.u0", weight=10.0, norm=2, name="ends")],
        grad_inference=True,
    )


def data_of_parts(**sizes: Any) -> weft.Data:
    split = {"interior": INTERIOR, "boundary": BOUNDARY}
    return weft.Data(split, split, inputs_require_grad=["interior.x"], shuffle=False, **sizes)


def fit_parts(problem: nn.Module, given: Any, **options: Any) -> weft.FitResult:
    sgd = lambda params: torch.optim.SGD(params, lr=0.05)
    return weft.Trainer(**{"epochs": 3, "progress": False, "optimizer": sgd} | options).fit(problem, given)


def test_terms_of_parts_train_as_the_loss_written_by_hand() -> None:
    net = net_of_points()
    result = fit_parts(slope_and_ends(copy.deepcopy(net)), data_of_parts())
    optimizer, losses = torch.optim.SGD(net.parameters(), lr=0.05), []
    for _ in range(3):
        x = INTERIOR["x"].clone().requires_grad_()
        ends = 10.0 * (net(BOUNDARY["x"]) - BOUNDARY["u0"]).abs().square().mean()
        loss = excess(net(x), x).mean() + ends
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    hand = torch.cat([p.detach().flatten() for p in net.parameters()])
    trained = torch.cat([v.flatten() for k, v in result.last_weights.items() if k.startswith("nodes.0")])
    torch.testing.assert_close(trained, hand, rtol=1e-6, atol=1e-7)
    assert result.history["train_loss"] == pytest.approx(losses, rel=1e-6)
    assert result.history["train_ends"][0] != pytest.approx(losses[0], rel=1e-2)
    without = fit_parts(
        weft.Problem(
            [*slope_and_ends().nodes], [weft.objective(excess, part="interior", name="pde")], grad_inference=True
        ),
        data_of_parts(),
        epochs=1,
    )
    assert without.history["train_loss"][0] != pytest.approx(losses[0], rel=1e-2)


def test_parts_with_batches_of_their_own_are_evaluated_over_all_their_rows() -> None:
    problem = slope_and_ends()
    result = fit_parts(
        problem,
        data_of_parts(batch_size={"interior": 5, "boundary": 2}),
        epochs=1,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
    )
    x = INTERIOR["x"].clone().requires_grad_()
    net = problem.nodes[0].fn
    assert result.steps == 3
    assert result.history["dev_pde"][0] == pytest.approx(excess(net(x), x).mean().item(), rel=1e-5)
    off = (net(BOUNDARY["x"]) - BOUNDARY["u0"]).square().mean().item()
    assert result.history["dev_ends"][0] == pytest.approx(10 * off, rel=1e-5)


def test_with_part_both_sides_of_a_constraint_and_an_objective_name_keys_of_that_part() -> None:
    batch = {"boundary": {"u": torch.tensor([[1.0], [3.0]]), "x": torch.tensor([[0.0], [1.0]])}, "u": torch.zeros(2, 1)}
    of_part = [
        weft.objective(lambda u, x: u + x, part="boundary", name="sum"),
        weft.less_equal("u", lambda x: x, part="boundary", name="less"),
        weft.greater_equal(lambda u: u, 2.0, part="boundary", name="more"),
        weft.equal("u", "x", part="boundary", name="same"),
    ]
    assert [term.keys for term in of_part] == [
        ["boundary.u", "boundary.x"],
        ["boundary.u", "boundary.x"],
        ["boundary.u"],
        ["boundary.u", "boundary.x"],
    ]
    out = weft.Problem([], of_part[:1], of_part[1:])(batch)
    assert out["train_sum"] == 2.5 and out["train_less_violation"] == 1.5 and out["train_more_violation"] == 0.5
    plain = weft.Problem([], [weft.objective(lambda u: u, name="u")])(batch)
    assert plain["train_u"] == 0.0  # the key without a part is another one


def test_a_part_or_key_that_is_not_there_is_told_with_those_that_are() -> None:
    problem = weft.Problem([*slope_and_ends().nodes], [weft.objective(lambda u: u, part="boundry", name="u")])
    with pytest.raises(
        KeyError,
        match=r"reads 'boundry.u', which neither the data.*'boundary.x', 'boundary.u0'.*did you mean 'boundary.u'",
    ):
        fit_parts(problem, data_of_parts())
    with pytest.raises(ValueError, match=r"inputs_require_grad names \['inner.x'\].*'interior.x'"):
        fit_parts(
            slope_and_ends(), weft.Data({"interior": INTERIOR, "boundary": BOUNDARY}, inputs_require_grad=["inner.x"])
        )


def test_a_node_on_several_parts_is_a_node_of_the_same_function_for_each() -> None:
    net = net_of_points()
    node = weft.Node(net, ["x"], ["u"], name="net")
    several = node.on(*PARTS)
    assert [(n.name, n.input_keys, n.output_keys) for n in several] == [
        ("net_interior", ["interior.x"], ["interior.u"]),
        ("net_boundary", ["boundary.x"], ["boundary.u"]),
    ]
    assert all(n.fn is net for n in several)
    terms = [weft.objective(excess, part="interior", name="pde")]
    ends = [weft.equal("boundary.u", "boundary.u0", weight=10.0, norm=2, name="ends")]
    short, long = (
        fit_parts(weft.Problem(nodes, terms, ends, grad_inference=True), data_of_parts()).history
        for nodes in (several, [*slope_and_ends().nodes])
    )
    assert short == long and short["train_pde"][0] != short["train_pde"][1]


def test_a_gradient_is_that_of_autograd_and_refuses_to_add_quantities_up() -> None:
    x = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)
    u = (x[:, :1] ** 3 * x[:, 1:]).sin()
    inner = (x[:, :1] ** 3 * x[:, 1:]).cos()
    first = weft.gradient(u, x)
    torch.testing.assert_close(first, torch.cat([3 * x[:, :1] ** 2 * x[:, 1:], x[:, :1] ** 3], 1) * inner)
    torch.testing.assert_close(weft.gradient(u[:, 0], x), first)
    second = weft.gradient(first[:, 1:], x)[:, 1:]
    torch.testing.assert_close(second, -(x[:, :1] ** 6) * u)
    assert not torch.allclose(second, u)
    with pytest.raises(ValueError, match=r"\(5, 2\) holds several quantities a row.*gradient\(u\[:, :1\], x\)"):
        weft.gradient(first, x)
    with pytest.raises(RuntimeError, match="does not require grad"):
        weft.gradient(u, torch.rand(5, 2))


def test_only_the_named_part_requires_grad() -> None:
    seen: list[tuple[bool, bool]] = []
    look = {"on_step_start": lambda t, b: seen.append(tuple(b[p]["x"].requires_grad for p in PARTS))}
    fit_parts(slope_and_ends(), data_of_parts(batch_size={"interior": 5, "boundary": 2}), epochs=1, hooks=look)
    assert seen == [(True, False)] * 3
    whole = weft.Data({"interior": INTERIOR, "boundary": BOUNDARY}, inputs_require_grad=["x"])
    fit_parts(slope_and_ends(), whole, epochs=1, hooks=look)
    assert seen[-1] == (True, True)


def test_metrics_read_keys_of_parts() -> None:
    metrics = {"off": (lambda u, u0: (u - u0).abs().max(), ["boundary.u", "boundary.u0"])}
    problem = slope_and_ends()
    result = fit_parts(
        problem, data_of_parts(), epochs=1, metrics=metrics, optimizer=lambda p: torch.optim.SGD(p, lr=0.0)
    )
    off = (problem.nodes[0].fn(BOUNDARY["x"]) - BOUNDARY["u0"]).abs().max().item()
    assert result.history["dev_off"] == [pytest.approx(off, rel=1e-6)]


# ---- predictions of some keys


def test_predict_runs_the_nodes_of_the_asked_keys_alone() -> None:
    problem = slope_and_ends()
    trainer = weft.Trainer(epochs=1, progress=False)
    trainer.fit(problem, data_of_parts())
    found = trainer.predict({"interior": {"x": INTERIOR["x"]}}, keys=["interior.u"])
    assert found.keys() == {"interior.u"}
    assert torch.equal(found["interior.u"], problem.nodes[0].fn(INTERIOR["x"]).detach())
    with pytest.raises(KeyError, match="boundary.x"):  # what the other node reads
        trainer.predict({"interior": {"x": INTERIOR["x"]}})
    with pytest.raises(ValueError, match=r"nothing computes 'interior.v'.*did you mean 'interior.u'"):
        trainer.predict({"interior": {"x": INTERIOR["x"]}}, keys=["interior.v"])


def test_a_key_brings_the_nodes_it_is_computed_from() -> None:
    nodes = [
        weft.Node(lambda x: 2 * x, ["x"], ["y"], name="twice"),
        weft.Node(lambda w: w, ["w"], ["v"], name="other"),
        weft.Node(lambda y: y + 1, ["y"], ["z"], name="more"),
    ]
    problem = weft.Problem(nodes, [weft.objective(lambda z: z)])
    found = weft.Trainer(progress=False).predict({"x": torch.ones(3, 1)}, problem=problem, keys=["z"])
    assert found.keys() == {"z"} and torch.equal(found["z"], torch.full((3, 1), 3.0))


def test_keys_choose_from_what_a_step_or_a_plain_module_returns() -> None:
    trainer = weft.Trainer(progress=False, predict_step=lambda t, b: {"a": b["x"], "b": -b["x"]})
    found = trainer.predict({"x": torch.ones(3, 1)}, problem=slope_and_ends(), keys=["b"])
    assert found.keys() == {"b"} and torch.equal(found["b"], -torch.ones(3, 1))
    with pytest.raises(ValueError, match="nothing computes 'c'"):
        trainer.predict({"x": torch.ones(3, 1)}, problem=slope_and_ends(), keys=["c"])


# ---- the two commonest errors


def test_derivatives_by_what_does_not_require_grad_name_the_option() -> None:
    with pytest.raises(
        RuntimeError, match=r"does not require grad.*weft.Data\(..., inputs_require_grad=\['x', 'u0'\]\)"
    ):
        fit_parts(slope_and_ends(), {"interior": INTERIOR, "boundary": BOUNDARY})


def test_derivatives_in_an_evaluation_name_grad_inference() -> None:
    problem = slope_and_ends()
    problem.grad_inference = False
    with pytest.raises(RuntimeError, match=r"in an evaluation \(dev\).*grad_inference=True"):
        fit_parts(problem, data_of_parts())
    node = weft.Node(lambda x: slope((x**2).sum(), x), ["x"], ["v"], name="v")
    predicting = weft.Problem([node], [weft.objective(lambda v: v)])
    with pytest.raises(RuntimeError, match=r"in an evaluation \(predict\).*grad_inference=True"):
        weft.Trainer(progress=False).predict(
            weft.Data(None, predict={"x": torch.ones(2, 1)}, inputs_require_grad=["x"]), problem=predicting
        )


def test_derivatives_of_what_was_computed_from_another_part_are_told() -> None:
    mixed = weft.objective(lambda interior, boundary: slope(boundary["x"] ** 2, interior["x"]), name="mixed")
    data = weft.Data({"interior": INTERIOR, "boundary": BOUNDARY}, inputs_require_grad=["x"])
    with pytest.raises(RuntimeError, match="differentiated with respect to an input that it was not computed from"):
        fit_parts(weft.Problem([*slope_and_ends().nodes], [mixed]), data)
