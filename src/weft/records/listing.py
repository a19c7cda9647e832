"""The runs below a folder as a table: how they went, and the settings in which they differ.

weft.runs()                                             # prints as a table, in a notebook too
weft.runs("runs", where="optimizer.lr<0.01, epochs=50", sort="best")
weft.compare(*weft.runs(sort="best")[:3])
"""

from __future__ import annotations

import operator
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from weft.records.foreign import printable
from weft.records.report import SUBMITTED, RunRecord, columns, read_run
from weft.records.tables import table
from weft.types import suggest

if TYPE_CHECKING:
    import pandas

COLUMNS = ("run", "started", "epochs", "steps", "best", "at epoch", "seconds", "stopped by")
MOST_SETTINGS = 8
"""So many settings have a column in the table; the DataFrame has all."""
OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}


class Runs(Sequence[RunRecord]):
    """Runs in order; printed, a table of how they went and of the settings in which they differ."""

    def __init__(self, records: Sequence[RunRecord], root: Path) -> None:
        self.records, self.root = list(records), root

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, index: int) -> RunRecord: ...
    @overload
    def __getitem__(self, index: slice) -> Runs: ...
    def __getitem__(self, index: int | slice) -> RunRecord | Runs:
        return Runs(self.records[index], self.root) if isinstance(index, slice) else self.records[index]

    @property
    def settings(self) -> list[str]:
        """The names of the settings in which the runs differ."""
        return differing([run.settings for run in self.records])

    def to_dataframe(self) -> pandas.DataFrame:
        """One row a run: how it went, and every setting in which the runs differ. Needs pandas."""
        import pandas

        rows = [{**_facts(run, self.root), **{n: run.settings.get(n) for n in self.settings}} for run in self.records]
        return pandas.DataFrame(rows)

    def _rows(self) -> list[tuple[str, ...]]:
        shown = self.settings[:MOST_SETTINGS]
        head = (*COLUMNS, *(short(name, self.settings) for name in shown))
        rows: list[tuple[str, ...]] = [head]
        for run in self.records:
            told = [text(run.settings[n]) if n in run.settings else "-" for n in shown]
            rows.append((*_in_words(run, self.root), *told))
        return rows

    def __repr__(self) -> str:
        if not self.records:
            return f"No runs below {self.root}."
        left = len(self.settings) - MOST_SETTINGS
        more = f"\n({left} more settings differ: to_dataframe() has them all)" if left > 0 else ""
        return columns(self._rows()) + more

    def _repr_html_(self) -> str:
        head, *rows = self._rows()
        return table(rows, head) if self.records else f"<p>{self!r}</p>"


def runs(root: str | Path = "runs", *, where: str | None = None, sort: str | None = None) -> Runs:
    """The runs below the folder `root`, oldest first, those of a sweep too.

    `where`: conditions that must all hold, "optimizer.lr<0.01, epochs=50" with =, !=, <, <=, >, >=; a name may be the
    last part of a setting's ("lr"), or "best", "epochs", "steps", "seconds", "run", "stopped by". `sort`: such a name,
    with "-" before it for the largest first. Raises ValueError for a name that no run has.
    """
    root = Path(root)
    found = find_runs(root)
    known = {name for run in found for name in (*_facts(run, root), *run.settings)}
    for condition in filter(None, (where or "").split(",")):
        name, sign, wanted = _parsed(condition)
        _check(name, known, "where")
        found = [run for run in found if _holds(_value(run, root, name, known), sign, wanted)]
    if sort is not None:
        name = sort.removeprefix("-")
        _check(name, known, "sort")
        values = [(_value(run, root, name, known), run) for run in found]
        there = [(value, run) for value, run in values if value is not None]
        numbers = all(isinstance(value, int | float) for value, _ in there)
        there.sort(key=lambda pair: pair[0] if numbers else str(pair[0]), reverse=sort.startswith("-"))
        found = [run for _, run in there] + [run for value, run in values if value is None]
    return Runs(found, root)


