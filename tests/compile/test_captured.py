"""What is done around a captured graph, with a GPU that is none: its graph computes anew when it is replayed."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from weft.compile import graph as graphs


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torch.cuda and torch.compile, so far as a capture asks for them; the list says what was asked."""
    asked: list[str] = []
    current: dict[str, Any] = {}

    class Stream:
        def __init__(self, device: Any = None) -> None:
            asked.append("stream")

        def wait_stream(self, other: Any) -> None: ...

        synchronize = lambda self: None

    class Graph:
        def replay(self) -> None:
            for place, value in zip(self.outputs, self.compute(*self.inputs), strict=True):
                place.copy_(value)

    def compiled(graph: torch.fx.GraphModule, **options: Any) -> Callable[..., Any]:
        def fused(*inputs: Tensor) -> Any:
            outputs = graph(*inputs)
            if (captured := current.get("captured")) is not None:
                captured.compute, captured.inputs, captured.outputs = graph, inputs, outputs
            return outputs

        return fused

    @contextlib.contextmanager
    def capture(captured: Any, pool: Any, stream: Any, **options: Any) -> Any:
        asked.append(f"capture into {pool}")
        current["captured"] = captured
        yield
        del current["captured"]

    nothing = lambda *_, **__: contextlib.nullcontext()
    pools = iter(range(100))
    for name, value in {
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": capture,
        "device": nothing,
        "stream": nothing,
        "current_stream": lambda *_: Stream(),
        "graph_pool_handle": lambda: next(pools),
        "get_rng_state": lambda *_: None,
        "set_rng_state": lambda *_: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    return asked


def captured(weight: Tensor, x: Tensor, rows: Tensor) -> Any:
    def update(x: Tensor, rows: Tensor) -> list[Tensor]:
        weight.data.add_(x.sum())
        return [weight * x]

    graph, fixed = graphs.trace(update, [x, rows])
    inputs = [t.detach() for t in (x, rows, *fixed)]
    run = graphs._captured(graph, inputs, moving=2)
    return run, lambda x, rows: run([x, rows, *fixed])


def test_a_captured_graph_computes_with_what_it_is_given_and_changes_what_it_holds(no_gpu: list[str]) -> None:
    weight, x, rows = torch.zeros(3), torch.ones(3), torch.arange(3)
    _, call = captured(weight, x, rows)
    assert torch.equal(weight, torch.zeros(3))  # the calls before the capture are undone
    first = call(2 * x, rows)[0]
    second = call(x, None)[0]  # nobody reads the row numbers: they are not copied
    assert torch.equal(weight, torch.full((3,), 9.0)) and torch.equal(second, torch.full((3,), 9.0))
    assert torch.equal(first, torch.full((3,), 12.0))  # and is not what the second call wrote


def test_captures_share_memory_as_long_as_one_of_them_lives(no_gpu: list[str]) -> None:
    one, two = (captured(torch.zeros(3), torch.ones(3), torch.arange(3)) for _ in range(2))
    assert [what for what in no_gpu if "capture" in what] == ["capture into 0"] * 2
    del one, two
    gc.collect()
    captured(torch.zeros(3), torch.ones(3), torch.arange(3))
    assert no_gpu[-1] != "capture into 0" and "capture into 1" in no_gpu
