"""Checks of time: steps, eager and as graphs, against loops written by hand and against JAX."""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import weft
from benchmarks.gpu.rows import Bench, Row, at_least, at_most, holds
from benchmarks.measure import CLOCKS, measure
from benchmarks.workloads import Workload, neural_ode, pinn, rosenbrock_weft, wide

HAND, EAGER = "hand-written, in memory", "weft, eager"


def eager(bench: Bench) -> Iterator[Row]:
    """Four workloads of the CPU's table, whole epochs with their dev set."""
    for make in (rosenbrock_weft, pinn, neural_ode, wide):
        workload = make()
        yield _ratio(bench, workload, workload.name)


def _ratio(bench: Bench, workload: Workload, name: str) -> Row:
    if bench.small:
        workload.epochs, workload.train = 3, {k: v[: 2 * workload.batch_size] for k, v in workload.train.items()}
    workload.to(bench.device)
    found = measure(workload, [HAND, EAGER], bench.count(5, 1), CLOCKS["wall"], lambda _: None)
    if broken := [t.error for t in found.values() if t.error]:
        raise RuntimeError(broken[0])
    hand, own = found[HAND].best, found[EAGER].best
    return at_most(f"eager step / hand-written, {name} ({1e6 * own:.0f} / {1e6 * hand:.0f} us)", own / hand, 1.05)


def wide_workload(bench: Bench) -> Workload:
    """The wide MLP with batches that fill a GPU."""
    workload = wide()
    size = workload.batch_size = bench.count(4096, 64)
    generator = torch.Generator().manual_seed(1)
    workload.train = {"x": torch.randn(16 * size, 16, generator=generator)}
    workload.dev = {"x": torch.randn(size, 16, generator=generator)}
    workload.epochs = bench.count(12, 3)
    return workload


def wide_ratio(bench: Bench) -> Iterator[Row]:
    """Examples per second, over those of the loop written by hand."""
    workload = wide_workload(bench)
    row = _ratio(bench, workload, f"wide MLP, batch {workload.batch_size}")
    assert row.value is not None
    yield at_least(f"wide MLP, batch {workload.batch_size}: throughput / hand-written", 1 / row.value, 0.98)


# ---- as a graph ------------------------------------------------------------------------------------------------------


def graph(bench: Bench) -> Iterator[Row]:
    """Updates alone, of the Rosenbrock problem: eager ones and graphs by turns, on the same data."""
    workload = rosenbrock_weft()
    workload.train = {k: v[: 52 * 64] for k, v in workload.train.items()}  # whole batches: one graph
    seconds, said = {}, {}
    with uncompiled(bench):
        for compile in (False, True):
            seconds[compile], said[compile] = update_seconds(bench, workload, compile)
    reason = "; ".join(said[True]) or "captured"
    yield holds("the Rosenbrock update is a graph", not said[True], reason)
    yield at_most("a step as a graph (its batch is cut, its numbers are noted)", 1e6 * seconds[True], 60, " us")
    ratio = seconds[True] / seconds[False]
    yield at_most(f"graph / eager step ({1e6 * seconds[False]:.0f} us); stretch 0.1", ratio, 0.2)


def update_seconds(bench: Bench, workload: Workload, compile: bool) -> tuple[float, list[str]]:
    """Seconds an update takes when all is made, batches included; and what was said against a graph."""
    torch.manual_seed(0)
    problem = workload.make()
    trainer = weft.Trainer(
        epochs=bench.count(40, 4),
        optimizer=workload.optimizer,
        clip=workload.clip,
        progress=False,
        accelerator=bench.device,
        devices=1,
        seed=0,
        compile=compile,
    )
    found: list[float] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with trainer.start(problem, weft.Data(workload.train, batch_size=workload.batch_size)) as run:
            for _ in run.epochs():
                bench.wait()
                began = time.perf_counter()
                for batch in run.batches("train"):
                    run.update(batch)
                bench.wait()
                found.append((time.perf_counter() - began) / workload.steps)
    said = [str(w.message) for w in caught if "stays eager" in str(w.message)]
    return statistics.median(found[len(found) // 2 :]), said


@contextmanager
def uncompiled(bench: Bench) -> Iterator[None]:
    """In a rehearsal graphs run as they were traced: the C++ compiler takes its time."""
    from weft.compile import graph as graphs

    was = graphs.compile_graph

    def run_itself(traced: torch.fx.GraphModule, inputs: Any, moving: int) -> Callable[[Any], Any]:
        def run(given: Any) -> Any:
            with torch.no_grad():
                return traced(*given)

        return run

    if bench.small and not bench.on_gpu:
        graphs.compile_graph = run_itself
    try:
        yield
    finally:
        graphs.compile_graph = was


# ---- JAX -------------------------------------------------------------------------------------------------------------


def jax_ratio(bench: Bench) -> Iterator[Row]:
    """The same training in JAX, its loop one `lax.scan`: both at the same loss, and the time of a step."""
    try:
        import jax
    except ImportError:
        yield Row("weft's step / JAX's, whole loop in lax.scan", "JAX is not installed")
        return
    from benchmarks.gpu import by_jax

    workload = rosenbrock_weft()
    workload.train = {k: v[: 52 * 64] for k, v in workload.train.items()}
    epochs = bench.count(40, 2)
    torch.manual_seed(0)
    problem = workload.make()
    seconds, loss = by_jax.train(problem, workload, epochs, bench.count(3, 1), bench.device)
    own = copy.deepcopy(problem)
    trainer = weft.Trainer(
        epochs=epochs, optimizer=workload.optimizer, clip=workload.clip, progress=False, accelerator=bench.device
    )
    data = weft.Data(workload.train, batch_size=workload.batch_size, shuffle=False)
    ours = trainer.fit(own, data).history["train_loss"][-1]
    apart = abs(loss - ours) / ours
    yield at_most(f"JAX {jax.__version__} and weft end at the same loss ({loss:.4g}): apart", apart, 0.02)
    with uncompiled(bench):
        for name, compile in (("eager", False), ("graph", True)):
            step, said = update_seconds(bench, workload, compile)
            what = f"weft's {name} step / JAX's in lax.scan ({1e6 * seconds:.1f} us){' - eager' if said else ''}"
            yield Row(what, f"{step / seconds:.3g}", value=step / seconds)