def find_runs(root: str | Path = "runs") -> list[RunRecord]:
    """The runs below `root`, newest last; those of a sweep one level deeper. Unreadable ones are named and left out.

    Of those that were submitted `state` says where their job is.
    """
    root = Path(root)
    depths = [(name, stars) for name in ("config.yaml", "result.json", SUBMITTED) for stars in ("*/", "*/*/")]
    folders = {path.parents[name.count("/")] for name, stars in depths for path in root.glob(stars + name)}
    found = []
    for folder in sorted(folders, key=lambda f: f.stat().st_mtime):
        if (folder / Path(SUBMITTED).name).is_file():  # what was submitted, not a run
            continue
        try:
            found.append(read_run(folder))
        except (ValueError, OSError) as error:
            warnings.warn(f"{printable(folder)} is left out: {printable(error)}", stacklevel=2)
    if submitted := {run.folder: run for run in found if (run.folder / SUBMITTED).is_file()}:
        from weft.slurm.events import states

        for folder, state in states(submitted).items():
            if not _is_older(folder / SUBMITTED, folder / "result.json"):  # gone on with by hand since
                submitted[folder].state = state
    return found


def _is_older(path: Path, other: Path) -> bool:
    return other.is_file() and path.stat().st_mtime < other.stat().st_mtime


def differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    """The names under which not all of `settings` have the same value."""
    names = dict.fromkeys(name for one in settings for name in one)
    return [name for name in names if any(one.get(name) != settings[0].get(name) for one in settings)]


def short(name: str, names: Sequence[str]) -> str:
    """The last part of a dotted name, if no other of `names` ends in it."""
    last = name.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in names) == 1 and not last.isdigit() else name


def text(value: Any) -> str:
    """A setting in a table."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _facts(run: RunRecord, root: Path) -> dict[str, Any]:
    result = run.result
    return {
        "run": str(run.folder.relative_to(root)) if run.folder.is_relative_to(root) else str(run.folder),
        "started": str(run.sessions[0].get("started", ""))[:19] if run.sessions else None,
        **{name: result.get(name) for name in ("epochs", "steps")},
        "best": result.get("best_metric"),
        "at epoch": result.get("best_epoch"),
        "seconds": result.get("seconds"),
        "stopped by": run.status,
    }


def _in_words(run: RunRecord, root: Path) -> tuple[str, ...]:
    facts = _facts(run, root)
    if facts["best"] is not None:
        facts["best"] = f"{run.result.get('monitor')} {facts['best']:.6g}"
    if facts["seconds"] is not None:
        facts["seconds"] = f"{facts['seconds']:.1f}"
    return tuple("" if facts[name] is None else str(facts[name]) for name in COLUMNS)


def _parsed(condition: str) -> tuple[str, str, Any]:
    match = re.fullmatch(r"\s*([^<>=!]+?)\s*(!=|<=|>=|=|<|>)=?\s*(.*?)\s*", condition)
    if match is None:
        raise ValueError(f"where={condition!r}: expected a name, one of {', '.join(OPERATORS)}, and a value.")
    from weft import yamlfile

    return match[1], match[2], yamlfile.load(match[3]) if match[3] else ""


def _check(name: str, known: set[str], what: str) -> None:
    if known and not _meant(name, known):
        ends = sorted({*known, *(other.rpartition(".")[2] for other in known)})
        raise ValueError(f"{what}: no run has {name!r}{suggest(name, ends) or '; there are ' + ', '.join(ends)}.")


def _meant(name: str, known: set[str]) -> list[str]:
    return [name] if name in known else sorted(other for other in known if other.endswith(f".{name}"))


def _value(run: RunRecord, root: Path, name: str, known: set[str]) -> Any:
    values = {**run.settings, **_facts(run, root)}
    return next((values[other] for other in _meant(name, known) if values.get(other) is not None), None)


def _holds(value: Any, sign: str, wanted: Any) -> bool:
    if value is None:
        return sign == "!="
    try:
        return OPERATORS[sign](value, wanted) or (sign == "=" and str(value) == str(wanted))
    except TypeError:  # text and a number
        return OPERATORS[sign](str(value), str(wanted))
