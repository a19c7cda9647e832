"""What can be known of code that trains by itself: what its loop reaches, and whether it stepped at all.

Loaded for an `update` or a loop of one's own only.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from weft.step.state import RunState

MOST_FRAMES = 3
"""Of the user's code that are looked at: the loop, and the functions that it was called from."""


def reached_by_the_loop() -> list[tuple[str, dict[str, Any]]]:
    """What the loop that calls this may reach by name: variables, what it closes over, and its module's, by its owner.

    The names alone that its code mentions: a notebook's cell may see hundreds of others.
    """
    found = []
    for frame in _frames_of_the_user():
        name = frame.f_code.co_name
        names = {*_names(frame.f_code), *frame.f_code.co_varnames, *frame.f_code.co_freevars, *frame.f_code.co_cellvars}
        seen = {**{n: v for n, v in frame.f_globals.items() if n in names}}
        seen |= {n: v for n, v in frame.f_locals.items() if n in names}
        found.append(("the loop" if name == "<module>" else f"the loop in {name}()", seen))
        if len(found) == MOST_FRAMES:
            break
    return found


def _frames_of_the_user() -> Iterator[FrameType]:
    folders = tuple(sysconfig.get_paths()[kind] for kind in ("stdlib", "platstdlib", "purelib", "platlib"))
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file, module = frame.f_code.co_filename, str(frame.f_globals.get("__name__"))
        if module.partition(".")[0] != "weft" and not file.startswith((*folders, "<frozen")):
            yield frame
        frame = frame.f_back


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


class Moves:
    """Whether the parameters of a run move under an `update` of one's own that uses none of weft's tools.

    `after_update` keeps their values once; what `tell` finds unchanged in a later epoch's end has not been trained.
    """

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters, self.before, self.updates = parameters, list[Tensor](), 0

    def after_update(self, acted: bool) -> None:
        """`acted`: weft's optimizers have stepped, so all is well and nothing is kept."""
        self.updates += 1
        if acted:
            self.before, self.parameters = [], []
        elif self.updates == 1:
            self.before = [p.detach().clone() for p in self.parameters]

    def tell(self, state: RunState, backward: bool) -> None:
        """Warn once of updates that trained nothing. `backward`: gradients were taken."""
        if self.updates < 2 or not self.parameters:
            return
        if all(map(torch.equal, self.parameters, self.before)):
            lacks = "self.step()" if backward else "self.backward(loss) and self.step()"
            state.warn_once(
                f"{type(state.trainer).__name__}.update has trained nothing: in {self.updates} updates it called no "
                f"step, and no parameter has moved. It lacks {lacks}, or `return super().update(batch)`."
            )
        self.before, self.parameters = [], []


def tell_of_no_step(state: RunState) -> None:
    """Warn once of an epoch in which a loop of one's own made no step of the run."""
    batches = state.progress.batch
    seen = f"went through {batches} batches of training data" if batches else "asked for no batch of training data"
    state.warn_once(
        f"An epoch {seen} and made no step: nothing was trained by this run's optimizers. For each "
        "batch, a loop calls run.update(batch), or run.backward(loss) and run.step() (of several optimizers the first "
        "one's steps count)."
    )
