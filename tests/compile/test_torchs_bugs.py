"""Bugs of torch that graphs work around: each is there in the versions that are named, or the workaround can go."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from weft.compile import graph as graphs


def result_of(fn: Callable[..., list[Tensor]], *inputs: Tensor) -> Tensor:
    graph, fixed = graphs.trace(fn, inputs)
    given = [*inputs, *fixed]
    return graphs.compile_graph(graph, given, moving=len(inputs))(given)[0]


def alpha_is_dropped(patch: pytest.MonkeyPatch) -> bool:
    """Inductor takes `add(a @ b, x, alpha=k)` for `addmm(x, a, b)`: `graph._spell_out_alpha`."""
    patch.setattr(graphs, "_spell_out_alpha", lambda graph: None)
    a, b, x = torch.rand(3, 4, 4)

    def fn(a: Tensor, b: Tensor, x: Tensor) -> list[Tensor]:
        return [torch.add(a @ b, x, alpha=1e-4)]

    return not torch.allclose(result_of(fn, a, b, x), fn(a, b, x)[0])


def fused_steps_take_gradients_for_strided_as_parameters(patch: pytest.MonkeyPatch) -> bool:
    """Fused optimizers on a CPU go through memory side by side: `GradientGraph.gradients`."""
    start, grad = torch.rand(3, 4), torch.rand(4, 3).t()
    found = []
    for fused in (True, False):
        p = nn.Parameter(start.clone())
        p.grad = grad
        torch.optim.SGD([p], lr=1.0, fused=fused).step()
        found.append(p.detach())
    return not torch.equal(*found)


THERE = {
    alpha_is_dropped: ("2.13",),
    fused_steps_take_gradients_for_strided_as_parameters: ("2.13",),
}
"""By bug: the versions of torch in which it was found."""


@pytest.mark.parametrize("bug", THERE, ids=lambda bug: bug.__name__)
def test_a_bug_is_there_in_the_versions_that_have_it(bug: Callable[..., bool], monkeypatch: pytest.MonkeyPatch) -> None:
    has = torch.__version__.startswith(THERE[bug])
    assert bug(monkeypatch) == has, f"{bug.__doc__} In torch {torch.__version__}: {'gone' if has else 'there'}."
