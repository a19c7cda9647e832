"""Graphs that cost nothing to make, so that each kind of batch has one; and such that run as they were traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from weft.compile import choosing
from weft.compile import graph as graphs

COSTS = {name: getattr(choosing, name) for name in ("SECONDS_PER_GRAPH", "SECONDS_PER_NODE", "SECONDS_ONCE")}


@pytest.fixture(autouse=True)
def free_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every kind of batch that comes again made into a graph, however short the fit is."""
    for name in COSTS:
        monkeypatch.setattr(choosing, name, 0.0)


@pytest.fixture
def true_costs(free_graphs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the costs of graphs decide about them, as in a run of a user's."""
    for name, seconds in COSTS.items():
        monkeypatch.setattr(choosing, name, seconds)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the traced graphs themselves: quick, where a test is not about what the compiler makes of them."""

    def run_itself(graph: torch.fx.GraphModule, inputs: Any, moving: int) -> Callable[[Any], Any]:
        def run(given: list[Tensor]) -> Any:
            with torch.no_grad():
                return graph(*given)

        return run

    monkeypatch.setattr(graphs, "compile_graph", run_itself)
