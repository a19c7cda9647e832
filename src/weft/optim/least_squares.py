"""What Gauss-Newton methods ask of a problem: its residuals on a batch, and how they change with the parameters.

    closure = weft.optim.LeastSquares(problem, batch)       # for an optimizer used by hand; a trainer makes its own
    loss = optimizer.step(closure)

The loss is the sum of mean squares of what `weft.problem.residuals` finds. Divided by the root of its number,
each entry is one of a vector r with loss = r'r; its Jacobian J has a row for each entry, a column for each parameter.

Where each row of a residual depends on its own row of the batch alone, J is made of as many small gradients as there
are rows: the derivative for one row is traced to a graph, which is applied to all rows at once. Whether that is so is
found out by computing it both ways; else J comes from products with whole vectors, which takes longer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from weft.optim.searching import a_little_away
from weft.problem.residuals import residuals_of

CHUNK = 2**25
"""Numbers of the Jacobian that are made at once."""


class LeastSquares:
    """A closure that evaluates the loss and its residuals; called, it leaves gradients in the parameters.

    problem: a module with a method `residuals(batch)`, or a NeuroMANCER Problem. params: those that train; None: all
        that require grad. evaluate: what returns the loss and makes its gradients; None: from the residuals. rows: how
        residuals are split.
    Raises TypeError, with what to write, where the loss is no sum of squares.
    """

    def __init__(
        self,
        problem: nn.Module,
        batch: Any,
        params: Iterable[Tensor] | None = None,
        evaluate: Callable[[], Tensor] | None = None,
        rows: Rows | None = None,
    ) -> None:
        self.problem, self.batch = problem, batch
        self.params = [p for p in (problem.parameters() if params is None else params) if p.requires_grad]
        self.read, self._evaluate = residuals_of(problem), evaluate
        self.rows = Rows() if rows is None else rows

    def __call__(self) -> Tensor:
        """The loss, with its gradients."""
        if self._evaluate is not None:
            return self._evaluate()
        loss = torch.stack([r.square().mean() for r in self.parts().values()]).sum()
        for p, grad in zip(self.params, torch.autograd.grad(loss, self.params, allow_unused=True), strict=True):
            p.grad = grad
        return loss.detach()

    def parts(self) -> dict[str, Tensor]:
        """The residuals by name, as the problem returns them."""
        return self._parts(self.batch)

    @torch.enable_grad()
    def _parts(self, batch: Any) -> dict[str, Tensor]:
        found = self.read(batch)
        if isinstance(found, Tensor):
            return {"residuals": found}
        return dict(found if isinstance(found, Mapping) else {f"residuals_{i}": r for i, r in enumerate(found)})

    def values(self) -> Tensor:
        """r, whose sum of squares is the loss, without gradients."""
        return self.rows.computed("the residuals", self._values, self.batch)[0]

    def _values(self, batch: Any) -> tuple[Tensor]:
        return (self._vector(batch).detach(),)

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """r and J, some rows at a time."""
        for name, whole in self.parts().items():
            by_row = self.rows.of(self, name, whole)
            yield from by_row(self) if by_row is not None else _by_products(self, whole)

    def product(self, vector: Tensor) -> Tensor:
        """J times a vector of parameters, without J: the derivative of J' w with respect to w."""
        return self.rows.computed("products with the Jacobian", self._product, self.batch, vector)[0]

    def transposed(self, vector: Tensor) -> Tensor:
        """J' times a vector of residuals, without J."""
        return self.rows.computed("products with the transposed Jacobian", self._transposed, self.batch, vector)[0]

    def _product(self, batch: Any, vector: Tensor) -> tuple[Tensor]:
        r = self._vector(batch)
        w = torch.zeros_like(r, requires_grad=True)
        back = _flat(torch.autograd.grad(r, self.params, w, create_graph=True, allow_unused=True), self.params)
        return (torch.autograd.grad(back, w, vector)[0].detach(),)

    def _transposed(self, batch: Any, vector: Tensor) -> tuple[Tensor]:
        gradients = torch.autograd.grad(self._vector(batch), self.params, vector, allow_unused=True)
        return (_flat(gradients, self.params).detach(),)

    @torch.enable_grad()
    def _vector(self, batch: Any) -> Tensor:
        return torch.cat([_scaled(r) for r in self._parts(batch).values()])


