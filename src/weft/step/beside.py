"""What belongs to the parameters that only an optimizer holds. Loaded where there are some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from weft.places import named, places, places_behind


def buffers_beside(
    problem: nn.Module, tensors: Sequence[Tensor], steps: Sequence[tuple[str, Any]]
) -> dict[str, Tensor]:
    """The buffers of the modules that hold `tensors`, reached by the problem or by `steps`: they are trained too."""
    held = {id(p) for p in tensors}
    reached = [*places(problem, everything=True), *places_behind(steps, problem)]
    modules = {id(place.module) for place in reached if place.module is not None and id(place.value) in held}
    found = [place for place in reached if id(place.module) in modules and type(place.value) is Tensor]
    return {
        f"buffer.{name}": place.value for name, place in named(p for p in found if not p.value.requires_grad).items()
    }
