"""Where the update of several parts of a batch (micro-batches, processes) cannot be that of one big batch: told once.

Gradients of the parts are added by one share for all that a step computed: its rows, or the "num_examples" that it
returned. Loaded where there are several parts only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from weft.data.batches import num_examples
from weft.step.metrics import DENOMINATOR

if TYPE_CHECKING:
    from weft.step.state import RunState

MOST_BATCHES = 10_000
"""Of an epoch that are looked at for the rows of their parts."""


def tell_of_shares(state: RunState, batch: Any, loss: Any, scalars: Mapping[str, Any]) -> None:
    """Warn of what is no mean over the rows of `batch`, a part, whose first loss and scalars these are."""
    if said := next(_inexact(state, batch, loss, scalars), None):
        state.warn_once(f"{_who(state)}: {said}")


def _who(state: RunState) -> str:
    several = [f"accumulate={state.config.accumulate}"] if state.config.accumulate > 1 else []
    several += [f"{state.processes.world} processes"] if state.processes.world > 1 else []
    return " with ".join(several)


def _inexact(state: RunState, batch: Any, loss: Any, scalars: Mapping[str, Any]) -> Iterator[str]:
    if DENOMINATOR in scalars:
        return
    own = [name.removeprefix(DENOMINATOR) for name in scalars if name.startswith(DENOMINATOR) and name.strip("/")]
    if own:
        yield (
            f"{' and '.join(own)} count by weights of their own in the history, and the gradients of the parts of a "
            "batch by their rows, so an update is not exactly that of one big batch. Where the whole loss is a mean "
            'over one of them, return that as "num_examples" too.'
        )
    losses = loss.values() if isinstance(loss, dict) else [loss]
    if any(is_sum_over_rows(one, num_examples(batch)) for one in losses):
        yield (
            f"the loss is a sum over the {num_examples(batch)} rows of its part, and parts are averaged by their rows: "
            "an update is the mean of their sums, not the sum over one big batch. Divide by the number of rows "
            '(.mean()), or by what the step then returns as "num_examples".'
        )
    source = state.source("train")
    nested = state.config.accumulate > 1 and getattr(source, "nested", False)
    if nested and (found := _unequal_parts(source, state.config.accumulate)) is not None:
        main, other = found
        yield (
            f"the parts of the data have other shares of their rows in each batch, so the mean over {other!r} is "
            f"weighted by the rows of {main!r}, the first one: an update is not exactly that of one big batch. "
            "Batch sizes that divide the parts alike, or accumulate=1, are exact."
        )


def is_sum_over_rows(loss: Any, rows: int) -> bool:
    """Whether a loss was made by summing over a first dimension of `rows` > 1, as its graph tells; seen are `.sum()`,
    sums of such, and the losses of torch with reduction="sum"."""
    nodes: list[Any] = [loss.grad_fn] if isinstance(loss, Tensor) and rows > 1 else []
    while nodes:
        node = nodes.pop()
        kind = type(node).__name__
        if kind in ("SumBackward0", "SumBackward1"):
            sizes = tuple(node._saved_self_sym_sizes)
            dims = getattr(node, "_saved_dim", None) or [0]  # of all; a negative one is told as 2**64 less than it
            if sizes[:1] == (rows,) and any(d in (0, 2**64 - len(sizes)) for d in dims):
                return True
        elif kind.endswith("LossBackward0") and getattr(node, "_saved_reduction", None) == 2:  # torch's number for sum
            shape = getattr(getattr(node, "_saved_self", None), "shape", ())
            if tuple(shape)[:1] == (rows,):
                return True
        elif kind == "AddBackward0":
            nodes += [following for following, _ in node.next_functions if following is not None]
    return False


def _unequal_parts(source: Any, accumulate: int) -> tuple[str, str] | None:
    """The first part of nested data, and one that has other shares of its rows in the batches of one update."""
    main, *others = source.parts
    rows = {
        part: [source.rows_of_part(part, n) for n in range(min(len(source), MOST_BATCHES))] for part in source.parts
    }
    for start in range(0, len(rows[main]), accumulate):
        of_main = rows[main][start : start + accumulate]
        for part in others:
            of_part = rows[part][start : start + accumulate]
            if any(a * sum(of_part) != b * sum(of_main) for a, b in zip(of_main, of_part, strict=True)):
                return main, part
    return None
