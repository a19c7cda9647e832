"""What a sweep is asked for, and its result."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from weft.config import Count, Natural, at_least, check, with_manual
from weft.recipes.schema import ConfigError
from weft.types import suggest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Space = Mapping[str, Any]


@with_manual
@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """How a sweep searches."""

    trials: Count | None = None
    """How many trials are to be completed, pruned ones included (>= 1); None: 20, or the whole grid."""
    workers: Count = 1
    """How many trials run at the same time (>= 1)."""
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    """Who proposes settings: "tpe" learns from the trials before, "random" does not, "grid" tries all."""
    pruner: Literal["median", "halving", "none"] = "none"
    """Who ends a bad trial at the end of an epoch: "median", "halving" (asynchronous successive halving), or nobody."""
    metric: str | None = None
    """The metric to optimise; None: the one that decides about best weights."""
    mode: Literal["min", "max"] = "min"
    """Whether smaller ("min") or larger ("max") is better."""
    seed: Natural | None = None
    """Seed of the sampler (>= 0); None: random."""
    name: str = "sweep"
    """The name of the sweep: its folder below root_dir, and its study in the database."""
    root_dir: str = "runs"
    """The folder that the sweep's own folder goes into."""
    storage: str | None = None
    """A database by URL (postgresql://..., mysql://...); None: a journal in the sweep's folder, machines share it."""
    max_failures: Natural = 3
    """After more trials than this that raised an error, the sweep ends with the first one (>= 0)."""
    take_over: bool = False
    """Treat trials that run on other machines as lost, and go on with them here."""
    on: Literal["local", "slurm"] = "local"
    """Where the workers run: processes on this machine, or an array of jobs of SLURM."""
    slurm: dict[str, Any] | None = None
    """Options of sbatch for on="slurm": partition, time, gres, mem, ..."""
    setup: list[str] | None = None
    """Lines of bash before Python starts in a job (modules, conda)."""
    grace: Annotated[int, at_least(60)] = 300
    """Seconds before a job's time limit at which its trial is saved and the job goes back into the queue (>= 60 s)."""

    def __post_init__(self) -> None:
        check(self)
        if self.on == "local" and (without := [n for n in ("slurm", "setup") if getattr(self, n)]):
            raise ConfigError([f"{without[0]} has no effect with on='local'; give on='slurm'"])


@dataclass
class SweepResult:
    """What a sweep found: the best settings, their value, and all trials."""

    best_params: dict[str, Any]
    best_value: float | None
    best_trial: int | None
    """The number of the best trial; its run is in the folder `trial-NNNN`."""
    trials: list[dict[str, Any]]
    """All trials in order: number, state ("complete", "pruned", "fail"), value, params, and what the run said."""
    folder: Path
    name: str
    storage: str
    mode: Literal["min", "max"] = "min"
    """Whether smaller or larger values are better."""

    @property
    def dashboard(self) -> str:
        """The command that shows the sweep in a browser (`pip install optuna-dashboard`)."""
        return f"optuna-dashboard {self.storage}"

    def __repr__(self) -> str:
        counts = {state: sum(t["state"] == state for t in self.trials) for state in ("complete", "pruned", "fail")}
        said = ", ".join(f"{n} {state}" for state, n in counts.items() if n)
        best = (
            f"; best {self.best_value:.6g} in trial {self.best_trial} with {self.best_params}"
            if self.best_value is not None
            else ""
        )
        return f"SweepResult({said}{best}; {self.folder})"

    def save(self) -> Path:
        """Write it into the sweep's folder, as `sweep.json`, whole or not at all."""
        path, new = self.folder / "sweep.json", self.folder / f"sweep.json.{os.getpid()}"
        new.write_text(json.dumps({**asdict(self), "folder": str(self.folder)}, indent=1))
        return new.replace(path)

    def to_dataframe(self) -> Any:
        """The trials as a pandas DataFrame, one row each. Needs pandas."""
        import pandas

        return pandas.DataFrame([{**t, **t["params"]} for t in self.trials]).drop(columns="params")

    def plot(self, axes: Any = None) -> list[Axes]:
        """The trials' values in order and over each parameter, on matplotlib axes (see `weft.plot.search`)."""
        from weft import plots

        return plots.search(self, axes)

    def _repr_html_(self) -> str:
        import html

        from weft.records.charts import STYLE, Line, chart
        from weft.records.tables import table

        values = {t["number"]: t["value"] for t in self.trials if t["value"] is not None}
        names = list(dict.fromkeys(name for t in self.trials for name in t["params"]))
        rows = [(t["number"], t["state"], t["value"], *(t["params"].get(n, "-") for n in names)) for t in self.trials]
        picture = chart("value", [Line("value", values)], "trial", mark=self.best_trial)
        style = f"<style>{STYLE[STYLE.index('.charts') :]}</style>"
        told = f"<p>{html.escape(repr(self))}<br><code>{html.escape(self.dashboard)}</code></p>"
        return f"{style}{told}{picture}{table(rows, ('trial', 'state', 'value', *names))}"


def space_complaints(space: Any, sampler: str) -> list[str]:
    """What is wrong with a search space, one line each."""
    if not isinstance(space, Mapping) or not space:
        return [f"space={space!r}: expected a dict of choices or ranges by name"]
    wrong = []
    for name, spec in space.items():
        if isinstance(spec, list | tuple):
            ends = [v for v in spec if isinstance(v, int | float) and not isinstance(v, bool)]
            if isinstance(spec, tuple) and len(ends) == 2:
                way = f"{{'low': {ends[0]}, 'high': {ends[1]}}} for a range, or a list for choices"
                wrong.append(f"space.{name}={spec!r}: a tuple of two numbers; expected {way}")
            elif not spec or not all(v is None or isinstance(v, bool | int | float | str) for v in spec):
                wrong.append(f"space.{name}={spec!r}: expected a list of numbers, texts, true, false or null")
            continue
        if not isinstance(spec, Mapping):
            wrong.append(f"space.{name}={spec!r}: expected a list of choices, or {{low, high}}")
            continue
        known = ("low", "high", "log", "step")
        wrong += [
            f"space.{name}.{k}={spec[k]!r}: there is no such key{suggest(str(k), known)}"
            for k in spec
            if k not in known
        ]
        low: Any = spec.get("low")
        high: Any = spec.get("high")
        if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in (low, high)) or low > high:
            wrong.append(f"space.{name}={dict(spec)!r}: expected numbers with low <= high")
        elif spec.get("log") and low <= 0:
            wrong.append(f"space.{name}.low={low!r}: must be greater than 0 with log: true")
        elif spec.get("log") and spec.get("step"):
            wrong.append(f"space.{name}: expected log or step, not both")
        elif sampler == "grid" and not spec.get("step"):
            wrong.append(f"space.{name}: a grid needs a list of choices, or a step")
    return wrong
