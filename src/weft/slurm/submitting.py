"""weft.submit: a run as a job of SLURM."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from weft import yamlfile
from weft.recipes.schema import ConfigError
from weft.slurm import events
from weft.slurm.freezing import freeze, in_copy
from weft.slurm.script import batch_script


@dataclass(frozen=True)
class Submitted:
    """A run that was submitted: where it is, how it is, and how to end it."""

    folder: Path
    """The run's folder; `submit/` in it holds the script, the logs, and the code as it was."""
    job: str
    """SLURM's number of the job; "" after a dry run."""
    script: str = ""
    """The batch script."""

    @property
    def state(self) -> str:
        """ "queued", "running", "preempted", "finished", "failed", "stuck", "cancelled", or "lost".

        Read from the run's folder. Only what has no end there is asked for in SLURM's queue: a job that is gone without
        a word, as with its machine, is "lost".
        """
        return events.states([self.folder]).get(self.folder, "queued")

    def log(self) -> str:
        """What the job printed so far, over all its restarts."""
        return "".join(p.read_text(errors="replace") for p in sorted((self.folder / events.FOLDER).glob("job-*.log")))

    def cancel(self) -> None:
        """Take the job out of the queue, or end it. Raises RuntimeError with SLURM's words if that fails."""
        if self.state not in events.ENDS:
            _call("scancel", *events.jobs_of(self.folder))
            events.note(self.folder, "cancelled")

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the end, at most `timeout` seconds, and return the FitResult of the run, or what the function gave.

        Raises RuntimeError with the end of the log where it did not finish, TimeoutError where it takes longer.
        """
        until = None if timeout is None else time.monotonic() + timeout
        pause = 0.2
        while (state := self.state) not in (*events.ENDS, "lost"):
            if until is not None and time.monotonic() > until:
                raise TimeoutError(f"job {self.job} is {state} after {timeout} s; it goes on, and so may waiting.")
            time.sleep(pause)
            pause = min(2.0, pause * 1.5)
        if state != "finished":
            raise RuntimeError(f"job {self.job} ({self.folder}) is {state}; the end of its log:\n{self.log()[-2000:]}")
        returned = self.folder / events.FOLDER / "returned.json"
        if returned.exists():
            return json.loads(returned.read_text())
        from weft.records.results import load_result

        return load_result(self.folder)


def submit(
    run: Mapping[str, Any] | str | Path | Callable[..., Any],
    *,
    slurm: Mapping[str, Any] | None = None,
    name: str | None = None,
    root_dir: str | Path = "runs",
    devices: int | None = None,
    num_nodes: int | None = None,
    setup: Sequence[str] | str = (),
    python: str | None = None,
    grace: int = 300,
    dry_run: bool = False,
) -> Submitted:
    """Submit a run to SLURM and return a handle to it; with `dry_run` nothing is submitted, its `script` is there.

    `run`: a config (a dict, or the path of a YAML file), or a function, of a job or of nothing, which trains by
    `weft.Trainer(**job.options, ...)` and returns a FitResult or plain data. `slurm`: options of sbatch by name
    (partition, time, gres, mem, account, cpus_per_task, ...). `name`: of the run's folder below `root_dir`; None: the
    config's `run_name`, or the time. `devices` and `num_nodes`: tasks a node, and nodes; None: what the config says.
    `setup`: lines of bash before Python starts (modules, conda). `python`: what starts it. `grace`: seconds
    (>= 60) before the time limit at which the run saves and is requeued; the slowest step and save are added.

    The job runs in a copy of the code below the working folder, in `submit/code` of the run's folder, with links to
    what is no code: what is edited later changes nothing. It is requeued after the time limit and after preemption, and
    goes on from its last checkpoint with the same bits, until it is done or a restart made no step. No variable of the
    environment is written into a file.

    Raises ConfigError for a wrong config or option, FileExistsError where a run of this name is queued or running,
    RuntimeError where there is no SLURM, or it refuses.
    """
    lines = [setup] if isinstance(setup, str) else list(setup)
    if not isinstance(grace, int) or grace < 60:
        raise ConfigError([f"grace={grace!r}: expected whole seconds, at least 60"])
    config = None if callable(run) else _checked(run)
    trainer: dict[str, Any] = (config or {}).get("trainer", {})
    devices = devices if devices is not None else trainer.get("devices", 1)
    nodes: int = num_nodes if num_nodes is not None else trainer.get("num_nodes", 1)
    if not isinstance(devices, int) or devices < 1:
        raise ConfigError(
            [f"devices={devices!r}: expected a number of devices a node, as SLURM starts a task for each"]
        )
    name = str(name or trainer.get("run_name") or f"{datetime.now():%Y-%m-%d_%H-%M-%S}")
    if not re.fullmatch(r"[\w][\w.\-+=]*", name):
        raise ConfigError([f"name={name!r}: expected letters, digits and ._-+= only"])
    folder = (Path(root_dir) if root_dir != "runs" else Path(trainer.get("root_dir") or root_dir)).resolve() / name
    place = folder / events.FOLDER
    text = batch_script(
        ["-m", "weft.slurm.job", str(folder), str(grace)],
        name=name,
        logs=place,
        code=place / "code",
        slurm=slurm or {},
        tasks=devices,
        nodes=nodes,
        setup=lines,
        python=python,
        grace=grace,
    )
    if dry_run:
        return Submitted(folder, "", text)
    before = _make_room(folder)
    if step := events.last_step(folder):
        warnings.warn(f"{folder} holds a run of {step} steps, which the job goes on with.", stacklevel=2)
    try:
        if callable(run):
            _keep_function(run, place)
        else:
            own = {"root_dir": str(folder.parent), "run_name": name, "resume": "auto"}
            kept = {"checkpoint": True, **trainer, **own, "devices": devices, "num_nodes": nodes}
            moved = in_copy({**(config or {}), "trainer": kept}, f"{place / 'code'}/", folder.parent)
            (place / "config.yaml").write_text(yamlfile.dump(moved))
        freeze(Path.cwd(), place / "code", leave_out=folder.parent)
        (place / "job.sh").write_text(text)
        return Submitted(folder, send(place / "job.sh", folder), text)
    except BaseException:
        _take_back(place, before)
        raise


def send(script: Path, folder: Path) -> str:
    """Hand a script to sbatch, write that down in the run's folder, and return the job's number."""
    job = _call("sbatch", "--parsable", str(script)).strip().partition(";")[0]
    events.note(folder, "submitted", job=job)
    return job


def _checked(run: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """The config in weft's own words, checked without importing what it names: the job does that."""
    from weft.recipes import recipe

    if isinstance(run, str | Path) and Path(run).suffix == ".py":
        raise ConfigError(
            [f"{run}: expected a config (YAML); what a script does is submitted from it, by weft.submit(function)"]
        )
    source = recipe.Source(dict(run), [], []) if isinstance(run, Mapping) else recipe.read(run)
    return recipe.check(source, needed=("problem", "data"), imports=False).config


