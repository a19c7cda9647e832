"""Precision: in which dtype a step computes, and how its optimizers step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from lightning.fabric import Fabric

# The one implementation of the finite check: torch's own multi-tensor kernel, which marks `found`.
check_and_unscale = torch._amp_foreach_non_finite_check_and_unscale_  # pyright: ignore[reportPrivateImportUsage]


def float_dtype(fabric: Fabric) -> torch.dtype | None:
    """The dtype that floating data is cast to when it is made resident: float64 under 64-true, else None (kept)."""
    return torch.float64 if fabric.strategy.precision.precision == "64-true" else None


@contextmanager
def numerics(
    fabric: Fabric, deterministic: bool, problem: nn.Module, trained: Callable[[], Collection[torch.Tensor]] = list
) -> Iterator[None]:
    """The default dtype (float64 under 64-true: Fabric would hand back float32 losses), constants, determinism.

    `trained` tells what optimizers hold, which is no constant.
    """
    dtype, was = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        if float_dtype(fabric) is not None:
            torch.set_default_dtype(torch.float64)
        if deterministic:
            torch.use_deterministic_algorithms(True)
        with _constants(problem, fabric, trained):
            yield
    finally:
        torch.set_default_dtype(dtype)
        if deterministic:
            torch.use_deterministic_algorithms(was, warn_only=warn_only)


def _constants(
    problem: nn.Module, fabric: Fabric, trained: Callable[[], Collection[torch.Tensor]]
) -> AbstractContextManager[None]:
    """The constants of plain functions where the run computes; on a CPU in their own dtype they are there already."""
    if fabric.device.type == "cpu" and float_dtype(fabric) is None:
        return nullcontext()
    from weft.problem.hardcoded import constants_on

    return constants_on(problem, fabric.device, float_dtype(fabric), trained)


def in_precision(fabric: Fabric, step: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`step` as it is, or inside autocast where parameters or layers are in half precision. Inputs are never cast.

    Where all parameters are (bf16-true), autocast lets layers round what they compute with, and nothing else: a time or
    a coordinate of 1000.3 stays 1000.3.
    """
    precision = fabric.strategy.precision.precision
    if precision.endswith("-mixed"):
        autocast = fabric.autocast
    elif precision in ("bf16-true", "16-true"):
        dtype = torch.bfloat16 if precision == "bf16-true" else torch.float16
        autocast = partial(torch.autocast, fabric.device.type, dtype)
    else:
        return step

    def in_autocast(batch: Any) -> Any:
        with autocast():
            return step(batch)

    return in_autocast


def stepping(fabric: Fabric, optimizers: Sequence[Optimizer]) -> tuple[Callable[[], Any], Callable[[Any], Any] | None]:
    """What steps `optimizers`, and what takes the gradient scaling of 16-mixed back before (None elsewhere).

    Under a scaler an overflow skips the step and lowers the scale, as it is meant to.
    """
    scaler = scaler_of(fabric)

    def step_all() -> None:
        for optimizer in optimizers:
            optimizer.step()

    def scaled_steps() -> None:
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()

    if scaler is not None:
        return scaled_steps, scaler.unscale_
    return optimizers[0].step if len(optimizers) == 1 else step_all, None


def scaler_of(fabric: Fabric) -> Any:
    """The gradient scaler of 16-mixed, else None."""
    return getattr(fabric.strategy.precision, "scaler", None)
