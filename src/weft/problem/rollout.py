"""Rollouts: nodes in a closed loop over time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from weft.problem.nodes import duplicates_in, node_list
from weft.problem.terms import explain
from weft.types import Batch


class Rollout(nn.Module):
    """A closed loop: the nodes in turn, `steps` times, each reading entry t of its inputs and appending its outputs.

    Tensors are (batch, time, features), as in NeuroMANCER's System. A key the nodes write starts from the entries in
    the data, if there are any: a state given with one entry ends with steps + 1, a control that is not given with
    `steps`. A key they only read needs `steps` entries, or is (batch, features) and constant in time. The nodes see
    (batch, features). `steps` may be changed between epochs. `name`: as in messages and pictures.

    Raises KeyError for a key that is not there, ValueError for a signal that is too short.
    """

    nodes: Any
    """The nodes, as a ModuleList."""

    def __init__(self, nodes: Iterable[nn.Module], steps: int, name: str | None = None) -> None:
        super().__init__()
        self.nodes = nn.ModuleList(node_list(nodes, "Rollout"))
        self.name, self.steps = name or "rollout", steps
        written: list[str] = []
        initial: list[str] = []  # read in the first step before anything was written to them
        for node in self.nodes:
            initial += [k for k in node.input_keys if k not in written and k not in initial]
            written += [k for k in node.output_keys if k not in written]
        self.input_keys, self.output_keys = initial, written
        if duplicates := duplicates_in(n.name for n in self.nodes):
            from weft.problem.named import tell_apart

            tell_apart(self, duplicates)
        _check_steps(self)

    def forward(self, data: Batch) -> dict[str, Tensor]:
        """All written keys, each (batch, time, features), the entries they started from included."""
        _check_steps(self)
        series: dict[str, list[Tensor]] = {k: [] for k in self.output_keys}
        for key in dict.fromkeys([*self.input_keys, *(k for k in self.output_keys if k in data)]):
            series[key] = self._entries(key, data)
        nodes = [(node, node.input_keys, node.output_keys) for node in self.nodes]
        for t in range(self.steps):
            for node, reads, writes in nodes:
                new = node({k: series[k][t] for k in reads})
                for key in writes:
                    series[key].append(new[key])
        return {k: torch.stack(series[k], dim=1) for k in self.output_keys}  # one copy at the end

    def _entries(self, key: str, data: Batch) -> list[Tensor]:
        try:
            tensor = data[key]
        except KeyError as error:
            explain(error, str(self), [key], data)
            raise
        written = key in self.output_keys
        if tensor.ndim == 2:
            return [tensor] * (1 if written else self.steps)
        if tensor.ndim != 3:
            raise ValueError(
                f"{self}: {key!r} has shape {tuple(tensor.shape)}; expected (batch, time, features), "
                "or (batch, features) for what is constant in time."
            )
        needed = (1 if key in self.input_keys else 0) if written else self.steps
        if tensor.shape[1] < needed:
            raise ValueError(
                f"{self}: {key!r} has {tensor.shape[1]} time entries, {needed} are needed for {self.steps} steps; "
                "give a longer signal or fewer steps."
            )
        return list(tensor.unbind(1))

    def __str__(self) -> str:
        return f"rollout {self.name!r}"

    def __repr__(self) -> str:
        nodes = ", ".join(str(n.name) for n in self.nodes)
        keys = f"({', '.join(self.input_keys)}) -> {', '.join(self.output_keys)}"
        return f"Rollout {self.name}{keys}: {self.steps} steps of {nodes}"


def _check_steps(rollout: Rollout) -> None:
    if not isinstance(rollout.steps, int) or rollout.steps < 1:
        raise ValueError(f"{rollout}: steps must be an int >= 1; got {rollout.steps!r}.")
