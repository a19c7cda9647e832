"""What compile="auto" decides and what that costs, with empty caches: `python -m benchmarks.auto` (about five minutes).

Every workload is trained for a tutorial's number of epochs and for a tenth of it: eagerly, with compile=True and with
"auto". Each fit is told its full length, and stopped when it runs steadily; the rest is counted at the median epoch.
Seconds are CPU seconds of the process and of the compilers it waits for, so that a machine that others use gives the
same ratios; imports that all three need are not counted, those of the compiler are. `--clock wall` for a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")  # a workload sets how many it uses
os.environ.setdefault("NUMBA_DISABLE_JIT", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

EPOCHS = {
    "rosenbrock_weft": 400,
    "rosenbrock_neuromancer": 400,
    "rosenbrock_sgd": 400,
    "rollout": 400,
    "pinn": 2000,
    "neural_ode": 1000,
    "one_batch": 2000,
    "wide": 100,
}
"""By workload; as NeuroMANCER's tutorials have them."""
MODES: tuple[Any, ...] = (False, True, "auto")
STEADY_FROM, STEADY_SECONDS = 12, 1.0  # epochs; of those that are counted
AT_MOST_SLOWER, AT_LEAST_TAKEN = 1.05, 0.8


def cpu_seconds() -> float:
    """Of this process, and of those that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class _Enough(Exception):
    pass


def seconds_of_fit(name: str, epochs: int, compile: Any, clock: Callable[[], float]) -> dict[str, Any]:
    """Seconds of a whole fit, and how many graphs it made (0: none, of any kind of batch), in this process."""
    import copy

    import torch

    from benchmarks import peers, workloads
    from weft.compile import choosing

    workload = getattr(workloads, name)()
    workload.epochs = epochs
    torch.set_num_threads(workload.threads)
    torch.manual_seed(0)
    problem, made, ticks = workload.make(), list[Any](), list[float]()
    begun = clock()
    remember = choosing.Graphs.__init__

    def init(graphs: Any, state: Any) -> None:
        remember(graphs, state)
        made.append(graphs)

    choosing.Graphs.__init__ = init  # type: ignore[method-assign]

    def tick() -> None:
        ticks.append(clock())
        if len(ticks) > STEADY_FROM and ticks[-1] - ticks[STEADY_FROM - 1] > STEADY_SECONDS:
            raise _Enough

    try:
        with peers.quiet():
            peers.weft_fit(workload, copy.deepcopy(problem), tick, compile=compile)
    except _Enough:
        pass
    steady = (
        statistics.median(b - a for a, b in pairwise(ticks[STEADY_FROM - 1 :])) if len(ticks) > STEADY_FROM else 0.0
    )
    graphs = [max(0, n) for g in made for n in g.made.values()]
    return {
        "seconds": ticks[-1] - begun + max(0, epochs - len(ticks) + 1) * steady,
        "graphs": sum(graphs),
        "first": ticks[min(2, len(ticks) - 1)] - begun,
    }


def in_a_child(name: str, epochs: int, compile: Any, clock: Callable[[], float]) -> dict[str, Any]:
    """The same in a process of its own, which has imported what eager fits need, with empty caches."""
    reading, writing = os.pipe()
    with tempfile.TemporaryDirectory() as folder:
        if (child := os.fork()) == 0:
            status = 1
            try:
                os.environ["WEFT_CACHE"] = folder
                found = seconds_of_fit(name, epochs, compile, clock)
                os.write(writing, json.dumps(found).encode())
                status = 0
            finally:
                sys.stderr.flush()
                os._exit(status)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            text = pipe.read()
        os.waitpid(child, 0)
        time.sleep(0.5)  # a header may be on its way into the folder
    return json.loads(text)


def rows(names: list[str], clock: Callable[[], float], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """One row for each workload and length."""
    import lightning.fabric
    import torch  # noqa: F401

    import weft.loop.trainer  # noqa: F401
    from benchmarks import peers, workloads  # noqa: F401

    assert lightning.fabric.Fabric
    found = []
    for name in names:
        for epochs in (EPOCHS[name] // 10, EPOCHS[name]):
            eager, compiled, auto = (in_a_child(name, epochs, mode, clock) for mode in MODES)
            best = min(eager["seconds"], compiled["seconds"])
            gain = eager["seconds"] - best
            row = {
                "workload": getattr(workloads, name)().name,
                "epochs": epochs,
                "eager": eager["seconds"],
                "compiled": compiled["seconds"],
                "auto": auto["seconds"],
                "graphs": auto["graphs"],
                "ratio": auto["seconds"] / eager["seconds"],
                "taken": (eager["seconds"] - auto["seconds"]) / gain if gain > 0.05 * eager["seconds"] else None,
            }
            found.append(row)
            say(line(row))
    return found


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    taken = "nothing to gain" if row["taken"] is None else f"{row['taken']:.0%}"
    missed = row["ratio"] > AT_MOST_SLOWER or (row["taken"] is not None and row["taken"] < AT_LEAST_TAKEN)
    return (
        f"| {row['workload']} | {row['epochs']} | {row['eager']:.1f} | {row['compiled']:.1f} | {row['auto']:.1f} "
        f"| {row['graphs']} | {row['ratio']:.2f} | {taken} | {'missed' if missed else 'met'} |"
    )


HEAD = (
    "| workload | epochs | eager, s | compile=True, s | auto, s | graphs of auto | auto / eager | of the gain | |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.auto", description=__doc__)
    parser.add_argument("--workloads", default="", help="only those whose function name holds this text")
    parser.add_argument("--clock", choices=("process", "wall"), default="process")
    parser.add_argument("--out", type=Path, help="write the table to this file, too")
    given = parser.parse_args(arguments)
    clock = cpu_seconds if given.clock == "process" else time.perf_counter
    print(HEAD, flush=True)
    found = rows([n for n in EPOCHS if given.workloads in n], clock, lambda text: print(text, flush=True))
    if given.out is not None:
        given.out.write_text("\n".join([HEAD, *map(line, found)]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
