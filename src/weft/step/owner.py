"""What a run asks of its trainer: a type, which only checkers load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

from weft.config import TrainerConfig
from weft.step.phase import Phase


class Owner(Protocol):
    """What a run asks of its trainer."""

    options: dict[str, Any]
    config: TrainerConfig
    state: dict[str, Any]
    hooks: list[Any]
    phases: list[Phase]
    callbacks: list[Any]
    metric_functions: dict[str, Any]
    launched: Any
    recipe: dict[str, Any] | None
    monitors_by_default: bool
    names_are_apart: bool

    def overrides(self, name: str) -> bool:
        """Whether a method is the user's own."""
        ...

    def step_function(self, split: str, problem: nn.Module) -> Callable[[Any], Any]:
        """What is called with each batch of `split`."""
        ...

    def configure_optimizers(self) -> Any:
        """The optimizer(s) as they were given."""
        ...

    def update(self, batch: Any) -> Any:
        """The user's own update, where it is overridden."""
        ...

    def default_hooks(self, state: Any) -> list[Any]:
        """The hooks that the options ask for."""
        ...
