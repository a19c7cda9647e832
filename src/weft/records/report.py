"""Runs looked at afterwards: the one-page report of a run, the list of runs, and what differs between two.

    write("runs/a")                     # runs/a/report.html: opens without a server, asks for nothing outside
    for run in listing.find_runs("runs"): ...

Everything is read from the files in the run's folder, so one that still runs, or was killed, can be looked at.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft import yamlfile
from weft.loggers.csv import CONTEXT, Level, Row, levels, read_rows
from weft.records.charts import STYLE, Line, chart
from weft.records.environment import read_sessions
from weft.records.foreign import MAX_ROWS_BYTES, RESULT, printable, read_json
from weft.records.repeats import in_words, repeated

SPLITS = ("train", "dev", "test")
SUBMITTED = "submit/events.jsonl"
WHERE = ("trainer.root_dir", "trainer.run_name", "trainer.resume", "trainer.progress")


@dataclass
class RunRecord:
    """What the files of a run's folder say. What is not there (yet) is None or empty."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    sessions: list[dict[str, Any]] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    """The rows of metrics.csv."""
    profile: dict[str, Any] = field(default_factory=dict)
    """Where the time went (`profiler="simple"`), as `TimeProfile.to_dict` gives it; or rows of another profiler."""
    history: dict[str, dict[int, float]] | None = None
    """The curves of a run without a folder."""
    state: str | None = None
    """Where a job is that the run was submitted as: "queued", "running", ...; None for a run that was not."""

    @property
    def curves(self) -> dict[str, dict[int, float]]:
        """Values by epoch of everything logged once an epoch, by name."""
        if self.history is not None:
            return self.history
        found: dict[str, dict[int, float]] = {}
        for row, level in zip(self.rows, levels(self.rows), strict=True):
            if level is not Level.STEP:
                found.setdefault(row.name, {})[row.epoch] = row.value
        return found

    @property
    def step_curves(self) -> dict[str, dict[int, float]]:
        """Values by step of everything logged by steps, by name."""
        found: dict[str, dict[int, float]] = {}
        for row, level in zip(self.rows, levels(self.rows), strict=True):
            if level is Level.STEP:
                found.setdefault(row.name, {})[row.step] = row.value
        return found

    @property
    def metrics(self) -> dict[str, dict[int, float]]:
        """The curves without learning rates, speed and seconds."""
        return {k: v for k, v in self.curves.items() if k.split("/")[0] not in CONTEXT}

    @property
    def trained(self) -> dict[str, Any]:
        """What was trained last, and by what: optimizer and its numbers, sizes, seed."""
        return dict(self.sessions[-1].get("trained") or {}) if self.sessions else {}

    @property
    def settings(self) -> dict[str, Any]:
        """Settings and what was trained by dotted name, without what only says where the run or its code is."""
        said = {name: value for name, value in self.config.items() if name != "objects"}
        base = self.sessions[-1].get("folder") if self.sessions else self.folder.absolute() / "submit" / "code"
        config = {k: v.removeprefix(f"{base}/") if isinstance(v, str) else v for k, v in flat(said).items()}
        return {k: v for k, v in config.items() if k not in WHERE} | flat(self.trained)

    @property
    def status(self) -> str:
        """Why the run ended, or that it has not."""
        if self.state is not None and not (self.state == "finished" and self.result):
            return self.state
        return str(self.result.get("stop_reason", "no result: still running, or killed"))


def read_run(folder: str | Path) -> RunRecord:
    """What is known of the run in `folder`.

    Raises FileNotFoundError if it is no run's folder, and ValueError, naming the file, for one that no run writes.
    """
    folder = Path(folder)
    files = ("config.yaml", "metrics.csv", "result.json")
    if not any((folder / name).is_file() for name in (*files, SUBMITTED)):
        raise FileNotFoundError(f"{folder} is no folder of a run: it has none of {', '.join(files)}.")
    said = [path for name in ("config.yaml", "submit/config.yaml") if (path := folder / name).is_file()]
    config = yamlfile.load_file(said[0]) if said else {}
    result = read_json(folder / "result.json", RESULT) if (folder / "result.json").is_file() else {}
    rows = []
    if (table := folder / "metrics.csv").is_file():
        if table.stat().st_size > MAX_ROWS_BYTES:
            raise ValueError(f"{table}: longer than {MAX_ROWS_BYTES >> 20} MiB")
        rows = read_rows(table)
    found = folder / "profile" / "profile.json"
    profile = read_json(found) if found.is_file() else {}
    return RunRecord(folder, config if isinstance(config, dict) else {}, read_sessions(folder), result, rows, profile)


# ------------------------------------------------------------------------------------------------ the report


def write(folder: str | Path) -> Path:
    """Write `report.html` into the folder of a run and return its path: one page that needs nothing else."""
    run = read_run(folder)
    path = run.folder / "report.html"
    path.write_text(page(run), encoding="utf-8", errors="backslashreplace")  # a folder's name may be any bytes
    return path


def page(run: RunRecord) -> str:
    """The report of a run as one HTML page, pictures and style included."""
    title = html.escape(f"{run.folder.resolve().name}")
    parts = [f"<h1>{title}</h1>", _facts(run), _charts(run), _profile(run)]
    parts += [_table("What was trained", flat(run.trained)), _table("Settings", flat(run.config))]
    for number, session in enumerate(run.sessions, 1):
        name = "Surroundings" if len(run.sessions) == 1 else f"Surroundings, session {number}"
        parts.append(_table(name, flat({key: value for key, value in session.items() if key != "trained"})))
    return document(title, "\n".join(parts))


