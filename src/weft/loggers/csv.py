"""`metrics.csv`: every logged number as one row, appended, and read back.

logger = CSVLogger("runs/a/metrics.csv")
logger.log_metrics({"train_loss": 0.5, "epoch": 0}, step=79)
logger.save()
read_rows("runs/a/metrics.csv")     # [Row(step=79, epoch=0, name='train_loss', value=0.5, time=1760000000.123)]
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from weft.checkpoint.archive import put
from weft.yamlfile import only_files

COLUMNS = ("step", "epoch", "name", "value", "time")
CONTEXT = ("lr", "steps_per_second", "examples_per_second", "wait_seconds", "seconds")
"""What `Logging` adds to an epoch's metrics; names `lr/...` too. The history of a result does not have it."""


class Row(NamedTuple):
    """One logged number: optimizer steps done, the epoch (from 0), its name, its value, and when (unix seconds)."""

    step: int
    epoch: int
    name: str
    value: float
    time: float


class CSVLogger:
    """Writes rows `step,epoch,name,value,time` to `path`; a Lightning logger by its methods.

    Rows are only ever appended, so a new name costs nothing and a killed run loses no more than its last row.
    Values are written with all their digits. `clock` gives unix seconds.
    """

    def __init__(self, path: str | os.PathLike[str], *, clock: Callable[[], float] = time.time) -> None:
        self.path = Path(path)
        self._clock = clock
        self._waiting: list[tuple[Any, ...]] = []
        self._is_checked = False  # header there, last line whole

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Add one row for each of `metrics` but `"epoch"`, which becomes the column (0 if it is missing)."""
        now = round(self._clock(), 3)
        epoch = int(metrics.get("epoch", 0))
        self._waiting += [
            (
                int(step),
                epoch,
                _quoted(name.replace("\r", " ")),
                repr(float(value)),
                now,
            )  # csv leaves a bare \r unquoted
            for name, value in metrics.items()
            if name != "epoch"
        ]

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Nothing: hyperparameters stand in the run's `config.yaml`."""

    def save(self) -> None:
        """Append what waits to the file; creates it, with its folder and header, on the first call."""
        if not self._is_checked:
            self._prepare()
        if self._waiting:
            size = self.path.stat().st_size
            try:
                with self.path.open("a", encoding="utf-8", newline="") as file:
                    file.write(_as_text(self._waiting))
            except OSError as error:
                with contextlib.suppress(OSError):  # what came through would be there twice after the next try
                    os.truncate(self.path, size)
                raise OSError(error.errno, f"{self.path} could not be written: {error.strerror}") from error
            self._waiting = []

    def rewind(self, step: int, epoch: int, in_epoch: bool = False) -> None:
        """Drop what a run that goes on from a checkpoint at `step` with `epoch` will log again.

        That is every row after `step`, and every mean over `epoch` or a later one, which may stand at `step` itself.
        Step values up to `step` stay. The file is replaced in one operation. Rows that
        cannot be read (the disk or its power failed) do not hold the run up: a warning names the copy that is kept of
        them.
        """
        self._waiting = []
        if _is_empty(self.path):
            return
        rows, broken = _split(self.path)
        if broken:
            copy = self.path.with_name(f"{self.path.stem}-damaged{self.path.suffix}")
            put(copy, self.path.read_bytes())
            warnings.warn(
                f"{self.path} has {len(broken)} broken rows, left out now: {broken[0]}; {copy} has all.", stacklevel=2
            )
        of_steps = (level is Level.STEP for level in levels(rows))
        kept = [r for r, of_step in zip(rows, of_steps, strict=True) if r.step <= step and (r.epoch < epoch or of_step)]
        if len(kept) < len(rows) or broken:
            text = _as_text([COLUMNS, *((*row[:2], _quoted(row.name), repr(row.value), row.time) for row in kept)])
            put(self.path, text.encode())

    def finalize(self, status: str) -> None:
        """Append what waits; `status` is not kept. The logger can be used again."""
        self.save()

    def _prepare(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if _is_empty(self.path):
            self.path.write_text(_as_text([COLUMNS]), encoding="utf-8", newline="")
        _check_header(self.path)
        _cut_torn_line(self.path)
        self._is_checked = True


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a metrics.csv in the order they were written; a last line that was cut off is left out.

    Raises FileNotFoundError, and ValueError naming file and line for a file of another kind.
    """
    rows, broken = _split(Path(path))
    if broken:
        raise ValueError(f"{path}, {broken[0]}, expected {','.join(COLUMNS)}.")
    return rows


def _split(path: Path) -> tuple[list[Row], list[str]]:
    """The rows of the file, and where it has others, in words."""
    _check_header(path)
    with open(path, "rb", opener=only_files) as file:
        text = file.read().decode("utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    reader = csv.reader(io.StringIO(whole, newline=""))
    next(reader)
    rows, broken = [], []
    while True:
        fields: list[str] = []
        try:
            fields = next(reader)
            step, epoch, name, value, seconds = fields
            rows.append(Row(_count(step), _count(epoch), _unquoted(name), float(value), float(seconds)))
        except StopIteration:
            return rows, broken
        except (ValueError, csv.Error):
            broken.append(f"line {reader.line_num}: found {','.join(fields)[:80]!r}")


def _count(text: str) -> int:
    if len(text) > 18 or (number := int(text)) < 0:
        raise ValueError(text[:20])
    return number


# What a spreadsheet takes for a formula when a cell begins with it; written with an apostrophe, which it hides.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def _quoted(name: str) -> str:
    return f"'{name}" if name.lstrip("'").startswith(_FORMULA) else name


def _unquoted(name: str) -> str:
    return name[1:] if name.startswith("'") and name.lstrip("'").startswith(_FORMULA) else name


def read_history(path: str | os.PathLike[str], num_epochs: int) -> dict[str, list[float]]:
    """The history that a metrics.csv records: a list of `num_epochs` floats by name, nan where nothing was logged.

    Without step values and without what logging adds (learning rates, speed, seconds). Raises like `read_rows`.
    """
    history: dict[str, list[float]] = {}
    rows = read_rows(path)
    for row, level in zip(rows, levels(rows), strict=True):
        if row.epoch < num_epochs and level is Level.EPOCH:
            history.setdefault(row.name, [math.nan] * num_epochs)[row.epoch] = row.value
    return history


class Level(Enum):
    """What a row tells of."""

    EPOCH = "an epoch's metric"
    CONTEXT = "what was added to an epoch's metrics"
    STEP = "a step value"


def levels(rows: Sequence[Row]) -> list[Level]:
    """What each row of a metrics.csv tells of, in the order in which they were written.

    `Logging` writes an epoch in one go: what it adds, "seconds" last, then the metrics, whatever their names are. Of
    rows that something else wrote the name decides: step values end in "_step".
    """
    found: list[Level] = []
    after, moment = False, None
    for row in rows:
        if (row.step, row.epoch, row.time) != moment:
            after, moment = False, (row.step, row.epoch, row.time)
        if after:
            found.append(Level.EPOCH)
        elif row.name.split("/")[0] in CONTEXT:
            found.append(Level.CONTEXT)
        else:
            found.append(Level.STEP if row.name.endswith("_step") else Level.EPOCH)
        after = after or row.name == "seconds"
    return found


def _as_text(rows: list[tuple[Any, ...]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _is_empty(path: Path) -> bool:
    """Whether nothing is there but maybe the beginning of the header.

    Whoever wrote it was killed, or the disk was full.
    """
    header = _as_text([COLUMNS]).encode()
    return not path.exists() or (path.stat().st_size < len(header) and header.startswith(path.read_bytes()))


def _check_header(path: Path) -> None:
    with open(path, encoding="utf-8", errors="replace", opener=only_files) as file:
        header = file.readline(1000).rstrip("\n")
    if header != ",".join(COLUMNS):
        raise ValueError(
            f"{path} is not a metrics.csv of weft: its first line is {header[:80]!r}, expected {','.join(COLUMNS)!r}. "
            "Choose another run_name or root_dir, or move the file away."
        )


def _cut_torn_line(path: Path) -> None:
    """Drop a last line without its end: the process that wrote it was killed."""
    with path.open("rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
