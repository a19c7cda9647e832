"""The same update as one graph, checked against the eager one.

    graphs = Graphs(state)                                          # Trainer(compile=True)
    update = compile_update(graphs, eager, begin_step, end_step)

A graph is traced from the step itself, not from its source, so that it need not be written for a compiler. It stands in
for one kind of batch (shapes, dtypes, split) and for the problem's attributes as they are. The first batch of a kind
is done eagerly, so that lazy layers and the optimizer's state exist. Before a graph takes over, and again on the next
batch, in epochs 1, 2, 4, 8, ... and after every change of an attribute, loss and gradients (or what the optimizer
made of them) are compared with the eager ones. Where anything stands against a graph, or it does not agree, the
update stays eager, and one warning says why.

Which kinds of batch run as graphs is checkpointed: a resumed run takes the same path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from weft.compile.checking import difference, side_effect
from weft.compile.functional import flatten
from weft.compile.graph import MAX_NODES, get_ready
from weft.compile.lifting import CannotCompile, NotYet
from weft.compile.residuals import ResidualGraphs
from weft.compile.stepgraphs import EvaluationGraph, GradientGraph, UpdateGraph
from weft.data.batches import num_examples
from weft.devices.precision import scaler_of
from weft.step.closures import Evaluation, Read, evaluation_of, with_closure
from weft.step.doubts import doubts_in
from weft.step.forward import Forward, forward_of
from weft.step.metrics import DENOMINATOR, counted
from weft.step.microbatches import combiner, num_read, record
from weft.step.nonfinite import not_finite
from weft.step.optimizer_step import READS_ARE_FREE, Step, ignores, make_step
from weft.step.optimizers import needs_closure, parameters_of

if TYPE_CHECKING:
    from weft.step.state import RunState, Update

MAX_GRAPHS = 8  # for one kind of batch, or for one split; further ones are done eagerly
MAX_OPERATIONS = 1.2 * MAX_NODES  # of an eager step, about which no graph is tried
MAX_UNASKED = 6000  # operations up to which compile=True makes a graph of the update, whatever it costs
EAGER = -1
_UNKNOWN = object()

# What a graph costs to make with an empty cache, and what it saves, from counts alone: a run decides alike wherever and
# whenever it runs. Over the benchmarks an eager operation takes 1.2 to 1.8 us longer than one in a graph (2 x AMD EPYC,
# torch 2.13); the first graph of a process also loads the compiler.
SECONDS_SAVED_PER_NODE = 1.2e-6
SECONDS_PER_GRAPH, SECONDS_PER_NODE, SECONDS_ONCE = 0.5, 0.005, 2.0
AUTO_MARGIN = 1.25  # times its cost is what a graph must save for "auto": these are guesses
NODES_PER_PARAMETER = 40  # of an optimizer's step and of clipping, in a graph


class Graphs:
    """The graphs of a run. `made` says for each kind of batch how many were made so far, or EAGER if it stays eager."""

    def __init__(self, state: RunState) -> None:
        self.state = state
        self.chosen: dict[str, Chosen] = {}

    @property
    def made(self) -> dict[str, int]:
        """By kind of batch; part of every checkpoint."""
        return self.state.kept.notes.setdefault("graphs", {})

    @property
    def met(self) -> dict[str, list[int]]:
        """Where each kind was met first: the step, batches in it, and nodes of a graph of it. In every checkpoint."""
        return self.state.kept.notes.setdefault("kinds_met", {})

    def all(self) -> list[EvaluationGraph]:
        """Every graph that was made and is still known."""
        return [g for chosen in self.chosen.values() for known in chosen.known.values() for g in known]

    def forward(self, split: str, forward: Forward) -> Forward:
        """`forward`, the evaluation of a batch of `split`, by graphs where there are some."""
        if getattr(self.state.trainer, "evaluates_eagerly", False):
            return forward
        if split not in self.chosen:

            def make(batch: Any, tensors: list[Tensor]) -> EvaluationGraph:
                return EvaluationGraph(self.state, forward, batch, tensors)

            self.chosen[split] = Chosen(self, split, make)
        chosen = self.chosen[split]
        chosen.look_over()

        def compiled(batch: Any) -> tuple[Any, Any]:
            graph, tensors = chosen.find(batch)
            if graph is None:
                with chosen.counting():
                    return forward(batch)
            return None, graph(tensors)[0]

        return compiled


def compile_update(
    graphs: Graphs, eager: Update, begin: Callable[[Any], None], end: Callable[[Any, Tensor], None]
) -> Update:
    """`eager`, or a function that does the same by graphs, and calls `eager` where there is none.

    `begin` and `end` frame the step, as they frame the eager one.
    """
    state = graphs.state
    if reason := _obstacle(state):
        if state.config.compile is True:
            state.warn_once(f"compile=True: the update stays eager: {reason}.")
        return eager
    state.training.compile_choice = str(state.config.compile)
    if state.config.compile is True:
        get_ready(state.fabric.device)
    (optimizer,) = state.training.optimizers.values()
    forward = forward_of(state, "train")
    several, combine, finish = state.config.accumulate > 1, combiner(state), _finisher(state)
    step: Step | None = None
    if needs_closure(optimizer):
        rows = getattr(optimizer, "rows", None)
        if rows is not None and state.config.compile is True:
            rows.by_graph = ResidualGraphs(state)
        return with_closure(state, begin, end, closure_evaluation(graphs))

    def make(batch: Any, tensors: list[Tensor]) -> EvaluationGraph:
        if _may_be_in_graph(state, optimizer):
            try:
                return UpdateGraph(state, forward, batch, tensors)
            except NotYet:
                raise
            except CannotCompile:  # the optimizer reads values, say
                pass
        return GradientGraph(state, forward, batch, tensors)

    chosen = graphs.chosen["train"] = Chosen(graphs, "train", make)

    def update(batch: Any) -> Tensor:
        nonlocal step
        found = [(part, *chosen.find(part)) for part in (batch if several else (batch,))]
        if any(graph is None for _, graph, _ in found):
            with chosen.counting(optimizer):
                return eager(batch)
        begin(batch)
        _, graph, tensors = found[0]
        if isinstance(graph, UpdateGraph):
            scalars, loss, finite = graph(tensors)
            read = [(scalars, num_examples(batch))]
            done = finish(finite, loss, read)
        else:
            loss, read = _gradients(found)
            if combine is not None:
                loss = combine(loss, num_read(read))
            step = step or make_step(state, [optimizer])
            done = step(loss, read)
        if done:
            record(state, read)
        end(batch, loss)
        return loss

    return update


def closure_evaluation(graphs: Graphs) -> Evaluation:
    """A function of a batch that gives its loss and what was read, and puts the gradients into `.grad`.

    It is what a closure optimizer's search evaluates again and again: by graphs where there are some, else eagerly.
    """
    state, eagerly = graphs.state, evaluation_of(graphs.state)
    forward, several, combine = forward_of(state, "train"), state.config.accumulate > 1, combiner(state)

    def make(batch: Any, tensors: list[Tensor]) -> EvaluationGraph:
        return GradientGraph(state, forward, batch, tensors)

    chosen = graphs.chosen["train"] = Chosen(graphs, "train", make)

    def evaluate(batch: Any) -> tuple[Tensor, Read]:
        found = [(part, *chosen.find(part)) for part in (batch if several else (batch,))]
        if any(graph is None for _, graph, _ in found):
            with chosen.counting():
                return eagerly(batch)
        loss, read = _gradients(found)
        return (loss if combine is None else combine(loss, num_read(read))), read

    return evaluate


def _finisher(state: RunState) -> Callable[[Tensor, Tensor, list[Any]], bool]:
    """A function (flag, loss, what was read) -> whether a graph's update is to be counted. It was, if it was finite."""
    progress = state.progress
    waits = state.fabric.device.type in READS_ARE_FREE or state.config.on_nonfinite == "skip"

    def finish(finite: Tensor, loss: Tensor, read: list[Any]) -> bool:
        if not waits:  # `look_back` raises later; until then the graph leaves such steps out
            doubts_in(state).note(progress.step, finite)
        elif not finite.item():
            not_finite(state, loss, read)
            return False
        progress.skipped = 0
        return True

    return finish


