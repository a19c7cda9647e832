"""What Lightning Fabric is asked for, and its traps: one Fabric per run, made from arguments alone.

Fabric decides accelerator, strategy, precision and processes. weft decides how a batch goes through the problem:
on one device the bare module (32-true), inside autocast (mixed; inputs keep their dtype), or in float64 throughout.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from weft.devices.signals import interactive

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from weft.config import TrainerConfig

STARTING_SECONDS = 300.0  # python and torch take their time, most of all where many start at once
_OVERRIDES = ("LT_ACCELERATOR", "LT_STRATEGY", "LT_DEVICES", "LT_NUM_NODES", "LT_PRECISION")


def make_fabric(config: TrainerConfig, strategy: Any = None, plugins: Any = None) -> Fabric:
    """The Fabric that these options ask for, checked; no process is started yet.

    Errors (ValueError, TypeError) name the option, what was found, and what this machine has.
    """
    from lightning.fabric import Fabric
    from lightning.fabric.plugins import Precision
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    plugins = [] if plugins is None else list(plugins) if isinstance(plugins, list | tuple) else [plugins]
    # Fabric writes into it; the next fit gives it again
    asked: Any = copy(strategy) if strategy is not None else config.strategy
    devices: Any = list(config.devices) if isinstance(config.devices, list | tuple) else config.devices
    if not any(isinstance(p, ClusterEnvironment) for p in plugins):
        alone = is_one(devices) and config.num_nodes == 1 and asked == "auto"
        if config.num_nodes > 1 or not os.environ.keys().isdisjoint(("TORCHELASTIC_RUN_ID", "SLURM_NTASKS")):
            from weft.devices.launched import check_launch, slurm_tasks

            check_launch(config, alone)
            alone = alone or (slurm_tasks() == 1 and config.num_nodes == 1)
        if alone:
            plugins.append(LightningEnvironment())  # Fabric takes SLURM's number of tasks for what is asked, unasked
    _check_precision(config)
    if asked == "dp":  # Fabric takes "ddp" instead on a CPU, unasked; on GPUs it copies the problem in each step
        raise ValueError("strategy='dp' is not supported; use 'ddp', which starts one process for each device.")
    precision: Any = config.precision
    if any(isinstance(p, Precision) for p in plugins) and precision == "32-true":
        precision = None  # the default must not contradict the plugin
    try:
        with _without_overrides(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*`srun` command is available")  # outside of a job that is no hint
            fabric = Fabric(
                accelerator=config.accelerator,
                devices=devices,
                num_nodes=config.num_nodes,
                strategy=_strategy(asked),
                precision=precision,
                plugins=plugins or None,
            )
        _check_strategy(fabric)
    except (ValueError, RuntimeError, TypeError, MisconfigurationException) as error:
        kind = type(error) if isinstance(error, ValueError | TypeError) else ValueError
        raise kind(
            f"{error} (Asked for accelerator={config.accelerator!r}, devices={config.devices!r}, strategy={asked!r}, "
            f"num_nodes={config.num_nodes}, precision={config.precision!r}. This machine has {_machine()}.)"
        ) from error
    if config.timeout is not None and hasattr(fabric.strategy, "_timeout"):  # until all processes are there
        seconds = max(config.timeout, STARTING_SECONDS)
        fabric.strategy._timeout = timedelta(seconds=seconds)  # type: ignore[attr-defined]
    return fabric


def _strategy(asked: Any) -> Any:
    """What Fabric gets for `asked`: one that shards is made of weft's own pieces."""
    if not (asked == "fsdp" or "fsdp" in type(asked).__module__):
        return asked
    from weft.devices.strategies import sharding_strategy

    return sharding_strategy(asked)


