"""Clearer words for what a step raised, and for why nothing can be trained. Loaded when there is an error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from weft.places import Place, places
from weft.problem.hardcoded import misplaced


def explained(error: Exception, batch: Any, problem: nn.Module) -> Exception | None:
    """A clearer error for a mixture of dtypes or devices, that says what to do; None for every other error."""
    text = str(error)
    device = next((p.device for p in problem.parameters()), None)
    if "device" in text and device is not None and (found := misplaced(problem, device)):
        return RuntimeError(
            f"{text}. The parameters are on {device}, and {'; '.join(found)}. Give a node what it needs as an input, "
            "or as a buffer of a module."
        )
    if "device" in text and device is not None and device.type != "cpu" and "cpu" in text:
        return RuntimeError(
            f"{text}. The parameters are on {device}. A tensor that a function makes anew, torch.tensor([1.0, 2.0]), "
            "is on the CPU: make it once outside of the function, from where weft moves it, or with device=x.device."
        )
    if "dtype" not in text and "must be the same" not in text and "expected scalar type" not in text:
        return None
    weights = {p.dtype for p in problem.parameters() if p.is_floating_point()}
    data = {k: v.dtype for k, v in batch.items() if isinstance(v, Tensor)} if isinstance(batch, Mapping) else {}
    other = {k: str(d) for k, d in data.items() if d not in weights and k != "index"}
    if not other:
        return None
    whole = [k for k in other if not data[k].is_floating_point]
    way = f"give {whole} as floats (.float())" if whole else "train with precision='64-true', which casts both"
    return TypeError(
        f"{text}. The data has {other}, the parameters are {sorted(map(str, weights))}. Convert the data, or {way}."
    )


def name_taken(names: Iterable[str], split: str) -> ValueError:
    """What to raise for metrics named as what a step itself reports."""
    name = min(names)
    return ValueError(
        f"The metric {name.removeprefix(f'{split}_')!r} would replace {name!r}, which the {split} step reports itself, "
        "in the history and wherever it is monitored. Give it another name in metrics={...}."
    )


def why_no_gradient(problem: nn.Module) -> str:
    """Where to look when a loss depends on nothing that requires grad."""
    if not is_frozen(problem):
        return "Is it detached, or computed under no_grad?"
    return (
        "All parameters are frozen, by Phase(freeze=...), weft.hooks.freeze or requires_grad_(False); leave those to "
        "train out of them."
    )


def why_no_parameters(owner: nn.Module) -> str:
    """A sentence on a module without parameters that require grad: what its functions reach, or what is frozen."""
    own = {id(p) for p in owner.parameters()}
    for place in places(owner, everything=True):
        if isinstance(p := place.value, Tensor) and p.requires_grad and p.is_leaf and id(p) not in own:
            return (
                f" The function of {place.owner} uses {place.name} of shape {tuple(p.shape)}, which is not registered "
                f"by it. {_way_out(owner, place)}"
            )
    return " All its parameters are frozen; let some train (weft.hooks.unfreeze)." if own else ""


def _way_out(owner: nn.Module, place: Place) -> str:
    node, (name, _, of_module) = owner.get_submodule(place.path), place.name.rpartition(".")
    keys = [list(getattr(node, kind)) for kind in ("input_keys", "output_keys") if hasattr(node, kind)]
    if of_module and len(keys) == 2 and name.isidentifier():
        return f"Make the node of the module itself: weft.Node({name}, {keys[0]}, {keys[1]})."
    return "Make the node of the module that holds it, or give it to the problem: problem.k = k."


def is_frozen(module: nn.Module) -> bool:
    """Whether there are parameters, and none requires grad."""
    required = [p.requires_grad for p in module.parameters()]
    return bool(required) and not any(required)
