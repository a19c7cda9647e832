"""The files of a run's folder, whoever wrote them: read in bounded time and memory, or refused by name.

result = read_json(folder / "result.json", RESULT)      # a dict with values of these types, or ValueError
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weft.yamlfile import MAX_DEPTH, depth_of, only_files

MAX_BYTES = 16 << 20
"""Of a JSON file: result.json has some hundred bytes, a profile some thousand."""
MAX_ROWS_BYTES = 64 << 20
"""Of a metrics.csv that is drawn or compared; its rows take eight times as much in memory."""

Number, Count, Text = (int, float), (int,), (str,)
_NOTHING = (type(None),)
RESULT: dict[str, tuple[type, ...]] = {
    "epochs": Count,
    "steps": Count,
    "best_metric": (*Number, *_NOTHING),
    "best_epoch": (*Count, *_NOTHING),
    "stop_reason": Text,
    "seconds": Number,
    "seed": (*Count, *_NOTHING),
    "monitor": (*Text, *_NOTHING),
    "evaluations": Count,
    "search_stop": (*Text, *_NOTHING),
}
_WORDS = {int: "a whole number", float: "a number", str: "text", type(None): "null"}


def read_json(path: Path, types: Mapping[str, tuple[type, ...]] | None = None) -> dict[str, Any]:
    """The dict in a JSON file; the keys in `types`, where they are there, hold values of these types.

    Raises ValueError, naming the file, for anything else, and for one that is too long or nested too deep.
    """
    text = read_bytes(path, MAX_BYTES).decode("utf-8", errors="replace")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {str(error)[:200]}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds a {type(found).__name__}; expected a dict")  # noqa: TRY004, the file is wrong
    if depth_of(found) > MAX_DEPTH:
        raise ValueError(f"{path}: nested deeper than {MAX_DEPTH}")
    for key, kinds in (types or {}).items():
        if key in found and (wrong := _complaint(found[key], kinds)):
            raise ValueError(f"{path}: {key} is {str(found[key])[:60]!r}; expected {wrong}")
    return found


def _complaint(value: Any, kinds: tuple[type, ...]) -> str:
    expected = " or ".join(_WORDS[kind] for kind in kinds if not (kind is int and float in kinds))
    if type(value) not in kinds:
        return expected
    if isinstance(value, int) and abs(value) >= 1 << 63:
        return f"{expected} of at most 63 bits"
    return ""


def read_bytes(path: Path, limit: int) -> bytes:
    """What is in the file. Raises ValueError, naming it, if that is more than `limit` bytes."""
    with open(path, "rb", opener=only_files) as file:
        found = file.read(limit + 1)
    if len(found) > limit:
        raise ValueError(f"{path}: longer than {limit >> 20} MiB")
    return found


def printable(text: Any, limit: int = 300) -> str:
    """A text for a terminal: what would move its cursor, colour it or ring its bell is written out."""
    shown = str(text)[: limit + 1]
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
    return shown if len(shown) <= limit else f"{shown[:limit]}..."
