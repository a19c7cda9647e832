"""The script that the launcher tests start: `python job.py TASK FOLDER [trainer options as JSON]`.

It is run by every process of a job. The first one writes what it found to FOLDER/told.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import weft


class LineWithDropout(nn.Module):
    """A line with dropout, so that each process needs random numbers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.drop = nn.Dropout(0.3)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        y = self.layer(self.drop(batch["x"]))
        return {f"{batch['name']}_loss": (y - batch["x"].sum(1, keepdim=True)).square().mean(), "y": y}


def setup(rows: int = 37) -> tuple[Any, ...]:
    x = torch.rand(rows, 2, dtype=torch.float64)
    return {"x": x}, {"x": x[:5]}, None, 4


def digest(problem: nn.Module) -> str:
    flat = torch.cat([p.detach().double().flatten() for p in problem.parameters()])
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()[:16]


def rank() -> int:
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", os.environ.get("SLURM_PROCID", "0"))))


class Trouble(weft.Hook):
    """What goes wrong in process `of` after step `step`: "raise", "exit", "kill", "term" or "hang"; once, if asked for.

    The file `trouble` keeps its time.
    """

    def __init__(self, kind: str, of: int, step: int, folder: Path, once: bool) -> None:
        self.kind, self.of, self.step, self.folder = kind, of, step, folder
        self.flag = folder / "once" if once else None

    def on_step_end(self, trainer: Any, batch: Any, loss: Any) -> None:
        if rank() != self.of or trainer.global_step != self.step or (self.flag is not None and self.flag.exists()):
            return
        if self.flag is not None:
            self.flag.write_text("done")
        (self.folder / "trouble").touch()
        if self.kind == "raise":
            raise ValueError("this is the cause")
        if self.kind == "exit":
            os._exit(3)
        if self.kind in ("kill", "term"):
            os.kill(os.getpid(), signal.SIGKILL if self.kind == "kill" else signal.SIGTERM)
        if self.kind == "hang":
            time.sleep(1000)


def main(task: str, folder: Path, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    problem = LineWithDropout()
    (folder / f"pid-{rank()}-{os.getpid()}").touch()
    if "trouble" in options:
        kind, of, step, once = options.pop("trouble")
        options["hooks"] = Trouble(kind, of, step, folder, once)
    defaults = {"epochs": 4, "seed": 1, "precision": "64-true", "accelerator": "cpu", "progress": False, "timeout": 600}
    trainer = weft.Trainer(**{**defaults, **options})
    result = trainer.fit(problem, setup)
    told: dict[str, Any] = {"weights": digest(problem), "history": result.history, "stop_reason": result.stop_reason}
    if task == "all":
        told["validated"] = trainer.validate()
        told["predicted"] = trainer.predict({"x": torch.arange(6.0, dtype=torch.float64).reshape(3, 2)})["y"].tolist()
        told["again"] = trainer.fit(problem, setup).epochs
        if "spawn" not in str(options.get("strategy")):
            with trainer.start(problem, setup) as run:
                for _ in run.epochs():
                    for batch in run.batches("train"):
                        run.backward(problem(batch)["train_loss"])
                        run.step()
                    break
            told["own loop"] = digest(problem)
    if trainer.run is not None and trainer.run.is_global_zero:
        (folder / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
