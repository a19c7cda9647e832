"""The weights file that LitTrainer writes."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from weft.checkpoint import archive
from weft.checkpoint.weights import state_of
from weft.events import Hook
from weft.types import suggest


class WeightsFile(Hook):
    """Keeps the best weights of a fit in one file (the last ones if nothing is monitored), in the first process only.

    Written at the end, and at a better epoch whenever all writing so far took less than a tenth of the time.
    A file that this fit did not write is never replaced: "-v1", "-v2", ... is added to the name.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self._begin()

    def _begin(self) -> None:
        self.written: Path | None = None
        self.values: dict[str, Any] = {}  # of the epoch whose weights are to be written, for the name
        self.is_current = True
        self.started, self.spent = time.perf_counter(), 0.0

    def on_fit_start(self, trainer: Any) -> None:
        self._begin()

    def on_epoch_end(self, trainer: Any, metrics: Mapping[str, float]) -> None:
        run = trainer.run
        if run.state.epoch.improved or run.best.weights is None:
            self.values, self.is_current = {**metrics, "epoch": trainer.current_epoch, "step": run.progress.step}, False
        if (
            run.state.epoch.improved
            and not run.state.processes.in_shards
            and self.spent <= 0.1 * (time.perf_counter() - self.started)
        ):
            self.write(trainer)

    def state_dict(self) -> dict[str, Any]:
        written = None if self.written is None else str(self.written)
        return {"written": written, "values": dict(self.values), "is_current": self.is_current}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.written = None if state_dict["written"] is None else Path(state_dict["written"])
        self.values, self.is_current = dict(state_dict["values"]), state_dict["is_current"]

    def on_fit_end(self, trainer: Any, result: Any) -> None:
        if not self.values and result.best_epoch is not None:  # the best are from before this fit
            self.values, self.is_current = {"epoch": result.best_epoch, "step": result.steps}, False
        if not self.is_current:
            self.write(trainer)

    def write(self, trainer: Any) -> None:
        """Write the weights that the name tells of, and remove the file before."""
        run, began = trainer.run, time.perf_counter()
        weights = run.state.processes.whole(
            run.best.weights.state_dict() if run.best.weights is not None else state_of(run.problem)
        )
        if not run.is_global_zero or run.state.config.fast_dev_run or not weights:
            return
        state = {
            "state_dict": {f"problem.{name}": value for name, value in weights.items()},
            "epoch": self.values["epoch"],
            "global_step": self.values["step"],
            "pytorch-lightning_version": version("lightning"),  # without it Lightning's own loader refuses a file
        }
        trainer.lit_hooks.call("on_save_checkpoint", trainer.lit_problem, state)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path()
        archive.write(path, state)
        if self.written is not None and self.written != path:
            self.written.unlink(missing_ok=True)
        self.written, self.is_current = path, True
        self.spent += time.perf_counter() - began

    def _path(self) -> Path:
        def filled(match: re.Match[str]) -> str:
            name, form = match[1], match[2] or ""
            if name not in self.values:
                raise ValueError(f"weight_name={self.name!r}: there is no {name!r}{suggest(name, self.values)}.")
            return f"{name}={self.values[name]:{form}}"

        stem = re.sub(r"\{(\w+):?([^}]*)\}", filled, self.name).removesuffix(".ckpt")
        number, path = 0, self.folder / f"{stem}.ckpt"
        while path.exists() and path != self.written:
            number += 1
            path = self.folder / f"{stem}-v{number}.ckpt"
        return path
