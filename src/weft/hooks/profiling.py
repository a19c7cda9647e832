"""Profiling by one keyword: where the time goes, and what the hardware does meanwhile.

    weft.Trainer(profiler="simple")      # a table by part and node: result.profile      (weft.hooks.timing)
    weft.Trainer(profiler="pytorch")     # torch.profiler, a few steps, for TensorBoard and Chrome
    weft.Trainer(profiler="advanced")    # cProfile: every function
    weft.Trainer(profiler=weft.hooks.PyTorchProfiler(wait=100, active=3, memory=True))
    weft.Trainer(profiler=anything)      # with start(), step() and stop()

Whatever can be watched is known by name: the phases of a step ("data", "forward", "backward", "optimizer"),
"evaluation", "checkpoint", each hook, and the nodes of the problem. A run folder also gets what was found, under
`profile/`. Of a LightningModule the parts are the same, its submodules are the nodes; in manual optimization "forward"
is what calls the module itself. In a compiled run the nodes are one graph and have no times of their own.
"""

from __future__ import annotations

import cProfile
import io
import json
import pstats
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.profiler import ProfilerAction, record_function, schedule

from weft.events import Hook
from weft.hooks.timing import SimpleProfiler

T = TypeVar("T")
MAX_ROWS = 30  # of the tables of "pytorch" and "advanced"


class PyTorchProfiler:
    """torch.profiler over a few steps, its ranges named after parts and nodes. Needs a run folder.

    `wait` steps are left out, `warmup` are traced and thrown away, `active` are kept; this `repeat` times (>= 1), then
    the run goes on at full speed. Numbers below those of a step (0, 0, 1, 1) raise ValueError. `memory`, `shapes`,
    `stacks`: what is recorded besides, each at a price. The folder's `profile/*.pt.trace.json` opens in TensorBoard
    (torch-tb-profiler), chrome://tracing and Perfetto.
    """

    needs_folder = True

    def __init__(
        self,
        wait: int = 5,
        warmup: int = 2,
        active: int = 3,
        repeat: int = 1,
        *,
        memory: bool = False,
        shapes: bool = False,
        stacks: bool = False,
    ) -> None:
        if wait < 0 or warmup < 0 or active < 1 or repeat < 1:
            raise ValueError(
                f"PyTorchProfiler: wait={wait}, warmup={warmup}, active={active}, repeat={repeat}; expected wait and "
                "warmup "
                "of at least 0 steps, active and repeat of at least 1."
            )
        self.wait, self.warmup, self.active, self.repeat = wait, warmup, active, repeat
        self.options: dict[str, Any] = {"profile_memory": memory, "record_shapes": shapes, "with_stack": stacks}
        self.folder: Path | None = None
        self.worker = socket.gethostname()
        self.files: list[Path] = []
        self.text = ""
        self.rows: list[dict[str, Any]] = []

    def start(self) -> None:
        """Begin the schedule."""
        self.files, self.rows, self.text = [], [], ""
        devices = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            devices.append(torch.profiler.ProfilerActivity.CUDA)
        times = schedule(wait=self.wait, warmup=self.warmup, active=self.active, repeat=self.repeat)
        self._profile = torch.profiler.profile(
            activities=devices, schedule=times, on_trace_ready=self._keep, **self.options
        )
        self._profile.start()

    def step(self) -> None:
        """A step is over."""
        if self._profile is not None:
            self._profile.step()
            if len(self.files) == self.repeat:  # done: nothing is left in the loop but the test above
                self.stop()

    def stop(self) -> None:
        """End; a recording that is going on is kept."""
        profile, self._profile = self._profile, None
        if profile is not None:
            profile.stop()

    @property
    def is_recording(self) -> bool:
        """Whether ranges are worth naming now."""
        return self._profile is not None and self._profile.current_action != ProfilerAction.NONE

    def watch(self, name: str, function: Callable[..., T]) -> Callable[..., T]:
        """`function` in a range of that name."""
        return _in_range(name, function, lambda: self.is_recording)

    def _keep(self, profile: torch.profiler.profile) -> None:
        """Write a trace and keep its table."""
        averages = profile.key_averages()
        self.text = averages.table(sort_by="self_cpu_time_total", row_limit=MAX_ROWS, max_name_column_width=40)
        self.rows = [
            {
                "name": e.key,
                "calls": e.count,
                "seconds": e.cpu_time_total / 1e6,
                "own_seconds": e.self_cpu_time_total / 1e6,
            }
            for e in averages
        ]
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        # the name by which torch-tb-profiler finds it; the contents are a Chrome trace
        path = self.folder / f"{self.worker}.{time.time_ns() // 1_000_000}.pt.trace.json"
        profile.export_chrome_trace(str(path))
        self.files.append(path)

    _profile: torch.profiler.profile | None = None

    def __str__(self) -> str:
        return self.text or "PyTorchProfiler: nothing was recorded."

    def to_dict(self) -> dict[str, Any]:
        """`files` (paths) and `rows`: name, calls, seconds, own_seconds of each operation and range."""
        return {"files": [str(path) for path in self.files], "rows": self.rows}

    def complaint(self, steps: int) -> str | None:
        """Why nothing was recorded in `steps` steps; None if something was."""
        if self.files:
            return None
        return (
            f"profiler='pytorch' recorded nothing: it begins after {self.wait} + {self.warmup} steps, and there were "
            f"{steps}. "
            "Pass weft.hooks.PyTorchProfiler(wait=0, warmup=0) or train longer."
        )


