"""The script that the tests of process groups start: `python grouped.py FOLDER KIND SIGNAL STEP`.

It trains with a loader of this KIND of workers, or in two processes by this KIND of strategy.
After step STEP it sends SIGNAL to its whole group, itself and its workers, as a terminal, SLURM and Jupyter do; ""
sends none, and "PARENT_SIGINT" goes only to the process that launched this one. Under torchrun the group is torchrun's,
which hands on what it knows. At the end it writes the digest of all weights.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import weft

EPOCHS = 2


class NoisyRows(torch.utils.data.Dataset):
    """Rows with noise from each worker's own random numbers, which take a moment to make."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        time.sleep(0.002)
        return {"x": torch.tensor([i / 24.0, 1.0]) + 0.1 * torch.randn(2)}


class NoisyLine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.drop = nn.Linear(2, 1), nn.Dropout(0.2)

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        loss = (self.layer(self.drop(batch["x"])) - batch["x"].sum(1, keepdim=True)).square().mean()
        return {f"{batch['name']}_loss": loss}


def grouped_data(kind: str) -> weft.Data:
    """`kind`: none, fork, spawn, forkserver, or persistent (workers of the dev set that stay)."""
    if kind == "none":
        return weft.Data(NoisyRows(), {"x": torch.ones(4, 2)}, batch_size=4)
    method = "fork" if kind == "persistent" else kind
    loader: Any = DataLoader(NoisyRows(), batch_size=4, shuffle=True, num_workers=2, multiprocessing_context=method)
    dev: Any = {"x": torch.ones(4, 2)}
    if kind == "persistent":
        dev = DataLoader(
            weft.DictDataset({"x": torch.ones(8, 2)}), batch_size=4, num_workers=2, persistent_workers=True
        )
    return weft.Data(loader, dev)


def strike(name: str, interruption: Any) -> None:
    """Signal the group, or for "PARENT_<name>" its first process alone, and wait until this process has heard it."""
    number, is_started = getattr(signal, name.removeprefix("PARENT_")), "TORCHELASTIC_RUN_ID" in os.environ
    groups = [] if name.startswith("PARENT_") else [0]
    if is_started:  # its processes have sessions of their own; SLURM signals all, and torchrun dies of SIGUSR1
        groups = [os.getpgid(os.getppid()), *(_groups_of_all() if name == "SIGUSR1" else [])]
    elif not groups:
        os.kill(os.getppid(), number)
    for group in groups:
        os.killpg(group, number)
    while not interruption.asked:
        time.sleep(0.01)


def _groups_of_all() -> list[int]:
    """The groups of all processes that torchrun started; its own child is this process, others have written it down."""
    return [int(path.name) for path in Path(os.environ["GROUPS"]).glob("*")]


def train_in_group(folder: str, kind: str, name: str, step: str) -> None:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        os.environ["GROUPS"] = f"{folder}/groups-{os.environ['TORCHELASTIC_RUN_ID']}"
        Path(os.environ["GROUPS"]).mkdir(parents=True, exist_ok=True)
        Path(os.environ["GROUPS"], str(os.getpgid(0))).touch()

    def strike_at(trainer: Any, batch: Any, loss: Any) -> None:
        if name and trainer.global_step == int(step) and trainer.run.is_global_zero:
            strike(name, trainer.run.state.control.interruption)

    options: dict[str, Any] = {
        "root_dir": folder,
        "run_name": "run",
        "checkpoint": {"every_n_epochs": 100, "best": False},
    }
    if kind.startswith("ddp"):
        options |= {"strategy": kind, "devices": 2, "timeout": 300}
    elif (world := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        options |= {"devices": world, "timeout": 300}
    trainer = weft.Trainer(
        epochs=EPOCHS,
        seed=3,
        progress=False,
        resume="auto",
        hooks={"on_step_end": strike_at},
        accelerator="cpu",
        **options,
    )
    problem = NoisyLine()
    trainer.fit(problem, grouped_data("none" if kind.startswith("ddp") else kind))
    flat = torch.cat([p.detach().flatten() for p in problem.parameters()])
    if trainer.run is not None and trainer.run.is_global_zero:
        Path(folder, "digest").write_text(hashlib.sha256(flat.numpy().tobytes()).hexdigest())


if __name__ == "__main__":
    train_in_group(*sys.argv[1:])
