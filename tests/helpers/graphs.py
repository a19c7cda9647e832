"""Graphs that cost nothing: for whoever counts them, and that run as they were traced, without the C++ compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from weft.compile import choosing
from weft.compile import graph as graphs

COSTS = {name: getattr(choosing, name) for name in ("SECONDS_PER_GRAPH", "SECONDS_PER_NODE", "SECONDS_ONCE")}


def make_free(patch: pytest.MonkeyPatch) -> None:
    """Have every kind of batch that comes again made into a graph, however short the fit is."""
    for name in COSTS:
        patch.setattr(choosing, name, 0.0)


def run_as_traced(patch: pytest.MonkeyPatch) -> None:
    """Run the traced graphs themselves: quick, where a test is not about what the compiler makes of them."""

    def run_itself(graph: torch.fx.GraphModule, inputs: Any, moving: int) -> Callable[[Any], Any]:
        def run(given: list[Tensor]) -> Any:
            with torch.no_grad():
                return graph(*given)

        return run

    patch.setattr(graphs, "compile_graph", run_itself)
