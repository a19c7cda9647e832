"""What is not a loop's speed: import, the first step, a second process, cost by number of samples, memory."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

TRAIN = """
import time; begin = time.perf_counter()
import torch; torch.set_num_threads(1)
from benchmarks.workloads import rosenbrock_weft
from benchmarks import peers
ticks = []
workload = rosenbrock_weft(); workload.epochs = {epochs}
torch.manual_seed(0)
problem, made = workload.make(), time.perf_counter()
with peers.quiet():
    peers.{peer}(workload, problem, lambda: ticks.append(time.perf_counter()))
steady = min(b - a for a, b in zip(ticks[:-1], ticks[1:]))
lost = [b - a - steady for a, b in zip(ticks[:-1], ticks[1:])]
print(made - begin, ticks[0] - made, lost[0], sum(lost))
"""

MEMORY = """
import ctypes, pathlib, re, resource, torch; torch.set_num_threads(1)
import lightning.fabric, weft.compile.choosing, weft.loop.trainer  # the same for all: imports are not compared
from benchmarks.workloads import wide
from benchmarks import peers
workload, status, begun, peaks = wide(), pathlib.Path("/proc/self/status"), [], []
workload.epochs = 8

def peak():
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS counts in bytes
    return int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1]) / 1024

def tick():
    begun.append(None)
    if len(begun) == 6:  # graphs are made, and compared with eager in epochs 1, 2, 4 and 8
        peaks.append(peak())
        if status.exists():
            ctypes.CDLL(None).malloc_trim(0)
            pathlib.Path("/proc/self/clear_refs").write_text("5")

with peers.quiet():
    peers.{peer}(workload, workload.make(), tick)
weights = sum(p.numel() * 4 for p in workload.make().parameters()) / 2**20
print(max(*peaks, peak()), peak(), weights)
"""


def python(code: str, **variables: str) -> list[float]:
    """The numbers that `code` prints in a new process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return [float(x) for x in done.stdout.split()[-10:]]


def imports(rounds: int) -> dict[str, float]:
    """Seconds of `import torch` and of `import weft` with its main names, each in new processes, in turn."""
    both: dict[str, list[float]] = {"import torch": [], "import weft": [], "import weft, Trainer and Problem": []}
    code = {"import weft, Trainer and Problem": "import weft; weft.Trainer, weft.Problem"}
    for _ in range(rounds):
        for name, seconds in both.items():
            timed = f"import time; b = time.perf_counter(); {code.get(name, name)}; print(time.perf_counter() - b)"
            seconds += python(timed)
    return {name: min(seconds) for name, seconds in both.items()}


def first_step(epochs: int = 12) -> dict[str, float]:
    """Seconds to the first step, lost in the first epoch (the update is a graph from its third step), lost in all.

    For eager, compiled, and compiled again in a second process. In all: with the graphs of the short last batch and of
    the dev set, and the comparisons with eager in epochs 1, 2, 4 and 8.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for name, peer in (
            ("eager", "weft_eager"),
            ("compiled", "weft_compiled"),
            ("compiled, second process", "weft_compiled"),
        ):
            _, to_first, at_first, lost = python(TRAIN.format(peer=peer, epochs=epochs), WEFT_CACHE=folder)
            found |= {f"{name}: to the first step": to_first, f"{name}: lost in the first epoch": at_first}
            found[f"{name}: lost until steady"] = lost
    return found


def samples(sizes: list[int]) -> dict[int, float]:
    """Microseconds per sample of an epoch over so many samples, weft eager, batches of 1000 rows, shuffled."""
    import torch

    import weft
    from benchmarks.peers import quiet
    from benchmarks.workloads import mlp

    found = {}
    for n in sizes:
        x = torch.rand(n, 2)
        problem = weft.Problem(
            [weft.Node(mlp(2, 16, 1), ["x"], ["y"])], [weft.objective(lambda y: y.square(), name="f")]
        )
        ticks: list[float] = []
        hooks = {"on_epoch_start": lambda _, t=ticks: t.append(time.perf_counter())}
        epochs = max(2, min(200, 10**6 // n)) + 1
        with quiet():
            trainer = weft.Trainer(epochs=epochs, hooks=hooks)
            trainer.fit(problem, weft.DictDataset({"x": x}) if n <= 1000 else weft.Data({"x": x}, batch_size=1000))
        found[n] = 1e6 * statistics.median(b - a for a, b in pairwise(ticks)) / n
    return found


def memory() -> dict[str, float]:
    """Peak resident memory (MiB) of the wide network, by hand and with weft.

    All import the same modules. weft keeps two copies of the weights besides (the best and the last). "compiled"
    includes the compiler; "from the cache" is a second process, which loads what the first has made. "steady" is the
    peak of the last three epochs
    alone: tracing and the first comparisons with eager are over (without /proc it is the whole peak).
    """
    found = {}
    names = {
        "hand-written": "by_hand",
        "weft, eager": "weft_eager",
        "weft, compiled": "weft_compiled",
        "weft, compiled, from the cache": "weft_compiled",
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, peer in names.items():
            found[name], found[f"{name}, steady"], found["weights"] = python(
                MEMORY.format(peer=peer), WEFT_CACHE=folder
            )
    return found
