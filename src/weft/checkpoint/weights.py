"""Weights in memory: copied, kept, put back.

best = Snapshot()
best.take(problem)          # 15 us for a small network
best.restore(problem)
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weft.devices.processes import own_part


def state_of(module: nn.Module) -> dict[str, Any]:
    """Copies of the module's parameters and persistent buffers by name, detached, on their devices."""
    return {name: _copied(value) for name, value in module.state_dict(keep_vars=True).items()}


def _copied(value: Any) -> Any:
    # Never deepcopy of a tensor: sparse ones (cvxpylayers' buffers) refuse it. The rest comes from get_extra_state().
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


class Snapshot:
    """A copy of a module's parameters and persistent buffers, in memory of its own that is used again.

    best = Snapshot()
    best.take(problem)          # 15 us for a small network
    best.restore(problem)
    """

    def __init__(self) -> None:
        self._kept: dict[str, Any] = {}
        self._module: weakref.ref[nn.Module] | None = None  # set if walking its modules finds all that it saves

    def take(self, module: nn.Module) -> None:
        """Copy the module's state as it is now. Tensors that kept their shape cost no new memory."""
        if self._module is not None and self._module() is module:
            live = _walk(module, "", {})
            if live.keys() == self._kept.keys() and all(map(_alike, self._kept.values(), live.values())):
                with torch.no_grad():
                    kept, now = list(map(own_part, self._kept.values())), list(map(own_part, live.values()))
                    torch._foreach_copy_(kept, now)  # pyright: ignore[reportPrivateImportUsage]
                return
        live = module.state_dict(keep_vars=True)
        old, self._kept = self._kept, {}
        for name, value in live.items():
            kept = old.get(name)
            if isinstance(value, Tensor) and isinstance(kept, Tensor) and _alike(kept, value):
                self._kept[name] = kept.copy_(value.detach())
            else:
                self._kept[name] = _copied(value)
        walked = _walk(module, "", {})
        same = walked.keys() == live.keys() and all(walked[name] is value for name, value in live.items())
        self._module = weakref.ref(module) if same and live else None

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the kept tensors by name."""
        return {name: _copied(value) for name, value in self._kept.items()}

    def load_state_dict(self, weights: Mapping[str, Any]) -> None:
        """Hold copies of `weights`, as `state_dict` gave them."""
        self._kept, self._module = {name: _copied(value) for name, value in weights.items()}, None

    def restore(self, module: nn.Module) -> None:
        """Put the copy back into the same module, in place; buffers that changed size since get their old size.

        ValueError where the module has got other parameters; it is then as it was.
        """
        if not self._kept:
            raise RuntimeError("This Snapshot is empty; call take(module) first.")
        load_into(module, self._kept, source="the snapshot", any_size=True)


def _walk(module: nn.Module, prefix: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
    # What module.state_dict(keep_vars=True) gives, three times as fast: no hooks, no versions.
    for name, parameter in module._parameters.items():
        if parameter is not None:
            found[prefix + name] = parameter
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            found[prefix + name] = buffer
    for name, child in module._modules.items():
        if child is not None:
            _walk(child, f"{prefix}{name}.", found)
    return found


def _alike(a: Tensor, b: Tensor) -> bool:
    # Sparse tensors are never copied in place: their number of entries may differ.
    return a.shape == b.shape and a.dtype is b.dtype and a.device == b.device and a.layout is b.layout is torch.strided


def load_into(
    module: nn.Module, weights: Mapping[str, Any], *, source: str, strict: bool = True, any_size: bool = False
) -> None:
    """Copy a state dict into the module in place; if it does not fit, nothing is changed and a ValueError names
    `source`.

    A buffer that holds at most one number is a place for one of any size (multipliers that grow at the first step of
    training) and takes the size found; with `any_size`, which is for a module's own earlier state, every buffer does.
    strict=False loads the names that fit, warns of the others, and raises if there is none.
    """
    own = module.state_dict(keep_vars=True)
    before = [(value, value.detach().clone()) for value in own.values() if isinstance(value, Tensor)]
    buffers = [(part._buffers, dict(part._buffers)) for part in module.modules()]
    try:
        _fit_buffers(module, weights, any_size)
        own = module.state_dict(keep_vars=True)
        try:
            missing, unexpected = module.load_state_dict(weights, strict=False)
        except RuntimeError as error:
            raise ValueError(_misfit(own, weights, source) or f"{source} does not fit: {error}") from error
        if (missing or unexpected) and (strict or not set(weights) - set(unexpected)):
            raise ValueError(
                f"{source} does not fit this problem: it lacks {few(missing)} and has {few(unexpected)} besides; "
                "pass strict=False or match={new prefix: old prefix} to load a part."
            )
    except BaseException:
        for registered, old in buffers:
            registered.update(old)
        with torch.no_grad():
            for value, old in before:
                value.copy_(old)
        raise
    if missing or unexpected:
        warnings.warn(
            f"{source}: not in it, unchanged here: {few(missing)}; not used: {few(unexpected)}.", stacklevel=3
        )


def _fit_buffers(module: nn.Module, weights: Mapping[str, Any], any_size: bool) -> None:
    device = next((value.device for value in module.state_dict().values() if isinstance(value, Tensor)), None)
    for prefix, part in module.named_modules(remove_duplicate=False):
        for name, buffer in part._buffers.items():
            new = weights.get(path := f"{prefix}.{name}" if prefix else name)
            if any_size and buffer is not None and path not in weights and name not in part._non_persistent_buffers_set:
                part._buffers[name] = None  # it was None when the copy was taken
            elif name in part._non_persistent_buffers_set or not isinstance(new, Tensor):
                continue
            elif buffer is None:
                part._buffers[name] = new.detach().clone().to(device)
            elif (any_size or buffer.numel() <= 1) and (
                buffer.shape != new.shape or buffer.layout is not torch.strided
            ):
                part._buffers[name] = new.detach().clone().to(buffer.device, buffer.dtype)


def _misfit(own: Mapping[str, Any], weights: Mapping[str, Any], source: str) -> str:
    pairs = [(name, weights[name], value) for name, value in own.items() if isinstance(weights.get(name), Tensor)]
    shapes = [(name, tuple(new.shape), tuple(old.shape)) for name, new, old in pairs if new.shape != old.shape]
    return "; ".join(f"{source} has {name} of shape {new}, this problem has {old}" for name, new, old in shapes[:5])


def few(names: Iterable[str]) -> str:
    """The first five names, for a message."""
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "nothing"
