"""The state of a run: what services take, and what is saved."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from weft.checkpoint.folder import BackgroundWriter
from weft.checkpoint.hidden import attributes
from weft.config import TrainerConfig


@dataclass
class Kept:
    """What a run keeps in mind so that it can be saved and gone on with."""

    attributes_at_start: dict[str, Any]
    """Of the problem's modules, outside of their state dict."""
    generators_before_epoch: dict[str, Any] = field(default_factory=dict)
    """States of the generators that the loader of the training data has of its own."""
    generators_to_resume: dict[str, Any] = field(default_factory=dict)
    data_prints: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    """Plain values of weft's own hooks; what a checkpoint lacks of them starts anew."""
    compile_choice: str = "eager"
    resumed_from: Path | None = None
    best_saved: tuple[Any, ...] | None = None
    """Name, value and epoch of the best weights that `best` points to."""
    writer: BackgroundWriter | None = None
    save_wanted: bool = False
    """A hook has asked for a checkpoint while others had not seen the step yet."""

    @classmethod
    def of(cls, config: TrainerConfig, problem: nn.Module, previous: Kept | None) -> Kept:
        """For a new run, or one that goes on from a `previous` one of the same problem."""
        in_background = config.checkpointing is not None and config.checkpointing.background
        writer = BackgroundWriter() if in_background else None
        if previous is None:
            return cls(attributes(problem), writer=writer)
        return cls(previous.attributes_at_start, best_saved=previous.best_saved, writer=writer)

