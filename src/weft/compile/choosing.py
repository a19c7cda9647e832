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

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weft.compile import graph as graphs
from weft.compile.checking import difference, side_effect
from weft.compile.functional import flatten
from weft.compile.lifting import CannotCompile, NotYet
from weft.compile.stepgraphs import EvaluationGraph, GradientGraph, UpdateGraph
from weft.data.batches import num_examples
from weft.devices.precision import scaler_of
from weft.step.forward import Forward, forward_of
from weft.step.metrics import DENOMINATOR, counted
from weft.step.microbatches import combiner, num_read, record
from weft.step.nonfinite import READS_ARE_FREE, Doubts, ignores, not_finite
from weft.step.optimizer_step import Step, make_step
from weft.step.optimizers import needs_closure

if TYPE_CHECKING:
    from weft.step.state import RunState, Update

MAX_GRAPHS = 8  # for one kind of batch, or for one split; further ones are done eagerly
EAGER = -1

# compile="auto", from counts alone: on a small problem an eager operation costs this much more than one in a graph, and
# a graph costs this much to make. It must win twice what it costs.
SECONDS_SAVED_PER_NODE = 1.5e-6
SECONDS_PER_GRAPH, SECONDS_PER_NODE = 8.0, 0.03


class Graphs:
    """The graphs of a run. `made` says for each kind of batch how many were made so far, or EAGER if it stays eager."""

    def __init__(self, state: RunState) -> None:
        self.state = state
        self.chosen: dict[str, Chosen] = {}

    @property
    def made(self) -> dict[str, int]:
        """By kind of batch; part of every checkpoint."""
        return self.state.kept.notes.setdefault("graphs", {})

    def all(self) -> list[EvaluationGraph]:
        """Every graph that was made and is still known."""
        return [g for chosen in self.chosen.values() for known in chosen.known.values() for g in known]

    def forward(self, split: str, forward: Forward) -> Forward:
        """`forward`, the evaluation of a batch of `split`, by graphs where there are some."""
        if of_all_rows(self.state):
            return forward
        if split not in self.chosen:

            def make(batch: Any, tensors: list[Tensor], counting: bool = False) -> EvaluationGraph:
                return EvaluationGraph(self.state, forward, batch, tensors)

            self.chosen[split] = Chosen(self, split, make)
        chosen = self.chosen[split]
        chosen.look_over()

        def compiled(batch: Any) -> tuple[Any, Any]:
            graph, tensors = chosen.find(batch)
            return forward(batch) if graph is None else (None, graph(tensors)[0])

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
    (optimizer,) = state.training.optimizers.values()
    forward = forward_of(state, "train")
    several, combine, finish = state.config.accumulate > 1, combiner(state), _finisher(state)
    step: Step | None = None

    def make(batch: Any, tensors: list[Tensor], counting: bool = False) -> EvaluationGraph:
        if not counting and _may_be_in_graph(state, optimizer):
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


def _finisher(state: RunState) -> Callable[[Tensor, Tensor, list[Any]], bool]:
    """A function (flag, loss, what was read) -> whether a graph's update is to be counted. It was, if it was finite."""
    progress = state.progress
    waits = state.fabric.device.type in READS_ARE_FREE or state.config.on_nonfinite == "skip"

    def finish(finite: Tensor, loss: Tensor, read: list[Any]) -> bool:
        if not waits:  # `look_back` raises later; until then the graph leaves such steps out
            state.step.doubts = state.step.doubts or Doubts(state.fabric.device)
            state.step.doubts.note(progress.step, finite)
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


def of_all_rows(state: RunState) -> list[str]:
    """The metrics that are no means, which graphs cannot hand on."""
    return [name for name, metric in state.metrics.items() if getattr(metric, "of_all_rows", False)]


def _obstacle(state: RunState) -> str | None:
    """Why no update of this run can be a graph, None if nothing is known to stand against it."""
    if state.trainer.overrides("update"):
        return f"{type(state.trainer).__name__} has its own update"
    if of_all_rows(state):
        return f"metrics of all rows ({', '.join(of_all_rows(state))}) read more than numbers from each step"
    if len(state.training.optimizers) > 1:
        return f"there are several optimizers ({', '.join(state.training.optimizers)})"
    if any(needs_closure(o) for o in state.training.optimizers.values()):
        return f"{type(next(iter(state.training.optimizers.values()))).__name__} evaluates the loss in a line search"
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
        self._current: dict[tuple[Any, ...], EvaluationGraph | None] = {}
        self._first_seen: dict[str, int] = {}
        self._epoch = -1

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
        graph, is_chosen = self._current.get(key), key in self._current
        if not is_chosen or (graph is not None and not graph.watch.glance()):
            graph = self._choose(key, batch, tensors)
        if graph is not None and graph.num_checks and (reason := difference(graph, batch, tensors)) is not None:
            self._give_up(repr(key), f"the graph does not agree with the eager step: {reason}")
            graph = self._current[key] = None
        return graph, tensors

    def _choose(self, key: tuple[Any, ...], batch: Any, tensors: list[Tensor]) -> EvaluationGraph | None:
        kind, made, progress = repr(key), self.graphs.made, self.state.progress
        if kind not in made:
            made[kind], self._first_seen[kind] = 0, progress.step
            if sum(k.startswith(f"({self.split!r}, {progress.phase}") for k in made) > MAX_GRAPHS:
                self._give_up(kind, f"its batches have more than {MAX_GRAPHS} different shapes")
            elif self.state.config.compile == "auto" and not self._pays(batch, tensors):
                made[kind] = EAGER
        if self._first_seen.get(kind) == progress.step:
            return None  # the first is done eagerly
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

    def _give_up(self, kind: str, reason: str) -> None:
        self.graphs.made[kind] = EAGER
        what = "the update" if self.split == "train" else f"the evaluation of {self.split!r}"
        self.state.warn_once(f"compile={self.state.config.compile!r}: {what} stays eager: {reason}.")

    def _pays(self, batch: Any, tensors: list[Tensor]) -> bool:
        """Whether a graph wins twice what it costs, from counts alone: the same answer in every run."""
        steps = steps_to_come(self.state, self.split)
        if steps * graphs.MAX_NODES * SECONDS_SAVED_PER_NODE < SECONDS_PER_GRAPH:
            return False  # not even the largest would: do not trace
        try:
            nodes = self.make(batch, tensors, counting=True).num_nodes
        except CannotCompile:
            return False
        return steps * nodes * SECONDS_SAVED_PER_NODE > 2 * (SECONDS_PER_GRAPH + nodes * SECONDS_PER_NODE)


def steps_to_come(state: RunState, split: str) -> int:
    """How often a batch of `split` will be seen in this fit; 0 if that is not known."""
    progress, config = state.progress, state.config
    epochs = progress.last_epoch - progress.epoch
    if split != "train":
        epochs //= config.validate_every
    if (batches := state.num_batches(split)) is None:
        return 0
    steps = epochs * (-(-batches // config.accumulate) if split == "train" else batches)
    return steps if split != "train" or progress.last_step is None else min(steps, progress.last_step - progress.step)
