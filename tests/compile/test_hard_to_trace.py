"""Steps that are hard to trace: random numbers in any layout, forward-mode derivatives, very many operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from tests.helpers.problems import parameter_rows, small_rosenbrock, tanh_net
from weft.compile import choosing
from weft.compile import graph as graphs
from weft.compile.lifting import CannotCompile


def compiled(fn: Callable[..., Sequence[Tensor]], *inputs: Tensor) -> Callable[..., Sequence[Tensor]]:
    graph, fixed = graphs.trace(fn, inputs)
    run = graphs.compile_graph(graph, [*inputs, *(t.detach() for t in fixed)], moving=len(inputs))
    return lambda *given: run([*given, *fixed])


def with_seed(fn: Callable[..., Sequence[Tensor]], *inputs: Tensor) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(3)
    return [t.detach() for t in fn(*inputs)], torch.get_rng_state()


# ---- random numbers --------------------------------------------------------------------------------------------------


def test_random_numbers_are_at_the_places_where_eager_code_has_them() -> None:
    """In memory that is not contiguous they are drawn in the order of memory."""

    def drawn(x: Tensor) -> list[Tensor]:
        seen = x.permute(2, 0, 1)
        mask = torch.empty_like(seen).bernoulli_(0.5)
        noise = [torch.rand_like(seen), torch.randn_like(x), torch.rand_like(x), torch.rand(3, 2)]
        return [seen * mask, nn.functional.dropout(seen, 0.3), *(n + 0 for n in noise)]

    x = torch.rand(3, 4, 5)
    found, random_after = with_seed(compiled(drawn, x), x)
    expected, random_expected = with_seed(drawn, x)
    for mine, value in zip(found, expected, strict=True):
        assert torch.equal(mine, value)
    assert torch.equal(random_after, random_expected)
    assert not torch.equal(expected[0], with_seed(drawn, x.flip(0))[0][0])


def test_a_transformer_with_dropout_draws_what_eager_draws() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)

    def step(x: Tensor) -> list[Tensor]:
        loss = (layer(x) * x).sum()
        return [loss.detach(), *torch.autograd.grad(loss, list(layer.parameters()))]

    x = torch.rand(4, 5, 8)
    found, random_after = with_seed(compiled(step, x), x)
    expected, random_expected = with_seed(step, x)
    for mine, value in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, value, rtol=1e-4, atol=1e-5)
    assert torch.equal(random_after, random_expected)
    torch.manual_seed(4)
    assert abs(step(x)[0] - found[0]) > 1e-3  # another mask makes a difference


# ---- derivatives -----------------------------------------------------------------------------------------------------

NET = tanh_net(1, 1, 4)


def velocity(x: Tensor) -> list[Tensor]:
    return [*torch.func.jvp(NET, (x,), (torch.ones_like(x),))]


def forward_jacobian(x: Tensor) -> list[Tensor]:
    return [torch.vmap(torch.func.jacfwd(NET))(x)]


def reverse_hessian(x: Tensor) -> list[Tensor]:
    return [torch.vmap(torch.func.jacrev(torch.func.jacrev(NET)))(x)]


@pytest.mark.parametrize("fn", [velocity, forward_jacobian, reverse_hessian])
def test_derivatives_in_forward_mode_are_traced(fn: Callable[..., list[Tensor]]) -> None:
    def step(x: Tensor) -> list[Tensor]:
        loss = sum((t.square().sum() for t in fn(x)), torch.zeros(()))
        return [loss.detach(), *torch.autograd.grad(loss, [p for p in NET.parameters() if p.dim() == 2])]

    x, other = torch.rand(2, 5, 1)
    graph, fixed = graphs.trace(step, [x])
    for mine, value in zip(graph(other, *fixed), step(other), strict=True):
        torch.testing.assert_close(mine, value)


class Curved(nn.Module):
    def forward(self, batch: dict[str, Any]) -> Tensor:
        return torch.vmap(torch.func.hessian(lambda v: NET(v).sum()))(batch["a"]).square().mean()


def test_what_cannot_be_traced_names_the_users_line_and_a_way_out() -> None:
    problem = Curved()
    problem.net = NET
    wanted = (
        r"jacrev\(torch.func.jacrev.* can be traced \(test_hard_to_trace.py, line \d+: return torch.vmap\(torch.func"
    )
    with pytest.warns(UserWarning, match=wanted) as caught:
        weft.Trainer(epochs=2, compile=True, progress=False).fit(problem, weft.Data(parameter_rows(20), batch_size=10))
    assert sum("stays eager" in str(w.message) for w in caught) == 1


def test_a_line_that_was_typed_is_named_too() -> None:
    typed: dict[str, Any] = {}
    exec(compile("def fn(x):\n    return [x * float(x.sum())]\n", "<stdin>", "exec"), typed)  # noqa: S102
    with pytest.raises(CannotCompile, match=r"\(<stdin>, line 2"):
        graphs.trace(typed["fn"], [torch.rand(3)])


# ---- very many operations --------------------------------------------------------------------------------------------


def test_too_many_operations_are_known_before_they_are_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("traced")

    monkeypatch.setattr(choosing, "MAX_OPERATIONS", 100)
    monkeypatch.setattr(graphs, "trace", never)
    with pytest.warns(UserWarning, match=r"the update stays eager: one of them is about \d+ operations"):
        weft.Trainer(epochs=2, compile=True, progress=False).fit(
            small_rosenbrock(), weft.Data(parameter_rows(20), batch_size=10)
        )


class Steps(nn.Module):
    """Very many steps of Euler: about 10,000 operations with their gradients."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.right = nn.Linear(2, 2)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        x = torch.cat([batch["a"], batch["p"]], -1)
        for _ in range(450):
            x = x + 0.01 * self.right(x).tanh()
        return x.square().mean()


@pytest.mark.long
def test_ten_thousand_operations_are_one_graph_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    made = graphs.compile_graph

    def compile_graph(graph: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(graph.graph.nodes))
        return made(graph, *args, **kwargs)

    def losses(compile: bool) -> list[float]:
        found: list[float] = []

        def note(trainer: Any, batch: Any, loss: Tensor) -> None:
            found.append(float(loss))
            if len(found) == 12:
                trainer.stop("enough")

        trainer = weft.Trainer(epochs=10**5, compile=compile, progress=False, hooks={"on_step_end": note})
        trainer.fit(Steps(), weft.Data(parameter_rows(20), batch_size=10))
        return found

    monkeypatch.setattr(graphs, "compile_graph", compile_graph)
    compiled = losses(True)
    assert len(sizes) == 1
    assert choosing.MAX_UNASKED < sizes[0] < graphs.MAX_NODES
    assert compiled == pytest.approx(losses(False), rel=1e-4)
    assert compiled[0] > compiled[-1]


def test_tracing_stops_at_the_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_NODES", 20)
    calls = []

    def long(x: Tensor) -> list[Tensor]:
        for _ in range(1000):
            x = x.sin()
            calls.append(1)
        return [x]

    with pytest.raises(CannotCompile, match="more than 20 nodes"):
        graphs.trace(long, [torch.rand(3)])
    assert len(calls) == 20
