"""Tensors that a traced function reaches by another way than its inputs: fakes for them, and inputs of the graph."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode, track_tensor_tree
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

_aten = torch.ops.aten
_MADE_ANEW = (_aten.lift_fresh.default, _aten.lift_fresh_copy.default)  # torch.tensor(...): torch knows its value

NESTED = (
    f"torch {torch.__version__} cannot trace forward-mode derivatives of reverse-mode ones inside vmap "
    "(torch.func.hessian, say); torch.func.jacrev(torch.func.jacrev(f)) gives the same and can be traced"
)


class CannotCompile(RuntimeError):
    """Why a function cannot run as a graph, and where that was found."""


class NotYet(CannotCompile):
    """Something is still to be made by an eager step."""


class ByReference(TorchDispatchMode):
    """While make_fx traces: every real tensor that an operation of this thread meets is a constant of the graph.

    Without this, operations that meet real tensors only are computed, and change them. CannotCompile after `most`
    operations.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most, self._number = most, 0
        self._fakes: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._number += 1
        if self._number > self._most:
            raise CannotCompile(f"its graph has more than {self._most} nodes")
        if func not in _MADE_ANEW:
            args, kwargs = tree_map_only(Tensor, self._fake, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _fake(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        if type(tensor) not in (Tensor, nn.Parameter):
            raise CannotCompile(f"it makes a constant of {type(tensor).__name__}")
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # type: ignore[attr-defined]
            raise CannotCompile(NESTED)
        if id(tensor) not in self._fakes:
            mode, fakes = get_proxy_mode(), detect_fake_mode()
            assert mode is not None and fakes is not None
            with _disable_current_modes():
                fake = fakes.from_tensor(tensor.detach())
            tracer: Any = mode.tracer
            node: Any = tracer.create_arg(tensor)
            track_tensor_tree(fake, fx.Proxy(node, tracer), constant=None, tracer=tracer)
            self._fakes[id(tensor)] = fake, tensor  # which keeps the number from being used again
        return self._fakes[id(tensor)][0]


class NoReading(TorchFunctionMode):
    """While make_fx traces: the one way to read a tensor's values of which no mode below is told, is refused."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist:
            raise CannotCompile("the step reads the values of a tensor (tolist)")
        return func(*args, **(kwargs or {}))


def inputs_for_constants(graph: fx.GraphModule) -> tuple[fx.GraphModule, list[Tensor]]:
    """The same graph with the tensors it holds as inputs after its own, and these tensors.

    Two that are the same memory seen alike (a parameter and its `.data`) become one input.
    """
    from torch.fx._lazy_graph_module import _make_graph_module  # its code is only compiled where somebody calls it

    nodes = list(graph.graph.nodes)
    new, copied, lifted = fx.Graph(), {}, {}
    fakes = next(n.meta["val"].fake_mode for n in nodes if isinstance(n.meta.get("val"), FakeTensor))
    for node in nodes:
        if node.op == "placeholder":
            copied[node] = new.placeholder(node.name)
            copied[node].meta = node.meta
    for node in nodes:
        if node.op == "get_attr":
            tensor: Any = functools.reduce(getattr, node.target.split("."), graph)
            if type(tensor) not in (Tensor, nn.Parameter):
                raise CannotCompile(f"it makes a constant of {type(tensor).__name__}")
            try:
                at = tensor.data_ptr() if tensor.numel() else id(tensor)
            except RuntimeError as error:  # a fake that torch lost sight of
                raise CannotCompile(NESTED) from error
            place = (at, tensor.shape, tensor.stride(), tensor.dtype)
            if place not in lifted:
                lifted[place] = new.placeholder(f"constant{len(lifted)}"), tensor
                lifted[place][0].meta["val"] = fakes.from_tensor(tensor.detach())  # the compiler asks for it
            copied[node] = lifted[place][0]
    for node in nodes:
        if node.op not in ("placeholder", "get_attr"):
            copied[node] = new.node_copy(node, copied.__getitem__)
    _refuse_overlaps([(tensor, _is_written(node)) for node, tensor in lifted.values()])
    return _make_graph_module({}, new), [tensor for _, tensor in lifted.values()]


def _is_written(node: fx.Node) -> bool:
    """Whether the graph changes `node`, or a view of it, in place."""
    for user in node.users:
        schema = getattr(user.target, "_schema", None)
        taken = [] if schema is None else [*zip(schema.arguments, user.args, strict=False)]
        aliases = [argument.alias_info for argument, value in taken if value is node and argument.alias_info]
        if any(alias.is_write for alias in aliases) or (aliases and _is_written(user)):
            return True
    return False


def _refuse_overlaps(constants: Sequence[tuple[Tensor, bool]]) -> None:
    """CannotCompile where a tensor that the graph changes shares memory with another: a compiler takes them for two."""
    there = [(t.data_ptr(), t.data_ptr() + _extent(t), is_written, t) for t, is_written in constants if t.numel()]
    there.sort(key=lambda found: found[:2])
    for i, (_, end, one_is_written, one) in enumerate(there):
        for _, _, other_is_written, other in takewhile(lambda found, end=end: found[0] < end, there[i + 1 :]):
            if one_is_written or other_is_written:
                shapes = f"{tuple(one.shape)} and {tuple(other.shape)}"
                raise CannotCompile(f"it changes a tensor in memory that another shares (shapes {shapes})")


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
