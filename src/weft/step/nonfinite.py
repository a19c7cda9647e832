"""What is done about a step whose numbers are not finite: raise, skip or stop; and what it learned is put back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from weft.step.state import RunState


MAX_SKIPPED = 100  # steps in a row that on_nonfinite="skip" leaves out before it gives up


def not_finite(state: RunState, loss: Tensor | None, read: Sequence, step: int | None = None) -> None:
    """Act on a loss or gradient that is not finite, as `on_nonfinite` says. Nothing was updated in that step.

    Raises FloatingPointError naming step, epoch, rank and the first term that was not finite.
    """
    progress, policy = state.progress, state.config.on_nonfinite
    if step is None and state.step.statistics is not None:
        state.step.statistics.restore()  # not of an earlier step: those since then have gone on with what it left
    values = [(name, _as_float(value)) for scalars, _ in read for name, value in scalars.items()]
    values.append(("the loss", 0.0 if loss is None else loss.item()))
    here = next((f"{name} is {value}" for name, value in values[:-1] if not math.isfinite(value)), None)
    told = state.processes.gather(here)  # all processes are here: they check the same sums
    rank, what = next(((rank, what) for rank, what in enumerate(told) if what), (0, None))
    what = what or ("a gradient is not finite" if math.isfinite(values[-1][1]) else f"the loss is {values[-1][1]}")
    message = f"{what} in step {progress.step if step is None else step} (epoch {progress.epoch}, rank {rank})"
    if policy == "raise":
        raise FloatingPointError(
            f"{message}; the weights are as they were. on_nonfinite='skip' or 'stop' goes on, 'ignore' steps with it."
        )
    if policy == "stop":
        state.warn_once(f"{message}; training stops (on_nonfinite='stop').")
        state.decide_to_stop("nonfinite")
        return
    progress.skip()
    if progress.skipped_total == 1:
        state.warn_once(f"{message}; the step is skipped (on_nonfinite='skip'), and so are others without a word.")
    if progress.skipped >= MAX_SKIPPED:
        raise FloatingPointError(f"{message}; {MAX_SKIPPED} steps in a row were skipped.")


def _as_float(value: Any) -> float:
    return float(value.detach().double().mean()) if isinstance(value, Tensor) else float(value)


class RunningStatistics:
    """A copy of what normalisation layers learn in their forward pass, to be put back when the batch was bad."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
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
