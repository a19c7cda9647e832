"""Equality to the last bit, for tests at tolerance 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def same(a: Any, b: Any) -> bool:
    """Equal in type, structure and every bit; nan equals nan."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        if (a.shape, a.dtype, a.layout) != (b.shape, b.dtype, b.layout):
            return False
        if a.layout is not torch.strided:
            return same(a.to_dense(), b.to_dense())
        return a.contiguous().view(-1).view(torch.uint8).equal(b.contiguous().view(-1).view(torch.uint8))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or repr(a) == repr(b)


def flat_weights(problem: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in problem.parameters()]).cpu()


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    """Copies of parameters and buffers by name."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
