"""Optimizers and schedulers: from what the user gave to one dict of optimizers by name, and when schedules step.

Trainer(optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3),
        scheduler=weft.Schedule(lambda opt: OneCycleLR(opt, 1e-2, total_steps=500), interval="step"))
"""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

DEFAULT = "default"  # the name of an optimizer that was given without one


def default_optimizer(params: Iterable[nn.Parameter]) -> Optimizer:
    """Adam(lr=1e-3, betas=(0.0, 0.9)), fused where the device has it."""
    params = list(params)
    return torch.optim.Adam(params, lr=1e-3, betas=(0.0, 0.9), fused=can_fuse(params))


def can_fuse(params: Sequence[torch.Tensor]) -> bool:
    """Whether torch has fused optimizers for all of these parameters (floating, dense, on CPU, CUDA or MPS)."""
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda", "mps") and not p.is_sparse for p in params)


def build_optimizers(given: Any, problem: nn.Module) -> dict[str, Optimizer]:
    """The optimizers by name, made of an instance, a factory of the parameters, or a dict of these by name.

    In a dict, a factory gets the parameters of the node or submodule that its name names, else all of them if it is
    the only entry. Raises ValueError for an optimizer without any of the problem's parameters, and where nothing can be
    trained.
    """
    if isinstance(given, Mapping):
        if not given:
            raise ValueError("optimizer={}: expected at least one optimizer.")
        return {name: _build(name, g, problem, named=len(given) > 1) for name, g in given.items()}
    return {DEFAULT: _build(DEFAULT, given if given is not None else default_optimizer, problem, named=False)}


def _build(name: str, given: Any, problem: nn.Module, named: bool) -> Optimizer:
    if not isinstance(given, Optimizer):
        if not callable(given):
            raise TypeError(
                f"optimizer {name!r} is {given!r}; expected a torch optimizer or a function of parameters, such as "
                "optimizer=lambda params: torch.optim.Adam(params, lr=1e-3)."
            )
        owner, params = problem, list(problem.parameters())
        if named or name != DEFAULT:
            from weft.problem.named import has_part, parameters_under

            if named or has_part(problem, name):
                owner, params = parameters_under(problem, name)
        params = [p for p in params if p.requires_grad]
        if not params:
            from weft.step.explaining import why_no_parameters

            raise ValueError(
                f"{type(owner).__name__} has no parameters that require grad: there is nothing to train."
                f"{why_no_parameters(owner)}"
            )
        made = given(params)
        if not isinstance(made, Optimizer):
            raise TypeError(f"The factory of optimizer {name!r} returned {type(made).__name__}; expected an optimizer.")
        given = made
    ours = {id(p) for p in problem.parameters()}
    if not any(id(p) in ours for p in parameters_of(given)):
        raise ValueError(
            f"Optimizer {name!r} ({type(given).__name__}) has none of the parameters of {type(problem).__name__}: "
            "it would train something else. Make it from problem.parameters(), or pass a function of the parameters."
        )
    return given


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """Every parameter an optimizer updates, in order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


class Others:
    """The parameters that an optimizer holds and the problem does not register, by optimizer and number.

    They stay here when a later phase brings other optimizers: the best weights hold them too. `buffers`: those of the
    modules that they belong to (a batch norm that a function closes over).
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}

    def add(self, problem: nn.Module, optimizers: Mapping[str, Optimizer]) -> list[Tensor]:
        """Those that are new."""
        known = {id(p) for p in (*problem.parameters(), *self.tensors.values())}
        found = []
        for name, optimizer in optimizers.items():
            for i, p in enumerate(parameters_of(optimizer)):
                if id(p) not in known:
                    key = f"optimizer.{name}.{i}"
                    while key in self.tensors:  # of an earlier phase
                        key += "'"
                    self.tensors[key] = p
                    found.append(p)
        return found

    def hold_buffers(self, buffers: dict[str, Tensor]) -> None:
        """Know of these, in the place of those before: they may be copies on the device of a run."""
        self.buffers = buffers

    def state_dict(self) -> dict[str, Tensor]:
        """Copies, on their devices."""
        return {name: t.detach().clone() for name, t in (self.tensors | self.buffers).items()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor], source: str = "") -> None:
        """Put back, in place. What is missing stays, which is told if there is a `source` to name."""
        for name, p in (self.tensors | self.buffers).items():
            if name in state_dict:
                p.copy_(state_dict[name])
            elif source and name in self.tensors:
                warnings.warn(
                    f"{source} lacks {name} of shape {tuple(p.shape)}, which the problem does not register: it goes on "
                    "from the value that it has here.",
                    stacklevel=3,
                )


def shared_parameters(problem: nn.Module, optimizers: Mapping[str, Optimizer]) -> list[str]:
    """The names of the problem's parameters that are in more than one of the optimizers."""
    names = {id(p): name for name, p in problem.named_parameters()}
    counts = Counter(id(p) for o in optimizers.values() for p in parameters_of(o))
    return [names.get(p, "a parameter outside the problem") for p, count in counts.items() if count > 1]


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether `optimizer.step` cannot be called without a closure (LBFGS and other line searches).

    An optimizer whose signature hides it (`closure=None`) says so by an attribute `needs_closure = True`.
    """
    if hasattr(optimizer, "needs_closure"):
        return bool(optimizer.needs_closure)  # pyright: ignore[reportAttributeAccessIssue]
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty
