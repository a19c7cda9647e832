"""Constants that plain functions use: the matrices of a plant, wherever the run is.

    A = torch.tensor([[1.2, 1.0], [0.0, 1.0]])
    plant = weft.Node(lambda x, u: x @ A.T + u, ["x", "u"], ["x"], name="plant")

For the time of a run such tensors are replaced by copies on its device (and in float64 under 64-true); then the
originals are put back, with what was changed in place. Found are those that `weft.places` finds: a function of the
problem closes over them, reads them from its module, has them as a default, or as an attribute of the object it belongs
to; and plain attributes of modules, which are neither parameters nor buffers.

What is trained is never replaced: a tensor that requires grad is moved in place, as the parameters of the problem are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from weft.places import Place, places


def constants_of(problem: nn.Module) -> list[Place]:
    """The tensors that the modules and plain functions of a problem use, one for each place; not what has a graph."""
    tensors = [p for p in places(problem) if isinstance(p.value, Tensor) and p.put is not None]
    return [p for p in tensors if p.value.grad_fn is None]


@contextmanager
def constants_on(
    problem: nn.Module,
    device: torch.device,
    dtype: torch.dtype | None = None,
    trained: Callable[[], Collection[Tensor]] = list,
) -> Iterator[None]:
    """Within: the constants of the problem are on `device`; floating ones have `dtype` if it is given.

    What requires grad is moved in place, and what an optimizer holds (`trained` tells it) stays there.
    """
    moved: list[tuple[Place, Tensor]] = []
    in_place: dict[int, tuple[Tensor, Tensor]] = {}
    copies: dict[int, Tensor] = {}  # a tensor in two places stays one tensor
    held: set[int] = set()
    if device.type != "cpu" or dtype is not None:  # else they are where they belong
        held = set(map(id, trained()))
        for constant in constants_of(problem):
            value = constant.value
            if value.is_meta:  # a shape, nothing to move
                continue
            there = copies.get(id(value))
            if there is None:
                there = value.detach().to(device, dtype if dtype is not None and value.is_floating_point() else None)
                copies[id(value)] = there
            if there.device == value.device and there.dtype == value.dtype:
                continue
            if value.requires_grad or id(value) in held:
                in_place[id(value)] = value, value.data
                value.data = there
            else:
                there.copy_of = value  # type: ignore[attr-defined]  # for who asks whether it was changed
                constant.put(there)  # type: ignore[misc]  # those without are no constants
                moved.append((constant, there))
    try:
        yield
    finally:
        with torch.no_grad():
            for there in {id(there): there for _, there in moved}.values():
                if there._version and not there.is_meta:  # what a function changed in place is its state
                    there.copy_of.copy_(there)  # type: ignore[attr-defined]
            for tensor, before in in_place.values():
                if id(tensor) not in held:
                    before.copy_(tensor.data) if not tensor.is_meta else None
                    tensor.data = before
        for constant, there in moved:
            if constant.get() is there:  # nobody has put something else there meanwhile
                constant.put(constant.value)  # type: ignore[misc]


def misplaced(problem: nn.Module, device: torch.device) -> list[str]:
    """The constants that are not on `device`, as text: "node 'plant' uses A on cpu"."""
    return [f"{c.owner} uses {c.name} on {c.value.device}" for c in constants_of(problem) if c.value.device != device]