class AdvancedProfiler:
    """cProfile from the first step to the last: every Python function, by its own time.

    Costs a lot while it runs.
    """

    def start(self) -> None:
        """Begin."""
        self._profile = cProfile.Profile()
        self._profile.enable()

    def step(self) -> None:
        """Nothing is done for a step."""

    def stop(self) -> None:
        """End."""
        self._profile.disable()

    @property
    def stats(self) -> pstats.Stats:
        """What was found, as the standard library has it."""
        return pstats.Stats(self._profile, stream=io.StringIO())

    def __str__(self) -> str:
        stream = io.StringIO()
        pstats.Stats(self._profile, stream=stream).sort_stats("tottime").print_stats(MAX_ROWS)
        return stream.getvalue()

    def to_dict(self) -> dict[str, Any]:
        """`seconds` and `rows`: function, calls, seconds (with what it calls), own_seconds; the longest first."""
        stats: Any = self.stats
        rows = [
            {"function": f"{file}:{line}({name})", "calls": calls, "own_seconds": own, "seconds": whole}
            for (file, line, name), (_, calls, own, whole, _) in stats.stats.items()
        ]
        return {"seconds": stats.total_tt, "rows": sorted(rows, key=lambda row: -row["own_seconds"])}


_MAKERS: dict[str, Callable[[], Any]] = {
    "simple": SimpleProfiler,
    "pytorch": PyTorchProfiler,
    "advanced": AdvancedProfiler,
}


class Profiling(Hook):
    """Starts, steps and stops a profiler, shows it the parts of the training and the nodes, and keeps what it finds.

    `profiler`: "simple", "pytorch", "advanced", or an object with start, step and stop; TypeError for anything else.
    `result.profile` is what was found, an object of your own itself.
    """

    def __init__(self, profiler: Any) -> None:
        self.profiler = _MAKERS[profiler]() if isinstance(profiler, str) else profiler
        if missing := [name for name in ("start", "step", "stop") if not callable(getattr(self.profiler, name, None))]:
            raise TypeError(
                f"profiler={profiler!r}: expected 'simple', 'pytorch', 'advanced' or an object with start(), step() "
                "and "
                f"stop(); {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing."
            )
        self._watch: Callable[[str, Callable], Callable] | None = getattr(self.profiler, "watch", None)
        if self._watch is None and not isinstance(self.profiler, AdvancedProfiler):
            self._watch = _ranges  # of torch.profiler, which may be what the object starts
        self._patched: list[nn.Module] = []
        self._started = False

    def watch_part(self, name: str, function: Callable[..., T]) -> Callable[..., T]:
        """`function` as the profiler wants it called; see `weft.step.instrument`."""
        return function if self._watch is None else self._watch(name, function)

    def on_fit_start(self, trainer: Any) -> None:
        run = trainer.run
        if run.run_dir is not None:
            self.profiler.folder = run.run_dir / "profile" if isinstance(self.profiler, PyTorchProfiler) else None
        if isinstance(self.profiler, PyTorchProfiler):
            if run.run_dir is None:
                raise ValueError(
                    "profiler='pytorch' writes a trace, but this run has no folder (fast_dev_run writes nothing)."
                )
            self.profiler.worker = f"{socket.gethostname()}_{run.fabric.global_rank}"
        if self._watch is not None and not run.state.config.compile:  # a graph has no nodes any more
            for name, module in [("problem", run.problem), *nodes_of(run.problem)]:
                if "forward" not in vars(module):
                    module.forward = self._watch(name, module.forward)
                    self._patched.append(module)
        self.profiler.start()
        self._started = True

    def on_step_end(self, trainer: Any, batch: Any, loss: Any) -> None:
        self.profiler.step()

    def on_epoch_end(self, trainer: Any, metrics: Any) -> None:
        if isinstance(self.profiler, SimpleProfiler):
            self.profiler.epoch()

    def on_fit_end(self, trainer: Any, result: Any) -> None:
        """Stop, put the nodes back as they were, and keep the profile in the result and in the run's folder."""
        for module in self._patched:
            del module.forward
        self._patched = []
        if not self._started:  # the fit failed before
            return
        self._started = False
        self.profiler.stop()
        found = self.profiler.profile if isinstance(self.profiler, SimpleProfiler) else self.profiler
        result.profile = found
        run = trainer.run
        if (
            isinstance(found, PyTorchProfiler)
            and result.stop_reason != "error"
            and (complaint := found.complaint(run.progress.step))
        ):
            run.state.warn_once(complaint)
        if run.run_dir is not None and run.is_global_zero and hasattr(found, "to_dict"):
            folder = run.run_dir / "profile"
            folder.mkdir(exist_ok=True)
            (folder / "profile.txt").write_text(f"{found}\n")
            (folder / "profile.json").write_text(json.dumps(found.to_dict(), indent=1))


def nodes_of(problem: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The nodes of a weft or NeuroMANCER problem as ("node loop.policy", module), inner ones by their path.

    Of any other module its children, by their attributes' names.
    """

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        for number, node in enumerate(getattr(module, "nodes", None) or ()):
            name = prefix + str(getattr(node, "name", None) or number)
            yield f"node {name}", node
            yield from walk(node, f"{name}.")

    found = list(walk(problem, ""))
    yield from found or [(f"node {name}", child) for name, child in problem.named_children()]


def _ranges(name: str, function: Callable[..., T]) -> Callable[..., T]:
    return _in_range(name, function, lambda: True)


def _in_range(name: str, function: Callable[..., T], is_recording: Callable[[], bool]) -> Callable[..., T]:
    """`function` in a `record_function` range while something records."""

    def ranged(*args: Any, **kwargs: Any) -> T:
        if not is_recording():
            return function(*args, **kwargs)
        with record_function(name):
            return function(*args, **kwargs)

    return ranged
