"""A graph compared with the eager step, on the real parameters of the run, which are then put back bit for bit.

`graph`: one of `weft.compile.stepgraphs`, which import this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from weft.compile.lifting import CannotCompile
from weft.compile.watching import Watch, restored
from weft.devices import seeding
from weft.devices.generators import generator_states
from weft.step.history import Progress
from weft.step.state import Trial, trial

Effects = dict[tuple[str, str], Tensor]
"""What a step computes and changes, by what it is ("the gradient of parameter") and its name."""

NUM_SHIFTS = 4
NUM_TRIALS = 4  # of a step, before a graph takes over: one is traced, three are done for their side effects


@contextmanager
def tried(progress: Progress) -> Iterator[Trial]:
    """Within, in this thread: a step is told `progress`, and what it logs and asks for is only noted."""
    token = trial.set(found := Trial(progress))
    try:
        yield found
    finally:
        trial.reset(token)
    if found.wants_to_stop:
        raise CannotCompile("the step stops the training")


@contextmanager
def buffers_in_place(problem: nn.Module) -> Iterator[None]:
    """A buffer that the block sets anew is copied into the one that was there."""
    own = [(m._buffers, name, b) for m in problem.modules() for name, b in m._buffers.items() if b is not None]
    try:
        yield
        for held, name, buffer in own:
            if (new := held[name]) is not buffer:
                if not isinstance(new, Tensor) or (new.shape, new.dtype) != (buffer.shape, buffer.dtype):
                    raise CannotCompile(f"the step makes another shape or dtype of buffer {name}")
                with torch.no_grad():
                    buffer.data.copy_(new)
    finally:
        for held, name, buffer in own:
            if held.get(name) is not buffer:
                held[name] = buffer


@contextmanager
def undone(graph: Any) -> Iterator[dict[str, Any]]:
    """What the block does to random state, attributes and gradients is undone. Gives the random states before it."""
    random, problem = seeding.random_state(), graph.state.problem
    gradients = {id(p): (p, p.grad) for p in (*problem.parameters(), *getattr(graph, "trained", ()))}
    try:
        with graph.watch.untouched():
            yield _states(graph)
    finally:
        for p, grad in gradients.values():
            if p.grad is not grad:
                p.grad = grad
        seeding.set_random_state(random)


def _states(graph: Any) -> dict[str, Any]:
    """The states of all random numbers but torch's own at large, which graphs draw as eager steps do."""
    everywhere, reached = seeding.random_state(), generator_states(graph.watch.generators)
    found = {"python's random": everywhere["python"], "numpy's np.random": everywhere["numpy"]}
    return found | {f"the random generator {place}": state for place, state in reached.items()}


def _drawn(graph: Any, before: dict[str, Any]) -> str | None:
    """What was drawn from since the states were `before`, as a reason against a graph; None if nothing was."""
    drawn = [name for name, state in _states(graph).items() if not _same(state, before[name])]
    return f"the step draws from {' and '.join(drawn)}: a graph would use the same number every time" if drawn else None


