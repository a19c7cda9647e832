"""Tracing a step changes nothing that another thread can see."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.compile import checking
from weft.compile import graph as graphs
from weft.loop import adapters
from weft.loop.run import Run
from weft.step import state

X = torch.rand(32, 2, generator=torch.Generator().manual_seed(1))


class Watcher(threading.Thread):
    """Asks again and again, from the first trace to the end of the last, and keeps what it has seen."""

    def __init__(self, ask: Callable[[], Any]) -> None:
        super().__init__()
        self.ask, self.seen, self.asked, self.over = ask, set[Any](), 0, False

    def run(self) -> None:
        while not self.over:
            self.seen.add(self.ask())
            self.asked += 1


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {f"{batch['name']}_loss": self.net(batch["x"]).square().mean()}


def step(trainer: weft.Trainer, batch: dict[str, Any]) -> Tensor:
    assert trainer.run is not None
    trainer.log({"half": trainer.problem(batch)["train_loss"].detach() / 2})
    factor = 1 + 0.1 * trainer.current_epoch + 0.01 * trainer.global_step + 0.001 * trainer.run.progress.epoch
    return trainer.problem(batch)["train_loss"] * factor


def watched(monkeypatch: pytest.MonkeyPatch, ask: Callable[[weft.Trainer], Any], compile: bool = True) -> Watcher:
    """What another thread sees of a trainer while graphs are traced."""
    real = graphs.trace
    trainer = weft.Trainer(
        epochs=3,
        seed=0,
        progress=False,
        compile=compile,
        training_step=step,
        optimizer=lambda p: torch.optim.RAdam(p, lr=1e-2),
    )
    watcher = Watcher(lambda: ask(trainer))

    def slow(fn: Callable[..., Any], inputs: Any) -> Any:
        def twice(*given: Tensor) -> Any:
            for _ in range(3):
                fn(*given)
            before = watcher.asked
            while watcher.asked < before + 3 and watcher.is_alive():
                pass
            return fn(*given)

        if not watcher.ident:
            watcher.start()
        traced = real(fn, inputs)
        real(twice, inputs)
        return traced

    monkeypatch.setattr(graphs, "trace", slow)
    torch.manual_seed(0)
    trainer.fit(Net(), weft.Data({"x": X}, batch_size=8, shuffle=False))
    watcher.over = True
    watcher.join()
    assert watcher.asked > 10
    return watcher


ASKED = (
    lambda trainer: torch.compiler.is_compiling(),
    lambda trainer: torch.compiler.is_compiling.__module__,
    lambda trainer: type(trainer.current_epoch).__name__,
    lambda trainer: type(trainer.global_step).__name__,
    lambda trainer: type(trainer.run.progress.epoch).__name__,
    lambda trainer: type(trainer.run.state.progress.step).__name__,
    lambda trainer: type(trainer.problem.net[0].weight).__name__,
    lambda trainer: type(trainer.problem.net[1].running_mean).__name__,
    lambda trainer: type(trainer.run.optimizers["default"].param_groups[0]["lr"]).__name__,
    lambda trainer: trainer.problem.net[0].weight.grad_fn is None,
    lambda trainer: trainer.run.state.step.evaluating is None,
)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    "asked",
    [pytest.param(ASKED[:2], id="of torch", marks=pytest.mark.long), pytest.param(ASKED[2:], id="of the run")],
)
def test_another_thread_sees_the_run_as_it_is_while_a_step_is_traced(
    asked: tuple[Callable[[Any], Any], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(watched(monkeypatch, lambda trainer: tuple(ask(trainer) for ask in asked)).seen) == 1


@pytest.mark.long
@pytest.mark.usefixtures("uncompiled")
def test_the_watching_thread_would_have_seen_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: numbers that all can see are tensors for a while."""
    real = Run.progress.fget

    def for_all(self: Run) -> Any:
        return real(self)  # type: ignore[misc]

    told = [threading.get_ident()]

    def leaking(trainer: weft.Trainer) -> str:
        return type(trainer.current_epoch).__name__ if told[0] != threading.get_ident() else ""

    class Shared:
        """A context variable that forgot to be of one thread."""

        value: Any = None

        def get(self) -> Any:
            return self.value

        def set(self, value: Any) -> Any:
            before, self.value = self.value, value
            return before

        def reset(self, token: Any) -> None:
            self.value = token

    shared = Shared()
    for module in (state, adapters, checking):  # all are loaded: one that came now would keep what stands in for it
        monkeypatch.setattr(module, "trial", shared)
    monkeypatch.setattr(Run, "progress", property(for_all))
    assert watched(monkeypatch, leaking).seen == {"int", "Tensor"}


@pytest.mark.usefixtures("uncompiled")
def test_what_tracing_and_checking_touch_is_there_again_bit_for_bit() -> None:
    """Weights, buffers, optimizer state, gradients and random state, before and after each comparison."""
    from weft.compile import choosing

    seen = 0

    def same(act: Callable[..., Any]) -> Callable[..., Any]:
        def checked(graph: Any, *given: Any) -> Any:
            nonlocal seen
            problem, optimizer = graph.state.problem, graph.state.training.optimizers["default"]
            random = torch.get_rng_state()
            before = [t.clone() for t in problem.state_dict().values()]
            kept = [v.clone() for s in optimizer.state.values() for v in s.values()]
            held = [id(v) for s in optimizer.state.values() for v in s.values()]
            found = act(graph, *given)
            assert found is None
            assert all(torch.equal(t, b) for t, b in zip(problem.state_dict().values(), before, strict=True))
            now = [v for s in optimizer.state.values() for v in s.values()]
            assert all(torch.equal(t, b) for t, b in zip(now, kept, strict=True))
            assert [id(v) for v in now] == held
            assert all(p.grad is None for p in problem.parameters())
            assert torch.equal(random, torch.get_rng_state())
            seen += 1
            return found

        return checked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, "difference", same(checking.difference))
        patch.setattr(choosing, "side_effect", same(checking.side_effect))
        weft.Trainer(epochs=3, seed=0, progress=False, compile=True, training_step=step).fit(
            Net(), weft.Data({"x": X}, {"x": X[:8]}, batch_size=8)
        )
    assert seen >= 4
