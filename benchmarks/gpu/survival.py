"""Checks of what a run survives and what it needs: kills, memory, checkpoints in the background, NCCL."""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import weft
from benchmarks.gpu.rows import Bench, Row, at_most, holds
from benchmarks.gpu.speed import wide_workload
from benchmarks.peers import PEERS
from benchmarks.workloads import ROSENBROCK, rosenbrock_weft


def start_job(*arguments: Any, torchrun: bool = False, **environment: str) -> subprocess.Popen[str]:
    """A process that runs one of the jobs."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"] if torchrun else []
    command = [sys.executable, *launch, "-m", "benchmarks.gpu.job", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env={**os.environ, **environment})


def told(job: subprocess.Popen[str]) -> dict[str, Any]:
    """What a job printed last. Raises RuntimeError with its last words if it failed."""
    out, errors = job.communicate()
    if job.returncode:
        raise RuntimeError(f"a job ended with status {job.returncode}: {errors.strip()[-500:]}")
    return json.loads(out.strip().splitlines()[-1])


# ---- kill ------------------------------------------------------------------------------------------------------------


def kill(bench: Bench) -> Iterator[Row]:
    """Undisturbed, killed in step 33 of 60, and gone on: eager and graph side by side."""
    kinds = ("eager", "graph")
    whole = {kind: start_job("killed", bench.device, f"whole-{kind}", kind, -1) for kind in kinds}
    dying = {kind: start_job("killed", bench.device, f"killed-{kind}", kind, 33) for kind in kinds}
    codes = {kind: (job.communicate(), job.returncode)[1] for kind, job in dying.items()}
    again = {kind: start_job("killed", bench.device, f"killed-{kind}", kind, -1) for kind in kinds}
    for kind in kinds:
        expected, found = told(whole[kind]), told(again[kind])
        same = found == expected and codes[kind] == -9
        detail = f"{found['digest'][:12]}, {expected['digest'][:12]}, {found['steps']} steps"
        said = f"; {expected['said'][0]}" if expected["said"] else ""
        yield holds(f"killed in step 33 and gone on, {kind}: sha256 of all state", same, detail + said, "equal")


# ---- memory ----------------------------------------------------------------------------------------------------------


def allocated(bench: Bench) -> int:
    """Bytes of tensors, on the device; in a rehearsal those that Python knows of."""
    bench.wait()
    if bench.on_gpu:
        return torch.cuda.memory_allocated()
    gc.collect()
    return sum(x.untyped_storage().nbytes() for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter))


def memory(bench: Bench) -> Iterator[Row]:
    """What is allocated at the end of two epochs that are many steps apart, and the peak beside a loop by hand."""
    steps, first = bench.count(10_000, 40), bench.count(500, 10)
    found: list[int] = []
    epochs, per_epoch = (first + steps) // 10, 10
    data = weft.Data({k: v[: 64 * per_epoch] for k, v in ROSENBROCK["train"].items()}, batch_size=64)

    def look(trainer: Any, metrics: Any) -> None:
        if trainer.global_step in (first, first + steps):
            found.append(allocated(bench))

    hooks = {"on_epoch_end": look}
    options: dict[str, Any] = {"progress": False, "accelerator": bench.device, "devices": 1, "seed": 0}
    weft.Trainer(epochs=epochs, hooks=hooks, **options).fit(rosenbrock_weft().make(), data)
    yield at_most(f"allocated after {steps:,} steps more", found[1] - found[0], 0, " bytes")
    if not bench.on_gpu:
        return
    workload = wide_workload(bench)
    workload.epochs = 4
    workload.to(bench.device)
    peaks, weights = {}, 0
    for name in ("hand-written, in memory", "weft, eager"):
        torch.manual_seed(0)
        problem = workload.make().to(bench.device)
        weights = sum(p.nbytes for p in problem.parameters())
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        PEERS[name](workload, problem, lambda: None)
        peaks[name] = torch.cuda.max_memory_allocated() - before
        del problem
    hand, own = peaks.values()
    mib = f"{own / 2**20:.0f} / {hand / 2**20:.0f} MiB"
    yield Row(f"peak / hand-written, wide MLP, two snapshots included ({mib})", f"{own / hand:.3g}", value=own / hand)
    kept = 2 * weights  # the best ones, and the last ones in the result
    yield at_most("peak / hand-written, wide MLP, two snapshots of the weights apart", (own - kept) / hand, 1.05)


# ---- a checkpoint in the background ----------------------------------------------------------------------------------


class Large(nn.Module):
    """Weights of so many bytes; with AdamW's two averages a checkpoint holds three times as much."""

    def __init__(self, num_bytes: int, layers: int = 4) -> None:
        super().__init__()
        width = int((num_bytes / 4 / layers) ** 0.5)
        torch.manual_seed(0)
        self.net = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
        self.width = width

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        x = batch["x"].expand(-1, self.width)
        return {f"{batch['name']}_loss": self.net(x).square().mean()}


