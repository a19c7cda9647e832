"""Scripts that checks start as processes of their own: `python -m benchmarks.gpu.job NAME DEVICE [argument ...]`."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from torch import Tensor, nn

import weft
from benchmarks.gpu.rows import Bench


def digest(*parts: Any) -> str:
    """The sha256 of tensors, dicts of them, and plain values."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            found.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(part, dict):
            for key, value in part.items():
                found.update(repr(key).encode() + digest(value).encode())
        elif isinstance(part, list | tuple):
            found.update(digest(*part).encode() if part else b"[]")
        else:
            found.update(repr(part).encode())
    return found.hexdigest()


def killed(device: str, root: str, kind: str, die_at: str) -> None:
    """Train with dropout, deterministically; die in a step, or tell the sha256 of all that came of it."""
    from benchmarks.gpu.agreement import start
    from benchmarks.gpu.speed import uncompiled

    def die(trainer: Any, batch: Any, loss: Any) -> None:
        if trainer.global_step == int(die_at):
            os.kill(os.getpid(), signal.SIGKILL)

    data = torch.rand(192, 2, generator=torch.Generator().manual_seed(1))
    trainer = weft.Trainer(
        epochs=10,
        progress=False,
        seed=0,
        accelerator=device,
        devices=1,
        deterministic=True,
        compile=kind == "graph",
        hooks={"on_step_end": die},
        checkpoint={"every_n_steps": 7},
        root_dir=root,
        run_name="run",
        resume="auto",
    )
    with uncompiled(Bench(device, device == "cpu", Path(root))), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        given = {"a": data[:, :1], "p": data[:, 1:]}
        problem = start(0.3)
        result = trainer.fit(problem, weft.Data(given, {k: v[:32] for k, v in given.items()}, batch_size=32))
    made = digest(problem.state_dict(), trainer.optimizer.state_dict(), result.last_weights, result.history)
    said = [str(w.message) for w in caught if "stays eager" in str(w.message)]
    print(json.dumps({"digest": made, "steps": result.steps, "said": said}))


class Wide(nn.Module):
    """A network worth sharding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 256), nn.Tanh(), nn.Linear(256, 8))

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {f"{batch['name']}_loss": (self.net(batch["x"]) - batch["x"].sin()).square().mean()}


def sharded(device: str, root: str) -> None:
    """Train in shards in the one process that torchrun has started, save, and load what was saved as a whole."""
    from weft.devices import fabric

    fabric._check_strategy = lambda _: None  # weft refuses one process: nobody to share with
    problem, x = Wide(), torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    trainer = weft.Trainer(
        epochs=3,
        progress=False,
        seed=0,
        accelerator=device,
        devices=1,
        strategy="fsdp",
        checkpoint=True,
        root_dir=root,
        run_name="run",
    )
    result = trainer.fit(problem, weft.Data({"x": x}, batch_size=64))
    parts = sorted(Path(root, "run", "checkpoints").glob("step-*.ckpt"))
    loaded = weft.load_weights(Wide(), parts[-1])
    same = all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(loaded.parameters(), problem.parameters(), strict=True))
    backend = torch.distributed.get_backend()
    curve = result.history["train_loss"]
    told = {"backend": backend, "in parts": parts[-1].is_dir(), "same": same, "learns": curve[-1] < curve[0]}
    print(json.dumps(told), flush=True)


def stuck(device: str, root: str) -> None:
    """Reach a collective that does not end, after a checkpoint, with a timeout of some seconds."""

    def hang(trainer: Any, batch: Any, loss: Any) -> None:
        if trainer.global_step == 6:
            if device == "cuda":
                torch.cuda._sleep(200_000_000_000)  # about 100 s, on the stream that the collective waits for
            else:
                torch.distributed.new_group([0])
                os.kill(os.getpid(), signal.SIGABRT)  # what NCCL's watchdog does
            torch.distributed.all_reduce(torch.ones(1, device=device))
            float(loss)

    trainer = weft.Trainer(
        epochs=3,
        progress=False,
        seed=0,
        accelerator=device,
        devices=1,
        strategy="ddp",
        timeout=5,
        checkpoint={"every_n_steps": 2},
        root_dir=root,
        run_name="run",
        hooks={"on_step_end": hang},
    )
    trainer.fit(Wide(), weft.Data({"x": torch.randn(256, 8)}, batch_size=64))


def end_with(parent: int) -> None:
    """End this process when the one that started it is gone: nobody waits for it, and it may hold the device."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=end_with, args=[os.getppid()], daemon=True).start()
    {"killed": killed, "sharded": sharded, "stuck": stuck}[sys.argv[1]](*sys.argv[2:])
