"""Terms of a loss: objectives (and `constraints`), made of plain functions whose argument names are the keys they read.

f = weft.objective(lambda x, a: (1 - x) ** 2 + a * x**4, name="f")
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weft.problem.pairs import PairWatch, has_rows, refuse_pairs
from weft.types import WRITTEN_KEYS, Batch, suggest

RESERVED_KEYS = WRITTEN_KEYS


def with_parts(batch: Batch) -> dict[str, Any]:
    """The batch as a dict of its own, in which what stands in its parts has keys too: "interior.x"."""
    data = dict(batch)
    for part, value in batch.items():
        if type(value) is dict:
            for key, one in value.items():
                data[f"{part}.{key}"] = one
    return data


class MissingKeyError(KeyError):
    """A key that is read but not there. (A plain KeyError shows its message quoted.)"""

    def __str__(self) -> str:
        return str(self.args[0])


def argument_keys(fn: Callable[..., Any], what: str) -> list[str]:
    """The names of the arguments that `fn` must be given; those with a default are constants and left out.

    For a module: those of its `forward`. Raises TypeError where the names cannot be known.
    """
    try:
        parameters = inspect.signature(fn.forward if isinstance(fn, nn.Module) else fn).parameters.values()
    except (TypeError, ValueError):
        raise TypeError(
            f"{what}: {fn!r} does not tell its argument names, which are the keys it reads; wrap it: lambda x: fn(x)."
        ) from None
    required = [p for p in parameters if p.default is p.empty]
    for p in required:
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.KEYWORD_ONLY):
            raise TypeError(
                f"{what}: argument {str(p)!r} of {fn!r} does not name one key to read; give the keys as plain "
                "arguments (lambda x, y: ...) and constants as arguments with a default."
            )
    return [p.name for p in required]


def check_function(fn: Any, what: str) -> None:
    """Raise TypeError for what is no function, and for the class of a module, where an object of it is meant."""
    if not callable(fn):
        raise TypeError(f"{what}; got {type(fn).__name__} {fn!r}.")
    if isinstance(fn, type) and issubclass(fn, nn.Module):
        raise TypeError(f"{what}; got the class {fn.__name__}. Give an object of it, {fn.__name__}(...).")


def function_name(fn: Callable[..., Any]) -> str | None:
    """The name to show for `fn`: a function's own, a module's class in lower case; None for a lambda."""
    if isinstance(fn, nn.Module):
        return type(fn).__name__.lower()
    name = getattr(fn, "__name__", None)
    return None if name == "<lambda>" else name


def explain(error: Exception, what: str, keys: Iterable[str], data: Mapping[str, Any]) -> None:
    """Raise MissingKeyError if `error` came from a key that is not there; otherwise note on it where it was raised."""
    there = [k for k in data if k not in RESERVED_KEYS]
    for key in keys:
        if isinstance(error, KeyError) and key not in data:
            raise MissingKeyError(
                f"{what} reads {key!r}, which neither the data nor an earlier node provides; "
                f"there are {there}{suggest(key, there) or '.'}"
            ) from None
    error.add_note(f"raised in {what}, which reads {', '.join(f'{k} {shape_of(data[k])}' for k in keys if k in data)}")


def shape_of(value: Any) -> str:
    """The shape of a tensor, the type of anything else, for a message."""
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


class Shapes:
    """What is known of the shapes of a term: notes, which are no state of a problem and in no checkpoint."""

    seen = False
    """Whether they were looked at."""
    picks = False
    """Whether it picks rows by a mask; then it counts for those, and not for all of its batch."""
    rows: int | None = None
    """So many it picked of the last batch; None: it does not, or made one number of them itself."""

    def note(self, value: Any) -> None:
        if self.picks:
            self.rows = value.shape[0] if isinstance(value, Tensor) and value.ndim else None

    def mean(self, value: Tensor) -> Tensor:
        """Of no rows where none was picked, which counts for nothing: 0, and so are its gradients."""
        return value.sum() if self.rows == 0 else value.mean()


class Term(nn.Module):
    """One named part of the loss: `name`, `keys` (those it reads) and `weight`.

    `weight` is a 0-d tensor that moves with the module, may be changed in place during training, and is no part of the
    state dict (a term's weight belongs to the training, not to the trained problem).
    """

    weight: Tensor
    kind = "term"

    def __init__(self, weight: float | Tensor, name: str | None, part: str | None = None) -> None:
        super().__init__()
        if name is not None and (not isinstance(name, str) or not name):
            raise TypeError(f"The name of a term is a non-empty text; got {name!r}.")
        self.name: str = name or ""  # a Problem numbers those without
        self._prefix = "" if part is None else f"{part}."
        self.keys: list[str] = []
        self._shapes = Shapes()
        if isinstance(weight, Tensor) and weight.requires_grad:
            raise ValueError(f"The weight of {self} is not trained, but the tensor given requires grad; detach it.")
        try:
            self.given_weight = float(weight)
        except (TypeError, ValueError, RuntimeError):
            self.given_weight = math.nan
        if not math.isfinite(self.given_weight):
            raise ValueError(f"The weight of {self} must be one finite number; got {weight!r}.")
        self.register_buffer("weight", torch.tensor(self.given_weight), persistent=False)

    def _add_function(self, fn: Callable[..., Any]) -> list[str]:
        """The keys that `fn` reads. A method of a module brings that module, so that its parameters are trained."""
        owner = getattr(fn, "__self__", None)
        if isinstance(owner, nn.Module):
            self.add_module(f"owner{len(self._modules)}", owner)
        keys = [f"{self._prefix}{key}" for key in argument_keys(fn, str(self))]
        self.keys += [k for k in keys if k not in self.keys]
        return keys

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Term:
        """Move or cast. In a wider dtype a weight of 0.1 is 0.1 again, not the float32 nearest to it."""
        before = self.weight
        super()._apply(fn, recurse)
        cast = self.weight.dtype != before.dtype and not (before.is_meta or self.weight.is_meta)
        if cast and before.item() == torch.tensor(self.given_weight, dtype=before.dtype).item():
            self.weight.fill_(self.given_weight)
        return self

    @property
    def picks(self) -> bool:
        """Whether it is known to pick rows by a mask."""
        return self._shapes.picks

    @property
    def shapes(self) -> Shapes:
        """What is known of the shapes of what it computes."""
        return self._shapes

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r}" if self.name else f"{self.kind} without a name"

    def __repr__(self) -> str:
        return f"{self}({', '.join(self.keys)}), weight {self.weight.item():g}"


class Objective(Term):
    """Something to minimise: `weight * mean(fn(...))`. Made by `weft.objective`."""

    kind = "objective"

    def __init__(
        self, fn: Callable[..., Tensor], weight: float | Tensor = 1.0, name: str | None = None, part: str | None = None
    ) -> None:
        check_function(fn, "An objective is a function of keys")
        super().__init__(weight, name or function_name(fn), part)
        self.fn = fn
        self._add_function(fn)

    def forward(self, data: Batch) -> Tensor:
        """The contribution to the loss, a scalar.

        Raises KeyError for a missing key, TypeError for no float tensor, ValueError for every row with every other.
        """
        value = self.value(data)
        try:
            self._shapes.note(value)
            return self.weight * (value.sum() if self._shapes.rows == 0 else self.reduced(value))
        except (AttributeError, TypeError, RuntimeError) as error:
            found = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{self} returned {found}; expected a floating point tensor, which is averaged.") from error

    def value(self, data: Batch) -> Any:
        """What the function returns, not reduced."""
        try:
            return self.fn(*[data[k] for k in self.keys]) if self._shapes.seen else self._first(data)
        except Exception as error:
            explain(error, str(self), self.keys, data)
            raise

    @staticmethod
    def reduced(value: Tensor) -> Tensor:
        """The mean over all entries."""
        return value.mean() if value.ndim else value

    def _first(self, data: Batch) -> Any:
        """What the function returns; ValueError where it pairs every row with every other."""
        read = {k: data[k] for k in self.keys}
        if torch.compiler.is_compiling() or not has_rows(read):  # to torch's compiler a watch is another program
            return self.fn(*read.values())
        with PairWatch(read) as watch:
            value = self.fn(*read.values())
        refuse_pairs(str(self), value, read, watch)
        self._shapes.seen, self._shapes.picks = True, watch.picks
        return value


def objective(
    fn: Callable[..., Tensor], weight: float | Tensor = 1.0, name: str | None = None, part: str | None = None
) -> Objective:
    """A term that adds `weight * mean(fn(...))` to the loss.

    fn: a function whose argument names are the keys it reads (arguments with a default are constants), or a module, by
        the arguments of its `forward`. It may return a tensor of any shape. What picks rows by a mask (`e[m]`) counts
        for those that it returns; return them, not their mean.
    name: defaults to the function's; a lambda becomes `objective_0`, by its place in the problem.
    part: of a batch with parts, the one whose keys the arguments name: with "interior", `x` is the key "interior.x".
    Raises TypeError where the argument names do not say what is read (`*args`, a builtin).
    """
    return Objective(fn, weight, name, part)


def picks_rows(problem: nn.Module) -> bool:
    """Whether a term of a problem is known to pick rows by a mask."""
    terms = getattr(problem, "terms", None)
    return isinstance(terms, dict) and any(getattr(term, "picks", False) for term in terms.values())


def weights_of_picked(terms: Iterable[Any], split: str) -> dict[str, int]:
    """What terms that pick rows by a mask count for, by their keys in a problem's output; if there is but one term, the
    whole loss too."""
    found, terms = {}, list(terms)
    for term in terms:
        if term.shapes.picks and term.shapes.rows is not None:
            names = [term.name, f"{term.name}_violation"] if term.kind == "constraint" else [term.name]
            found |= {f"{split}_{name}_weight": term.shapes.rows for name in names}
    return found | ({"num_examples": min(found.values())} if found and len(terms) == 1 else {})
