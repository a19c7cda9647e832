"""What a config says about batches."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from weft.config import BatchSize, Count, Natural, check, with_manual


@with_manual
@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How data is cut into batches, where it differs from what the data setup function returned.

    None everywhere: as it said. The fields are those of `weft.Data`.
    """

    batch_size: BatchSize = None
    """Rows per batch and process (>= 1), "all" for one batch, or a dict of these by split or part."""
    shuffle: bool | None = None
    """Training rows in a new order each epoch."""
    drop_last: bool | None = None
    """Leave out a short last training batch."""
    num_workers: Natural | Literal["all"] | None = None
    """Processes that read a dataset which is not made of tensors (>= 0); "all": one per core."""
    pre_batch: Literal["in_memory", "on_disk"] | None = None
    """Make the batches of a dataset once and keep them, in memory or in a temporary folder."""
    refresh_every: Count | None = None
    """Call the data setup function again every n epochs (>= 1)."""
    inputs_require_grad: list[str] | None = None
    """Keys that derivatives are taken with respect to."""

    def __post_init__(self) -> None:
        check(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for YAML; `DataConfig(**config.to_dict()) == config`."""
        return dataclasses.asdict(self)
