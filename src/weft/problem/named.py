"""Nodes, submodules and parameters of a problem by their names. Loaded where some are named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from weft.problem.nodes import Node, duplicates_in
from weft.problem.terms import function_name
from weft.types import suggest


def submodule(problem: nn.Module, name: str) -> nn.Module:
    """The submodule with this dotted name, or the node with this `.name`. ValueError with a suggestion if none."""
    modules = dict(problem.named_modules(remove_duplicate=False))
    if name in modules:
        return modules[name]
    named = {str(m.name): m for m in modules.values() if isinstance(getattr(m, "name", None), str)}
    if name in named:
        return named[name]
    known = [*named, *(m for m in modules if m), *(n for n, _ in problem.named_parameters() if "." not in n)]
    raise ValueError(
        f"{type(problem).__name__} has no node or submodule {name!r}{suggest(name, known) or '.'} It has {known}."
    )


def parameters_under(problem: nn.Module, name: str) -> tuple[nn.Module, list[nn.Parameter]]:
    """The node, submodule or bare parameter of this name: the module (that holds it), and the parameters.

    ValueError with a suggestion if there is none.
    """
    if (bare := dict(problem.named_parameters(remove_duplicate=False)).get(name)) is not None:
        return problem, [bare]
    owner = submodule(problem, name)
    return owner, list(owner.parameters())


def has_part(problem: nn.Module, name: str) -> bool:
    """Whether `name` stands for a node, a submodule or a parameter of the problem."""
    return (
        name in dict(problem.named_parameters())
        or name in dict(problem.named_modules(remove_duplicate=False))
        or any(getattr(m, "name", None) == name for m in problem.modules())
    )


def tell_apart(problem: Any, names: Sequence[str]) -> None:
    """Give nodes that have one of these names from their functions the name of what they compute, too: "linear_u".

    ValueError for names that were given twice.
    """
    for node in problem.nodes:
        if isinstance(node, Node) and node.name in names and node.name == (function_name(node.fn) or "node"):
            node.name = "_".join([node.name, *(key.rpartition(".")[2] for key in node.output_keys)])
    if duplicates := duplicates_in(n.name for n in problem.nodes):
        raise ValueError(f"{problem} has several nodes named {duplicates[0]!r}; give each its own name.")
