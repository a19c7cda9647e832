"""No graph and no batch outlives its step: a long run needs no more memory than a short one."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft

STEPS = 10_000
EPOCH = 10  # batches; those of an epoch are cut from one piece of at most 4 MiB


def live_tensors() -> int:
    for thread in threading.enumerate():
        if thread.name == "weft-checkpoint":  # it holds the copies that it writes
            thread.join()
    gc.collect()
    return sum(1 for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter))


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Measure(weft.Hook):
    """Counts live tensors and resident memory at two steps, and who is still alive of each batch."""

    def __init__(self, first: int, last: int, keep: Any = None) -> None:
        self.at, self.found, self.keep = (first, last), list[tuple[int, int]](), keep
        self.batches: list[weakref.ref[Tensor]] = []

    def on_step_end(self, trainer: Any, batch: Any, loss: Tensor) -> None:
        if self.keep is not None:
            self.keep(trainer, batch, loss)
        self.batches = [ref for ref in self.batches if ref() is not None]
        self.batches.append(weakref.ref((batch[0] if isinstance(batch, list) else batch)["p"]))
        if trainer.global_step in self.at:
            self.found.append((live_tensors(), resident_bytes()))
            assert len(self.batches) <= EPOCH, "batches of earlier epochs are alive"

    @property
    def new_tensors(self) -> int:
        return self.found[1][0] - self.found[0][0]

    @property
    def new_mib(self) -> float:
        return (self.found[1][1] - self.found[0][1]) / 2**20


def train_measured(measure: Measure, steps: int, **options: Any) -> weft.FitResult:
    torch.manual_seed(0)  # how many directions LBFGS keeps depends on its way
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    problem = weft.Problem([weft.Node(net, ["p"], ["x"])], [weft.objective(lambda x, p: (x - p[:, :1]) ** 2, name="f")])
    p = torch.randn(160, 2, generator=torch.Generator().manual_seed(0))
    data = weft.Data({"p": p}, {"p": p[:16]}, batch_size=16)
    return weft.Trainer(max_steps=steps, epochs=10**6, progress=False, hooks=[measure], **options).fit(problem, data)


def test_ten_thousand_steps_leave_no_tensor_and_less_than_two_mib(tmp_path: Path) -> None:
    measure = Measure(500, 500 + STEPS)
    result = train_measured(measure, 500 + STEPS, log_every=100, root_dir=str(tmp_path), loggers="csv", patience=10**6)
    assert measure.new_tensors == 0
    assert measure.new_mib < 2
    assert result.epochs == 1050 and all(type(v) is float for column in result.history.values() for v in column)


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate": 2},
        {"clip": 1.0, "on_nonfinite": "skip"},
        {"optimizer": lambda p: torch.optim.LBFGS(p, max_iter=2, history_size=5)},
        {"training_step": lambda trainer, batch: trainer.problem(batch)["train_loss"]},
        {"checkpoint": {"every_n_steps": 50, "background": True}, "root_dir": "runs"},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.filterwarnings("ignore:LBFGS no longer")
def test_no_way_of_updating_keeps_tensors(options: dict[str, Any]) -> None:
    measure = Measure(105, 305)
    train_measured(measure, 306, **options)
    history = 3 * 5 if "optimizer" in options else 0  # LBFGS keeps up to 5 directions, and drops them when it is stuck
    assert measure.new_tensors <= history


def test_a_graph_or_a_loss_that_is_kept_would_be_noticed() -> None:
    kept: list[Any] = []
    measure = Measure(20, 70, keep=lambda trainer, batch, loss: kept.append(loss))
    train_measured(measure, 70)
    assert measure.new_tensors >= 50
    with pytest.raises(AssertionError, match="earlier epochs are alive"):
        train_measured(Measure(20, 70, keep=lambda trainer, batch, loss: kept.append(batch)), 70)
