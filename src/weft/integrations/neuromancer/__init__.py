"""Scripts made for NeuroMANCER: its base `Trainer`, and `LitTrainer`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weft.integrations.neuromancer.trainer import Trainer

__all__ = ["Trainer"]


def __getattr__(name: str) -> Any:
    if name == "Trainer":
        from weft.integrations.neuromancer import trainer

        return trainer.Trainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
