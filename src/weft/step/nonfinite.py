"""Numbers that are not finite: found in each step. What is then done is in `skipping`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from weft.devices.processes import own_part

if TYPE_CHECKING:
    from weft.step.state import RunState

# The one implementation of the finite check: torch's own multi-tensor kernel, which marks `found`.
check_and_unscale = torch._amp_foreach_non_finite_check_and_unscale_  # pyright: ignore[reportPrivateImportUsage]
READS_ARE_FREE = ("cpu",)  # kinds of devices where reading a number does not wait for work that was queued


def doubts_of(state: RunState, optimizers: Sequence[Optimizer], scaled: bool) -> Any:
    """Where steps that are not finite are noted for later, on a GPU; None where each step is looked at by itself."""
    if ignores(state) or state.fabric.device.type in READS_ARE_FREE or state.processes.in_shards:
        return None  # in shards all ask each other anyhow
    from weft.step.doubts import noted

    return noted(state, optimizers, scaled)


def ignores(state: RunState) -> bool:
    """Whether nobody looks whether numbers are finite: the optimizer steps with what there is."""
    return state.config.on_nonfinite == "ignore"


def look_back(state: RunState) -> None:
    """Act on a step since the last look that was not finite, where steps are not looked at one by one.

    It was left out.
    """
    if state.step.doubts is not None and (step := state.step.doubts.look()) is not None:
        from weft.step.skipping import not_finite

        not_finite(state, None, [(state.epoch.means.compute(), 1)], step)


def finite_check(
    params: Sequence[Tensor], scaled: bool, ignore: bool = False
) -> Callable[[Tensor | None, Sequence[Tensor | None]], bool]:
    """A function (loss, gradient norms where known) -> whether loss and all gradients are finite, exactly.

    With known norms these are looked at; else torch's own multi-tensor check, which costs about 2 % of a small
    step. Under a gradient scaler the scaler decides about gradients (an overflow skips the step by design).
    """
    if ignore:
        return lambda loss, norms: True
    by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for p in params:
        by_kind.setdefault((p.dtype, p.device), []).append(p)
    kinds = [(alike, torch.zeros((), dtype=torch.float32, device=device)) for (_, device), alike in by_kind.items()]
    one = {found.device: torch.ones_like(found) for _, found in kinds}

    def is_finite(loss: Tensor | None, norms: Sequence[Tensor | None]) -> bool:
        if loss is not None and not math.isfinite(loss.item()):
            return False
        if scaled:
            return True
        if norms and norms[0] is not None:
            return all(math.isfinite(norm.item()) for norm in norms if norm is not None)
        for alike, found in kinds:
            own = [own_part(p.grad) for p in alike if p.grad is not None]
            grads = [g.coalesce().values() if g.is_sparse else g for g in own]
            if alike[0].is_complex():
                grads = [torch.view_as_real(grad) for grad in grads]
            check_and_unscale(grads, found.zero_(), one[found.device])
            if found.item():
                return False
        return True

    return is_finite


class RunningStatistics:
    """A copy of what normalisation layers learn in their forward pass, to be put back when the batch was bad."""

    def __init__(self, module: nn.Module) -> None:
        layers = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        self._live = [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
        self._kept = [buffer.clone() for buffer in self._live]

    def take(self) -> None:
        """Copy them as they are now: before a step."""
        if self._live:
            torch._foreach_copy_(self._kept, self._live)  # pyright: ignore[reportPrivateImportUsage]

    def restore(self) -> None:
        """Put them back."""
        if self._live:
            torch._foreach_copy_(self._live, self._kept)  # pyright: ignore[reportPrivateImportUsage]
