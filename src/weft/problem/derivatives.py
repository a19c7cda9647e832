"""Derivatives of what a node computed by what it was computed from: what the terms of a PINN are made of."""

from __future__ import annotations

import torch
from torch import Tensor


def gradient(of: Tensor, by: Tensor) -> Tensor:
    """The derivatives of a quantity by its inputs, row by row, in the shape of `by`; differentiable again.

    of: (rows,) or (rows, 1), each row computed from the same row of `by`; of several quantities take one column,
        `gradient(u[:, :1], x)`.
    by: (rows, ...), an input that requires grad: `weft.Data(..., inputs_require_grad=["x"])`.

    `u_x = gradient(u, x)`, `u_xx = gradient(u_x, x)`; of x with several columns u_x has as many, and second derivatives
    are taken of one: `gradient(u_x[:, :1], x)`. Raises ValueError for several quantities at once, whose derivatives
    would be added up, and torch's RuntimeError where `by` does not require grad or `of` was not computed from it.
    """
    if of.dim() > 1 and of[0].numel() > 1:
        raise ValueError(
            f"gradient: {tuple(of.shape)} holds several quantities a row, whose derivatives would be added up; take "
            "one column, gradient(u[:, :1], x)."
        )
    return torch.autograd.grad(of.sum(), by, create_graph=True)[0]
