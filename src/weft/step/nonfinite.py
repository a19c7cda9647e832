"""Numbers that are not finite: found, and acted on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from weft.devices.processes import own_part

if TYPE_CHECKING:
    from weft.step.state import RunState

# The one implementation of the finite check: torch's own multi-tensor kernel, which marks `found`.
_check_and_unscale = torch._amp_foreach_non_finite_check_and_unscale_  # pyright: ignore[reportPrivateImportUsage]
READS_ARE_FREE = ("cpu",)  # kinds of devices where reading a number does not wait for work that was queued


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
            _check_and_unscale(values, found, self._one)
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


NEVER = 2**62  # the step that no run comes to
FLUSH_AFTER = 32  # flags that wait before they are looked through
MAX_SKIPPED = 100  # steps in a row that on_nonfinite="skip" leaves out before it gives up


def doubts_of(state: RunState, optimizers: Sequence[Optimizer], scaled: bool) -> Doubts | None:
    """Where steps that are not finite are noted for later, on a GPU; None where each step is looked at by itself."""
    if ignores(state) or state.fabric.device.type in READS_ARE_FREE or state.processes.in_shards:
        return None  # in shards all ask each other anyhow
    names = [type(o).__name__ for o in optimizers if not (scaled or skips_by_itself(o))]
    if state.config.on_nonfinite == "skip" or names:
        why = f"{names[0]} is not fused" if names else "on_nonfinite='skip' counts them"
        state.warn_once(f"The check for numbers that are not finite waits for the GPU in each step, as {why}.")
        return None
    state.step.doubts = state.step.doubts or Doubts(state.fabric.device)
    return state.step.doubts


def ignores(state: RunState) -> bool:
    """Whether nobody looks whether numbers are finite: the optimizer steps with what there is."""
    return state.config.on_nonfinite == "ignore"


def look_back(state: RunState) -> None:
    """Act on a step since the last look that was not finite, where steps are not looked at one by one.

    It was left out.
    """
    if state.step.doubts is not None and (step := state.step.doubts.look()) is not None:
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
            _check_and_unscale(grads, found.zero_(), one[found.device])
            if found.item():
                return False
        return True

    return is_finite


def not_finite(state: RunState, loss: Tensor | None, read: Sequence, step: int | None = None) -> None:
    """Act on a loss or gradient that is not finite, as `on_nonfinite` says. Nothing was updated in that step.

    Raises FloatingPointError naming step, epoch, rank and the first term that was not finite.
    """
    progress, policy = state.progress, state.config.on_nonfinite
    if step is None:  # else the steps since then have gone on with what that one left
        state.step.statistics.restore()
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
    progress.skipped += 1
    progress.skipped_total += 1
    if progress.skipped_total == 1:
        state.warn_once(f"{message}; the step is skipped (on_nonfinite='skip'), and so are others without a word.")
    if progress.skipped >= MAX_SKIPPED:
        raise FloatingPointError(f"{message}; {MAX_SKIPPED} steps in a row were skipped.")


def _as_float(value: Any) -> float:
    return float(value.detach().double().mean()) if isinstance(value, Tensor) else float(value)


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
