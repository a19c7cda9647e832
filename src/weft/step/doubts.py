"""Steps on a GPU whose numbers are looked at later, many at once. Loaded where a run computes on one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer

from weft.devices.precision import check_and_unscale

if TYPE_CHECKING:
    from weft.step.state import RunState

NEVER = 2**62  # the step that no run comes to
FLUSH_AFTER = 32  # flags that wait before they are looked through


def skips_by_itself(optimizer: Optimizer) -> bool:
    """Whether the optimizer leaves a step out that its `found_inf` marks, on the device: torch's fused ones do."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


class Doubts:
    """Steps in which the loss or a gradient was not finite, noted on the device.

    A small step on a GPU takes as long as it takes to queue its operations, so a note is a flag that is kept, and many
    flags are looked through together.
    """

    def __init__(self, device: torch.device) -> None:
        self._one = torch.ones((), dtype=torch.float32, device=device)
        self._first = self._none = torch.full((), NEVER, dtype=torch.int64, device=device)
        self._waiting: dict[torch.dtype, list[tuple[int, Tensor]]] = {}

    def guard(
        self,
        step: int,
        loss: Tensor | None,
        norms: Sequence[Tensor | None],
        params: Iterable[Tensor],
        optimizers: Sequence[Optimizer],
    ) -> None:
        """Note `step` if its loss, gradient norms or gradients are not finite, and mark it for `optimizers`.

        Without optimizers (a gradient scaler watches the gradients) only the loss is looked at.
        """
        found, by_dtype = torch.zeros_like(self._one), dict[torch.dtype, list[Tensor]]()
        for value in (loss, *(norms if optimizers else ())):
            if value is not None:  # the kernel writes what it reads; `.data` has a count of changes of its own
                value = value.data if value.dtype in (torch.float32, torch.float64) else value.detach().float()
                by_dtype.setdefault(value.dtype, []).append(value)
        for p in params if optimizers else ():
            if p.grad is not None:
                by_dtype.setdefault(p.grad.dtype, []).append(p.grad)
        for values in by_dtype.values():
            check_and_unscale(values, found, self._one)
        for optimizer in optimizers:
            optimizer.found_inf = found  # type: ignore[attr-defined]
        self.note(step, found)

    def note(self, step: int, flag: Tensor) -> None:
        """Note `step` by a flag on the device: a number that is not 0 where it was bad, or whether it was finite."""
        waiting = self._waiting.setdefault(flag.dtype, [])
        waiting.append((step, flag))
        if len(waiting) >= FLUSH_AFTER:
            self._flush()

    def _flush(self) -> None:
        for dtype, waiting in self._waiting.items():
            steps, flags = zip(*waiting, strict=True)
            stacked = torch.stack(flags)
            fine = stacked if dtype == torch.bool else stacked == 0
            bad = torch.tensor(steps).to(stacked.device, non_blocking=True).masked_fill(fine, NEVER)
            self._first = torch.minimum(self._first, bad.min())
        self._waiting = {}

    def look(self) -> int | None:
        """The first step since the last look that was not finite, None if all were. Waits for the device."""
        self._flush()
        first, self._first = int(self._first), self._none
        return None if first == NEVER else first


def noted(state: RunState, optimizers: Sequence[Optimizer], scaled: bool) -> Doubts | None:
    """Where steps that are not finite are noted; None where they cannot be left out later, which is said once."""
    names = [type(o).__name__ for o in optimizers if not (scaled or skips_by_itself(o))]
    if state.config.on_nonfinite == "skip" or names:
        why = f"{names[0]} is not fused" if names else "on_nonfinite='skip' counts them"
        state.warn_once(f"The check for numbers that are not finite waits for the GPU in each step, as {why}.")
        return None
    return doubts_in(state)


def doubts_in(state: RunState) -> Doubts:
    """Those of the run, made when the first step may be noted."""
    doubts = state.step.doubts
    if doubts is None:
        state.step.note_in(doubts := Doubts(state.fabric.device))
    return doubts
