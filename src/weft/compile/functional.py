"""The update and the evaluation as pure functions of tensors: what a graph is traced from, and what checks it.

A `PureStep` names every tensor that a step reads or changes: those of the batch, parameters, buffers, the optimizer's
state, learning rates, the numbers of epoch and step. Called on such tensors it changes no other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from weft.compile.graph import CannotCompile

Key = tuple[Any, ...]


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


# ---- what a problem holds --------------------------------------------------------------------------------------------


_OF_MODULES = set(vars(nn.Module())) - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Watch:
    """The attributes of modules and of an object at one moment: whether they have changed, and putting them back.

    Private attributes that hold a tensor may change: they are a module's own notes (NeuroMANCER's variables keep their
    last value so). Public ones may be read by anybody.
    """

    def __init__(self, problem: nn.Module, owner: Any) -> None:
        dicts: list[tuple[str, Any]] = [(type(owner).__name__, vars(owner))]
        for name, module in problem.named_modules():
            name = name or type(problem).__name__
            dicts += [
                (name, module.__dict__),
                (name, module._parameters),
                (name, module._buffers),
                (name, module._modules),
            ]
        for name, values in list(dicts):
            held = ((k, v) for k, v in values.items() if isinstance(v, list | dict | set))
            dicts += [(f"{name}.{k}", v) for k, v in held if not k.startswith("_") or k in _HOOKS]
        self._saved = [(name, now, copy(now), _notes(now)) for name, now in dicts]
        near = [owner, problem, *(m for m in problem.modules() if not type(m).__module__.startswith("torch.nn"))]
        self._noted = [saved for saved in self._saved if saved[3]]
        self._now, self._before = ([saved[i] for saved in self._saved if not saved[3]] for i in (1, 2))
        self._near = [vars(o) for o in near]  # of each, one of `_picks` takes all values in one call
        notes = {id(now): notes for _, now, _, notes in self._saved}
        keys = [[k for k in now if k not in _OF_MODULES and k not in notes[id(now)]] for now in self._near]
        self._picks: list[Callable[..., Any]] = [itemgetter(*k, k[0]) if k else len for k in keys]
        self._picked, self._sizes = self._pick(), list(map(len, self._near))
        self._parameters = list(problem.parameters())
        self._requires = [p.requires_grad for p in self._parameters]
        self._tensors = [v for _, d in dicts if isinstance(d, dict) for v in d.values() if type(v) is Tensor]

    def changed(self) -> str | None:
        """What is no longer as it was, None if all is."""
        same = _same(self._now, self._before, set())  # one comparison of all is quick
        for name, now, before, notes in self._noted if same else self._saved:
            if not _same(now, before, notes):
                return next((f"{name}.{k}" for k in _keys_that_differ(now, before) if k not in notes), name)
        if [p.requires_grad for p in self._parameters] != self._requires:
            return "requires_grad of a parameter"
        return None

    def glance(self) -> bool:
        """Whether the attributes of all but torch's own layers are as they were. Cheap enough for every step."""
        try:
            return self._pick() == self._picked and list(map(len, self._near)) == self._sizes
        except (KeyError, RuntimeError, ValueError):
            return False

    def _pick(self) -> list[Any]:
        return [pick(now) for pick, now in zip(self._picks, self._near, strict=True)]

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Whatever the block does to attributes, buffers and other tensors of the modules is undone."""
        values = [t.detach().clone() for t in self._tensors]
        try:
            yield
        finally:
            for _, now, before, _ in self._saved:
                now.clear()
                now.extend(before) if isinstance(now, list) else now.update(before)
            with torch.no_grad():
                for tensor, value in zip(self._tensors, values, strict=True):
                    tensor.copy_(value)


def _notes(values: Any) -> set[str]:
    """The private keys that hold a tensor."""
    if not isinstance(values, dict):
        return set()
    return {k for k, v in values.items() if isinstance(v, Tensor) and isinstance(k, str) and k.startswith("_")}


def _same(now: Any, before: Any, notes: set[str]) -> bool:
    try:
        if notes:
            return {k: v for k, v in now.items() if k not in notes} == {
                k: v for k, v in before.items() if k not in notes
            }
        return now == before
    except (RuntimeError, ValueError):  # two tensors or arrays do not compare: another one stands there
        return False


def _keys_that_differ(now: Any, before: Any) -> list[Any]:
    if not isinstance(now, dict):
        return []
    return [k for k in {**before, **now} if now.get(k, _same) is not before.get(k, _same)]


class Tensors:
    """The parameters and buffers of a module by place, each tensor once, and a way to put others in their places."""

    def __init__(self, module: nn.Module) -> None:
        self.parameters, self.buffers = list(module.parameters()), list(module.buffers())
        number = {id(t): i for i, t in enumerate([*self.parameters, *self.buffers])}
        self._places: list[tuple[dict[str, Any], str, int]] = [
            (held, key, number[id(tensor)])
            for m in module.modules()
            for held in (m._parameters, m._buffers)
            for key, tensor in held.items()
            if tensor is not None
        ]

    @contextmanager
    def replaced(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """The module holds `tensors` (parameters, then buffers). A buffer that was set anew is copied into its own."""
        own = [held[key] for held, key, _ in self._places]
        try:
            for held, key, i in self._places:
                held[key] = tensors[i]
            yield
            for held, key, i in self._places:
                if held[key] is not tensors[i]:
                    with torch.no_grad():
                        tensors[i].copy_(held[key])  # type: ignore[arg-type]
        finally:
            for (held, key, _), tensor in zip(self._places, own, strict=True):
                held[key] = tensor


# ---- the optimizer as a function of tensors --------------------------------------------------------------------------


class _TensorScalars(TorchFunctionMode):
    """Lets `add_(x, alpha=t)`, `addcmul_` and `addcdiv_(a, b, value=t)` take a tensor t, which torch needs as a number."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if isinstance(kwargs.get("alpha"), Tensor) and name in ("add", "add_", "sub", "sub_"):
            return func(args[0], args[1] * kwargs.pop("alpha"), **kwargs)
        if isinstance(kwargs.get("value"), Tensor) and name in ("addcmul", "addcmul_", "addcdiv", "addcdiv_"):
            product = args[1] * args[2] if "mul" in name else args[1] / args[2]
            return getattr(args[0], "add_" if name.endswith("_") else "add")(product * kwargs.pop("value"))
        return func(*args, **kwargs)


