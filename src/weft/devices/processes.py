"""The process of a run, and what it would tell others: here, nothing, as it is alone. `weft.devices.group` has several.

loss = combine(loss, examples) if (combine := processes.combiner(params)) is not None else loss
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from weft.devices.signals import Interruption

T = TypeVar("T")
Combine = Callable[[Tensor, int], Tensor]
"""(Loss, examples here) -> the loss of the global batch; the gradients become its, too."""


class Processes:
    """A single process: rank 0 of 1. Every method is what several processes do with each other."""

    rank, world = 0, 1
    data_rank, data_world = 0, 1
    """Which rows of a global batch are this process's."""
    in_shards = False
    """Whether each process holds only a part of the problem (`weft.sharded`)."""
    skips_empty = False
    """Whether a process without a row of a short batch does nothing."""
    repeats = False
    """Whether another process computes the same rows, and tells of them."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        self.wishes: dict[str, Any] = {}
        """What this process wants, by name; `agree` grants it to all."""
        self.granted: dict[str, Any] = {}

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in order of rank. Every process must call."""
        return [value]

    def first(self, make: Callable[[], T]) -> T:
        """What `make()` returns in the first process, in every one; if it raises there, it is raised in all."""
        return make()

    def leave(self, error: BaseException | None) -> None:
        """The end of a run: with an `error` this process is on its own way."""

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all processes. Every process must call."""
        return value

    def share_weights(self, problem: nn.Module) -> None:
        """Give every process the first one's parameters and buffers. ValueError if they built different problems."""

    def average_buffers(self, problem: nn.Module) -> None:
        """Make buffers that training changes (running means) those of the whole batch."""

    def own_buffers(self, problem: nn.Module) -> dict[str, Tensor]:
        """Copies of the buffers that this process changed since they were last alike in all of them."""
        return {}

    def set_own_buffers(self, problem: nn.Module, own: dict[str, Tensor]) -> None:
        """Put back what `own_buffers` gave."""

    def combiner(self, params: Sequence[nn.Parameter], shards: Sequence[nn.Parameter] = ()) -> Combine | None:
        """What makes the gradients of `params`, and a loss, those of the global batch; None in a single process."""
        return None

    def called(self) -> bool:
        """Whether a process wanted something at the last update; alike in all of them. Asking clears it."""
        return True

    def agree(self, interruption: Interruption) -> bool:
        """Grant to all processes what any of them wants, the first one's wishes first. Every process must call."""
        return True

    def due(self, name: str, is_due: bool) -> bool:
        """Whether what is due by a clock is done now: at once in a single process, else when all know of it."""
        return is_due

    # ---- what is different where the problem is in shards

    def holding(self, problem: nn.Module) -> AbstractContextManager[Any]:
        """While `problem` is used: where it is in shards it comes whole out of this."""
        return nullcontext()

    def gathered(self, problem: nn.Module) -> AbstractContextManager[Any]:
        """While parts of `problem` are called one by one."""
        return nullcontext()

    def arrange(self, optimizers: Mapping[str, Optimizer]) -> None:
        """Make new optimizers fit for parameters in shards."""

    def whole(self, weights: dict[str, Any]) -> dict[str, Any]:
        """A state dict without shards."""
        return weights

    def norm(self, params: Sequence[Tensor]) -> Tensor:
        """The 2-norm of all gradients. Every process must call."""
        return nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])

    def clip(self, params: Sequence[Tensor], limit: float, by_value: bool = False) -> Tensor | None:
        """Clip gradients to a total 2-norm of `limit`, or each entry; returns the norm before, if it is known."""
        if by_value:
            for p in params:
                if p.grad is not None and p.grad.is_complex():  # which torch's own refuses
                    limit_entries(p.grad, limit)
            return nn.utils.clip_grad_value_([p for p in params if not p.is_complex()], limit)
        return nn.utils.clip_grad_norm_(params, limit)

    def all_of(self, is_so: bool) -> bool:
        """Whether something is so in every process, where each sees other numbers."""
        return is_so


@torch.no_grad()
def limit_entries(grad: Tensor, limit: float) -> Tensor:
    """Bring each entry into [-limit, limit], in place; of a complex number its two parts. Returns it."""
    (torch.view_as_real(grad) if grad.is_complex() else grad).clamp_(-limit, limit)
    return grad


def shrinking(norm: Tensor, limit: float) -> Tensor:
    """What brings gradients of this norm to at most `limit` when they are multiplied with it, as by torch."""
    return (limit / (norm + 1e-6)).clamp(max=1.0)


def own_part(tensor: Any) -> Tensor:
    """The part of a sharded tensor that this process holds, sharing its memory; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
