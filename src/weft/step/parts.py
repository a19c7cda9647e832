"""Evaluation of a split of several datasets of different sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weft.data.batches import num_examples, within
from weft.data.shares import share
from weft.step.evaluation import scalars_of
from weft.step.forward import Forward
from weft.step.metrics import ALL_ROWS, DENOMINATOR, Means, whole_metrics

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
    found: dict[str, list[tuple[dict[str, Any], int]]] = {part: [] for part in ("", *source.parts)}
    logged, whole = {part: Means() for part in found}, WholeByPart(whole_metrics(state.metrics, split))
    limit = within(state.config.limit(split), source)
    for part, batch in passes(source, state.progress.epoch, limit):
        examples = num_examples(batch[part]) if part else 1
        if examples or not state.processes.skips_empty:
            scalars = dict(scalars_of(state, forward, batch, logged[part], examples).items())
            whole.add(part, scalars.pop(ALL_ROWS, {}))
            found[part].append((scalars, examples))
    means = {part: _means_along(state, rows, logged[part]) for part, rows in found.items()}
    first = means.pop("")
    names = [name for name in first if all(name in along for along in means.values())]
    sums = {name: sum(along[name] for along in means.values()) - (len(means) - 1) * first[name] for name in names}
    return sums | whole.compute(state)


def passes(source: Any, number: int, limit: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Batches that go through each part of `source` once, `limit` batches of each at most, and the part that each goes
    through.

    The other parts stay at their first rows, which are alike in every process. The first batch, under "", has all parts
    there.
    """

    def batch(part: str = "", lo: int = 0, hi: int = 0) -> dict[str, Any]:
        found = {p: _cut(source, p, lo, hi) if p == part else _cut(source, p, 0, size) for p, size in first.items()}
        return {**found, "name": source.split, "epoch": number}

    first = {part: -(-size // source.world) for part, size in source.sizes.items()}
    yield "", batch()
    for part, rows in source.lengths.items():
        for start in islice(range(0, rows, source.sizes[part]), limit):
            mine = share(min(source.sizes[part], rows - start), source.rank, source.world)
            yield part, batch(part, start + mine.start, start + mine.stop)


def _cut(source: Any, part: str, lo: int, hi: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, tensor in source.parts[part].items():
        value = found[key] = tensor.detach()[lo:hi].clone()
        value.requires_grad_(key in source.require_grad[part] or tensor.requires_grad)
    return {**found, "index": torch.arange(lo, min(hi, source.lengths[part]), device=source.device())}


class WholeByPart:
    """Metrics of all rows, each of which reads the rows of one part: they are those of the pass along that part.

    Which part it is shows in what it reads: along the others it stays as it was in the first batch of all.
    """

    def __init__(self, metrics: dict[str, Any]) -> None:
        self.metrics = metrics
        self.first: dict[str, tuple[Any, ...]] = {}
        self.same: Counter[tuple[str, str]] = Counter()
        """By metric and part, how many batches of its pass began with what was read at first."""
        self.along: dict[tuple[str, str], list[tuple[Any, ...]]] = {}
        """What was read in the others, where there are some."""

    def add(self, part: str, read: dict[str, tuple[Any, ...]]) -> None:
        """What the metrics read of one batch of the pass along `part`; "": of the first batch, which has all parts."""
        for name, inputs in read.items():
            if not part:
                self.first[name] = inputs
            elif (name, part) in self.along or not _is_same(inputs, self.first[name]):
                self.along.setdefault((name, part), []).append(inputs)
            else:
                self.same[name, part] += 1

    def compute(self, state: RunState) -> dict[str, float]:
        """The metrics by name. ValueError for one that reads rows of several parts."""
        found: dict[str, float] = {}
        for name, metric in self.metrics.items():
            moves = sorted(set().union(*state.processes.gather({p for n, p in self.along if n == name})))
            if len(moves) > 1:
                raise ValueError(
                    f"The metric {name!r} reads rows of several parts, {' and '.join(moves)}, which have different "
                    "numbers of batches, so no row of one belongs to a row of another. Give each part a metric of its "
                    "own, or take each part in one batch (batch_size=None)."
                )
            if moves:
                at = (name, moves[0])
                inputs = [self.first[name]] * self.same[at] + self.along.get(at, [])
            else:  # all that it reads is in one batch, which every process has seen
                inputs = [self.first[name]] if name in self.first and state.is_global_zero else []
            for one in inputs:
                metric.update(one)
            found |= metric.compute(name, state.processes.gather)
        return found


def _is_same(read: Any, first: Any) -> bool:
    if isinstance(read, Tensor) and isinstance(first, Tensor):
        return read.shape == first.shape and torch.equal(read, first)
    if isinstance(read, Mapping) and isinstance(first, Mapping):
        return read.keys() == first.keys() and all(_is_same(read[key], first[key]) for key in read)
    if isinstance(read, list | tuple) and isinstance(first, list | tuple):
        return len(read) == len(first) and all(map(_is_same, read, first))
    return bool(read == first)


def _means_along(state: RunState, rows: list[tuple[dict[str, Any], int]], means: Means) -> dict[str, float]:
    """Means over batches of one part: by what the step returned as their denominators, if these change along it."""
    gather = state.processes.gather
    counts = set().union(*gather({float(scalars.get(DENOMINATOR, 0.0)) for scalars, _ in rows}))
    for scalars, examples in rows:
        if len(counts) < 2:
            scalars.pop(DENOMINATOR, None)
        means.add(scalars, examples)
    return means.compute(gather)
