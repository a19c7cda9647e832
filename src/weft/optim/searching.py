"""What the optimizers of this wing share: one group of real parameters, written and read as one vector."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Searching(Optimizer):
    """An optimizer that evaluates the loss itself: `step(closure)`, one parameter group.

    After a step `evaluations` says how often it evaluated besides the closure, and `search_stop` what ended the step.
    """

    needs_closure = True
    needs_full_batch = True
    """What it has learned of one batch is used for the next: batches must not differ."""
    max_iter: int
    evaluations = 0
    search_stop: str | None = None

    def __init__(self, params: Iterable[Tensor], defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        name = type(self).__name__
        if len(self.param_groups) > 1:
            raise ValueError(f"{name} takes one group of parameters; got {len(self.param_groups)}.")
        self._params: list[Tensor] = self.param_groups[0]["params"]
        if wrong := [p.dtype for p in self._params if not p.is_floating_point()]:
            raise TypeError(f"{name} trains real parameters; got one of {wrong[0]}.")
        if len({(p.dtype, p.device) for p in self._params}) > 1:
            raise ValueError(f"{name} needs all parameters on one device and of one dtype.")

    @property
    def kept(self) -> dict[str, Any]:
        """What it has learned: part of the state, so of checkpoints."""
        return self.state[self._params[0]]

    @property
    def epsilon(self) -> float:
        """The spacing of the parameters' numbers at 1."""
        return torch.finfo(self._params[0].dtype).eps

    def trained(self) -> list[Tensor]:
        """The parameters that are not frozen."""
        return [p for p in self._params if p.requires_grad]

    @contextmanager
    def goes_back(self) -> Iterator[None]:
        """Put the parameters back where they were if something raises."""
        before = [p.detach().clone() for p in self._params]
        try:
            yield
        except BaseException:
            with torch.no_grad():
                for p, old in zip(self._params, before, strict=True):
                    p.copy_(old)
            raise


def flat(params: Iterable[Tensor]) -> Tensor:
    """Their values as one vector, a copy."""
    return torch.cat([p.detach().reshape(-1) for p in params])


def flat_gradient(params: Iterable[Tensor]) -> Tensor:
    """Their gradients as one vector; zero where there is none."""
    grads = [(p, p.grad) for p in params]
    return torch.cat([p.new_zeros(p.numel()) if g is None else g.detach().to_dense().reshape(-1) for p, g in grads])


@torch.no_grad()
def write(params: Iterable[Tensor], vector: Tensor) -> None:
    """Give the parameters the values of the vector."""
    start = 0
    for p in params:
        p.copy_(vector[start : start + p.numel()].view_as(p))
        start += p.numel()


@contextmanager
def a_little_away(params: Iterable[Tensor]) -> Iterator[None]:
    """Within: the parameters, each 1 % larger. At a solution residuals are rounding alone, and agree with nothing."""
    known = [(p.data, p.detach().clone()) for p in params]  # `.data` has a count of changes of its own
    try:
        for data, old in known:
            data.copy_(old * 1.01)
        yield
    finally:
        for data, old in known:
            data.copy_(old)


def with_gradient(closure: Callable[[], Any]) -> Tensor:
    """What the closure returns, evaluated with autograd on, detached."""
    with torch.enable_grad():
        return torch.as_tensor(closure()).detach()