def background(bench: Bench) -> Iterator[Row]:
    """Steps by the clock while a checkpoint is written, over the longest of those when none is."""
    size = bench.count(2**30, 2**23)
    data = weft.Data({"x": torch.rand(64 * 50, 1)}, batch_size=64)
    trainer = weft.Trainer(
        epochs=10**6,
        progress=False,
        accelerator=bench.device,
        devices=1,
        seed=0,
        root_dir="runs",
        run_name="run",
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True),
        checkpoint={"every_n_seconds": 1e9, "best": False, "background": True},
    )
    quiet, during, save = [], [], 0.0
    with trainer.start(Large(size // 3), data) as run:
        for _ in run.epochs():
            for batch in run.batches("train"):
                seconds = bench.seconds(lambda batch=batch: run.update(batch))
                writer = run.state.kept.writer
                if not save:
                    quiet.append(seconds)
                    if len(quiet) == 60:
                        save = bench.seconds(run.save)
                        during.append(save)
                elif writer._thread.is_alive() or len(during) < 3:
                    during.append(seconds)
                else:
                    trainer.stop("written")
                    break
            if trainer.run.state.control.stop_reason is not None:
                break
    path = next(Path("runs/run/checkpoints").glob("step-*.ckpt"))
    usual = statistics.median(quiet[20:])
    longest = max(during) - usual
    mib = path.stat().st_size / 2**20
    yield at_most(f"a checkpoint of {mib:.0f} MiB in the background: longest stall", 1e3 * longest, 50, " ms")
    steps = f"{len(during) - 1} steps of {1e3 * statistics.median(during[1:]):.2f} ms, {1e3 * usual:.2f} without"
    yield Row("of it the call of save(); steps meanwhile", f"{1e3 * save:.1f} ms; {steps}")


# ---- NCCL ------------------------------------------------------------------------------------------------------------


def nccl(bench: Bench) -> Iterator[Row]:
    """Shards through one process, and a collective that never ends."""
    root, record = bench.folder / "stuck", bench.folder / "trace"
    where = {"TORCH_NCCL_DEBUG_INFO_TEMP_FILE": str(record), "TORCH_FR_DUMP_TEMP_FILE": str(record)}
    more = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
    began = time.monotonic()
    stuck = start_job("stuck", bench.device, root, torchrun=True, **where, **more)
    found = told(start_job("sharded", bench.device, bench.folder / "sharded", torchrun=True))
    whole = found["in parts"] and found["same"] and found["learns"]
    yield holds("FSDP2 in one process under torchrun: trained, saved in parts, loaded whole", whole, str(found))
    _, errors = stuck.communicate()
    seconds = time.monotonic() - began
    yield at_most(f"a collective that hangs ends the job (status {stuck.returncode})", seconds, 60, " s")
    named = [line.strip() for line in errors.splitlines() if "imeout" in line]
    dumps = list(bench.folder.glob("trace*"))
    from weft.checkpoint import folder as checkpoints

    step = checkpoints.load(root / "run")[0]["progress"]["step"]
    is_told = bool(stuck.returncode and (named or dumps)) or not bench.on_gpu
    text = f"{len(dumps)} files of the flight recorder; {named[0][:160] if named else 'no line'}"
    yield holds("and leaves its record", is_told, text)
    yield holds("and the last checkpoint", step in (4, 6), f"of step {step}")
