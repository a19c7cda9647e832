"""The run that `Trainer.validate`, `test` and `predict` evaluate in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from weft.loop.run import Run


@contextmanager
def run_to_evaluate(
    trainer: Any, problem: nn.Module | None, split: str, data: Any, setup_kwargs: Mapping[str, Any]
) -> Iterator[Run]:
    """The run of the trainer's last fit, or one for this problem or data, which is gone afterwards."""
    run, last = trainer.run, trainer.run
    if last is not None and last.carried is not None:  # the fit was in other processes: its data is made again
        run = last = trainer.run_of(last.problem, last).prepare(last.state.feed.make)
    if problem is None:
        problem = trainer.problem
    is_new = last is None or not last.is_of(problem)
    if is_new or data is not None or setup_kwargs:
        run = trainer.run_of(problem)
        if is_new and data is None and not setup_kwargs and not run.brings_data:
            raise TypeError(f"{split}: give the data for a problem that was not trained here.")
        run.prepare(run.data_to_evaluate(split, data, setup_kwargs, last.state if last is not None else None))
    trainer.run = run
    try:
        with run.in_use():
            yield run
    finally:
        trainer.run = last