def moved_optimizer(optimizer: Optimizer, parameters: Sequence[Tensor], states: Sequence[Mapping[str, Any]]) -> Any:
    """An optimizer like `optimizer` for other tensors: its parameters in order, and the state of each."""
    other = object.__new__(type(optimizer))
    other.__dict__.update(optimizer.__dict__)
    rest = iter(parameters)
    groups = [{**group, "params": [next(rest) for _ in group["params"]]} for group in optimizer.param_groups]
    other.param_groups = groups
    other.state = defaultdict(dict, {p: dict(s) for p, s in zip(parameters, states, strict=True) if s})
    return other


def step_alone(optimizer: Any) -> None:
    """`optimizer.step()` without its hooks and without what schedulers hang on it."""
    step = type(optimizer).step
    getattr(step, "__wrapped__", step)(optimizer)


def step_in_graph(
    optimizer: Optimizer,
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    states: Sequence[Mapping[str, Any]],
    rates: Sequence[Tensor],
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """New parameters and states, computed by torch's own optimizer code without reading a tensor's value.

    Torch allows that (`capturable`) on a CPU only while compiling, so it is told so. Counters are kept in float64,
    which makes bias corrections as precise as python's floats.
    """
    new = [p.detach().clone() for p in parameters]
    copied = [
        {k: (v.double() if v.dim() == 0 else v.clone()) if isinstance(v, Tensor) else v for k, v in s.items()}
        for s in states
    ]
    other = moved_optimizer(optimizer, new, copied)
    for group, rate in zip(other.param_groups, rates, strict=True):
        group |= {"lr": rate, "foreach": False, "fused": False}
        if "capturable" in group:
            group["capturable"] = True
    for p, grad in zip(new, grads, strict=True):
        p.grad = grad
    told = torch.compiler.is_compiling
    try:
        torch.compiler.is_compiling = lambda: True
        with torch.no_grad(), _TensorScalars():
            step_alone(other)
    finally:
        torch.compiler.is_compiling = told
    return new, [other.state.get(p, {}) for p in new]
