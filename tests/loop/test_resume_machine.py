"""Train, save, crash, load, evaluate in any order: always where a plain loop is after as many steps."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn

import weft
from tests.helpers.bitwise import same
from weft.checkpoint import archive
from weft.checkpoint import folder as checkpoints
from weft.devices import seeding

SEED, ROWS, SIZE, STEPS = 5, 14, 4, 60  # 4 batches in an epoch, the last one short
P = torch.randn(ROWS, 2, generator=torch.Generator().manual_seed(1))
DEV = torch.randn(6, 2, generator=torch.Generator().manual_seed(2))


def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5), nn.Dropout(0.4), nn.Tanh(), nn.Linear(5, 1))


def loss_of(x: Tensor, p: Tensor) -> Tensor:
    return (x - p[:, :1] * p[:, 1:]).square()


@cache
def reference() -> tuple[list[dict[str, Tensor]], list[float], list[float]]:
    """A plain PyTorch loop: weights after each step, the dev loss there, and the dev loss after each epoch."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    def dev() -> float:
        model.eval()
        with torch.no_grad():
            value = loss_of(model(DEV), DEV).mean().double().item()
        model.train()
        return value

    weights, devs, closed = [_copy(model)], [dev()], []
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        for epoch in range(STEPS // 4 + 1):
            seed = int(np.random.SeedSequence([SEED, epoch, 0, 0]).generate_state(1, np.uint64)[0] >> np.uint64(1))
            for rows in torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed)).split(SIZE):
                optimizer.zero_grad()
                loss_of(model(P[rows]), P[rows]).mean().backward()
                optimizer.step()
                weights.append(_copy(model))
                devs.append(dev())
            closed.append(devs[-1])
            schedule.step()
    return weights, devs, closed


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


class Life(RuleBasedStateMachine):
    """A run of weft that dies as often as hypothesis likes."""

    folder: Path
    run: weft.Run | None = None

    @initialize(background=st.booleans())
    def begin(self, background: bool) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.how, self.saved, self.highest = {"every_n_steps": 7, "keep": 3, "background": background}, [0], 0
        self.start(None)

    def start(self, resume: str | None) -> None:
        torch.manual_seed(77)  # a new process has other random numbers
        self.net = net()
        problem = weft.Problem([weft.Node(self.net, ["p"], ["x"])], [weft.objective(loss_of, name="f")])
        trainer = weft.Trainer(
            epochs=STEPS,
            seed=SEED,
            progress=False,
            root_dir=str(self.folder),
            run_name="run",
            checkpoint=self.how,
            optimizer=lambda p: torch.optim.AdamW(p, lr=0.02),
            resume=resume,
            scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        )
        self.run = trainer.start(problem, weft.Data({"p": P}, {"p": DEV}, batch_size={"train": SIZE, "dev": 6}))
        self.run.__enter__()
        self.steps = self.loop(self.run)

    def loop(self, run: weft.Run) -> Iterator[None]:
        for _ in run.epochs():
            for batch in run.batches("train"):
                run.update(batch)
                yield
            run.evaluate("dev")

    @property
    def step(self) -> int:
        assert self.run is not None
        return self.run.progress.step

    @precondition(lambda self: self.step < STEPS - 10)
    @rule(count=st.integers(1, 9))
    def train(self, count: int) -> None:
        for _ in itertools.islice(self.steps, count):
            pass

    @rule()
    def save(self) -> None:
        assert self.run is not None
        if self.step:  # between two updates, in the middle of an epoch
            self.run.save()
            if self.run.state.kept.writer is not None:
                self.run.state.kept.writer.wait()

    @rule()
    def evaluate(self) -> None:
        assert self.run is not None
        with torch.random.fork_rng():
            found = self.run.evaluate("dev")["dev_loss"]
        assert found == reference()[1][self.step]

    @rule(resume=st.sampled_from(["auto", "last", "path"]))
    def crash(self, resume: str) -> None:
        assert self.run is not None
        self.leave()
        folder = self.folder / "run/checkpoints"
        paths = sorted(folder.glob("step-*.ckpt"))
        if not paths:
            self.start("auto")
            assert self.step == 0
            return
        newest = checkpoints.find(folder)
        self.start(str(paths[0]) if resume == "path" else resume)
        assert self.step == archive.read(paths[0] if resume == "path" else newest)["progress"]["step"]

    @invariant()
    def the_weights_are_those_of_the_plain_loop(self) -> None:
        if self.run is not None:
            assert same(_copy(self.net), reference()[0][self.step])

    @invariant()
    def the_best_is_the_best_of_all_epochs_so_far(self) -> None:
        if self.run is not None:
            closed = reference()[2][: self.run.progress.epoch]
            assert self.run.best.value == min(closed, default=None)
            assert self.run.history.values.get("dev_loss", []) == closed

    def leave(self) -> None:
        assert self.run is not None
        self.steps.close()  # type: ignore[attr-defined]
        error: Any = RuntimeError("killed")
        self.run.__exit__(type(error), error, None)
        self.run = None

    def teardown(self) -> None:
        if self.run is not None:
            self.leave()
            shutil.rmtree(self.folder)


EXAMPLES = int(os.environ.get("WEFT_EXAMPLES", "12"))
TestLife = Life.TestCase
TestLife.settings = settings(max_examples=EXAMPLES, stateful_step_count=14, deadline=None)


class Forgetful(Life):
    """One whose new processes forget the random state that was saved."""

    @rule()
    def crash(self) -> None:
        assert self.run is not None
        self.leave()
        if paths := list((self.folder / "run/checkpoints").glob("step-*.ckpt")):
            for path in paths:
                state = archive.read(path)
                archive.write(path, {**state, "random": seeding.random_state()})
        self.start("auto")


def test_the_machine_finds_a_run_that_forgets_its_random_state() -> None:
    quick = settings(max_examples=30, stateful_step_count=14, deadline=None, phases=[Phase.generate], database=None)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(Forgetful, settings=quick)