def _gradients(found: list[tuple[Any, Any, list[Tensor]]]) -> tuple[Tensor, list[tuple[Any, int]]]:
    """Gradients of the parts of a batch, weighted by what they count for, in `.grad`; the loss, and what was read."""
    examples = [num_examples(part) for part, _, _ in found]
    losses, read, returns = [], [], len(found) > 1 and any(DENOMINATOR in graph.names for _, graph, _ in found)
    for (_, graph, tensors), n in zip(found, examples, strict=True):
        graph.share.fill_(1.0 if returns else n / max(1, sum(examples)))
        scalars, loss, *grads = graph(tensors)
        read.append((scalars, n))
        if returns:  # how much all parts come to is known after the last
            count = counted(scalars, n)
            loss, grads = loss * count, [grad * count for grad in grads]
        for p, grad in graph.gradients((scalars, loss, *grads)):
            p.grad = grad if p.grad is None else p.grad.add_(grad)
        losses.append(loss)
    loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
    if returns:
        whole = num_read(read)
        for p in found[0][1].trained:  # all graphs train the same
            if p.grad is not None:
                p.grad.div_(whole)
        loss = loss / whole
    return loss, read


def _may_be_in_graph(state: RunState, optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's step may be part of the graph; else it steps as always, after gradients from a graph."""
    hooked = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    listened = state.listeners("on_before_optimizer_step")
    alone = state.config.accumulate == 1 and state.fabric.world_size == 1
    return type(optimizer).__module__.startswith("torch.optim") and alone and not (hooked or listened)


def _obstacle(state: RunState) -> str | None:
    """Why no update of this run can be a graph, None if nothing is known to stand against it."""
    if state.trainer.overrides("update"):
        return f"{type(state.trainer).__name__} has its own update"
    if len(state.training.optimizers) > 1:
        return f"there are several optimizers ({', '.join(state.training.optimizers)})"
    if ignores(state):
        return "on_nonfinite='ignore' steps with numbers that are not finite, which a graph leaves out"
    if scaler_of(state.fabric) is not None:
        return f"precision={state.config.precision!r} scales the loss"
    return None


class Chosen:
    """Which graph, if any, fits a batch: looked up by its shapes, made when needed, looked over once an epoch."""

    def __init__(self, graphs: Graphs, split: str, make: Callable[..., EvaluationGraph]) -> None:
        self.graphs, self.state, self.split, self.make = graphs, graphs.state, split, make
        self.known: dict[str, list[EvaluationGraph]] = {}
        self._current: dict[tuple[Any, ...], Any] = {}
        self._to_count: str | None = None
        self._epoch = -1

    @property
    def what(self) -> str:
        """What its graphs do, in words."""
        return "the update" if self.split == "train" else f"the evaluation of {self.split!r}"

    def look_over(self) -> None:
        """The problem's attributes may have changed: choose again."""
        self._current.clear()
        self._epoch = self.state.progress.epoch

    def find(self, batch: Any) -> tuple[EvaluationGraph | None, list[Tensor]]:
        """The graph for `batch`, None if it is to be done eagerly, and the tensors of the batch."""
        if self.state.progress.epoch != self._epoch:
            self.look_over()
        tensors: list[Tensor] = []
        shapes: list[Any] = [self.split, self.state.progress.phase]
        try:
            flatten(batch, tensors, shapes)
        except CannotCompile as reason:
            self._give_up(self.split, str(reason))
            return None, tensors
        key = tuple(shapes)
        graph = self._current.get(key, _UNKNOWN)
        if graph is _UNKNOWN or (graph is not None and not graph.watch.glance()):
            graph = self._choose(key, batch, tensors)
        if graph is not None and graph.num_checks:
            if (reason := difference(graph, batch, tensors)) is None:
                graph.agreed = self.state.progress.step
            else:
                last = "" if graph.agreed is None else f" (it last did at step {graph.agreed})"
                self._give_up(repr(key), f"the graph does not agree with the eager step{last}: {reason}")
                graph = self._current[key] = None
        return graph, tensors

    def _choose(self, key: tuple[Any, ...], batch: Any, tensors: list[Tensor]) -> EvaluationGraph | None:
        kind, made, met, progress = repr(key), self.graphs.made, self.graphs.met, self.state.progress
        if kind not in made:
            made[kind], met[kind] = 0, [progress.step, 0, 0]
            if len(self._kinds()) > MAX_GRAPHS:
                self._give_up(kind, f"its batches have more than {MAX_GRAPHS} different shapes")
            else:
                self._to_count = kind
        if kind in met:
            if met[kind][0] == progress.step:  # the first are done eagerly
                met[kind][1] += 1
                return None
            if met[kind][2] > MAX_OPERATIONS:
                self._give_up(kind, f"one of them is about {met[kind][2]} operations, and a graph holds {MAX_NODES}")
            elif made[kind] == 0 and not self._pays(kind):
                if self._is_asked_for(kind):
                    much = f"a graph of about {met[kind][2]} operations takes {self._cost(kind):.0f} s to make"
                    self._give_up(kind, f"{much}, more than it would save in the steps to come")
                made[kind] = EAGER
            del met[kind]
        self._current[key] = None
        if made[kind] == EAGER:
            return None
        known = self.known.setdefault(kind, [])
        graph = next((g for g in known if g.changed() is None), None)
        if graph is not None:
            if progress.epoch & (progress.epoch - 1) == 0:
                graph.num_checks = max(graph.num_checks, 1)
        elif made[kind] > MAX_GRAPHS and known:
            self._give_up(kind, f"{known[-1].changed()} has changed {MAX_GRAPHS} times, and each needs a graph")
            return None
        else:
            try:
                graph = self.make(batch, tensors)
                if (effect := side_effect(graph, batch, tensors)) is not None:
                    raise CannotCompile(effect)
                with self.state.telling(f"compiling {self.what}"):
                    graph.compile()
            except NotYet:
                del self._current[key]
                return None
            except CannotCompile as reason:
                self._give_up(kind, str(reason))
                return None
            made[kind] += bool(known) or not made[kind]  # after a resume the first was counted before
            known.append(graph)
        self._current[key] = graph
        return graph

    def _kinds(self) -> list[str]:
        """Those of this split and phase, in the order in which they were met."""
        return [kind for kind in self.graphs.made if kind.startswith(f"({self.split!r}, {self.state.progress.phase},")]

    def _give_up(self, kind: str, reason: str) -> None:
        self.graphs.made[kind] = EAGER
        self.state.warn_once(f"compile={self.state.config.compile!r}: {self.what} stays eager: {reason}.")

    @contextmanager
    def counting(self, optimizer: torch.optim.Optimizer | None = None) -> Iterator[None]:
        """Within, an eager step is done; if its batch is the first of its kind, the operations of it are counted."""
        kind, self._to_count = self._to_count, None
        if kind is None:
            yield
            return
        with _Operations() as operations:
            yield
        parts = self.graphs.met[kind][1] if kind in self.graphs.met else 1
        nodes = operations.number // max(1, parts)
        if optimizer is not None:
            nodes += NODES_PER_PARAMETER * len(parameters_of(optimizer))
        if kind in self.graphs.met:
            self.graphs.met[kind][2] = nodes

    def _pays(self, kind: str) -> bool:
        """Whether a graph of this kind is worth making, from counts alone: the same answer in every run.

        compile=True asks for one of what is trained most, if it is not very large; of further kinds (a short last
        batch) and of evaluations only where it wins what it costs. "auto" asks for a little more than that of each.
        """
        first_step, times, nodes = self.graphs.met[kind]
        if self._is_asked_for(kind) and nodes <= MAX_UNASKED:
            return True
        saved = times_to_come(self.state, self.split, first_step, times) * nodes * SECONDS_SAVED_PER_NODE
        return saved > self._cost(kind) * (AUTO_MARGIN if self.state.config.compile == "auto" else 1)

    def _is_asked_for(self, kind: str) -> bool:
        """Whether compile=True means this kind."""
        return self.state.config.compile is True and self.split == "train" and self._kinds()[0] == kind

    def _cost(self, kind: str) -> float:
        """Seconds to make a graph of this kind, and to load the compiler where none was made before."""
        is_first = not any(number > 0 for number in self.graphs.made.values())
        return SECONDS_PER_GRAPH + self.graphs.met[kind][2] * SECONDS_PER_NODE + (SECONDS_ONCE if is_first else 0.0)


def times_to_come(state: RunState, split: str, first_step: int, times: int) -> float:
    """How often a kind of batch will come in this fit, if it was met `times` in step `first_step`, and again now.

    One that is trained comes as often as these two are apart; one of an evaluation in each to come. 0 if not known.
    """
    progress, config = state.progress, state.config
    epochs = progress.last_epoch - progress.epoch
    if split != "train":
        return epochs // config.validate_every * times
    batches = state.num_batches("train")
    steps = epochs * -(-batches // config.accumulate) if batches is not None else None
    if progress.last_step is not None:
        left = progress.last_step - progress.step
        steps = left if steps is None else min(steps, left)
    return (steps or 0) * times / (progress.step - first_step)


class _Operations(TorchDispatchMode):
    """Counts the operations of this thread: about the nodes of a graph of them."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))
