"""Results as small HTML tables, for notebooks."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from weft.records.repeats import in_words, repeated, without_repeats

if TYPE_CHECKING:
    import weft


def table(rows: Iterable[Sequence[Any]], head: Sequence[str] = ()) -> str:
    """Rows of values as an HTML table; without `head` the first column names the others."""
    first = "" if not head else f"<tr>{''.join(f'<th>{html.escape(h)}</th>' for h in head)}</tr>"
    cells = [[html.escape(str(value)) for value in row] for row in rows]
    if head:
        body = [f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in cells]
    else:
        body = [f"<tr><th>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>" for row in cells]
    return f"<table>{first}{''.join(body)}</table>"


def of_result(result: weft.FitResult) -> str:
    """How a fit went, and the last value of each metric that says more than the loss."""
    rows: list[tuple[str, Any]] = [("epochs", result.epochs), ("steps", result.steps)]
    if result.best_metric is not None:
        rows.append((f"best {result.monitor}", f"{result.best_metric:.6g} (epoch {result.best_epoch})"))
    rows += [("stopped by", result.stop_reason), ("seconds", f"{result.seconds:.2f}"), ("seed", result.seed)]
    rows.append(("run folder", result.run_dir or "-"))
    if result.search_stop is not None:
        rows.append(("line searches", f"{result.evaluations} evaluations, the last ended by {result.search_stop}"))
    hidden = repeated(result.history)
    names = without_repeats(sorted(name for name, values in result.history.items() if values), hidden)
    last = [(name, f"{result.history[name][-1]:.6g}") for name in names]
    note = f"<p>{html.escape(in_words(hidden))}</p>" if hidden else ""
    return table(rows) + table(last, ("metric", "last epoch")) + note
