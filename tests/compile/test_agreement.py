"""What is compared, and by what measure: rounding is no reason to leave a graph, anything else is."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.compile import stepgraphs


def fitted(problem: nn.Module, data: Any, **options: Any) -> tuple[weft.FitResult, list[str], weft.Trainer]:
    trainer = weft.Trainer(**{"epochs": 6, "seed": 0, "progress": False} | options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = trainer.fit(problem, data)
    return result, [str(w.message) for w in caught if "stays eager" in str(w.message)], trainer


# ---- gradients that are zero but for rounding ------------------------------------------------------------------------


def one_dimension() -> tuple[nn.Module, Tensor]:
    n = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(120, 1))
    return n, torch.randn(64, 2, 32)


def two_dimensions() -> tuple[nn.Module, Tensor]:
    n = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(108, 1))
    return n, torch.randn(64, 2, 8, 8)


def linear() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(64, 2)


OPTIMIZERS: list[Callable[[Any], torch.optim.Optimizer]] = [
    lambda p: torch.optim.SGD(p, lr=1e-2),
    lambda p: torch.optim.Adam(p, lr=1e-3),
]


@pytest.mark.usefixtures("rounding")
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["SGD", "Adam"])
@pytest.mark.parametrize("make", [one_dimension, two_dimensions, linear])
def test_a_bias_before_a_batch_norm_is_no_reason_to_leave_the_graph(make: Any, optimizer: Any) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        net, x = make()
        problem = weft.Problem([weft.Node(net, ["x"], ["u"])], [weft.objective(lambda u, y: (u - y) ** 2, name="m")])
        data = weft.Data({"x": x, "y": torch.randn(64, 1)}, batch_size=16)
        _, told, trainer = fitted(problem, data, compile=True, optimizer=optimizer)
        assert not told
        assert trainer.run is not None
        assert list(trainer.run.graphs.made.values()) == [1]


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs whose sums are rounded in another way than eager's: batches are computed in float64 and cast back."""
    from weft.compile import graph as graphs

    def in_float64(graph: torch.fx.GraphModule, inputs: Any, moving: int) -> Callable[[Any], Any]:
        def run(given: list[Tensor]) -> Any:
            wide = [t.double() if t.dtype == torch.float32 else t for t in given]
            kept = [t.clone() for t in wide]
            with torch.no_grad():
                out = graph(*wide)
                for t, w, before in zip(given, wide, kept, strict=True):
                    if w is not t and not torch.equal(w, before):
                        t.copy_(w)
            return [o.to(torch.float32) if i > 1 and o.dtype == torch.float64 else o for i, o in enumerate(out)]

        return run

    monkeypatch.setattr(graphs, "compile_graph", in_float64)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("factor", [1.1, 0.0, -1.0])
