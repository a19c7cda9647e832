"""The base `Trainer` of NeuroMANCER's scripts on a GPU, with a problem that does not need NeuroMANCER."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import weft
from weft.integrations.neuromancer import Trainer


def train_on(device: str) -> Any:
    torch.manual_seed(0)
    node = weft.Node(torch.nn.Linear(1, 1), ["x"], ["y"], name="net")
    problem = weft.Problem([node], [weft.objective(lambda x, y: (y - 2 * x) ** 2, name="fit")])
    rows = [{"x": x} for x in torch.linspace(0, 1, 16)[:, None]]
    loaders = (
        DataLoader(
            rows, batch_size=8, collate_fn=lambda r, name=name: {"x": torch.stack([d["x"] for d in r]), "name": name}
        )  # type: ignore[arg-type]
        for name in ("train", "dev")
    )
    optimizer = torch.optim.Adam(problem.parameters(), lr=0.1)
    trainer = Trainer(
        problem,
        *loaders,
        optimizer=optimizer,
        epochs=20,
        train_metric="train_loss",
        dev_metric="dev_loss",
        eval_metric="dev_loss",
        device=device,
    )
    trainer.train()
    return trainer


def learned(trainer: Any) -> float:
    x = torch.ones(1, 1, device=next(trainer.model.parameters()).device)
    return trainer.model({"x": x, "name": "dev"})["y"].item()


def test_a_problem_of_other_origin_trains_by_the_base_trainer() -> None:
    assert abs(learned(train_on("cpu")) - 2) < 0.3


@pytest.mark.gpu
def test_the_problem_goes_where_its_batches_go() -> None:
    trainer = train_on("cuda")
    assert {p.device.type for p in trainer.model.parameters()} == {"cuda"} and abs(learned(trainer) - 2) < 0.3
