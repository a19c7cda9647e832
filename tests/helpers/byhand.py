"""A small regression and the loop that trains it by hand: the truth that weft's loop is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import weft

ROWS, BATCH, EPOCHS = 70, 16, 4  # 5 batches an epoch, the last of 6 rows


class Regression(nn.Module):
    """A problem as anybody would write it: a dict in, a dict with a loss out."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        y = self.net(batch["x"])
        return {"y": y, f"{batch['name']}_loss": ((y - batch["t"]) ** 2).mean()}


def problem(seed: int = 0) -> Regression:
    torch.manual_seed(seed)
    return Regression()


def tensors(rows: int = ROWS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 2, generator=generator)
    return {"x": x, "t": torch.sin(x.sum(1, keepdim=True))}


def data(**options: Any) -> weft.Data:
    return weft.Data(weft.DictDataset(tensors()), batch_size=BATCH, shuffle=False, **options)


def slices(rows: int = ROWS, size: int = BATCH) -> Iterator[dict[str, Any]]:
    found = tensors(rows)
    for first in range(0, rows, size):
        yield {**{k: v[first : first + size] for k, v in found.items()}, "name": "train"}


def trained(module: nn.Module, given: Any = None, **options: Any) -> weft.FitResult:
    trainer = weft.Trainer(**{"epochs": EPOCHS, "progress": False, "monitor_metric": None, **options})
    return trainer.fit(module, data() if given is None else given)


def by_hand(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    before_step: Callable[[], Any] = lambda: None,
    after_step: Callable[[], Any] = lambda: None,
    after_epoch: Callable[[float], Any] = lambda loss: None,
    epochs: int = EPOCHS,
) -> list[float]:
    """The loop that every PyTorch tutorial shows. Returns the mean loss over the samples of each epoch."""
    curve = []
    for _ in range(epochs):
        total = 0.0
        for batch in slices():
            optimizer.zero_grad()
            loss = module(batch)["train_loss"]
            loss.backward()
            before_step()
            optimizer.step()
            after_step()
            total += loss.item() * len(batch["x"])
        curve.append(total / ROWS)
        after_epoch(curve[-1])
    return curve


OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda params: torch.optim.Adam(params, lr=1e-2),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
}
