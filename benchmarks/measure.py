"""How it is measured: rounds in which every peer trains in turn, from the same weights to the same loss."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from benchmarks.peers import PEERS, quiet, takes
from benchmarks.workloads import Workload

WARM_UP = 2  # epochs of a fit that are not counted: imports, the first steps, tracing
AGREE = 1e-3  # relative; end losses further apart than this are marked


@dataclass
class Timing:
    """One peer on one workload: seconds per training step (its share of the dev set included) in each round."""

    seconds: list[float] = field(default_factory=list)
    loss: float = math.nan
    first: float = math.nan
    """Seconds from the call to the end of the first epoch, in the first round."""
    error: str = ""

    @property
    def best(self) -> float:
        return min(self.seconds, default=math.nan)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) if self.seconds else math.nan


def measure(
    workload: Workload, peers: list[str], rounds: int, clock: Callable[[], float], say: Callable[[str], None]
) -> dict[str, Timing]:
    """The timings of all peers that can train this workload, interleaved: each round runs each of them once."""
    threads = torch.get_num_threads()
    torch.set_num_threads(workload.threads)
    torch.manual_seed(0)
    start = workload.make().to(workload.device)
    timings = {name: Timing() for name in peers if takes(name, workload)}
    if workload.device == "cuda":
        host, clock = clock, lambda: (torch.cuda.synchronize(), host())[1]
    try:
        for number in range(rounds):
            for name, timing in timings.items():
                if timing.error:
                    continue
                ticks: list[float] = []
                problem, begin = copy.deepcopy(start), clock()
                try:
                    with quiet():
                        timing.loss = PEERS[name](workload, problem, lambda ticks=ticks: ticks.append(clock()))
                except ImportError as error:
                    timing.error = f"not installed: {error.name}"
                except Exception as error:  # noqa: BLE001  # one peer that fails stops no other; the table says it
                    timing.error = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:150]
                else:
                    epochs = [b - a for a, b in pairwise(ticks)][WARM_UP:]
                    timing.seconds.append(statistics.median(epochs) / workload.steps)
                    if not number:
                        timing.first = ticks[1] - begin
            say(f"{workload.name}: round {number + 1} of {rounds}")
    finally:
        torch.set_num_threads(threads)
    return timings


CLOCKS = {"wall": time.perf_counter, "process": time.process_time}