def _keep_function(function: Callable[..., Any], place: Path) -> None:
    import cloudpickle

    with open(place / "function.pkl", "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
        cloudpickle.dump(function, file)


def _make_room(folder: Path) -> Path | None:
    """The run's folder, with nothing in `submit/` that is not this submission's.

    What was is kept in `submit-1`, ...: returns where.
    """
    place, aside = folder / events.FOLDER, None
    if place.exists():
        jobs = events.jobs_of(folder)
        if jobs and Submitted(folder, jobs[-1]).state not in (*events.ENDS, "lost"):
            raise FileExistsError(
                f"{folder} is the run of job {jobs[-1]}, which is not over; choose another name, or cancel it."
            )
        number = 1
        while (aside := folder / f"{events.FOLDER}-{number}").exists():
            number += 1
        place.rename(aside)
    place.mkdir(parents=True)
    return aside


def _take_back(place: Path, before: Path | None) -> None:
    """Nothing was submitted: the run's folder as it was."""
    shutil.rmtree(place)
    if before is not None:
        before.rename(place)
    with suppress(OSError):  # not empty
        place.parent.rmdir()
        place.parents[1].rmdir()


def _call(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except FileNotFoundError:
        raise RuntimeError(
            f"There is no {command[0]} on this machine; submit from a login node of the cluster."
        ) from None
    if done.returncode:
        raise RuntimeError(done.stderr.strip() or f"{command[0]}: exit status {done.returncode}")  # it says who it is
    return done.stdout
