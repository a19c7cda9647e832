"""The result of a run that has ended, read from its folder."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from weft.checkpoint import folder as checkpoints
from weft.loggers.csv import read_history
from weft.loop.result import FitResult
from weft.records.foreign import RESULT, read_json


def load_result(run_dir: str | Path) -> FitResult:
    """The FitResult of a finished run, read from its folder `run_dir`.

    Its history comes from metrics.csv, its `last_weights` from `last`. Raises FileNotFoundError naming what is missing,
    and ValueError naming a file that no run writes.
    """
    folder = Path(run_dir)
    if not (folder / "result.json").is_file():
        raise FileNotFoundError(f"{folder} holds no result.json: no run finished there.")
    plain = read_json(folder / "result.json", RESULT)
    known = {f.name for f in fields(FitResult)} - {"history", "last_weights", "run_dir", "profile"}
    if wrong := {"epochs", "steps", "best_metric", "best_epoch", "stop_reason"} - set(plain) or set(plain) - known:
        raise ValueError(
            f"{folder / 'result.json'} is no result of a run: it lacks, or should not have, {min(wrong)!r}."
        )
    if not 0 <= plain["epochs"] <= 10**7:
        raise ValueError(f"{folder / 'result.json'}: epochs is {plain['epochs']}; expected at most ten million.")
    history = read_history(folder / "metrics.csv", plain["epochs"])
    last: dict[str, Any] = {}
    if (folder / "checkpoints" / "last").is_file():
        saved = checkpoints.load(folder / "checkpoints", "last")[0]
        last = {"last_weights": dict(saved["problem"]), "last_others": dict(saved.get("others", {}))}
    return FitResult(**plain, history=history, **last, run_dir=folder)
