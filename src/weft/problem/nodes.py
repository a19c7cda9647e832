"""Nodes: functions of named tensors. Several in a loop over time are a `rollout`."""

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
    """The nodes as a list, each with a name, those of lists among them (`Node.on`); TypeError for what is none."""
    given = list(nodes) if isinstance(nodes, Iterable) else [nodes]
    checked = [node for one in given for node in (one if isinstance(one, list) else [one])]
    for i, node in enumerate(checked):
        is_node = isinstance(node, nn.Module) and hasattr(node, "input_keys") and hasattr(node, "output_keys")
        if not is_node:
            raise TypeError(f"{what}: {node!r} is no node; wrap it: weft.Node(fn, inputs=[...], outputs=[...]).")
        if getattr(node, "name", None) is None:
            cast(Any, node).name = f"node_{i}"  # as NeuroMANCER does
    return checked
