"""What a graph is traced from, as functions of tensors: a batch as a list of them, and an optimizer's step."""

from __future__ import annotations

import inspect
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from weft.compile.lifting import CannotCompile

# ---- batches as lists of tensors -------------------------------------------------------------------------------------


def flatten(batch: Any, tensors: list[Tensor], key: list[Any]) -> None:
    """Add the tensors of a nested batch to `tensors`, and to `key` all that decides which graph fits them."""
    if isinstance(batch, Tensor):
        tensors.append(batch if batch.is_contiguous() else batch.contiguous())
        key += (batch.shape, batch.dtype, batch.requires_grad)
    elif isinstance(batch, dict):
        for name, value in batch.items():
            if isinstance(value, Tensor):
                tensors.append(value if value.is_contiguous() else value.contiguous())
                key += (name, value.shape, value.dtype, value.requires_grad)
            elif type(value) is str:
                key += (name, value)
            elif name != "epoch":  # a tensor in the graph
                key.append(name)
                flatten(value, tensors, key)
    elif isinstance(batch, list | tuple):
        key.append(len(batch))
        for value in batch:
            flatten(value, tensors, key)
    elif batch is None or isinstance(batch, str | int | float | bool):
        key.append(batch)
    else:
        raise CannotCompile(f"a batch holds {type(batch).__name__}")


def rebuild(batch: Any, tensors: Iterator[Tensor], epoch: Any) -> Any:
    """A batch like `batch` that holds `tensors` in the order of `flatten`, and `epoch`."""
    if isinstance(batch, Tensor):
        tensor = next(tensors)
        return tensor.detach().requires_grad_() if batch.requires_grad else tensor
    if isinstance(batch, dict):
        return {k: epoch if k == "epoch" else rebuild(v, tensors, epoch) for k, v in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)([rebuild(v, tensors, epoch) for v in batch])
    return batch


# ---- the optimizer as a function of tensors --------------------------------------------------------------------------

COUNTING_ONCE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam)
"""Optimizers that count a parameter's steps up by one, before they use their number and in no other way."""


def leaders_of_counters(optimizer: Optimizer) -> list[int]:
    """For each parameter, the first of its group whose counter of steps has the same value; itself if it has none."""
    leaders: list[int] = []
    first: dict[tuple[int, torch.dtype, float], int] = {}
    for number, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            step = optimizer.state.get(p, {}).get("step")
            leader = len(leaders)
            if type(optimizer) in COUNTING_ONCE and isinstance(step, Tensor) and step.dim() == 0 and p.requires_grad:
                leader = first.setdefault((number, step.dtype, step.item()), leader)
            leaders.append(leader)
    return leaders


class _TensorScalars(TorchFunctionMode):
    """Lets `add_(x, alpha=t)`, `addcmul_` and `addcdiv_(a, b, value=t)` take a tensor t, where torch needs a number.

    `counters`: those that stand for several; what counts them up is done once.
    """

    def __init__(self, counters: Sequence[Tensor]) -> None:
        super().__init__()
        self._to_count = {id(t): t for t in counters}
        self._counted: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name in ("add_", "__iadd__") and id(args[0]) in self._to_count | self._counted:
            if id(args[0]) in self._counted:
                return args[0]
            self._counted[id(args[0])] = self._to_count.pop(id(args[0]))
        if isinstance(kwargs.get("alpha"), Tensor) and name in ("add", "add_", "sub", "sub_"):
            return func(args[0], args[1] * kwargs.pop("alpha"), **kwargs)
        if isinstance(kwargs.get("value"), Tensor) and name in ("addcmul", "addcmul_", "addcdiv", "addcdiv_"):
            product = args[1] * args[2] if "mul" in name else args[1] / args[2]
            return getattr(args[0], "add_" if name.endswith("_") else "add")(product * kwargs.pop("value"))
        return func(*args, **kwargs)


class _Compiling:
    """torch as a compiler shows it to a step: `compiler.is_compiling()` is True, all else is torch's own."""

    def __init__(self, real: Any, **others: Any) -> None:
        self.__dict__.update(others)
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


_TORCH = _Compiling(torch, compiler=_Compiling(torch.compiler, is_compiling=lambda: True))


_namespaces: dict[str, dict[str, Any]] = {}


def _compiling(function: Callable[..., Any]) -> FunctionType:
    """A copy of a function of torch.optim that, with all it calls there, believes that it is being compiled.

    Torch allows a step that reads no value (`capturable`) on a CPU only while compiling. To tell torch itself so would
    tell every other thread.
    """
    plain: Any = inspect.unwrap(function)
    if plain.__module__ not in _namespaces:
        namespace = _namespaces[plain.__module__] = {**vars(sys.modules[plain.__module__]), "torch": _TORCH}
        for name, value in list(namespace.items()):
            if isinstance(value, FunctionType) and value.__module__.startswith("torch.optim"):
                namespace[name] = _compiling(value)
    copied = FunctionType(
        plain.__code__, _namespaces[plain.__module__], plain.__name__, plain.__defaults__, plain.__closure__
    )
    copied.__kwdefaults__ = plain.__kwdefaults__
    return copied


def step_in_graph(
    optimizer: Optimizer,
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    rates: Sequence[Tensor],
    leaders: Sequence[int],
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """New parameters and states, computed by torch's own optimizer code without reading a tensor's value.

    Counters are kept in float64, which makes bias corrections as precise as python's floats. `leaders`: for each
    parameter, the one whose counter of steps it may use, as they are equal.
    """
    new = [p.detach().clone() for p in parameters]
    states = [
        {
            k: (v.double() if v.dim() == 0 else v.clone()) if isinstance(v, Tensor) else v
            for k, v in optimizer.state.get(p, {}).items()
        }
        for p in parameters
    ]
    counters: dict[int, Tensor] = {}
    for i, (state, grad) in enumerate(zip(states, grads, strict=True)):
        if grad is not None and leaders[i] != i:
            counters[leaders[i]] = state["step"] = states[leaders[i]]["step"]
    rest = iter(new)
    other = object.__new__(type(optimizer))
    other.__dict__.update(optimizer.__dict__)
    other.param_groups = [
        {**group, "params": [next(rest) for _ in group["params"]]} for group in optimizer.param_groups
    ]
    other.state = defaultdict(dict, {p: s for p, s in zip(new, states, strict=True) if s})
    for group, rate in zip(other.param_groups, rates, strict=True):
        group |= {"lr": rate, "foreach": False, "fused": False}
        if "capturable" in group:
            group["capturable"] = True
    for p, grad in zip(new, grads, strict=True):
        p.grad = grad
    with torch.no_grad(), _TensorScalars([*counters.values()]):
        _compiling(type(optimizer).step)(other)
    return new, [other.state.get(p, {}) for p in new]