def start_processes(fabric: Fabric, timeout: float | None) -> None:
    """Start or join the processes of `fabric`, where a script runs in each of them, unless it has them.

    From here on a process waits for another one for at most `timeout` seconds (None: torch's default, 30 minutes).

    Raises TypeError for strategies that run one function in other processes: only `fit` and its like can do that.
    """
    was_there = fabric._launched
    if not was_there and starts_function(fabric):
        raise TypeError(
            f"strategy={start_method(fabric)!r} runs one function in new processes, so it works with trainer.fit, "
            "validate, test and predict, but not with trainer.start, whose block is not a function. "
            "Use strategy='ddp' in a script, or put your loop into `update` or hooks."
        )
    if not was_there:
        try:
            with quiet():
                fabric.launch()
        except ValueError as error:
            raise ValueError(f"{error} (This machine has {_machine()}.)") from error
    if fabric.world_size > 1 or timeout is not None:
        from weft.devices.joining import join

        join(fabric, timeout, was_there)


@contextmanager
def quiet() -> Iterator[None]:
    """Without Fabric's lines about processes that start; its warnings are shown."""
    logs = [logging.getLogger(name) for name in ("lightning.fabric", "lightning.pytorch")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(max(log.level, logging.WARNING))
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def fabric_for_calls(config: TrainerConfig, strategy: Any, plugins: Any) -> Fabric | None:
    """The Fabric that runs a function in processes of its own (ddp_spawn, ddp_fork, ddp_notebook), if asked for."""
    if strategy is not None:
        may_start = getattr(strategy, "_start_method", "popen") != "popen"
    else:
        several = not is_one(config.devices) or config.num_nodes > 1
        named = config.strategy in ("ddp_spawn", "ddp_fork", "ddp_notebook")
        may_start = named or (config.strategy == "auto" and several and interactive())
    if not may_start:
        return None
    fabric = make_fabric(config, strategy, plugins)
    return fabric if starts_function(fabric) else None


def starts_function(fabric: Fabric) -> bool:
    """Whether the strategy runs a function in processes of its own (ddp_spawn, ddp_fork, ddp_notebook)."""
    return start_method(fabric) is not None


def start_method(fabric: Fabric) -> str | None:
    """ "spawn" or "fork" where the strategy runs a function in processes of its own, else None."""
    return getattr(fabric.strategy.launcher, "_start_method", None)


def is_one(devices: Any) -> bool:
    """Whether `devices` names one device (not "auto" or -1, which may mean more)."""
    return devices in (1, "1") or (isinstance(devices, list) and len(devices) == 1)


def _check_precision(config: TrainerConfig) -> None:
    on_cpu = config.accelerator == "cpu" or (config.accelerator == "auto" and not _has_gpu())
    if on_cpu and str(config.precision) in ("16", "16-mixed", "16-true"):
        raise ValueError(  # Fabric would take bf16-mixed unasked
            f"precision={config.precision!r} needs a GPU, and this run is on a CPU (this machine has {_machine()}); "
            "use 'bf16-mixed' or '32-true'."
        )


def _check_strategy(fabric: Fabric) -> None:
    from lightning.fabric.strategies.ddp import DDPStrategy
    from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
    from lightning.fabric.strategies.single_device import SingleDeviceStrategy

    strategy = fabric.strategy
    if not isinstance(strategy, DDPStrategy | SingleDeviceStrategy | ModelParallelStrategy):
        raise TypeError(f"{type(strategy).__name__} is not supported; use 'ddp' or one of its like, or 'fsdp'.")
    if isinstance(strategy, ModelParallelStrategy) and strategy.num_processes * strategy.num_nodes == 1:
        raise ValueError(
            "There is one process (devices=1), so there is nobody to share a problem with; use strategy='auto'."
        )
    unused = set(getattr(strategy, "_ddp_kwargs", {})) - {"find_unused_parameters"}
    if unused:
        raise ValueError(
            f"DDPStrategy({', '.join(sorted(unused))}) has no effect: gradients are summed once per step, "
            "without torch's DistributedDataParallel, and parameters may stay unused."
        )


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
        warnings.warn(
            f"{', '.join(hidden)} in the environment is ignored: weft takes its devices from arguments.", stacklevel=4
        )
    try:
        yield
    finally:
        os.environ.update(hidden)
