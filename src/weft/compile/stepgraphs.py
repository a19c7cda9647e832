"""One step as a graph: what it computes, and how it runs. It is compared with the eager one in `weft.compile.checking`.

An `EvaluationGraph` gives the scalars of a batch, a `GradientGraph` also the loss and the gradients, an `UpdateGraph`
also clips, checks and steps the optimizer. What each computes is its `compute`, a function of the batch that reads
and changes the real tensors of the run; tracing makes them inputs of the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from weft.compile import graph as graphs
from weft.compile.checking import Effects, buffers_in_place, out_of_reach, tried, undone
from weft.compile.functional import leaders_of_counters, rebuild, step_in_graph
from weft.compile.lifting import CannotCompile, NotYet
from weft.compile.watching import Place, Watch
from weft.devices import seeding
from weft.devices.processes import limit_entries, shrinking
from weft.step.forward import Forward
from weft.step.metrics import ALL_ROWS, Vector
from weft.step.optimizer_step import clipping
from weft.step.optimizers import parameters_of
from weft.step.trained import look

if TYPE_CHECKING:
    from weft.step.state import RunState


class EvaluationGraph:
    """The scalars of a batch. Also the base of the graphs that train.

    Made for batches like `batch` (whose tensors are `tensors`) and for the problem as it is now; it is traced here and
    runs after `compile`. Raises CannotCompile.
    """

    def __init__(self, state: RunState, forward: Forward, batch: Any, tensors: list[Tensor]) -> None:
        self.state, self.forward, self.num_checks = state, forward, 2
        self.agreed: int | None = None  # the step in which it was last found to agree with the eager one
        self.watch = Watch(state.problem, state.trainer, [forward], self.further_places())
        if (reason := out_of_reach(self)) is not None:
            raise CannotCompile(reason)
        self.epoch, self.step = (torch.zeros((), dtype=torch.int64, device=state.fabric.device) for _ in range(2))
        self.names, self.logged = tuple[str, ...](), tuple[str, ...]()
        self.rows: list[Tensor] = []
        self._shape: TreeSpec = tree_flatten({})[1]

        def function(*moving: Tensor) -> list[Tensor]:
            return [*self.compute(rebuild(batch, iter(moving), self.epoch)), *self.rows]

        with undone(self):
            self.graph, self.fixed = graphs.trace(function, tensors)
            if any(isinstance(p.grad, FakeTensor) for p in state.problem.parameters()):
                raise CannotCompile("the step calls backward itself")
        self.example, self._num_rows = tensors, len(self.rows)
        self._counts = any(t is self.epoch or t is self.step for t in self.fixed)

    @property
    def num_nodes(self) -> int:
        """The size of the graph, before it is compiled."""
        return len(self.graph.graph.nodes)

    def compile(self) -> None:
        """Make the graph runnable. Raises CannotCompile."""
        random = seeding.random_state()
        inputs = [t.detach() for t in (*self.example, *self.fixed)]
        try:
            self.outputs = graphs.compile_graph(self.graph, inputs, moving=len(self.example))
        finally:
            seeding.set_random_state(random)  # the compiler draws
        del self.example, self.graph

    # ---- what is computed

    def compute(self, batch: Any) -> list[Tensor]:
        """The outputs."""
        return [self.read(batch)[1]]

    def read(self, batch: Any) -> tuple[Any, Tensor]:
        """Loss, and all scalars as one vector. Epoch and step are tensors here, for whoever asks in this thread."""
        told = replace(self.state.progress, epoch=self.epoch, step=self.step)  # type: ignore[arg-type]
        with tried(told) as trial, buffers_in_place(self.state.problem):
            loss, scalars = self.forward(batch)
        self.rows, self._shape = _rows(scalars)
        self.names, self.logged = tuple(scalars), tuple(trial.logged)
        return loss, vector([*scalars.values(), *trial.logged.values()], self.epoch.device)

    # ---- running

    def further_places(self) -> list[Place]:
        """What decides about the graph besides what the step reads."""
        return []

    def changed(self) -> str | None:
        """What the graph was made for and is no longer so, None if all is."""
        addresses = getattr(self.outputs, "addresses", None)  # a CUDA graph reads and writes at these
        if addresses is not None and [t.data_ptr() for t in self.fixed] != addresses:
            return "the place of a tensor in memory"
        return self.watch.changed()

    def __call__(self, tensors: list[Tensor]) -> list[Any]:
        """The scalars by name, then the other outputs."""
        values, *others = self.call(tensors)
        if self.logged:
            means, examples = self.state.step.evaluating or (self.state.epoch.logged, 1)
            means.add(Vector(self.logged, values[len(self.names) :]), examples)
            values = values[: len(self.names)]
        rows = tree_unflatten(self.rows, self._shape) if self._num_rows else {}
        return [Vector(self.names, values, rows), *others]

    def call(self, tensors: list[Tensor]) -> Sequence[Tensor]:
        """The outputs; what metrics of all rows read is then in `rows`."""
        self.refresh()
        outputs = self.outputs([*tensors, *self.fixed])
        if self._num_rows:
            self.rows, outputs = [*outputs[-self._num_rows :]], outputs[: -self._num_rows]
        return outputs

    def refresh(self) -> None:
        """Bring the numbers that are inputs up to date: epoch and step, where the graph uses them."""
        if self._counts:
            self.epoch.fill_(self.state.progress.epoch)
            self.step.fill_(self.state.progress.step)

    # ---- for the check

    def changing(self) -> Effects:
        """The tensors that a step may change, by what they are and their name."""
        problem = self.state.problem
        named = {("the step of parameter", name): p for name, p in problem.named_parameters()}
        named |= {("buffer", name): b for name, b in problem.named_buffers()}
        known = {id(t) for t in (*named.values(), self.epoch, self.step)}
        return named | {("constant", str(i)): t for i, t in enumerate(self.fixed) if id(t) not in known}

    def eagerly(self, batch: Any) -> Effects:
        """What the eager step computes from `batch`."""
        return self._loss_eagerly(batch)[1]

    def _loss_eagerly(self, batch: Any) -> tuple[Any, Effects]:
        with tried(self.state.progress) as trial, buffers_in_place(self.state.problem):
            loss, scalars = self.forward(batch)
        rows, _ = _rows(scalars)
        values = vector([*scalars.values(), *trial.logged.values()], self.epoch.device)
        return loss, {("a reported scalar", ""): values} | self._read(rows)

    def reference(self, batch: Any) -> Effects:
        """What the eager step does in place of the graph."""
        return self.eagerly(batch)

    def outcome(self, outputs: Sequence[Tensor]) -> Effects:
        """What the graph has computed, by the same names."""
        return {("a reported scalar", ""): outputs[0]} | self._read(self.rows)

    def _read(self, rows: Sequence[Tensor]) -> Effects:
        return {("what a metric of all rows reads", str(i)): t for i, t in enumerate(rows)}


class GradientGraph(EvaluationGraph):
    """Scalars, the loss and the gradients of a batch; its share of an accumulated batch is an input."""

    def __init__(self, state: RunState, forward: Forward, batch: Any, tensors: list[Tensor]) -> None:
        (self.optimizer,) = state.training.optimizers.values()
        self.trained = [p for p in parameters_of(self.optimizer) if p.requires_grad]
        self.share = torch.ones((), device=state.fabric.device)
        if (hooked := _hooked(state.problem, self.trained)) is not None:
            raise CannotCompile(f"{hooked} has a hook on gradients, which a graph would not call")
        super().__init__(state, forward, batch, tensors)

    def compute(self, batch: Any) -> list[Tensor]:
        loss, values, grads = self.differentiate(batch, self.share if self.state.config.accumulate > 1 else None)
        self.has_grad = [g is not None for g in grads]
        return [values, loss, *(g for g in grads if g is not None)]

    def differentiate(self, batch: Any, share: Tensor | None = None) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Loss, scalars and the gradient of each trained parameter (None if the loss does not depend on it)."""
        loss, values = self.read(batch)
        if share is not None:
            loss = loss * share.to(loss.dtype)
        grads: list[Tensor | None] = list(torch.autograd.grad(loss, self.trained, allow_unused=True))
        if any(g is not None and g.layout is not torch.strided for g in grads):
            raise CannotCompile("a gradient is sparse")
        return loss.detach(), values, grads

    def gradients(self, outputs: Sequence[Tensor]) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter that has a gradient, with the one among `outputs`.

        It has the parameter's strides, as `backward` gives it: torch's fused optimizers on a CPU rely on that.
        """
        trained = (p for p, has in zip(self.trained, self.has_grad, strict=True) if has)
        for p, grad in zip(trained, outputs[2:], strict=True):
            yield p, grad if grad.stride() == p.stride() else torch.empty_like(p).copy_(grad)

    # ---- for the check

    def changing(self) -> Effects:
        held = {id(t) for t in self.state.problem.parameters()}
        others = [p for p in self.trained if id(p) not in held]
        known = {id(t) for t in (self.share, *others)}
        return {k: t for k, t in super().changing().items() if id(t) not in known} | {
            ("the step of parameter", f"{i} that only the optimizer has"): p for i, p in enumerate(others)
        }

    def eagerly(self, batch: Any) -> Effects:
        loss, found = self._loss_eagerly(batch)
        if self.state.training.looks:
            look(self.state, loss)
        if self.state.config.accumulate > 1:
            self.share.fill_(0.5)
            loss = loss * 0.5
        self.state.fabric.backward(loss)
        found["the loss", ""] = loss.detach()
        return found | self._named((p, p.grad) for p in self.trained if p.grad is not None)

    def outcome(self, outputs: Sequence[Tensor]) -> Effects:
        return super().outcome(outputs) | {("the loss", ""): outputs[1]} | self._named(self.gradients(outputs))

    def _named(self, gradients: Iterable[tuple[Tensor, Tensor]]) -> Effects:
        names = {id(p): str(i) for i, p in enumerate(self.trained)}
        names |= {id(p): name for name, p in self.state.problem.named_parameters()}
        return {("the gradient of parameter", names[id(p)]): grad for p, grad in gradients}


class UpdateGraph(GradientGraph):
    """The whole update: loss, gradients, clipping, the check for numbers that are not finite, the optimizer's step.

    Where one is not finite, parameters and state stay as they are, and the third output is False.
    """

    def __init__(self, state: RunState, forward: Forward, batch: Any, tensors: list[Tensor]) -> None:
        (optimizer,) = state.training.optimizers.values()
        states, device = [optimizer.state.get(p, {}) for p in parameters_of(optimizer)], state.fabric.device
        self.kept = [v for s in states for v in s.values() if v is not None]
        if not all(isinstance(v, Tensor) for v in self.kept):
            raise CannotCompile(f"{type(optimizer).__name__} keeps numbers in its state")
        self.given_rates = [group["lr"] for group in optimizer.param_groups]
        self.rates = [
            lr if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64, device=device)
            for lr in self.given_rates
        ]
        if any(t.device != device for t in (*self.rates, *self.kept)):
            raise CannotCompile(f"{type(optimizer).__name__} keeps some of its state on another device")
        self.leaders = leaders_of_counters(optimizer)
        super().__init__(state, forward, batch, tensors)
        optimizer._opt_called = True  # type: ignore[attr-defined]  # a scheduler asks whether it has stepped

    def compute(self, batch: Any) -> list[Tensor]:
        loss, values, grads = self.differentiate(batch)
        config = self.state.config
        grads, finite = _clipped(loss, grads, config.clip, config.clip_algorithm == "value")
        own, by_id = parameters_of(self.optimizer), {id(p): g for p, g in zip(self.trained, grads, strict=True)}
        given = [by_id.get(id(p)) for p in own]
        leaders = [i if given[leader] is None else leader for i, leader in enumerate(self.leaders)]
        new, states = step_in_graph(self.optimizer, own, given, self.rates, leaders)
        with torch.no_grad():
            for p, value, state in zip(own, new, states, strict=True):
                before = self.optimizer.state.get(p, {})
                if by_id.get(id(p)) is None:
                    continue
                if before.keys() != state.keys():
                    raise NotYet(f"{type(self.optimizer).__name__} has no state yet")
                for old, now in [(p, value), *((before[k], state[k]) for k in before if before[k] is not None)]:
                    old.data.copy_(torch.where(finite, now, old))  # `.data` has a count of changes of its own
        return [values, loss, finite]

    def refresh(self) -> None:
        for i, group in enumerate(self.optimizer.param_groups):
            if group["lr"] is not self.given_rates[i]:
                self.given_rates[i] = group["lr"]
                self.rates[i].fill_(group["lr"])
        super().refresh()

    def changed(self) -> str | None:
        return super().changed() or (
            "a parameter's counter of steps" if leaders_of_counters(self.optimizer) != self.leaders else None
        )

    def further_places(self) -> list[Place]:
        optimizer, name = self.optimizer, type(self.optimizer).__name__
        places = [Place(name, vars(optimizer), ("state", "param_groups"))]
        places += [Place(name, group, notes=frozenset({"lr"})) for group in optimizer.param_groups]
        return [*places, Place(name, optimizer.state), *(Place(name, s) for s in optimizer.state.values())]

    # ---- for the check

    def changing(self) -> Effects:
        unnamed = {id(t) for t in (*self.rates, *self.kept)}
        found = {k: t for k, t in super().changing().items() if id(t) not in unnamed}
        for i, p in enumerate(parameters_of(self.optimizer)):
            state = self.optimizer.state.get(p, {})
            found |= {(f"{k} of parameter", str(i)): v for k, v in state.items() if isinstance(v, Tensor)}
        return found

    def reference(self, batch: Any) -> Effects:
        found = self.eagerly(batch)
        grads = [p.grad for p in self.trained if p.grad is not None]
        if all(t.isfinite().all() for t in (found["the loss", ""], *grads)):
            if (clip := clipping(self.state)) is not None:
                clip(self.trained)
            step = type(self.optimizer).step
            getattr(step, "__wrapped__", step)(self.optimizer)  # without what schedulers and hooks hang on it
        return {k: t for k, t in found.items() if not k[0].startswith("the gradient")}

    def outcome(self, outputs: Sequence[Tensor]) -> Effects:
        return EvaluationGraph.outcome(self, outputs) | {("the loss", ""): outputs[1]}


def _hooked(problem: nn.Module, parameters: Iterable[Tensor]) -> str | None:
    """What has a hook that backward would call in every step, None if nothing has."""
    names = {id(p): name for name, p in problem.named_parameters()}
    for p in parameters:
        if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
            return names.get(id(p), "a parameter")
    hooked = (name for name, m in problem.named_modules() if m._backward_hooks or m._backward_pre_hooks)
    return next((name or type(problem).__name__ for name in hooked), None)


def _rows(scalars: dict[str, Any]) -> tuple[list[Tensor], TreeSpec]:
    """What metrics of all rows read, taken out of `scalars`: as tensors, and how they are nested."""
    rows, shape = tree_flatten(scalars.pop(ALL_ROWS, {}))
    if other := [type(value).__name__ for value in rows if not isinstance(value, Tensor)]:
        raise CannotCompile(f"a metric of all rows reads a {other[0]}")
    return rows, shape


def vector(values: Sequence[Any], device: torch.device) -> Tensor:
    """Scalars (tensors of any size: their mean; numbers) as one vector in the widest dtype of the device."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    found = []
    for value in values:
        tensor = (
            value.detach() if isinstance(value, Tensor) else torch.full((), float(value), dtype=dtype, device=device)
        )
        if tensor.dim():
            tensor = tensor.mean() if tensor.is_floating_point() else tensor.float().mean()
        found.append(tensor.to(dtype))
    return torch.stack(found) if found else torch.zeros(0, dtype=dtype, device=device)


def _clipped(
    loss: Tensor, grads: list[Tensor | None], clip: float | None, by_value: bool
) -> tuple[list[Tensor | None], Tensor]:
    """The gradients clipped as `Processes.clip` does, new ones, and whether loss and gradients are finite."""
    there = [g for g in grads if g is not None]
    if clip is None or by_value:
        finite = torch.stack([g.isfinite().all() for g in there]).all()
        if clip is not None:
            grads = [None if g is None else limit_entries(g.clone(), clip) for g in grads]
    else:
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in there]))
        factor = shrinking(norm, clip)
        finite, grads = norm.isfinite(), [None if g is None else g * factor for g in grads]
    return grads, finite & loss.isfinite()
