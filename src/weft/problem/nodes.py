"""Nodes: functions of named tensors, and rollouts of them."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from weft.problem.terms import check_function, explain, function_name
from weft.types import Batch


class Node(nn.Module):
    """`fn(*inputs)` under names: reads the keys `inputs`, returns a dict of the keys `outputs`.

    fn: any function of tensors; a module with a single argument without default gets several inputs concatenated on the
        last axis. Several outputs are returned as a tuple, in the order of `outputs`.
    name: defaults to the function's, or to the module's class in lower case.
    Raises TypeError where `fn` cannot take that many inputs, or returns another number of outputs.
    """

    def __init__(
        self, fn: Callable[..., Any], inputs: Sequence[str], outputs: Sequence[str], name: str | None = None
    ) -> None:
        super().__init__()
        check_function(fn, "A node is made of a function or module")
        self.name = name or function_name(fn) or "node"
        self.input_keys, self.output_keys = _keys(inputs, self), _keys(outputs, self)
        if not self.output_keys:
            raise ValueError(f"{self} has no outputs; name at least one key.")
        if duplicates := duplicates_in(self.output_keys):
            raise ValueError(f"{self} writes {duplicates[0]!r} twice; give each output its own key.")
        self.fn = fn
        if isinstance(owner := getattr(fn, "__self__", None), nn.Module):
            self.owner = owner  # of a bound method; its parameters are trained too
        self._concatenates = self._check_arity()

    def on(self, *parts: str) -> list[Node]:
        """A node of the same function for each of these parts of a batch, which reads and writes its keys.

        `Node(net, ["x"], ["u"]).on("interior", "boundary")`: from "interior.x" to "interior.u", and of the boundary.
        """
        keys = [([f"{p}.{k}" for k in self.input_keys], [f"{p}.{k}" for k in self.output_keys]) for p in parts]
        return [Node(self.fn, *k, name=f"{self.name}_{p}") for p, k in zip(parts, keys, strict=True)]

    def _check_arity(self) -> bool:
        """Whether the inputs are concatenated. Raises TypeError if they are more or fewer than `fn` takes."""
        try:
            signature = inspect.signature(self.fn.forward if isinstance(self.fn, nn.Module) else self.fn)
        except (TypeError, ValueError):  # a builtin does not tell
            return False
        required = [p for p in signature.parameters.values() if p.default is p.empty]
        one = len(required) == 1 and required[0].kind in (inspect.Parameter.POSITIONAL_ONLY, _PLAIN)
        if isinstance(self.fn, nn.Module) and one and len(self.input_keys) > 1:
            return True
        try:
            signature.bind(*self.input_keys)
        except TypeError as error:
            raise TypeError(f"{self} gives {len(self.input_keys)} inputs to {signature}: {error}.") from None
        return False

    def forward(self, data: Batch) -> dict[str, Tensor]:
        """The outputs by key. Raises KeyError for a key that is not in `data`."""
        try:
            args = [data[k] for k in self.input_keys]
            value = self.fn(torch.cat(args, dim=-1)) if self._concatenates else self.fn(*args)
        except Exception as error:
            explain(error, str(self), self.input_keys, data)
            raise
        if isinstance(value, Tensor) and len(self.output_keys) == 1:
            return {self.output_keys[0]: value}
        if isinstance(value, tuple | list) and len(value) == len(self.output_keys):
            return dict(zip(self.output_keys, value, strict=True))
        from weft.problem.mistakes import wrong_number

        raise wrong_number(self, value)

    def __str__(self) -> str:
        return f"node {self.name!r}"

    def __repr__(self) -> str:
        return f"Node {self.name}({', '.join(self.input_keys)}) -> {', '.join(self.output_keys)}"


_PLAIN = inspect.Parameter.POSITIONAL_OR_KEYWORD


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
            raise ValueError(f"{self} has several nodes named {duplicates[0]!r}; give each its own name.")
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
        needed = (1 if key in self.input_keys else 0) if written else self.steps
        if tensor.ndim != 3 or tensor.shape[1] < needed:
            from weft.problem.mistakes import no_series

            raise no_series(self, key, tensor, needed)
        return list(tensor.unbind(1))

    def __str__(self) -> str:
        return f"rollout {self.name!r}"

    def __repr__(self) -> str:
        nodes = ", ".join(str(n.name) for n in self.nodes)
        keys = f"({', '.join(self.input_keys)}) -> {', '.join(self.output_keys)}"
        return f"Rollout {self.name}{keys}: {self.steps} steps of {nodes}"


def _keys(keys: Sequence[str], node: Node) -> list[str]:
    keys = [keys] if isinstance(keys, str) else list(keys)
    for key in keys:
        if not isinstance(key, str):
            raise TypeError(f"{node}: keys are texts; got {key!r}.")
    return keys


def duplicates_in(names: Iterable[Any]) -> list[Any]:
    """The names that stand there more than once."""
    return [name for name, count in Counter(names).items() if count > 1]


def node_list(nodes: Any, what: str) -> list[Any]:
    """The nodes as a list, each with a name; TypeError for what is none."""
    checked = list(nodes) if isinstance(nodes, Iterable) else [nodes]
    for i, node in enumerate(checked):
        is_node = isinstance(node, nn.Module) and hasattr(node, "input_keys") and hasattr(node, "output_keys")
        if not is_node:
            raise TypeError(f"{what}: {node!r} is no node; wrap it: weft.Node(fn, inputs=[...], outputs=[...]).")
        if getattr(node, "name", None) is None:
            cast(Any, node).name = f"node_{i}"  # as NeuroMANCER does
    return checked


def _check_steps(rollout: Rollout) -> None:
    if not isinstance(rollout.steps, int) or rollout.steps < 1:
        raise ValueError(f"{rollout}: steps must be an int >= 1; got {rollout.steps!r}.")