def test_a_small_gradient_that_is_wrong_is_found_beside_large_ones(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = stepgraphs.GradientGraph.differentiate

    def wrong(self: Any, *given: Any) -> Any:
        loss, values, grads = real(self, *given)
        return loss, values, [grads[0] * factor, *grads[1:]]

    class Scaled(nn.Module):
        """Its first gradient is a thousandth of the second."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return (1e-3 * self.a * batch["x"] + self.b).square().mean()

    data = weft.Data({"x": torch.rand(16, 3)}, batch_size=8)
    sgd = lambda p: torch.optim.SGD(p, lr=1e-1)
    assert not fitted(Scaled(), data, compile=True, optimizer=sgd)[1]
    monkeypatch.setattr(stepgraphs.GradientGraph, "differentiate", wrong)
    _, told, _ = fitted(Scaled(), data, compile=True, optimizer=sgd)
    assert "parameter a differs by" in told[0]


# ---- strides ---------------------------------------------------------------------------------------------------------


class Members(nn.Module):
    """Four small nets side by side: their gradients come transposed out of a graph."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w, self.b, self.v = (nn.Parameter(torch.randn(*n)) for n in ((4, 8, 2), (4, 1, 8), (4, 1, 8)))

    def forward(self, d: dict[str, Any]) -> dict[str, Tensor]:
        h = torch.tanh(torch.baddbmm(self.b, d["x"].expand(4, -1, -1), self.w.transpose(1, 2)))
        y = torch.bmm(h, self.v.transpose(1, 2)) - d["x"].prod(1, keepdim=True)
        return {d["name"] + "_loss": y.square().mean((1, 2)).sum()}


MEMBERS = {"x": torch.randn(128, 2, generator=torch.Generator().manual_seed(1))}


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("fused", [True, False])
def test_gradients_have_the_strides_of_their_parameters(
    fused: bool, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(compile: bool) -> float:
        result, told, _ = fitted(
            Members(),
            weft.Data(MEMBERS, batch_size=16, shuffle=False),
            compile=compile,
            accumulate=accumulate,
            epochs=15,
            optimizer=lambda q: torch.optim.Adam(q, lr=1e-2, fused=fused),
        )
        assert not told
        return result.history["train_loss"][-1]

    expected = end(False)
    assert end(True) == pytest.approx(expected, rel=1e-4)
    if fused and accumulate == 2:  # torch's fused Adam on a CPU walks the memory as it lies

        def as_they_come(self: Any, outputs: Any) -> Any:
            grads = [g.transpose(-1, -2).contiguous().transpose(-1, -2) for g in outputs[2:]]
            return zip(self.trained, grads, strict=True)

        monkeypatch.setattr(stepgraphs.GradientGraph, "gradients", as_they_come)
        monkeypatch.setattr("weft.compile.choosing.difference", lambda *_: None)
        assert end(True) != pytest.approx(expected, rel=1e-2)


# ---- what a step keeps -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("uncompiled")
def test_a_tensor_that_a_function_counts_in_goes_on_as_in_eager() -> None:
    ends = []
    for compile in (False, True):
        torch.manual_seed(0)
        seen, net = torch.zeros(()), nn.Linear(2, 1)

        def step(trainer: Any, batch: Any, seen: Tensor = seen) -> Tensor:
            seen.add_(1)
            return trainer.problem(batch["x"]).square().mean() * (1 + 0.01 * seen)

        result, _, _ = fitted(net, weft.Data(MEMBERS, batch_size=16), compile=compile, training_step=step)
        ends.append((result.history["train_loss"], seen.item()))
    assert ends[0][1] == ends[1][1] == 48
    assert ends[1][0] == pytest.approx(ends[0][0], rel=1e-5)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("kind", ["append", "nonlocal", "attribute", "dict"])
def test_a_step_that_counts_in_plain_python_stays_eager_and_its_count_is_that_of_eager(kind: str) -> None:
    def one(compile: bool) -> tuple[float, Any, list[str]]:
        torch.manual_seed(0)
        n, kept = 0, {"list": [], "n": 0}  # type: ignore[var-annotated]

        class Counter:
            n = 0

        counter = Counter()

        def step(trainer: Any, batch: Any) -> Tensor:
            nonlocal n
            if kind == "append":
                kept["list"].append(1)
            elif kind == "nonlocal":
                n += 1
            elif kind == "attribute":
                counter.n += 1
            else:
                kept["n"] += 1
            count = len(kept["list"]) + n + counter.n + kept["n"]
            return trainer.problem(batch["x"]).square().mean() * (1 + 0.01 * count)

        result, told, _ = fitted(
            nn.Linear(2, 1), weft.Data(MEMBERS, batch_size=16), compile=compile, training_step=step
        )
        return result.history["train_loss"][-1], len(kept["list"]) + n + counter.n + kept["n"], told

    loss, count, _ = one(False)
    assert count == 48
    found, counted, told = one(True)
    assert (found, counted) == (loss, count)
    assert "anew every time" in told[0]