def document(title: str, body: str) -> str:
    """A whole HTML page of `body`, both escaped already, with the style; it may ask for nothing, in any browser."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><link rel="icon" href="data:,">'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f"<body>\n{body}\n</body></html>\n"
    )


def _facts(run: RunRecord) -> str:
    result = run.result
    facts = [("stopped by", run.status)]
    if result.get("best_metric") is not None:
        facts.append((f"best {result['monitor']}", f"{result['best_metric']:.6g} at epoch {result['best_epoch']}"))
    facts += [(name, f"{result[name]}") for name in ("epochs", "steps") if name in result]
    if "seconds" in result:
        facts.append(("training took", f"{result['seconds']:.1f} s"))
    if run.sessions:
        facts += [("started", run.sessions[0].get("started")), ("command", run.sessions[-1].get("command"))]
    cells = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(str(v))}</td></tr>" for k, v in facts)
    return f'<table class="facts">{cells}</table>'


def _charts(run: RunRecord) -> str:
    curves, best = run.curves, run.result.get("best_epoch")
    drawn: list[str] = []
    losses = [Line(split, curves[name]) for split in SPLITS if (name := f"{split}_loss") in curves]
    monitor = run.result.get("monitor")
    if monitor in curves and not str(monitor).endswith("_loss"):
        losses.append(Line(str(monitor), curves[monitor]))
    if losses:
        drawn.append(chart("loss", losses, "epoch", mark=best, wide=True))
    hidden = repeated(run.metrics)
    for term in term_names(run.metrics):
        if term in hidden:
            continue
        lines = [Line(split, curves[f"{split}_{term}"]) for split in SPLITS if f"{split}_{term}" in curves]
        drawn.append(chart(term, lines or [Line(term, curves[term])], "epoch", mark=best))
    rates = {name: values for name, values in curves.items() if name.split("/")[0] == "lr"}
    if rates:
        drawn.append(chart("learning rate", [Line(name, values) for name, values in rates.items()], "epoch"))
    speed = {e: 1000 / v for e, v in curves.get("steps_per_second", {}).items() if v > 0}
    if speed:
        drawn.append(chart("step time (ms)", [Line("ms per step", speed)], "epoch"))
    for name, values in run.step_curves.items():
        drawn.append(chart(name.removesuffix("_step") + " by step", [Line(name, values)], "step"))
    if not drawn:
        return "<p>Nothing was logged.</p>"
    note = f"<p>Not drawn: {html.escape(in_words(hidden))}</p>" if hidden else ""
    return f'<div class="charts">{"".join(drawn)}</div>{note}'


def term_names(metrics: Mapping[str, Any]) -> list[str]:
    """The quantities besides the loss, without their split, in order; names without a split as they are."""
    names = []
    for name in metrics:
        split, _, quantity = name.partition("_")
        names.append(quantity if split in SPLITS and quantity else name)
    return [name for name in dict.fromkeys(names) if name != "loss"]


def _profile(run: RunRecord) -> str:
    """Where the time went: a row with a bar for each part and node, or for the longest rows of another profiler."""
    profile = run.profile
    if not profile:
        return ""
    if "parts" in profile:
        steps = max(1, profile["steps"])
        named = [*profile["parts"].items(), *((f"node {name}", row) for name, row in profile["nodes"].items())]
    else:
        steps = 1
        longest = sorted(profile["rows"], key=lambda row: -row["own_seconds"])[:20]
        named = [(row.get("name", row.get("function", "")), row) for row in longest]
    whole = profile.get("seconds") or sum(row["own_seconds"] for row in profile.get("rows", [])) or 1.0
    rows = []
    for name, row in named:
        seconds = row["seconds"] if "parts" in profile else row["own_seconds"]
        if not seconds:
            continue
        bar = f'<div style="background:#2563eb;height:9px;width:{200 * min(1.0, seconds / whole):.0f}px"></div>'
        cells = (bar, f"{100 * seconds / whole:.1f} %", f"{1000 * seconds / steps:.3f} ms", f"{row['calls']} calls")
        rows.append(f"<tr><th>{html.escape(name)}</th><td>{'</td><td>'.join(cells)}</td></tr>")
    per = "per step" if "parts" in profile else "in all, own"
    return f"<details open><summary>Where the time goes ({per})</summary><table>{''.join(rows)}</table></details>"


def _table(title: str, values: Mapping[str, Any]) -> str:
    if not values:
        return ""
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(_short(v))}</td></tr>" for k, v in values.items())
    return f"<details open><summary>{html.escape(title)}</summary><table>{rows}</table></details>"


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts and lists as one dict by dotted name; lists of plain values stay whole, empty dicts say nothing."""
    if isinstance(values, Mapping):
        items = [(str(k), v) for k, v in values.items()]
    elif isinstance(values, list) and any(isinstance(v, Mapping | list) for v in values):
        items = [(str(i), v) for i, v in enumerate(values)]
    else:
        return {prefix: values}
    found: dict[str, Any] = {}
    for name, value in items:
        found |= flat(value, f"{prefix}.{name}" if prefix else name)
    return found


def _short(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


# ------------------------------------------------------------------------------------------------ lists of runs


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text, aligned; the first is the head. What a terminal would obey is written out."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
