"""Runs side by side: what differs in their settings, surroundings and curves.

print(weft.compare("runs/a", "runs/b", "runs/c"))
weft.compare(result_a, result_b, labels=["small", "large"]).plot("dev_loss")
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.records.charts import STYLE, Line, chart
from weft.records.listing import differing, text
from weft.records.repeats import in_words, repeated, without_repeats
from weft.records.report import RunRecord, columns, document, flat, read_run
from weft.records.tables import table

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

OF_A_RESULT = ("best_metric", "best_epoch", "epochs", "steps", "seconds", "stop_reason")
SURROUNDINGS = ("command", "versions", "git", "host", "system", "processes", "devices", "order_seed")


class Comparison:
    """Several runs: printed, what differs between them; in a notebook with their curves."""

    def __init__(self, records: Sequence[RunRecord], labels: Sequence[str]) -> None:
        self.records, self.labels = list(records), list(labels)

    @property
    def tables(self) -> list[list[tuple[str, ...]]]:
        """Settings, what was trained, surroundings, results and last values: rows of text, the first of each the head.

        A table without rows: all are the same there.
        """
        sections = [
            ("Settings", [flat(run.config) for run in self.records]),
            ("Trained", [flat(run.trained) for run in self.records]),
            ("Surroundings", [_surroundings(run) for run in self.records]),
        ]
        tables = [self._differences(title, values) for title, values in sections]
        rows = [(name, *(_number(run.result.get(name)) for run in self.records)) for name in OF_A_RESULT]
        return [*tables, [("Result", *self.labels), *rows], self._last_values()]

    def _differences(self, title: str, values: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
        rows = [(n, *(text(one[n])[:60] if n in one else "-" for one in values)) for n in differing(values)]
        return [(title, *self.labels), *rows]

    def _last_values(self) -> list[tuple[str, ...]]:
        is_pair = len(self.records) == 2
        rows = [("Last value", *self.labels, *(("difference", "first differ at epoch") if is_pair else ()))]
        for name in self.names:
            curves = [run.metrics.get(name, {}) for run in self.records]
            last = [list(curve.values())[-1] if curve else None for curve in curves]
            rows.append((name, *map(_number, last), *(_apart(last, curves) if is_pair else ())))
        return rows

    @property
    def hidden(self) -> dict[str, str]:
        """Quantities that repeat the loss in every run, with the reason."""
        return repeated(*(run.metrics for run in self.records))

    @property
    def names(self) -> list[str]:
        """The metrics that any of the runs has, losses first, without those that repeat them."""
        names = dict.fromkeys(name for run in self.records for name in run.metrics)
        return sorted(without_repeats(names, self.hidden), key=lambda name: not name.endswith("_loss"))

    def __repr__(self) -> str:
        parts = [columns(rows) if len(rows) > 1 else f"{rows[0][0]}: the same" for rows in self.tables]
        return "\n\n".join([*parts, *([in_words(self.hidden)] if self.hidden else [])])

    def _charts(self) -> str:
        drawn = []
        for name in self.names:
            there = [(label, run) for label, run in zip(self.labels, self.records, strict=True) if name in run.metrics]
            lines = [Line(label, run.metrics[name]) for label, run in there]
            drawn.append(chart(name, lines, "epoch"))
        return f'<div class="charts">{"".join(drawn)}</div>'

    def _repr_html_(self) -> str:
        parts = [
            table(rows[1:], rows[0]) if len(rows) > 1 else f"<p>{html.escape(rows[0][0])}: the same</p>"
            for rows in self.tables
        ]
        note = f"<p>{html.escape(in_words(self.hidden))}</p>" if self.hidden else ""
        return f"<style>{STYLE[STYLE.index('.charts') :]}</style>{self._charts()}{note}{''.join(parts)}"

    def to_dataframe(self) -> pandas.DataFrame:
        """One row a run: its result, the settings that differ and the last value of each metric. Needs pandas."""
        import pandas

        rows = []
        settings = differing([run.settings for run in self.records])
        for run in self.records:
            row = {name: run.result.get(name) for name in OF_A_RESULT}
            row |= {name: run.settings.get(name) for name in settings}
            row |= {name: list(run.metrics[name].values())[-1] for name in self.names if run.metrics.get(name)}
            rows.append(row)
        return pandas.DataFrame(rows, index=pandas.Index(self.labels, name="run"))

    def plot(self, metric: str | None = None, ax: Axes | None = None) -> Axes:
        """One metric of all runs over the epochs on matplotlib axes; None: the one that decided, else the loss."""
        from weft import plots

        monitors = [str(run.result["monitor"]) for run in self.records if run.result.get("monitor")]
        name = metric or next((n for n in [*monitors, "train_loss", *self.names] if n in self.names), "")
        if name not in self.names:
            raise ValueError(f"compare: no run has {metric!r}; there are {', '.join(self.names)}.")
        series = {
            label: run.metrics[name]
            for label, run in zip(self.labels, self.records, strict=True)
            if name in run.metrics
        }
        return plots.series(series, ax, ylabel=name)

    def write(self, path: str | Path) -> Path:
        """Write the tables and the curves of all runs, metric by metric, as one HTML page; returns its path."""
        title = html.escape(", ".join(self.labels))
        note = f"<p>{html.escape(in_words(self.hidden))}</p>" if self.hidden else ""
        tables = "".join(
            table(rows[1:], rows[0]) if len(rows) > 1 else f"<p>{html.escape(rows[0][0])}: the same</p>"
            for rows in self.tables
        )
        body = f"<h1>{title}</h1>{self._charts()}{note}{tables}"
        path = Path(path)
        path.write_text(document("comparison", body), encoding="utf-8", errors="backslashreplace")
        return path


def compare(*runs: Any, labels: Sequence[str] | None = None) -> Comparison:
    """Two or more runs side by side: `print` it, look at it in a notebook, `plot`, `write` it as a page.

    `runs`: folders, `FitResult`s, or what `weft.runs` returned. `labels`: what to call them; None: their folders.
    Raises FileNotFoundError for a folder that holds no run.
    """
    given = [run for one in runs for run in (one if isinstance(one, Iterable) and not isinstance(one, str) else [one])]
    if len(given) < 2:
        raise ValueError(f"compare: expected two runs or more, got {len(given)}.")
    if labels is not None and len(labels) != len(given):
        raise ValueError(f"compare: {len(given)} runs have {len(labels)} labels.")
    records = [_record(run) for run in given]
    names = [str(run) if isinstance(run, str | Path) else _name(r, i) for i, (run, r) in enumerate(zip(given, records))]
    return Comparison(records, labels if labels is not None else names)


def _record(run: Any) -> RunRecord:
    if isinstance(run, RunRecord):
        return run
    if not hasattr(run, "history"):
        return read_run(run)
    if run.run_dir is not None:
        return read_run(run.run_dir)
    told = {name: getattr(run, name) for name in (*OF_A_RESULT, "monitor")}
    return RunRecord(Path(), result=told, history={k: dict(enumerate(v)) for k, v in run.history.items()})


def _name(record: RunRecord, number: int) -> str:
    return record.folder.name or f"run {number}"


def _surroundings(run: RunRecord) -> dict[str, Any]:
    session = run.sessions[-1] if run.sessions else {}
    return flat({k: session[k] for k in SURROUNDINGS if k in session})


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "-" if value is None else str(value)


def _apart(last: Sequence[float | None], curves: Sequence[Mapping[int, float]]) -> tuple[str, str]:
    """How far the last values of two runs are apart, and the epoch at which their curves first differ."""
    (x, y), (one, other) = last, curves
    apart = "-" if x is None or y is None else f"{y - x:+.3g}" if math.isfinite(y - x) else "nan"
    return apart, next((str(e) for e in sorted(one.keys() & other.keys()) if one[e] != other[e]), "the same")