def _scaled(residual: Tensor) -> Tensor:
    return residual.reshape(-1) / math.sqrt(max(1, residual.numel()))


def _flat(gradients: Sequence[Tensor | None], params: Sequence[Tensor]) -> Tensor:
    """One vector of all gradients; zeros where a parameter is not read."""
    pairs = zip(gradients, params, strict=True)
    return torch.cat([(p.new_zeros(p.numel()) if g is None else g.reshape(-1)) for g, p in pairs])


# ---- by products with the whole batch --------------------------------------------------------------------------------


def _by_products(problem: LeastSquares, whole: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """A column for each parameter, or a row for each entry, whichever are fewer."""
    r, params = _scaled(whole), problem.params
    n, m = sum(p.numel() for p in params), r.numel()
    if n < m:
        w = torch.zeros_like(r, requires_grad=True)
        back = _flat(torch.autograd.grad(r, params, w, create_graph=True, allow_unused=True), params)
        if back.requires_grad:
            yield r.detach(), _vjps(back, [w], n).T
        else:  # nothing that trains is read
            yield r.detach(), r.new_zeros(m, n)
        return
    at_once = max(1, CHUNK // max(1, n))
    for start in range(0, m, at_once):
        part = r[start : start + at_once]
        yield part.detach(), _vjps(part, params, len(part))


def _vjps(outputs: Tensor, inputs: Sequence[Tensor], count: int) -> Tensor:
    """The gradient of each of `count` outputs: (count, numbers of the inputs)."""
    eye = torch.eye(count, dtype=outputs.dtype, device=outputs.device)
    if not outputs.requires_grad:
        return eye.new_zeros(count, sum(p.numel() for p in inputs))

    def gradients(vectors: Tensor, batched: bool) -> list[Tensor]:
        found = torch.autograd.grad(
            outputs, inputs, vectors, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )
        lead = (len(vectors),) if batched else (1,)
        pairs = zip(found, inputs, strict=True)
        return [(p.new_zeros(*lead, p.numel()) if g is None else g.reshape(*lead, -1)).detach() for g, p in pairs]

    try:
        return torch.cat(gradients(eye, batched=True), dim=1)
    except RuntimeError:  # an operation that vmap has no rule for
        return torch.cat([torch.cat(gradients(row, batched=False), dim=1) for row in eye])


# ---- row by row ------------------------------------------------------------------------------------------------------

ByRow = Callable[[LeastSquares], Iterator[tuple[Tensor, Tensor]]]
Computes = Callable[..., Sequence[Tensor]]
"""(name, function, batch, *vectors) -> function(batch, *vectors)."""


class Rows:
    """Which residuals can be differentiated row by row, and the graphs that do it. Kept from step to step."""

    def __init__(self) -> None:
        self.graphs: dict[str, tuple[Any, ByRow | None]] = {}
        self.given_up = False
        """Whether the graphs gave something else than the problem: they hold values that change."""
        self.by_graph: Computes | None = None
        """What computes a function by a compiled graph, for a run that is compiled."""

    def computed(self, name: str, function: Callable[..., tuple[Tensor, ...]], batch: Any, *vectors: Tensor) -> Any:
        """`function(batch, *vectors)`, by a compiled graph where there is one."""
        return function(batch, *vectors) if self.by_graph is None else self.by_graph(name, function, batch, *vectors)

    def of(self, problem: LeastSquares, name: str, whole: Tensor) -> ByRow | None:
        """What yields r and J of the residual `name`, now `whole`; None where it must be differentiated as a whole."""
        shape = _shape_of(problem, whole)
        if self.given_up or shape is None:
            return None
        kept = self.graphs.get(name)
        if kept is None or kept[0] != shape:
            kept = self.graphs[name] = (shape, _by_row(problem, name, whole))
        return kept[1]

    def forget(self) -> bool:
        """Give up the graphs, which no longer agree with the problem. False if there are none."""
        held = any(graph is not None for _, graph in self.graphs.values())
        self.given_up = self.given_up or held
        self.graphs.clear()
        return held


def _shape_of(problem: LeastSquares, whole: Tensor) -> Any:
    """What a graph is made for; None where there are no rows, or too many entries in one."""
    known = {id(p) for p in problem.problem.parameters()}
    if whole.ndim == 0 or whole.shape[0] < 2 or whole[0].numel() > sum(p.numel() for p in problem.params):
        return None
    if any(id(p) not in known for p in problem.params):
        return None
    leaves = list(_leaves(problem.batch))
    if not any(_has_rows(leaf, len(whole)) for leaf in leaves):
        return None
    return whole.shape, [(leaf.shape, leaf.dtype) for leaf in leaves], [p.shape for p in problem.params]


@dataclass
class _Traced:
    """The graph of one row's residual and its gradients: of parameters, buffers and the batch's tensors."""

    graph: Callable[..., Any]
    in_dims: tuple[Any, ...]

    def held(self, problem: LeastSquares) -> tuple[list[Tensor], list[Tensor]]:
        """What trains, and the other parameters and buffers."""
        return [p.detach() for p in problem.params], [o.detach() for o in _others(problem).values()]

    def leaves(self, problem: LeastSquares, rows: slice, count: int) -> list[Tensor]:
        """The batch's tensors at some of its rows."""
        found = [leaf[rows] if _has_rows(leaf, count) else leaf for leaf in _leaves(problem.batch)]
        return [leaf.detach() for leaf in found]


def _by_row(problem: LeastSquares, name: str, whole: Tensor) -> ByRow | None:
    """A graph for all rows, if there is one and it gives what the whole batch gives; else None."""
    count, per_row = whole.shape[0], whole[0].numel()
    try:
        traced = _trace(problem, name, count)
        apply = vmap(traced.graph, in_dims=traced.in_dims)
        n, scale = sum(p.numel() for p in problem.params), 1 / math.sqrt(whole.numel())
        at_once = max(1, min(count, CHUNK // (per_row * n)))

        def by_row(now: LeastSquares) -> Iterator[tuple[Tensor, Tensor]]:
            def of(leaves: list[Tensor]) -> tuple[Tensor, Tensor]:
                with torch.no_grad():
                    r, jacobian = apply(*traced.held(now), leaves)
                    return r.reshape(-1) * scale, jacobian.reshape(-1, n) * scale

            for start in range(0, count, at_once):
                leaves = traced.leaves(now, slice(start, start + at_once), count)
                yield now.rows.computed(f"the Jacobian of {name}", of, leaves)

        with a_little_away(problem.params):
            r, gradient = r_and_gradient(by_row(problem))
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, NotImplementedError):
        return None  # the problem is no function of one row, or torch cannot trace or batch it: never an error of its
    with a_little_away(problem.params):
        want = _scaled(problem.parts()[name])
        gradients = torch.autograd.grad(want, problem.params, want.detach(), allow_unused=True)
    agree = _is_close(r, want.detach()) and _is_close(gradient, _flat(gradients, problem.params).detach())
    return by_row if agree else None


def r_and_gradient(blocks: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """r, and J' r."""
    found = [(r, jacobian.T @ r) for r, jacobian in blocks]
    return torch.cat([r for r, _ in found]), torch.stack([g for _, g in found]).sum(0)


def _is_close(a: Tensor, b: Tensor) -> bool:
    bound = 1e3 * torch.finfo(b.dtype).eps * float(b.abs().max()) * math.sqrt(b.numel())
    return a.shape == b.shape and bool(((a - b).abs() <= bound).all())


def _trace(problem: LeastSquares, name: str, count: int) -> _Traced:
    from torch.fx.experimental.proxy_tensor import make_fx

    batch, known = problem.batch, [*problem.params, *_others(problem).values()]
    leaves, places = list(_leaves(batch)), _places(problem.problem)
    read = _Reading(problem)

    def one_row(values: list[Tensor], held: list[Tensor], tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
        params = [v.detach().requires_grad_() for v in values]
        rows = [
            (x[None] if _has_rows(leaf, count) else x).detach().requires_grad_(leaf.requires_grad)
            for x, leaf in zip(tensors, leaves, strict=True)
        ]
        by_id = {id(old): new for old, new in zip(known, [*params, *held], strict=True)}
        state = {f"problem.{place}": by_id[id(old)] for place, old in places.items()}
        with torch.enable_grad():
            r = functional_call(read, state, (_rebuilt(batch, iter(rows)), name), tie_weights=False)
            entries = r.reshape(-1)
            if len(entries) > 1:
                return entries.detach(), _vjps(entries, params, len(entries))
            gradient = torch.autograd.grad(entries, params, torch.ones_like(entries), allow_unused=True)
        return entries.detach(), _flat(gradient, params)[None]

    dims = [0 if _has_rows(leaf, count) else None for leaf in leaves]
    traced = _Traced(one_row, (None, None, dims))
    (values, held), tensors = traced.held(problem), traced.leaves(problem, slice(0, 1), count)
    rows = [x[0] if d == 0 else x for x, d in zip(tensors, dims, strict=True)]
    graph = make_fx(one_row)(values, held, rows)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    traced.graph = graph
    return traced


class _Reading(nn.Module):
    """The residual of a problem as the forward of a module, so that parameters can be handed in."""

    def __init__(self, problem: LeastSquares) -> None:
        super().__init__()
        self.problem, self._read = problem.problem, problem.read

    def forward(self, batch: Any, name: str) -> Tensor:
        found = self._read(batch)
        if isinstance(found, Tensor):
            return found
        return found[name] if isinstance(found, Mapping) else found[int(name.rpartition("_")[2])]


def _others(problem: LeastSquares) -> dict[str, Tensor]:
    """What the problem holds besides what trains: inputs of a graph, so that they may change."""
    trained = {id(p) for p in problem.params}
    named = [*problem.problem.named_parameters(), *problem.problem.named_buffers()]
    return {key: value for key, value in named if id(value) not in trained}


def _places(problem: nn.Module) -> dict[str, Tensor]:
    """Every place of a parameter or buffer, once: with `tie_weights` torch (2.13) leaves a module that stands in two
    places with the tensors that it was called with."""
    modules = list(problem.named_modules())
    held = [(f"{path}." if path else "", {**m._parameters, **m._buffers}) for path, m in modules]
    return {prefix + name: t for prefix, tensors in held for name, t in tensors.items() if t is not None}


def _leaves(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            if key != "epoch":  # a number, and a tensor in a graph
                yield from _leaves(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _leaves(value)


def _rebuilt(batch: Any, tensors: Iterator[Tensor]) -> Any:
    """The batch with other tensors, in the order of `_leaves`."""
    if isinstance(batch, Tensor):
        return next(tensors)
    if isinstance(batch, Mapping):
        return {key: value if key == "epoch" else _rebuilt(value, tensors) for key, value in batch.items()}
    return [_rebuilt(value, tensors) for value in batch] if isinstance(batch, list | tuple) else batch


def _has_rows(leaf: Tensor, count: int) -> bool:
    return leaf.ndim > 0 and leaf.shape[0] == count
