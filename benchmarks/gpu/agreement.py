"""Checks of graphs: the same training eagerly and as graphs, one kind of update after the other."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import weft
from benchmarks.gpu.numbers import flat
from benchmarks.gpu.rows import MET, MISSED, TOLD, Bench, Row
from benchmarks.gpu.speed import uncompiled


def start(dropout: float = 0.0) -> weft.Problem:
    """A small Rosenbrock problem; with `dropout` its steps draw random numbers."""
    torch.manual_seed(0)
    noise = [nn.Dropout(dropout)] if dropout else []
    net = nn.Sequential(nn.Linear(2, 32), nn.GELU(), *noise, nn.Linear(32, 2))
    f = weft.objective(lambda x, a: (1 - x[:, :1]) ** 2 + a * (x[:, 1:] - x[:, :1] ** 2) ** 2, name="f")
    return weft.Problem([weft.Node(net, ["a", "p"], ["x"], name="net")], [f], [weft.less_equal("x", 1.0, 10.0)])


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def by_steps(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)


KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    "no clipping": dict,
    "random numbers (dropout)": lambda: {"problem": start(0.5)},
    "a short last batch": lambda: {"rows": 200},
    "clip": lambda: {"clip": 1.0},
    "a schedule by steps": lambda: {"scheduler": weft.Schedule(by_steps, interval="step")},
    "a schedule by epochs": lambda: {"scheduler": by_steps},
    "accumulate": lambda: {"accumulate": 2},
    "EMA": lambda: {"hooks": [weft.hooks.EMA(0.9)]},
    "several optimizers": lambda: {"optimizer": {"nodes.0.fn.0": adamw, "nodes.0.fn.2": adamw}},
}


def agrees(bench: Bench) -> Iterator[Row]:
    """Weights after some epochs; how many graphs were captured, or why none was."""
    for name, make in KINDS.items():
        with uncompiled(bench):
            eager, _, _ = train(bench, False, **make())
            graph, captured, said = train(bench, True, **make())
        apart = float((eager - graph).abs().max() / eager.abs().max())
        equal = "bit-equal" if torch.equal(eager, graph) else f"apart by {apart:.1e} of the largest weight"
        bar = "bit-equal, captured once for each kind of batch, or the reason"
        what = f"graph = eager: {name}"
        if said:
            yield Row(what, f"stays eager: {said[0]}", bar, TOLD if torch.equal(eager, graph) else MISSED)
        else:
            is_met = torch.equal(eager, graph) and captured == (2 if name == "a short last batch" else 1)
            yield Row(what, f"{equal}; {captured} captured", bar, MET if is_met else MISSED, apart)


def train(
    bench: Bench, compile: bool, *, problem: nn.Module | None = None, rows: int = 192, **options: Any
) -> tuple[torch.Tensor, int, list[str]]:
    """The weights at the end, how many graphs were made, and what was said against them."""
    own, data = copy.deepcopy(problem or start()), torch.rand(rows, 2, generator=torch.Generator().manual_seed(1))
    trainer = weft.Trainer(
        **{
            "epochs": bench.count(20, 5),
            "optimizer": adamw,
            "progress": False,
            "seed": 0,
            "accelerator": bench.device,
            "devices": 1,
            "compile": compile,
            **options,
        }
    )
    with counted() as made, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(own, weft.Data({"a": data[:, :1], "p": data[:, 1:]}, batch_size=32))
    return flat(own), len(made), [str(w.message) for w in caught if "stays eager" in str(w.message)]


@contextmanager
def counted() -> Iterator[list[Any]]:
    """A list that grows by one with each graph that is made runnable."""
    from weft.compile import graph as graphs

    made, was = [], graphs.compile_graph

    def counting(*given: Any, **options: Any) -> Any:
        made.append(was(*given, **options))
        return made[-1]

    graphs.compile_graph = counting
    try:
        yield made
    finally:
        graphs.compile_graph = was
