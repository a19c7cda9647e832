"""What modules, and the functions they call, keep outside of a state dict. `changed` compares it and puts it back."""

from __future__ import annotations

import marshal
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from weft.places import Place, attributes_of, named, places


def attributes(problem: nn.Module) -> dict[str, Any]:
    """Plain values (bool, int, float, str, None; lists, dicts and sets of them) and tensors that modules keep outside
    of their state dict, by name.

    Also which parameters are trained (`requires_grad`), and which modules a hook has put in eval mode. A plain value
    comes as its bytes (10^6 numbers in a list take 20 ms), a tensor with its version: both tell a change in place. Not
    taken: tensors with a graph, and those whose name begins with "_", which are caches (NeuroMANCER's variables keep
    their last value so).
    """
    found: dict[str, Any] = {f"{name}.requires_grad": p.requires_grad for name, p in problem.named_parameters()}
    modules = list(problem.named_modules())
    own = [(p.path, p.name, p.value) for p in attributes_of(modules)]
    for prefix, module in modules:
        if problem.training and not module.training:  # in training all others are not; so this one is "changed"
            found[f"{prefix}.training"] = False
        own += [(prefix, name, module._buffers[name]) for name in module._non_persistent_buffers_set]
    for prefix, name, value in own:
        if _is_plain(value):
            found[f"{prefix}.{name}" if prefix else name] = marshal.dumps(value, 2)  # of now: a list may grow
        elif type(value) is Tensor and not name.startswith("_") and value.grad_fn is None:
            found[f"{prefix}.{name}" if prefix else name] = (value, value._version)
    direct = {id(value) for *_, value in own}
    held = {name: p.value for name, p in of_functions(problem).items() if id(p.value) not in direct}
    return found | {name: (value, value._version) for name, value in held.items()}


def of_functions(problem: nn.Module) -> Mapping[str, Place]:
    """The tensors that the functions of a problem use and may change, by names that have a colon."""
    tensors = [p for p in places(problem) if type(p.value) is Tensor and p.put is not None]
    return named(p for p in tensors if p.value.grad_fn is None and not p.value.requires_grad)


_PLAIN = {type(None), bool, int, float, str}


def _is_plain(value: Any, depth: int = 20) -> bool:
    if type(value) not in (list, tuple, set, dict):
        return type(value) in _PLAIN
    items = [*value, *value.values()] if isinstance(value, dict) else value
    return set(map(type, items)) <= _PLAIN or (depth > 0 and all(_is_plain(item, depth - 1) for item in items))
