"""Throughput of one process and of two, one thread each, on a compute-bound problem; and of torch's own DDP.

python benchmarks/scaling.py            # a table; rates are the best of several repetitions, interleaved
CLOCK=process python benchmarks/scaling.py        # CPU time of the first process, on a machine that is shared
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CLOCK = time.process_time if os.environ.get("CLOCK") == "process" else time.perf_counter
BATCH, BATCHES, WIDTH = 1024, 24, 512  # rows of a process and step, steps of a measurement, units of a layer


class Wide(nn.Module):
    """An MLP 8 -> WIDTH x 3 -> 1, fitted to the product of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [8, WIDTH, WIDTH, WIDTH]
        layers = [m for i, o in pairwise(sizes) for m in (nn.Linear(i, o), nn.Tanh())]
        self.net = nn.Sequential(*layers, nn.Linear(WIDTH, 1))

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {f"{batch['name']}_loss": (self.net(batch["x"]) - batch["x"].prod(1, keepdim=True)).square().mean()}


def weft_rate(processes: int) -> float:
    """Examples per second of all processes, trained by weft."""
    import weft

    data = weft.Data({"x": torch.rand(BATCH * BATCHES * processes, 8)}, batch_size=BATCH)
    trainer = weft.Trainer(
        epochs=1,
        devices=processes,
        accelerator="cpu",
        strategy="ddp" if processes > 1 else "auto",
        seed=0,
        progress=False,
    )
    problem = Wide()
    trainer.fit(problem, data)  # warms up
    began = CLOCK()
    trainer.fit(problem, data)
    return BATCH * BATCHES * processes / (CLOCK() - began)


def ddp_rate(processes: int) -> float:
    """Examples per second of all processes, by a loop over torch's DistributedDataParallel, set up by Fabric."""
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto")
    fabric.launch()
    model = fabric.setup_module(Wide())
    optimizer = fabric.setup_optimizers(torch.optim.Adam(model.parameters(), fused=True))
    batches = torch.rand(BATCH * BATCHES, 8).split(BATCH)
    began = 0.0
    for _ in range(2):
        began = CLOCK()
        for x in batches:
            loss = model({"x": x, "name": "train"})["train_loss"]
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    return BATCH * BATCHES * processes / (CLOCK() - began)


def measure(kind: str, processes: int) -> float:
    """The rate of one job, in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rate.json"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, kind, str(processes), str(path)]
        subprocess.run(command, check=True, env=environment, stderr=subprocess.DEVNULL)
        return json.loads(path.read_text())


def main(repetitions: int = 5) -> dict[str, float]:
    """Measure and print; returns the best rate (examples/s) of each kind and number of processes."""
    best: dict[str, float] = {}
    for _ in range(repetitions):
        for kind in ("weft", "ddp"):
            for processes in (1, 2):
                name = f"{kind}, {processes}"
                best[name] = max(best.get(name, 0.0), measure(kind, processes))
    for name, rate in best.items():
        one = best[name.split(",")[0] + ", 1"]
        print(f"{name:10} {rate:12,.0f} examples/s   {rate / one:5.2f} x")
    return best


if __name__ == "__main__":
    if len(sys.argv) > 1:
        torch.set_num_threads(1)
        rate = {"weft": weft_rate, "ddp": ddp_rate}[sys.argv[1]](int(sys.argv[2]))
        if os.environ.get("LOCAL_RANK", "0") == "0":
            Path(sys.argv[3]).write_text(json.dumps(rate))
    else:
        main()
