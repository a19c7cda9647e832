"""Evaluation of a split of several datasets of different sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weft.data.batches import num_examples, within
from weft.step.evaluation import scalars_of
from weft.step.forward import Forward
from weft.step.metrics import DENOMINATOR, Means, whole_metrics

if TYPE_CHECKING:
    from weft.step.state import RunState


def means_by_part(state: RunState, split: str, forward: Forward) -> dict[str, float]:
    """Means over a split of several datasets, each gone through once while the others stay at their first rows.

    Nobody can tell which part a scalar was computed from. But where it is a sum of what it is on each part (a term of
    one part, or a loss that adds them up), how it changes along one part is known from the batches of that part alone,
    weighted by its rows. So its mean over all is the sum of its means along each part, less its value at the first rows
    of all for every part but one: exact, whatever the sizes of parts and batches are.
    """
    source = state.source(split)
    if whole := whole_metrics(state.metrics, split):
        raise ValueError(
            f"The metric {next(iter(whole))!r} needs each row of the {split} data once, and its parts "
            f"{list(source.parts)} have different numbers of batches; take each part in one batch (batch_size=None)."
        )
    found: dict[str, list[tuple[dict[str, Any], int]]] = {part: [] for part in ("", *source.parts)}
    logged = {part: Means() for part in found}
    limit = within(state.config.limit(split), source)
    for part, batch in source.passes(state.progress.epoch, limit):
        examples = num_examples(batch[part]) if part else 1
        if examples or not state.processes.skips_empty:
            scalars = scalars_of(state, forward, batch, logged[part], examples)
            found[part].append((dict(scalars.items()), examples))
    means = {part: _means_along(state, rows, logged[part]) for part, rows in found.items()}
    first = means.pop("")
    names = [name for name in first if all(name in along for along in means.values())]
    return {name: sum(along[name] for along in means.values()) - (len(means) - 1) * first[name] for name in names}


def _means_along(state: RunState, rows: list[tuple[dict[str, Any], int]], means: Means) -> dict[str, float]:
    """Means over batches of one part: by what the step returned as their denominators, if these change along it."""
    gather = state.processes.gather
    counts = set().union(*gather({float(scalars.get(DENOMINATOR, 0.0)) for scalars, _ in rows}))
    for scalars, examples in rows:
        if len(counts) < 2:
            scalars.pop(DENOMINATOR, None)
        means.add(scalars, examples)
    return means.compute(gather)
