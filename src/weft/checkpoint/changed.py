"""What training has changed of what modules keep outside of a state dict: told, and put back."""

from __future__ import annotations

import marshal
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weft.checkpoint.hidden import attributes, of_functions


def changed_attributes(problem: nn.Module, at_start: Mapping[str, Any]) -> dict[str, Any]:
    """Those that training has changed since they were `at_start` (NeuroMANCER's AugmentedLagrangeLoss has a flag)."""

    def changed(name: str, now: Any) -> bool:
        if name not in at_start or name.endswith(".training"):
            return ":" not in name  # a function may make itself new ones: nobody could put these back
        then = at_start[name]
        if isinstance(now, tuple):
            if not isinstance(then, tuple):
                return True
            if getattr(now[0], "copy_of", None) is then[0]:  # on another device for the time of the run
                return now[1] != 0
            return now[0] is not then[0] or now[1] != then[1]
        return now != then

    def value_of(found: Any) -> Any:
        return found[0] if isinstance(found, tuple) else marshal.loads(found) if isinstance(found, bytes) else found

    return {name: value_of(now) for name, now in attributes(problem).items() if changed(name, now)}


def set_attributes(problem: nn.Module, values: Mapping[str, Any]) -> None:
    """Put back what `changed_attributes` gave."""
    holders = {**dict(problem.named_parameters()), **dict(problem.named_modules())}
    functions = of_functions(problem) if any(":" in name for name in values) else {}
    for name, value in values.items():
        if ":" in name:
            if name not in functions:
                raise ValueError(f"The checkpoint has {name!r}, but no function of this problem uses such a tensor.")
            with torch.no_grad():
                functions[name].value.copy_(value)  # in place: others may hold it too
            continue
        prefix, _, attribute = name.rpartition(".")
        if prefix not in holders:
            raise ValueError(f"The checkpoint has {name!r}, but this problem has no module {prefix!r}.")
        module = holders[prefix]
        own = getattr(module, attribute, None)
        if type(value) is type(own) and isinstance(own, list | dict | set):  # in place: others may hold it too
            own.clear()
            own.extend(value) if isinstance(own, list) else own.update(value)
        elif not isinstance(value, Tensor):
            setattr(module, attribute, value)
        elif isinstance(own, Tensor) and own.shape == value.shape and own.dtype == value.dtype:
            with torch.no_grad():
                own.copy_(value)  # in place: a term's weight may be bound elsewhere
        else:
            device = next((p.device for p in problem.parameters()), value.device)
            setattr(module, attribute, value.detach().clone().to(device))
