"""Graphs that run as they were traced, without the C++ compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from weft.compile import graph as graphs


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the traced graphs themselves: quick, where a test is not about what the compiler makes of them."""

    def run_itself(graph: torch.fx.GraphModule, inputs: Any, moving: int) -> Callable[[Any], Any]:
        def run(given: list[Tensor]) -> Any:
            with torch.no_grad():
                return graph(*given)

        return run

    monkeypatch.setattr(graphs, "compile_graph", run_itself)
