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
print(made - begin, ticks[0] - made, sum(b - a - steady for a, b in zip(ticks[:-1], ticks[1:])))
"""

MEMORY = """
import resource, torch; torch.set_num_threads(1)
from benchmarks.workloads import wide
from benchmarks import peers
workload = wide(); workload.epochs = 3
with peers.quiet():
    peers.{peer}(workload, workload.make(), lambda: None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, sum(p.numel() * 4 for p in workload.make().parameters()) / 2**20)
"""


def python(code: str, **variables: str) -> list[float]:
    """The numbers that `code` prints in a new process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
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
    """Seconds to the first step and lost until the speed is steady, for eager, compiled, and compiled again."""
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for name, peer in (("eager", "weft_eager"), ("compiled", "weft_compiled"), ("compiled, second process", "weft_compiled")):
            _, to_first, lost = python(TRAIN.format(peer=peer, epochs=epochs), WEFT_CACHE=folder)
            found |= {f"{name}: to the first step": to_first, f"{name}: lost until steady": lost}
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
        problem = weft.Problem([weft.Node(mlp(2, 16, 1), ["x"], ["y"])], [weft.objective(lambda y: y.square(), name="f")])
        ticks: list[float] = []
        hooks = {"on_epoch_start": lambda _, t=ticks: t.append(time.perf_counter())}
        epochs = max(2, min(200, 10**6 // n)) + 1
        with quiet():
            trainer = weft.Trainer(epochs=epochs, hooks=hooks)
            trainer.fit(problem, weft.DictDataset({"x": x}) if n <= 1000 else weft.Data({"x": x}, batch_size=1000))
        found[n] = 1e6 * statistics.median(b - a for a, b in pairwise(ticks)) / n
    return found


def memory() -> dict[str, float]:
    """Peak memory (MiB) of the wide network, by hand and with weft; weft keeps two copies of the weights besides."""
    found = {}
    for name, peer in (("hand-written", "by_hand"), ("weft, eager", "weft_eager"), ("weft, compiled", "weft_compiled")):
        found[name], weights = python(MEMORY.format(peer=peer))
        found["weights"] = weights
    return found
