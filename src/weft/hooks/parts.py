"""Weights of single nodes: loaded from another run, frozen, trained again.

weft.hooks.load_node(problem, "dynamics", "runs/identified", source="nodes.0")
weft.hooks.freeze(problem, "dynamics")               # for good; weft.Phase(freeze=["dynamics"]) for one phase
"""

from __future__ import annotations

import os

from torch import nn

from weft.checkpoint.weights_files import load_weights
from weft.problem.named import submodule


def load_node(problem: nn.Module, node: str, path: str | os.PathLike[str], source: str | None = None) -> nn.Module:
    """The problem, whose part `node` now holds the weights that stand in a file.

    `node`: a node or submodule; `source`: the prefix of its weights in `path`.
    `path`: as for `weft.load_weights`. `source`: where they stand in the saved state dict ("nodes.0"); None: as here.
    Raises ValueError for names or shapes that do not fit; then nothing is changed.
    """
    target = submodule(problem, node)
    prefix = next(name for name, module in problem.named_modules() if module is target)
    return load_weights(problem, path, match={prefix: source if source is not None else prefix})


def freeze(problem: nn.Module, *nodes: str) -> None:
    """Let the parameters of these nodes or submodules of `problem` train no more, until `unfreeze`.

    Call before the fit.
    """
    for node in nodes:
        submodule(problem, node).requires_grad_(False)


def unfreeze(problem: nn.Module, *nodes: str) -> None:
    """Let the parameters of these nodes or submodules of `problem` train again. Call before the fit."""
    for node in nodes:
        submodule(problem, node).requires_grad_(True)