def _same(one: Any, other: Any) -> bool:
    """Whether two states of a generator are equal."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return all(_same(value, other[key]) for key, value in one.items())
    return all(map(_same, one, other)) if isinstance(one, list) else bool(one == other)


def out_of_reach(graph: Any) -> str | None:
    """What a step reaches that no trial of it could put back, as a reason against trying; None if there is nothing."""
    for place, thing in graph.watch.one_way.items():
        if isinstance(thing, str):
            return thing
        kind = f"{type(thing).__module__}.{type(thing).__qualname__}".removeprefix("builtins.")
        return f"the step reaches {place}, a {kind}, which cannot be put back after a trial (nothing was drawn from it)"
    return None


def effects(graph: Any, tensors: list[Tensor], act: Callable[[], Effects], shift: int = 0) -> Effects:
    """What `act` computes, and how it changes parameters, optimizer state, buffers and constants; these are put back.

    `shift`: with another one, parameters differ by other rounding errors.
    """
    changing = graph.changing()
    for p in (*graph.state.problem.parameters(), *getattr(graph, "trained", ())):
        p.grad = None
    with restored([*changing.values(), *tensors]):
        if shift:
            _perturb(changing, 8 * rounding(graph), shift)
        before = {key: t.detach().clone() for key, t in changing.items() if key[0].startswith("the step")}
        found = {key: t.detach().clone() for key, t in act().items()}
        after = {key: before[key] - t.detach() if key in before else t.detach().clone() for key, t in changing.items()}
        return found | after


def _perturb(changing: Effects, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for (kind, _), t in changing.items():
            if kind.startswith("the step") and t.is_floating_point():
                signs = torch.randint(0, 2, t.shape, generator=generator, device="cpu").to(t.device) * 2 - 1
                t.mul_(1 + size * signs)


def difference(graph: Any, batch: Any, tensors: list[Tensor]) -> str | None:
    """What the graph makes of a batch in another way than the eager step, None if there is no such thing.

    Changes nothing. They may differ by rounding: by a small part of the size of each tensor, by a smaller part of the
    largest of its kind (a gradient that is zero but for rounding), and by as much as the eager step does when its
    weights change in their last bits.
    """

    def eager(shift: int) -> Effects:
        with undone(graph):
            return effects(graph, tensors, lambda: graph.reference(batch), shift)

    graph.num_checks -= 1
    with undone(graph) as before:
        expected = effects(graph, tensors, lambda: graph.reference(batch))
        if (drawn := _drawn(graph, before)) is not None:
            return drawn
    graph.refresh()
    with undone(graph):
        found = effects(graph, tensors, lambda: graph.outcome(graph.call(tensors)))
    if missing := expected.keys() ^ found.keys():
        return f"only one of them has {' '.join(min(missing))}"
    eps, sizes = rounding(graph), {key: _norm(value) for key, value in expected.items()}
    largest: dict[str, float] = {}
    for (kind, _), size in sizes.items():
        largest[kind] = max(largest.get(kind, 0.0), size)
    weights = {key: eps * _norm(t) for key, t in graph.changing().items() if key[0].startswith("the step")}
    gaps = {key: _gap(found[key], value) for key, value in expected.items()}
    allowed = {
        key: math.sqrt(eps) * (size + (0.0 if key[0] in ("buffer", "constant") else 0.03 * largest[key[0]]))
        + weights.get(key, 0.0)
        for key, size in sizes.items()
    }
    wrong: list[Any] = []
    for shift in range(NUM_SHIFTS + 1):
        wrong = [key for key, gap in gaps.items() if not gap <= allowed[key]]
        if not wrong:
            return None
        if shift < NUM_SHIFTS:
            shifted = eager(shift + 1)
            for key in wrong:
                allowed[key] = max(allowed[key], 10 * _gap(shifted[key], expected[key]))
    return f"{' '.join(wrong[0]).strip()} differs by {gaps[wrong[0]] / max(sizes[wrong[0]], 1e-300):.1e} of its size"


def side_effect(graph: Any, batch: Any, tensors: list[Tensor]) -> str | None:
    """What the eager step changes every time and a graph would not, None if there is no such thing."""
    with undone(graph) as before:
        effects(graph, tensors, lambda: graph.eagerly(batch))  # what is set once and for all may be
        if (drawn := _drawn(graph, before)) is not None:
            return drawn
        random, once = seeding.random_state(), Watch(graph.state.problem, graph.state.trainer, [graph.forward])
        first = effects(graph, tensors, lambda: graph.eagerly(batch))
        seeding.set_random_state(random)
        second = effects(graph, tensors, lambda: graph.eagerly(batch))
        if (drawn := _drawn(graph, before)) is not None:
            return drawn
        if (attribute := once.changed()) is not None:
            return f"the step sets {attribute} anew every time"
    if first.keys() != second.keys() or any(_gap(second[key], value) > 0 for key, value in first.items()):
        return (
            "the step gives something else when it is repeated: it depends on what it did before. To find this, it was "
            f"done at least {NUM_TRIALS} times: an iterator or generator out of sight is now so many draws further"
        )
    return None


def rounding(graph: Any) -> float:
    """The relative rounding error of the step: that of its coarsest dtype."""
    mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(str(graph.state.config.precision))
    parameters = (*graph.state.problem.parameters(), *getattr(graph, "trained", ()))
    dtypes = {p.dtype for p in parameters if p.is_floating_point()} | ({mixed} if mixed else set())
    return max((torch.finfo(dtype).eps for dtype in dtypes), default=torch.finfo(torch.float32).eps)


def _norm(tensor: Tensor) -> float:
    if tensor.layout is not torch.strided or tensor.is_meta:
        return 0.0
    values = tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64)
    return float(values[values.isfinite()].norm())


def _gap(found: Tensor, expected: Tensor) -> float:
    """The distance of two tensors; infinite where other entries of them are not finite."""
    if found.shape != expected.shape:
        return math.inf
    if found.layout is not torch.strided or found.is_meta or torch.equal(found, expected):
        return 0.0  # what is sparse cannot be compared, and hardly changes
    if not torch.equal(found.isfinite(), expected.isfinite()):
        return math.inf
    wide = torch.complex128 if found.is_complex() else torch.float64
    return _norm(found.detach().to(wide) - expected.detach().to(wide))
