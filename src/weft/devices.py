"""What Lightning Fabric is asked for, and its traps: one Fabric per run, made from arguments alone.

Fabric decides accelerator, strategy, precision and processes. weft decides how a batch goes through the problem:
on one device the bare module (32-true), inside autocast (mixed; inputs keep their dtype), or in float64 throughout.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from weft.config import TrainerConfig

_OVERRIDES = ("LT_ACCELERATOR", "LT_STRATEGY", "LT_DEVICES", "LT_NUM_NODES", "LT_PRECISION")


def make_fabric(config: TrainerConfig, strategy: Any = None, plugins: Any = None) -> Fabric:
    """The Fabric that these options ask for. Errors name the option and what this machine has."""
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment

    plugins = [] if plugins is None else list(plugins) if isinstance(plugins, list | tuple) else [plugins]
    one_process = config.devices in (1, "1") and config.num_nodes == 1 and config.strategy == "auto" and strategy is None
    if one_process and not any(hasattr(p, "creates_processes_externally") for p in plugins):
        plugins.append(LightningEnvironment())  # Fabric 2.6 asks SLURM even for one device, and refuses --ntasks=2
    on_cpu = config.accelerator == "cpu" or (config.accelerator == "auto" and not _has_gpu())
    if config.precision in ("16-mixed", "16", 16) and on_cpu:  # Fabric would take bf16-mixed unasked
        raise ValueError(
            f"precision={config.precision!r} needs a GPU, and this run is on a CPU (this machine has {_machine()}); "
            "use 'bf16-mixed' or '32-true'."
        )
    devices: Any = list(config.devices) if isinstance(config.devices, tuple) else config.devices
    precision: Any = config.precision
    with _without_overrides():
        try:
            return Fabric(
                accelerator=config.accelerator, devices=devices, num_nodes=config.num_nodes,
                strategy=strategy if strategy is not None else config.strategy,
                precision=precision, plugins=plugins or None,
            )  # fmt: skip
        except (ValueError, RuntimeError, TypeError) as error:
            raise type(error)(
                f"{error} (asked for accelerator={config.accelerator!r}, devices={config.devices!r}, "
                f"strategy={config.strategy!r}, precision={config.precision!r}; this machine has {_machine()})"
            ) from error


def _has_gpu() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def _machine() -> str:
    found = [f"{torch.cuda.device_count()} CUDA device(s)"] if torch.cuda.is_available() else []
    found += ["MPS"] if torch.backends.mps.is_available() else []
    return ", ".join([*found, f"{os.cpu_count()} CPU cores"])


@contextmanager
def _without_overrides() -> Iterator[None]:
    """Fabric lets these variables override arguments without a word; here arguments decide, and it is said."""
    hidden = {k: os.environ.pop(k) for k in _OVERRIDES if k in os.environ}
    if hidden:
        warnings.warn(f"{', '.join(hidden)} in the environment is ignored: weft takes its devices from arguments.", stacklevel=4)
    try:
        yield
    finally:
        os.environ.update(hidden)


def float_dtype(fabric: Fabric) -> torch.dtype | None:
    """The dtype that floating data is cast to when it is made resident: float64 under 64-true, else None (kept)."""
    return torch.float64 if fabric._precision.precision == "64-true" else None


@contextmanager
def numerics(fabric: Fabric, deterministic: bool) -> Iterator[None]:
    """The default dtype (float64 under 64-true: Fabric would hand back float32 losses) and determinism of a run."""
    dtype, was = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        if float_dtype(fabric) is not None:
            torch.set_default_dtype(torch.float64)
        if deterministic:
            torch.use_deterministic_algorithms(True)
        yield
    finally:
        torch.set_default_dtype(dtype)
        if deterministic:
            torch.use_deterministic_algorithms(was, warn_only=warn_only)


def in_precision(fabric: Fabric, step: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`step` as it is, or inside autocast where the precision is mixed. Inputs are never cast."""
    if not fabric._precision.precision.endswith("-mixed"):
        return step

    def in_autocast(batch: Any) -> Any:
        with fabric.autocast():
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
    return getattr(fabric._precision, "scaler", None)
