"""Time per step of a small LightningModule: weft against lightning.pytorch.Trainer. `python -m
benchmarks.lightning_module`

Interleaved rounds on one thread, after one that does not count; the time of a fit of one epoch is taken off that of a
fit of six, so that setting up does not count. All end at the same loss, which is checked.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import LightningModule, Trainer

import weft

STEPS, EPOCHS = 600, 5


class Small(LightningModule):
    """Two layers, batches of 4, SGD; logs its loss or not."""

    def __init__(self, logs: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
        self.logs, self.last = logs, torch.zeros(())

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        """The squared distance of the network from the sum of its inputs."""
        loss = (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()
        if self.logs:
            self.log("train_loss", loss)
        self.last = loss.detach()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Batches:
    """The same batches in every epoch; a plain list would be a list of loaders to Lightning."""

    def __init__(self) -> None:
        self.batches = [torch.randn(4, 32, generator=torch.Generator().manual_seed(i)) for i in range(STEPS)]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def by_hand(module: Small, batches: Iterable[Any], epochs: int) -> None:
    """The loop without any trainer."""
    optimizer = module.configure_optimizers()
    for _ in range(epochs):
        for number, batch in enumerate(batches):
            loss = module.training_step(batch, number)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def with_weft(module: Small, batches: Iterable[Any], epochs: int) -> None:
    """weft as it comes, the check for non-finite numbers included."""
    weft.Trainer(epochs=epochs, accelerator="cpu", progress=False).fit(module, batches)


def barebones(module: Small, batches: Iterable[Any], epochs: int) -> None:
    """Lightning with everything off."""
    Trainer(max_epochs=epochs, accelerator="cpu", barebones=True).fit(module, batches)


def defaults(module: Small, batches: Iterable[Any], epochs: int) -> None:
    """Lightning as it comes."""
    Trainer(max_epochs=epochs, accelerator="cpu").fit(module, batches)


CASES: dict[str, tuple[Callable[[Small, Any, int], None], bool]] = {
    "by hand": (by_hand, False),
    "weft": (with_weft, False),
    "Lightning, barebones": (barebones, False),
    "weft, self.log": (with_weft, True),
    "Lightning, self.log": (defaults, True),
}


def main() -> None:
    """Measure, print, and with --out write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    out = given.out.resolve() if given.out else None
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    batches = Batches()
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    losses: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for number in range(given.rounds + 1):
            for name, (train, logs) in CASES.items():
                took = []
                for epochs in (1, 1 + EPOCHS):
                    module, began = Small(logs), time.perf_counter()
                    train(module, batches, epochs)
                    took.append(time.perf_counter() - began)
                    losses[name] = float(module.last)
                if number:
                    seconds[name].append((took[1] - took[0]) / EPOCHS)
        os.chdir("/")
    assert len({round(loss, 6) for loss in losses.values()}) == 1, losses
    lines = ["| | us per step (median) | ratio |", "|---|---|---|"]
    base = {"weft": "Lightning, barebones", "weft, self.log": "Lightning, self.log"}
    for name, found in seconds.items():
        median = statistics.median(found)
        other = base.get(name)
        ratio = f"{median / statistics.median(seconds[other]):.2f} of {other}" if other else ""
        lines.append(f"| {name} | {1e6 * median / STEPS:.0f} | {ratio} |")
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, lightning {lightning.__version__}"
    loss = next(iter(losses.values()))
    lines.append(
        f"\n{given.rounds} rounds, interleaved, wall clock, one thread; {machine}; {versions}. "
        f"All end at loss {loss:.6f}."
    )
    print("\n".join(lines))
    if out:
        out.write_text("# A small LightningModule\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
