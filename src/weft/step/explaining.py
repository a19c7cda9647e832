"""Clearer words for what a step raised, and for why nothing can be trained. Loaded when there is an error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from weft.places import Place, places
from weft.problem.hardcoded import misplaced
from weft.problem.reading import needs_grad_in_eval
from weft.types import suggest


def explained(error: Exception, batch: Any, problem: nn.Module, split: str = "train") -> Exception | None:
    """A clearer error that says what to do; None where there is nothing to add.

    With its traceback and notes, to be raised in its place. Of dtypes and devices that are mixed, of derivatives of
    what has none, and of a module that was given a batch where it expects a tensor.
    """
    found = _explained(error, batch, problem, split)
    if found is not None:
        for note in getattr(error, "__notes__", ()):
            found.add_note(note)
        found.__traceback__ = error.__traceback__
    return found


def _explained(error: Exception, batch: Any, problem: nn.Module, split: str) -> Exception | None:
    if (found := _of_gradients(error, batch, problem, split) or _of_a_batch(error, batch, problem, split)) is not None:
        return found
    if not isinstance(error, RuntimeError):
        return None
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
    if hasattr(problem, "own_data"):  # whose y is no input
        data.pop("y", None)
    other = {k: str(d) for k, d in data.items() if d not in weights and k != "index"}
    if not other:
        return None
    whole = [k for k in other if not data[k].is_floating_point]
    way = f"give {whole} as floats (.float())" if whole else "train with precision='64-true', which casts both"
    return TypeError(
        f"{text}. The data has {other}, the parameters are {sorted(map(str, weights))}. Convert the data, or {way}."
    )


def _of_gradients(error: Exception, batch: Any, problem: nn.Module, split: str) -> Exception | None:
    """Derivatives with respect to what does not require grad, or in an evaluation without gradients."""
    text = str(error)
    if "One of the differentiated Tensors does not require grad" in text:
        keys = _may_require_grad(batch)
        return RuntimeError(
            f"{text}. Derivatives are taken with respect to inputs that do not require grad: ask for it with "
            f"weft.Data(..., inputs_require_grad={keys or ['x']}), naming those that are differentiated."
        )
    is_evaluation = split != "train" and not needs_grad_in_eval(problem.modules())
    if "does not require grad and does not have a grad_fn" in text and is_evaluation:
        return RuntimeError(
            f"{text}. Derivatives are taken in an evaluation ({split}), which computes without gradients: ask for them "
            "with weft.Problem(..., grad_inference=True), or problem.grad_inference = True on any module."
        )
    if "appears to not have been used in the graph" in text:
        return RuntimeError(
            f"{text}. Something is differentiated with respect to an input that it was not computed from: of a batch "
            "with parts, take both from the same part (part='interior'); else compute it from that very tensor."
        )
    return None


def _may_require_grad(batch: Any) -> list[str]:
    """The keys of a batch whose numbers can require grad and do not; of a batch with parts those of the parts."""
    if not isinstance(batch, Mapping):
        return []
    found = [k for k, v in batch.items() if isinstance(v, Tensor) and v.is_floating_point() and not v.requires_grad]
    found += [key for part in batch.values() if isinstance(part, Mapping) for key in _may_require_grad(part)]
    return list(dict.fromkeys(found))


def _of_a_batch(error: Exception, batch: Any, problem: nn.Module, split: str) -> Exception | None:
    """A module that wants a tensor was called with the batch: a net that was given as the problem, or a step forgotten.

    Torch says so in several ways, most of which name the type of the batch.
    """
    kind = type(batch).__name__
    named = (f"not {kind}", f"'{kind}' object has no attribute", f"{kind}\\' object", f"got {kind}", f"({kind}")
    is_torchs = isinstance(error, TypeError | AttributeError) and any(name in str(error) for name in named)
    if not is_torchs or isinstance(batch, Tensor) or hasattr(problem, "terms") or hasattr(problem, "loss_fn"):
        return None
    if type(problem).__module__.startswith("torch.nn"):
        way = "It is a net: give it with a loss, weft.Supervised(net, loss_fn) over (X, y), or a weft.Problem of nodes."
    else:
        way = "A problem is called with the batch and returns its loss."
    step = {"dev": "validation_step", "test": "test_step"}.get(split, "training_step")
    return TypeError(
        f"{error}. The {split} step calls {type(problem).__name__} with a whole batch, a {kind}. {way} "
        f"Or give a {step}=function of (trainer, batch){', as there is a training_step' if split != 'train' else ''}."
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


def wrong_loss(loss: Any, key: str, problem: nn.Module, out: Any, split: str) -> Exception | None:
    """What to raise for a loss that cannot be minimised; None for one that can, once it is a scalar."""
    who = f"Problem {getattr(problem, 'name', None) or type(problem).__name__!r}"
    if loss is None:
        known = list(map(str, out)) if isinstance(out, Mapping) else []
        found = f"got keys {sorted(known)}" if isinstance(out, Mapping) else f"got {type(out).__name__}"
        return ValueError(
            f"{who} returned no {key!r}. The {split} step needs a scalar tensor under that key "
            f"(or 'loss', or the scalar itself); {found}{suggest(key, known) or '.'}"
        )
    if not isinstance(loss, Tensor):
        return TypeError(f"{who}: {key!r} is {type(loss).__name__} {loss!r}; expected a scalar tensor.")
    if loss.numel() != 1:
        return ValueError(f"{who}: {key!r} has shape {tuple(loss.shape)}; expected a scalar. Take its mean or sum.")
    if split == "train" and not loss.requires_grad:
        return ValueError(
            f"{who}: {key!r} does not depend on anything that requires grad, so nothing can be trained. "
            f"{why_no_gradient(problem)}"
        )
    return None


def reached_outside(reached: Sequence[Any]) -> str:
    """What to say of tensors that a loss reached and nothing trains (`reached.Outside`), by the first one's owner."""
    place = reached[0].place
    more = [found.place for found in reached if found.place.owner == place.owner]
    found = ", ".join(f"{p.name} of shape {tuple(p.value.shape)}" for p in more[:5])
    found += f" and {len(more) - 5} more" if len(more) > 5 else ""
    return (
        f"{place.owner} uses {found}, which requires grad and is not trained: neither the problem registers it nor an "
        "optimizer holds it. To train it, give it to the problem (as an attribute, `problem.k = k`, or by a weft.Node "
        "made of the module that holds it) or to an optimizer of your own; if it is constant, call "
        "`requires_grad_(False)`; an input that is differentiated belongs to the data (`inputs_require_grad`)."
    )


def no_more_fitting(epoch: int | None, misfit: ValueError) -> str:
    """What to say of best weights that cannot be put back into a problem that has grown since."""
    return (
        f"The best weights, those of epoch {epoch}, do not fit the problem as it is now, so it holds the last ones: "
        f"{str(misfit).partition('; pass')[0]}."
    )


def came_late(name: str, p: Tensor) -> str:
    """What to say of a parameter that came after the optimizers."""
    return (
        f"Parameter {name} of shape {tuple(p.shape)} requires grad since its optimizers were made, and is in none of "
        "them: it is not trained. Make it before the fit or in a phase's `setup`, add it (optimizer.add_param_group), "
        "or change it in place (p.data.copy_(...))."
    )


def takes_gradients(lost: bool) -> str:
    """What to say of a step that clears the gradients of what is trained (`lost`), or adds to them."""
    how, then = ("clears", "zero_grad"), "those of the parts of the batch before it are lost."
    if not lost:
        how, then = ("adds to", "by a backward of its own"), "the update adds those of the loss."
    return (
        f"The step {how[0]} the gradients of what is trained ({how[1]}): {then} For gradients of inputs alone use "
        "torch.autograd.grad(loss, x), which leaves the parameters as they are."
    )
