"""One step as a graph: what it computes, how it runs, and how it is compared with the eager step.

An `EvaluationGraph` gives the scalars of a batch, a `GradientGraph` also the loss and the gradients, an `UpdateGraph`
also clips, checks and steps the optimizer. Each is traced from pure functions of tensors (see
`weft.compile.functional`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weft.compile import graph as graphs
from weft.compile.functional import Tensors, Watch, moved_optimizer, rebuild, step_alone, step_in_graph
from weft.compile.graph import CannotCompile, NotYet
from weft.devices import seeding
from weft.step.forward import Forward
from weft.step.metrics import Means, Vector
from weft.step.optimizers import parameters_of

if TYPE_CHECKING:
    from weft.step.state import RunState


@contextmanager
def undone(state: RunState) -> Iterator[None]:
    """What the block does to random state, modules, trainer, and what it logs and asks for, is undone."""
    random, logged, asked = seeding.random_state(), state.step.evaluating, state.control.stop_reason
    state.step.evaluating = (Means(), 1)  # where `log` adds to
    try:
        with Watch(state.problem, state.trainer).untouched():
            yield
        if state.control.stop_reason != asked:
            raise CannotCompile("the step stops the training")
    finally:
        state.step.evaluating, state.control.stop_reason = logged, asked
        seeding.set_random_state(random)


class EvaluationGraph:
    """The scalars of a batch. Also the base of the graphs that train.

    Made for batches like `batch` (whose tensors are `tensors`) and for the problem as it is now; it is traced here and
    runs after `compile`. Raises CannotCompile.
    """

    def __init__(self, state: RunState, forward: Forward, batch: Any, tensors: list[Tensor]) -> None:
        self.state, self.forward, self.num_checks = state, forward, 2
        self.watch, self.held = Watch(state.problem, state.trainer), Tensors(state.problem)
        self.epoch, self.step = (torch.zeros((), dtype=torch.int64, device=state.fabric.device) for _ in range(2))
        self.names, self.logged = tuple[str, ...](), tuple[str, ...]()
        groups = [tensors, *self.groups()]
        sizes = [len(group) for group in groups]

        def function(*flat: Tensor) -> list[Tensor]:
            rest = iter(flat)
            return self.compute(batch, *[list(islice(rest, size)) for size in sizes])

        inputs = [t for group in groups for t in group]
        with undone(state):
            self.graph, constants = graphs.trace(function, inputs)
        self.example, self.fixed = tensors, [*inputs[len(tensors) :], *constants]
        placeholders = [n for n in self.graph.graph.nodes if n.op == "placeholder"]
        self._counts = any(
            node.users for node, t in zip(placeholders, inputs, strict=False) if t is self.epoch or t is self.step
        )

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

    def groups(self) -> list[Sequence[Tensor]]:
        """The tensors that are the same in each call, in the order in which `compute` takes them."""
        return [self.held.parameters, self.held.buffers, [self.epoch, self.step]]

    def compute(self, batch: Any, *groups: list[Tensor]) -> list[Tensor]:
        """The outputs, from a batch's tensors and from `groups`; what it changes of these it changes in place."""
        moved, parameters, buffers, counters = groups
        return [self.read(batch, moved, parameters, buffers, counters)[1]]

    def read(
        self, batch: Any, moved: list[Tensor], parameters: list[Tensor], buffers: list[Tensor], counters: list[Tensor]
    ) -> tuple[Any, Tensor]:
        """Loss, and all scalars as one vector. Epoch and step are tensors here, whoever asks for them."""
        state, progress, log = self.state, self.state.progress, _Log()
        was, state.step.evaluating = (progress.epoch, progress.step), (log, 1)  # type: ignore[assignment]
        try:
            progress.epoch, progress.step = counters  # type: ignore[assignment]
            with self.held.replaced([*parameters, *buffers]):
                loss, scalars = self.forward(rebuild(batch, iter(moved), counters[0]))
        finally:
            progress.epoch, progress.step = was
        self.names, self.logged = tuple(scalars), tuple(log.values)
        return loss, vector([*scalars.values(), *log.values.values()], counters[0].device)

    # ---- running

    def changed(self) -> str | None:
        """What the graph was made for and is no longer so, None if all is."""
        addresses = getattr(self.outputs, "addresses", None)  # a CUDA graph reads and writes at these
        if addresses is not None and [t.data_ptr() for t in self.fixed] != addresses:
            return "the place of a tensor in memory"
        return self.watch.changed()

    def still_fits(self) -> bool:
        """Whether nothing has changed, as far as a glance shows: called at every step."""
        return self.watch.glance()

    def __call__(self, tensors: list[Tensor]) -> list[Any]:
        """The scalars by name, then the other outputs."""
        values, *others = self.call(tensors)
        if self.logged:
            means, examples = self.state.step.evaluating or (self.state.epoch.logged, 1)
            means.add(Vector(self.logged, values[len(self.names) :]), examples)
            values = values[: len(self.names)]
        return [Vector(self.names, values), *others]

    def call(self, tensors: list[Tensor]) -> Sequence[Tensor]:
        """The outputs."""
        self.refresh()
        return self.outputs([*tensors, *self.fixed])

    def refresh(self) -> None:
        """Bring the numbers that are inputs up to date: epoch and step, where the graph uses them."""
        if self._counts:
            self.epoch.fill_(self.state.progress.epoch)
            self.step.fill_(self.state.progress.step)

    # ---- checking

    def eager(self, batch: Any, parameters: list[Tensor], buffers: list[Tensor]) -> dict[str, Tensor]:
        """What the eager step makes of `batch` with these weights (and of `buffers`, in place), by names for messages."""
        with self.held.replaced([*parameters, *buffers]):
            scalars = self.forward(batch)[1]
        return {"a reported scalar": vector(list(scalars.values()), self.epoch.device)}

    def repeated(self, batch: Any, parameters: list[Tensor], buffers: list[Tensor]) -> dict[str, Tensor]:
        """As much of it as must come out the same when it is done again."""
        return self.eager(batch, parameters, buffers)

    def outcome(self, outputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """What the graph has made, by the same names; called right after it ran."""
        return {"a reported scalar": outputs[0][: len(self.names)]}

    def difference(self, batch: Any, tensors: list[Tensor]) -> str | None:
        """What of the graph's outcome is not as the eager step's, None if all is. Changes nothing.

        They may differ by rounding: by as much as the eager step does when its weights change in their last bits.
        """
        self.num_checks -= 1
        expected, allowed = self._eagerly(batch, self.eager), math.sqrt(self._eps())
        self.refresh()
        with undone(self.state), torch.no_grad():
            before = [t.detach().clone() for t in self.fixed]
            try:
                found = self.outcome(self.call(tensors)) | {f"buffer {i}": b for i, b in enumerate(self.held.buffers)}
                gaps = {
                    name: gap for name, value in expected.items() if not (gap := _gap(found[name], value)) <= allowed
                }
            finally:
                for tensor, value in zip(self.fixed, before, strict=True):
                    tensor.copy_(value)
        if gaps:
            shifted = self._eagerly(batch, self.eager, shift=8 * self._eps())
            for name, gap in gaps.items():
                if not gap <= allowed + 10 * _gap(shifted[name], expected[name]):
                    return f"{name} differs by {gap:.1e} of its size"
        return None

    def side_effect(self, batch: Any) -> str | None:
        """What the eager step changes every time and a graph would not, None if there is no such thing."""
        with undone(self.state):
            self._eagerly(batch, self.repeated, keep=True)  # what is set once and for all may be
            random, once = seeding.random_state(), Watch(self.state.problem, self.state.trainer)
            first = self._eagerly(batch, self.repeated, keep=True)
            seeding.set_random_state(random)
            second = self._eagerly(batch, self.repeated, keep=True)
            if (attribute := once.changed()) is not None:
                return f"the step sets {attribute} anew every time"
        if any(_gap(second[name], value) > 0 for name, value in first.items()):
            return "the step gives something else when it is repeated: it depends on what it did before"
        return None

    def _eagerly(
        self, batch: Any, step: Callable[..., dict[str, Tensor]], shift: float = 0.0, keep: bool = False
    ) -> dict[str, Tensor]:
        parameters = [
            (p.detach() * (1 + shift) if p.is_floating_point() else p.detach().clone()).requires_grad_(p.requires_grad)
            for p in self.held.parameters
        ]
        buffers = [b.detach().clone() for b in self.held.buffers]
        with nullcontext() if keep else undone(self.state):
            found = step(batch, parameters, buffers)
        return found | {f"buffer {i}": b for i, b in enumerate(buffers)}

    def _eps(self) -> float:
        """The relative rounding error of the step: that of its coarsest dtype."""
        mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(str(self.state.config.precision))
        dtypes = {p.dtype for p in self.held.parameters if p.is_floating_point()} | ({mixed} if mixed else set())
        return max((torch.finfo(dtype).eps for dtype in dtypes), default=torch.finfo(torch.float32).eps)


class GradientGraph(EvaluationGraph):
    """Scalars, the loss and the gradients of a batch; its share of an accumulated batch is an input."""

    def __init__(self, state: RunState, forward: Forward, batch: Any, tensors: list[Tensor]) -> None:
        held = {id(p): i for i, p in enumerate(state.problem.parameters())}
        (self.optimizer,) = state.training.optimizers.values()
        self.own = parameters_of(self.optimizer)
        if any(id(p) not in held for p in self.own):
            raise CannotCompile("the optimizer has parameters that are not the problem's")
        self.numbers = [held[id(p)] for p in self.own if p.requires_grad]  # among the problem's parameters
        self.share = torch.ones((), device=state.fabric.device)
        super().__init__(state, forward, batch, tensors)

    def groups(self) -> list[Sequence[Tensor]]:
        return [*super().groups(), [self.share]]

    def compute(self, batch: Any, *groups: list[Tensor]) -> list[Tensor]:
        moved, parameters, buffers, counters, (share,) = groups
        loss, values, grads = self.differentiate(batch, moved, parameters, buffers, counters, share)
        self.has_grad = [g is not None for g in grads]
        return [values, loss, *(g for g in grads if g is not None)]

    def differentiate(
        self,
        batch: Any,
        moved: list[Tensor],
        parameters: list[Tensor],
        buffers: list[Tensor],
        counters: list[Tensor],
        share: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Loss, scalars and the gradient of each trained parameter (None if the loss does not depend on it)."""
        required = [p.requires_grad for p in self.held.parameters]
        leaves = [p.detach().requires_grad_(r) for p, r in zip(parameters, required, strict=True)]
        loss, values = self.read(batch, moved, leaves, buffers, counters)
        if share is not None and self.state.config.accumulate > 1:
            loss = loss * share.to(loss.dtype)
        grads = torch.autograd.grad(loss, [leaves[i] for i in self.numbers], allow_unused=True)
        return loss.detach(), values, list(grads)

    def difference(self, batch: Any, tensors: list[Tensor]) -> str | None:
        self.share.fill_(1.0)
        return super().difference(batch, tensors)

    @property
    def trained(self) -> list[Tensor]:
        """The parameters that have a gradient, in the order in which the graph gives them."""
        return [self.held.parameters[i] for i, has in zip(self.numbers, self.has_grad, strict=True) if has]

    def eager(self, batch: Any, parameters: list[Tensor], buffers: list[Tensor]) -> dict[str, Tensor]:
        loss, found = self._eager_loss(batch, parameters, buffers)
        grads = torch.autograd.grad(loss, [parameters[i] for i in self.numbers], allow_unused=True)
        return found | {
            f"the gradient of parameter {i}": g for i, g in zip(self.numbers, grads, strict=True) if g is not None
        }

    def repeated(self, batch: Any, parameters: list[Tensor], buffers: list[Tensor]) -> dict[str, Tensor]:
        return GradientGraph.eager(self, batch, parameters, buffers)  # what the optimizer makes of it, takes memory

    def _eager_loss(
        self, batch: Any, parameters: list[Tensor], buffers: list[Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with self.held.replaced([*parameters, *buffers]):
            loss, scalars = self.forward(batch)
        return loss, {"a reported scalar": vector(list(scalars.values()), self.epoch.device), "the loss": loss.detach()}

    def outcome(self, outputs: Sequence[Tensor]) -> dict[str, Tensor]:
        numbers = [i for i, has in zip(self.numbers, self.has_grad, strict=True) if has]
        gradients = {f"the gradient of parameter {i}": g for i, g in zip(numbers, outputs[2:], strict=True)}
        return super().outcome(outputs) | {"the loss": outputs[1]} | gradients


class UpdateGraph(GradientGraph):
    """The whole update: loss, gradients, clipping, the check for numbers that are not finite, the optimizer's step.

    Where one is not finite, parameters and state stay as they are, and the third output is False.
    """

    def __init__(self, state: RunState, forward: Forward, batch: Any, tensors: list[Tensor]) -> None:
        (optimizer,) = state.training.optimizers.values()
        self.groups_now, self.state_now = optimizer.param_groups, optimizer.state
        self.states = [dict(optimizer.state.get(p, {})) for p in parameters_of(optimizer)]
        if any(not isinstance(v, Tensor) and v is not None for s in self.states for v in s.values()):
            raise CannotCompile(f"{type(optimizer).__name__} keeps numbers in its state")
        self.rates = [_rate(group["lr"], state.fabric.device) for group in optimizer.param_groups]
        if any(t.device != state.fabric.device for t in (*self.rates, *self._held_by_optimizer())):
            raise CannotCompile(f"{type(optimizer).__name__} keeps some of its state on another device")
        self.settings = [dict(group) for group in optimizer.param_groups]
        self.clip, self.by_value = state.config.clip, state.config.clip_algorithm == "value"
        super().__init__(state, forward, batch, tensors)
        optimizer._opt_called = True  # type: ignore[attr-defined]  # a scheduler asks whether it has stepped

    def groups(self) -> list[Sequence[Tensor]]:
        return [*super().groups(), self.rates, self._held_by_optimizer()]

    def _held_by_optimizer(self) -> list[Tensor]:
        return [v for s in self.states for v in s.values() if v is not None]

    def compute(self, batch: Any, *groups: list[Tensor]) -> list[Tensor]:
        moved, parameters, buffers, counters, _, rates, flat = groups
        loss, values, grads = self.differentiate(batch, moved, parameters, buffers, counters)
        grads, finite = _clipped(loss, grads, self.clip, self.by_value)
        rest = iter(flat)
        states = [{k: None if v is None else next(rest) for k, v in s.items()} for s in self.states]
        place = {id(p): i for i, p in enumerate(self.held.parameters)}
        own = [parameters[place[id(p)]] for p in self.own]
        by_number = dict(zip(self.numbers, grads, strict=True))
        own_grads = [by_number.get(place[id(p)]) for p in self.own]
        new, new_states = step_in_graph(self.optimizer, own, own_grads, states, rates)
        with torch.no_grad():
            for old, value, grad, state, now in zip(own, new, own_grads, states, new_states, strict=True):
                if grad is None:
                    continue
                if state.keys() != now.keys():
                    raise NotYet(f"{type(self.optimizer).__name__} has no state yet")
                old.copy_(torch.where(finite, value, old))
                for k, tensor in state.items():
                    if tensor is not None:
                        tensor.copy_(torch.where(finite, now[k], tensor))
        return [values, loss, finite]

    def changed(self) -> str | None:
        if self.optimizer.state is not self.state_now or self.optimizer.param_groups is not self.groups_now:
            return "the optimizer's state"
        for group, before in zip(self.groups_now, self.settings, strict=True):
            for k in group:
                if k != "lr" and group[k] is not before.get(k) and group[k] != before.get(k):
                    return f"{type(self.optimizer).__name__}.{k}"
        return super().changed()

    def still_fits(self) -> bool:
        if self.optimizer.state is not self.state_now or self.optimizer.param_groups is not self.groups_now:
            return False
        for group, before in zip(self.groups_now, self.settings, strict=True):
            if group != before and {**before, "lr": group["lr"]} != group:
                return False
        return super().still_fits()

    def refresh(self) -> None:
        for group, before, rate in zip(self.groups_now, self.settings, self.rates, strict=True):
            if group["lr"] is not before["lr"]:
                before["lr"] = group["lr"]
                rate.fill_(group["lr"])
        super().refresh()

    def eager(self, batch: Any, parameters: list[Tensor], buffers: list[Tensor]) -> dict[str, Tensor]:
        loss, found = self._eager_loss(batch, parameters, buffers)
        grads = torch.autograd.grad(loss, [parameters[i] for i in self.numbers], allow_unused=True)
        for i, g in zip(self.numbers, grads, strict=True):
            parameters[i].grad = g
        if self.clip is not None and self.by_value:
            torch.nn.utils.clip_grad_value_([parameters[i] for i in self.numbers], self.clip)
        elif self.clip is not None:
            torch.nn.utils.clip_grad_norm_([parameters[i] for i in self.numbers], self.clip)
        place = {id(p): i for i, p in enumerate(self.held.parameters)}
        own = [parameters[place[id(p)]] for p in self.own]
        before = [p.detach().clone() for p in own]
        states = [{k: v.clone() if v is not None else v for k, v in s.items()} for s in self.states]
        other = moved_optimizer(self.optimizer, own, states)
        step_alone(other)
        finite = loss.isfinite() & torch.stack([g.isfinite().all() for g in grads if g is not None]).all()
        if not finite:
            return {"the loss": found["the loss"]}
        after = [other.state.get(p, {}) for p in own]
        return found | _changes(before, own, after)

    def outcome(self, outputs: Sequence[Tensor]) -> dict[str, Tensor]:
        before = [self._before[id(p)] for p in self.own]
        found = EvaluationGraph.outcome(self, outputs) | {"the loss": outputs[1]}
        return found | _changes(before, self.own, self.states)

    def difference(self, batch: Any, tensors: list[Tensor]) -> str | None:
        self._before = {id(p): p.detach().clone() for p in self.own}
        try:
            return super().difference(batch, tensors)
        finally:
            del self._before


class _Log:
    """Stands in for what `trainer.log` writes to while a step is traced."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def add(self, values: Mapping[str, Any], examples: int) -> None:
        self.values |= values


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
    """The gradients clipped as torch.nn.utils does, and whether loss and gradients are finite."""
    there = [g for g in grads if g is not None]
    if clip is None or by_value:
        finite = torch.stack([g.isfinite().all() for g in there]).all()
        if clip is not None:
            grads = [None if g is None else g.clamp(-clip, clip) for g in grads]
    else:
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in there]))
        factor = (clip / (norm + 1e-6)).clamp(max=1.0)
        finite, grads = norm.isfinite(), [None if g is None else g * factor for g in grads]
    return grads, finite & loss.isfinite()


def _rate(lr: Any, device: torch.device) -> Tensor:
    return lr if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64, device=device)


def _changes(
    before: Sequence[Tensor], after: Sequence[Tensor], states: Sequence[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """What an optimizer has done to its parameters and its state, by names for messages."""
    steps = {f"the step of parameter {i}": b.detach() - a for i, (a, b) in enumerate(zip(before, after, strict=True))}
    kept = {f"{k} of parameter {i}": v for i, s in enumerate(states) for k, v in s.items() if isinstance(v, Tensor)}
    return steps | kept


def _gap(found: Tensor, expected: Tensor) -> float:
    """The distance of two tensors in units of the larger; 0 where both are equal, also in what is not finite."""
    found, expected = found.detach().double(), expected.detach().double()
    if (
        torch.equal(found, expected)
        or (found.isnan() == expected.isnan()).all()
        and torch.equal(found.nan_to_num(), expected.nan_to_num())
    ):
        return 0.0
    return float((found - expected).norm() / expected.norm().clamp(min=1e-300))
