"""Random numbers of loader workers, and of generators that data hold: seeded, and put back where a run goes on."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.fabric  # noqa: F401, forked processes have it then
import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

import weft


class Noise(Dataset):
    """Noise of torch, of numpy and of python."""

    def __init__(self, rows: int = 8) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"x": torch.cat([torch.rand(1), torch.tensor([float(np.random.rand()), random.random()])])}


class Fit(torch.nn.Module):
    def __init__(self, inputs: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(inputs, 1)

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {f"{batch['name']}_loss": (self.net(batch["x"]) - 1).square().mean()}


def noise(data: Any, seed: int | None = 0, epochs: int = 2, dev: bool = False) -> list[list[float]]:
    """What training (or validation) saw, a list of numbers by epoch."""
    seen: list[list[float]] = []

    class Watched(Fit):
        def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
            if (batch["name"] == "dev") == dev:
                seen.append(batch["x"].flatten().tolist())
            return super().forward(batch)

    problem = Watched()
    if seed is None:
        torch.manual_seed(12)
    weft.Trainer(epochs=epochs, seed=seed, progress=False).fit(problem, data)
    return seen


def in_workers(**options: Any) -> weft.Data:
    return weft.Data(Noise(), batch_size=8, num_workers=2, **options)


def test_workers_draw_what_is_a_function_of_seed_and_epoch() -> None:
    first, again, other = noise(in_workers(), 0), noise(in_workers(), 0), noise(in_workers(), 1)
    assert first == again
    each = {tuple(epoch[column::3]) for epoch in (*first, *other) for column in range(3)}  # of torch, numpy, python
    assert len(each) == 12
    assert len({value for column in each for value in column}) == 12 * 8


def test_without_a_seed_it_is_the_initial_one_of_torch_which_is_read_not_drawn() -> None:
    found = noise(in_workers(), None)
    assert found == noise(in_workers(), None) != noise(in_workers(), 0)
    problem = Fit()
    torch.manual_seed(12)
    before = torch.get_rng_state()
    weft.Trainer(epochs=1, progress=False).fit(problem, in_workers())
    assert torch.equal(torch.get_rng_state(), before)


def test_training_and_validation_draw_differently() -> None:
    data = weft.Data(Noise(), Noise(), batch_size=8, num_workers=2)
    assert noise(data) != noise(data, dev=True)


def test_batches_made_once_are_made_from_the_seed_too() -> None:
    assert noise(in_workers(pre_batch="in_memory"), 0) == noise(in_workers(pre_batch="in_memory"), 0)
    assert noise(in_workers(pre_batch="in_memory"), 0) != noise(in_workers(pre_batch="in_memory"), 1)


def test_a_loader_that_is_passed_in_is_iterated_as_it_is() -> None:
    def loader() -> DataLoader:
        return DataLoader(Noise(), batch_size=8, num_workers=2, generator=torch.Generator().manual_seed(5))

    raw, own = [], loader()
    for _ in range(2):
        raw += [batch["x"].flatten().tolist() for batch in own]
    assert noise(loader(), 0) == noise(loader(), 1) == raw


def test_processes_draw_differently() -> None:
    from weft.data.splits import batches_of

    def drawn(rank: int, data: weft.Data) -> list[float]:
        batches: Any = batches_of(data, "train", seed=0, rank=rank, world=2)
        return [value for batch in batches.epoch(0) for value in batch["x"].flatten().tolist()]

    given = DataLoader(Noise(), batch_size=4, num_workers=1, generator=torch.Generator().manual_seed(5))
    for data in (weft.Data(Noise(), batch_size=4, num_workers=1), weft.Data(given)):
        first, second = drawn(0, data), drawn(1, data)
        assert len(first) == len(second) == 12 and not set(first) & set(second)
        assert first == drawn(0, data)


# ---- generators of data ----------------------------------------------------------------------------------------------

SHARED = torch.Generator()


class Own(Dataset):
    """Rows from a generator that the dataset holds."""

    def __init__(self, generator: Any = None) -> None:
        self.generator = generator or torch.Generator().manual_seed(3)

    def __len__(self) -> int:
        return 12

    def draw(self) -> torch.Tensor:
        return torch.randn(2, generator=self.generator)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"x": self.draw()}


class OfNumpy(Own):
    def __init__(self) -> None:
        super().__init__(np.random.default_rng(3))

    def draw(self) -> torch.Tensor:
        return torch.from_numpy(self.generator.standard_normal(2, np.float32))


class Transformed(Own):
    """Rows from a generator within a closure within a list."""

    def __init__(self) -> None:
        hidden = torch.Generator().manual_seed(4)
        self.transforms = [lambda x: x + torch.randn(2, generator=hidden)]

    def draw(self) -> torch.Tensor:
        return self.transforms[0](torch.ones(2))


class OfModule(Own):
    """Rows from a generator of the module."""

    def draw(self) -> torch.Tensor:
        return torch.randn(2, generator=SHARED)


class OfParent(OfModule):
    """Rows that the method of a class above draws."""


class OfClass(Own):
    """Rows from a generator that the class has."""

    shared = np.random.default_rng(3)

    def __init__(self) -> None:
        type(self).shared = np.random.default_rng(3)

    def draw(self) -> torch.Tensor:
        return torch.from_numpy(self.shared.standard_normal(2, np.float32))


class Slots:
    __slots__ = ("generator",)


class OfSlots(Own):
    """Rows from a generator in a slot of what the dataset holds."""

    def __init__(self) -> None:
        self.held = Slots()
        self.held.generator = torch.Generator().manual_seed(3)

    def draw(self) -> torch.Tensor:
        return torch.randn(2, generator=self.held.generator)


def shuffled() -> DataLoader:
    rows = [{"x": torch.full((2,), float(i))} for i in range(12)]
    return DataLoader(rows, batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(2))  # type: ignore[arg-type]


DEV: dict[str, Callable[[], Any]] = {
    "a dataset's": Own,
    "of numpy": OfNumpy,
    "in a closure": Transformed,
    "of the module": OfModule,
    "of the module, by a class above": OfParent,
    "of the class": OfClass,
    "in a slot": OfSlots,
    "of a part of a part": lambda: Subset(Subset(Own(), range(9)), range(7)),
    "of several": lambda: ConcatDataset([Own(), Own()]),
    "a loader's": shuffled,
    "of workers": lambda: Noise2(),
}


class Noise2(Noise):
    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"x": torch.rand(2)}


def _live(root: Path, name: str, kill: int, make_dev: Callable[[], Any]) -> None:
    def die(trainer: Any, batch: Any, loss: Any) -> None:
        if trainer.global_step == kill:
            os._exit(9)

    SHARED.manual_seed(9)
    data = weft.Data({"x": torch.ones(8, 2)}, make_dev(), batch_size=4, num_workers=int(make_dev is DEV["of workers"]))
    options = {"root_dir": str(root), "run_name": name, "checkpoint": True, "progress": False, "seed": 0, "epochs": 5}
    options |= {"hooks": [{"on_step_end": die}], "metrics": {"first": lambda x: x[0, 0]}}
    result = weft.Trainer(**options).fit(Fit(2), data, resume="auto")
    (root / f"{name}.json").write_text(json.dumps(result.history))


def life(root: Path, name: str, kill: int, make_dev: Callable[[], Any]) -> Any:
    """The history of a run in a process of its own, which dies at step `kill`; None if it did."""
    if (child := os.fork()) == 0:
        try:
            _live(root, name, kill, make_dev)
        finally:
            os._exit(1)  # no child goes on with the tests
    os.waitpid(child, 0)
    path = root / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


@pytest.mark.parametrize("which", DEV)
def test_a_killed_and_resumed_run_validates_on_the_same_random_numbers(which: str, tmp_path: Path) -> None:
    expected = life(tmp_path, "whole", -1, DEV[which])
    assert life(tmp_path, "cut", 7, DEV[which]) is None
    found = life(tmp_path, "cut", -1, DEV[which])
    assert found == expected
    assert len(set(expected["dev_first"])) > 2  # and they are random
