"""What least-squares optimizers compute of residuals, as graphs: values, Jacobians, and products with them.

    optimizer.rows.by_graph = ResidualGraphs(graphs)        # weft.optim's; Trainer(compile=True) does so

Each graph is compared with the eager computation once, when it is made, and made anew when an attribute that it rests
on has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from weft.compile.functional import flatten
from weft.compile.lifting import CannotCompile
from weft.compile.stepgraphs import EvaluationGraph
from weft.optim.searching import a_little_away
from weft.step.forward import forward_of
from weft.step.state import RunState

Function = Callable[..., Sequence[Tensor]]
MAX_MADE = 8  # graphs of one function; further ones are done eagerly


class FunctionGraph(EvaluationGraph):
    """A function of a batch and vectors that reads the run's parameters."""

    def __init__(self, state: RunState, function: Function, given: dict[str, Any], tensors: list[Tensor]) -> None:
        self.function = function
        super().__init__(state, forward_of(state, "train"), given, tensors)

    def compute(self, batch: Any) -> list[Tensor]:
        return list(self.function(batch["batch"], *batch["vectors"]))


class ResidualGraphs:
    """Computes functions by graphs, or eagerly where there can be none, which is told once."""

    def __init__(self, state: RunState) -> None:
        self.state = state
        self.known: dict[Any, FunctionGraph | None] = {}
        self.made: dict[str, int] = {}

    def __call__(self, name: str, function: Function, batch: Any, *vectors: Tensor) -> Sequence[Tensor]:
        """What `function(batch, *vectors)` returns; `name` is the same for the same function."""
        given = {"batch": batch, "vectors": list(vectors)}
        tensors, shapes = list[Tensor](), list[Any]([name, self.state.progress.phase])
        try:
            flatten(given, tensors, shapes)
            key = tuple(shapes)
            graph = self.known.get(key)
            if key not in self.known or (graph is not None and graph.changed() is not None):
                graph = self.known[key] = self._make(name, function, given, tensors)
        except CannotCompile as reason:
            self.state.warn_once(f"compile={self.state.config.compile!r}: residuals stay eager: {reason}.")
            graph = self.known[tuple(shapes)] = None
        return function(batch, *vectors) if graph is None else graph.call(tensors)

    def _make(self, name: str, function: Function, given: dict[str, Any], tensors: list[Tensor]) -> FunctionGraph:
        self.made[name] = self.made.get(name, 0) + 1
        if self.made[name] > MAX_MADE:
            raise CannotCompile(f"what they rest on has changed {MAX_MADE} times, and each needs a graph")
        graph = FunctionGraph(self.state, function, given, tensors)
        with self.state.telling(f"compiling {name}"):
            graph.compile()
        with a_little_away(self.state.problem.parameters()):
            found, wanted = graph.call(tensors), function(given["batch"], *given["vectors"])
        for mine, eager in zip(found, wanted, strict=True):
            bound = 1e4 * torch.finfo(eager.dtype).eps * float(eager.abs().max())
            if not bool(((mine - eager).abs() <= bound).all()):
                raise CannotCompile(f"a graph does not give {name} as they are")
        return graph
