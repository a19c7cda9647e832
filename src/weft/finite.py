"""Numbers that are not finite, found without waiting for a GPU.

    doubts = Doubts(device)
    doubts.guard(step, loss, norms, params, optimizers)   # each step: the optimizers leave a bad one out by themselves
    doubts.look()                                         # now and then: the first step that was left out, or None
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

READS_ARE_FREE = ("cpu",)  # kinds of devices where reading a number does not wait for work that was queued


def skips_by_itself(optimizer: Optimizer) -> bool:
    """Whether the optimizer leaves a step out that its `found_inf` marks, on the device: torch's fused ones do."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


class Doubts:
    """Steps in which the loss or a gradient was not finite, noted on the device."""

    def __init__(self, device: torch.device) -> None:
        self._first = torch.full((), -1, dtype=torch.int64, device=device)
        self._one = torch.ones((), dtype=torch.float32, device=device)

    def guard(
        self, step: int, loss: Tensor | None, norms: Sequence[Tensor | None], params: Iterable[Tensor],
        optimizers: Sequence[Optimizer],
    ) -> None:  # fmt: skip
        """Note `step` if its loss, gradient norms or gradients are not finite, and mark it for `optimizers`.

        Without optimizers (a gradient scaler watches the gradients) only the loss is looked at.
        """
        found = torch.zeros_like(self._one)
        for value in (loss, *(norms if optimizers else ())):
            if value is not None:
                found = torch.maximum(found, (~value.detach().isfinite()).to(torch.float32))
        if optimizers:
            by_dtype: dict[torch.dtype, list[Tensor]] = {}
            for p in params:
                if p.grad is not None:
                    by_dtype.setdefault(p.grad.dtype, []).append(p.grad)
            for grads in by_dtype.values():
                torch._amp_foreach_non_finite_check_and_unscale_(grads, found, self._one)  # pyright: ignore[reportPrivateImportUsage]
        for optimizer in optimizers:
            optimizer.found_inf = found  # type: ignore[attr-defined]
        self._first = torch.where((found > 0) & (self._first < 0), step, self._first)

    def note(self, step: int, finite: Tensor) -> None:
        """Note `step` if `finite`, a tensor on the device, is False: a compiled update has left it out by itself."""
        self._first = torch.where(~finite & (self._first < 0), step, self._first)

    def look(self) -> int | None:
        """The first step since the last look that was not finite, None if all were. Waits for the device."""
        first = int(self._first)
        self._first = torch.full_like(self._first, -1)
        return None if first < 0 else first
