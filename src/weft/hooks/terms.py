"""What the scientific-ML hooks read of a problem: the losses of its terms, their gradients, and functions of keys.

A loss here is that of a term without its weight: what the problem reports, divided by the weight it was reported with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weft.data.batches import num_examples
from weft.problem.named import submodule
from weft.problem.outputs import forward_nodes
from weft.problem.terms import argument_keys
from weft.problem.weights import term_weights
from weft.step.forward import forward_of
from weft.types import suggest

if TYPE_CHECKING:
    from weft.step.state import RunState

KeyFunction = Callable[..., Tensor] | str
"""A key, or a function whose argument names are the keys it reads; the argument `problem` is the problem itself."""


def term_names(problem: nn.Module, wanted: Sequence[str] | None, who: str) -> list[str]:
    """The names of the terms, all or those `wanted`. Raises ValueError for an unknown one, or a weight of zero."""
    weights = term_weights(problem)
    if not weights:
        raise ValueError(f"{who} balances named terms, and {type(problem).__name__} has none; use a weft.Problem.")
    for name in wanted or ():
        if name not in weights:
            raise ValueError(
                f"{who}: the problem has no term {name!r}{suggest(name, weights)}. It has {list(weights)}."
            )
    names = list(wanted or weights)
    if zero := [name for name in names if float(weights[name]) == 0.0]:
        raise ValueError(f"{who}: the weight of {zero} is 0, so that its loss cannot be read; start from another one.")
    return names


def weights_of(problem: nn.Module, names: Sequence[str]) -> Tensor:
    """The weights of these terms as a vector, on the device of the problem."""
    weights = term_weights(problem)
    device = next((p.device for p in problem.parameters()), None)
    return torch.stack([torch.as_tensor(weights[name], device=device).detach().clone() for name in names])


def losses_of_last_step(state: RunState, names: Sequence[str]) -> Tensor | None:
    """The losses of these terms in the last step, a vector on the device; None if the step was skipped.

    The weights must be as they were in that step. A hook that calls this sets `state.step.measured = []` when a fit
    starts.
    """
    if not state.step.measured:
        return None
    total = sum(examples for _, examples in state.step.measured)
    parts = [torch.stack(_contributions(scalars, names)) * (n / total) for scalars, n in state.step.measured]
    state.step.measured = []
    return over_processes(state, torch.stack(parts).sum(0)) / weights_of(state.problem, names)


def term_gradients(
    state: RunState, batch: Any, names: Sequence[str], params: Sequence[Tensor], weighted: bool = False
) -> tuple[Tensor, Tensor]:
    """The losses of these terms for `batch`, (terms,), and their gradients in `params`, (terms, entries), detached.

    Without the terms' weights, or `weighted`: as they stand in the loss.

    One forward pass of the training step and one pass back per term; nothing is left in `.grad`.
    `batch`: as a step gets it (a list of batches when accumulating).
    """
    forward, parts = forward_of(state, "train"), batch if isinstance(batch, list) else [batch]
    weights, examples = weights_of(state.problem, names), [num_examples(part) for part in parts]
    losses, gradients = torch.zeros_like(weights), torch.zeros(())
    for part, n in zip(parts, examples, strict=True):
        share, found = n / sum(examples), _contributions(forward(part)[1], names)
        terms = found if weighted else [value / w for value, w in zip(found, weights, strict=True)]
        losses = losses + torch.stack([term.detach() for term in terms]) * share
        rows = [flat_gradient(term, params) for term in terms]
        gradients = gradients.to(rows[0].device) + torch.stack(rows) * share
    return over_processes(state, losses), over_processes(state, gradients)


def flat_gradient(value: Tensor, params: Sequence[Tensor]) -> Tensor:
    """The gradient of a scalar in `params` as one vector; zero where it does not depend on them."""
    if not value.requires_grad:
        return torch.cat([torch.zeros_like(p).flatten() for p in params])
    found = torch.autograd.grad(value, params, retain_graph=True, allow_unused=True)
    both = zip(found, params, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g.detach()).flatten() for g, p in both])


def trained_parameters(state: RunState, of: str | None) -> list[nn.Parameter]:
    """The parameters that train, of the whole problem or of the node or submodule `of`.

    ValueError if they are in shards.
    """
    if state.processes.in_shards:
        raise ValueError(
            "Gradients of single terms need whole parameters, and the problem is in shards; use strategy='ddp'."
        )
    owner = state.problem if of is None else submodule(state.problem, of)
    return [p for p in owner.parameters() if p.requires_grad]


def key_function(fn: KeyFunction, problem: nn.Module, what: str) -> Callable[[Mapping[str, Any]], Tensor]:
    """A function of a batch: `fn` of the keys it names, found in the batch or among what the nodes compute from it.

    The nodes run only where a key is needed that the batch does not have. Raises KeyError naming what is missing.
    """
    keys = [fn] if isinstance(fn, str) else argument_keys(fn, what)
    function: Callable[..., Tensor] = (lambda value: value) if isinstance(fn, str) else fn
    nodes = forward_nodes(problem)

    def call(batch: Mapping[str, Any]) -> Tensor:
        data = {**batch, "problem": problem}
        if any(key not in data for key in keys):
            data |= nodes(batch)
        if missing := [key for key in keys if key not in data]:
            raise KeyError(
                f"{what} reads {missing}, which neither the data nor the problem's nodes provide: {list(data)}."
            )
        return function(*[data[key] for key in keys])

    return call


def _contributions(scalars: Mapping[str, Any], names: Sequence[str]) -> list[Tensor]:
    if missing := [name for name in names if f"train_{name}" not in scalars]:
        raise KeyError(f"The training step returned nothing for the terms {missing}; it returned {list(scalars)}.")
    return [scalars[f"train_{name}"].mean() for name in names]


def over_processes(state: RunState, value: Tensor) -> Tensor:
    """The mean of a tensor over all processes, so that each of them sets the same weights."""
    return state.processes.mean(value)
