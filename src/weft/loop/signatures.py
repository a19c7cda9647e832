"""The signature of the trainer, written out for whoever reads source only: a checker, an editor. Never loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    import weft
    from weft import Hook
    from weft.config import (
        CheckpointConfig,
        Count,
        Devices,
        FolderName,
        Limit,
        Natural,
        Nodes,
        Path,
        Positive,
        Precision,
        Time,
        at_least,
    )
    from weft.words.editors import Listening


class TrainerOptions:
    """What `weft.Trainer(...)` takes."""

    def __init__(
        self,
        *,
        epochs: Natural = 1000,
        min_epochs: Natural = 0,
        max_steps: Natural | None = None,
        max_time: Positive | Time | None = None,
        train_metric: str = "train_loss",
        dev_metric: str = "dev_loss",
        test_metric: str = "test_loss",
        monitor_metric: str | Literal[False] | None = None,
        monitor_mode: Literal["min", "max"] = "min",
        patience: Count | None = None,
        min_delta: Annotated[float, at_least(0)] = 0.0,
        warmup: Natural = 0,
        clip: Positive | None = None,
        clip_algorithm: Literal["norm", "value"] = "norm",
        accumulate: Count = 1,
        validate_every: Count = 1,
        accelerator: str = "auto",
        devices: Devices | str | list[int] = 1,
        num_nodes: Nodes = 1,
        strategy: Any = "auto",
        precision: Precision = "32-true",
        timeout: Positive | None = None,
        compile: bool | Literal["auto"] = False,
        seed: Natural | None = None,
        deterministic: bool = False,
        on_nonfinite: Literal["raise", "skip", "stop", "ignore"] = "raise",
        strict_data: bool = False,
        root_dir: Path | None = None,
        run_name: FolderName | None = None,
        log_every: Count | None = None,
        checkpoint: bool | CheckpointConfig | dict[str, Any] = False,
        resume: str | None = None,
        profiler: Any = None,
        progress: bool | Literal["auto"] = "auto",
        fast_dev_run: bool | Natural = False,
        limit_batches: Limit | None = None,
        optimizer: Optimizer | Callable[..., Any] | Mapping[str, Any] | None = None,
        scheduler: LRScheduler | weft.Schedule | Callable[..., Any] | Mapping[str, Any] | None = None,
        phases: Sequence[weft.Phase] | None = None,
        metrics: Mapping[str, Any] | None = None,
        training_step: Callable[[weft.Trainer, Any], Any] | None = None,
        validation_step: Callable[[weft.Trainer, Any], Any] | None = None,
        test_step: Callable[[weft.Trainer, Any], Any] | None = None,
        predict_step: Callable[[weft.Trainer, Any], Any] | None = None,
        hooks: Hook | Listening | Mapping[str, Callable[..., Any]] | Sequence[Hook | Listening | object] | None = None,
        loggers: Any = None,
        plugins: Any = None,
    ) -> None: ...
