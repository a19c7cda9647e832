"""The state of a run, grouped by what it belongs to. Services take it, or less of it; none of them takes the run.

    state.progress          how far it is                       state.epoch     the open epoch and what it measured
    state.training          what is trained, and by what        state.step      the open step
    state.feed              what it is trained on               state.kept      what saving and resuming need to know
    state.control           whether and why it ends             state.hooks     what listens

What is trained is decided in `training`, what is saved in `weft.loop.contents.state_of_run`, and what a batch counts
for in `weft.data.batches.num_examples`, or by what the step returns (`weft.step.metrics.counted`).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from weft.checkpoint.hidden import attributes
from weft.config import TrainerConfig
from weft.data.batches import num_batches, within
from weft.data.data import Data
from weft.devices import seeding
from weft.devices.processes import Processes
from weft.devices.signals import Interruption
from weft.events import AT_REST, EVENTS
from weft.step.history import Best, History, Progress
from weft.step.metrics import Means, check_scalars, whole_metrics
from weft.step.optimizers import Others
from weft.step.phase import Phase
from weft.step.throughput import Throughput

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from weft.step.owner import Owner
    from weft.step.schedules import Scheduled


@dataclass
class Trial:
    """A step that is only tried, as while a graph is made: what it is told of epoch and step, and what it asked for."""

    progress: Progress
    logged: dict[str, Any] = field(default_factory=dict)
    wants_to_stop: bool = False


trial: ContextVar[Trial | None] = ContextVar("trial", default=None)
"""Of this thread alone: all others see the run as it is."""

Update = Callable[[Any], Tensor]
"""Batch (a list of batches when accumulating) -> the loss, detached and still on the device."""


ROW_NAMES = ("epoch", "step", "time")
"""Names that a row of metrics.csv has for itself."""


FOUND_AGAIN = ("max_steps", "max_time")
"""Reasons to stop that are no part of what is saved: whoever goes on finds them again, or has other limits."""


class Stage(Enum):
    """What is under way. Only at rest is the state of a run whole; the value is its name in an error."""

    REST = ""
    UPDATE = "an update"
    STEP_HOOKS = "the calling of hooks after a step"
    EVALUATION = "an evaluation"
    EPOCH_END = "the end of an epoch"


@dataclass
class Training:
    """What is trained, and by what."""

    phases: list[Phase]
    optimizers: dict[str, Optimizer] = field(default_factory=dict)
    schedules: dict[str, Scheduled] = field(default_factory=dict)
    made: dict[str, str] = field(default_factory=dict)
    """What optimizers and schedulers were made with, in words (of a run with a folder)."""
    compile_choice: str = "eager"
    frozen: list[tuple[nn.Parameter, bool]] = field(default_factory=list)
    """Parameters that do not train in this phase, and whether they did before."""
    others: Others = field(default_factory=Others)
    """What the optimizers hold and the problem does not register."""
    registered: dict[int, nn.Parameter] = field(default_factory=dict)
    """What the problem had that requires grad when the optimizers of this phase were there."""
    outside: dict[int, Any] | None = None
    """In the first update of a phase, what requires grad besides (`trained.outside_of`); None: not looked for yet."""
    looks: int = 0
    """Updates of the phase whose losses are still looked at."""
    judged: set[int] = field(default_factory=set)
    """The tensors that were found where losses may reach them, by id, trained ones included."""
    unknown: dict[int, Any] = field(default_factory=dict)
    """Parameters that losses reached and that were found nowhere, with `looks` of then: made in the step, or hidden."""

    def train_by(self, optimizers: dict[str, Optimizer], made: dict[str, str]) -> None:
        """These from here on, which were `made` so; schedules are those that follow."""
        self.optimizers, self.schedules, self.made, self.registered = optimizers, {}, made, {}

    def step_by(self, schedules: dict[str, Scheduled], made: Mapping[str, str] | None = None) -> None:
        """These schedules from here on, which were `made` so."""
        self.schedules, self.made = schedules, {**self.made, **(made or {})}

    def register(self, problem: nn.Module) -> None:
        """Know what `problem` has to train when the optimizers are new, not in a later fit that goes on with them."""
        self.registered = self.registered or {id(p): p for p in problem.parameters() if p.requires_grad}

    def judge(self, tensors: set[int]) -> None:
        """Know these, by id: where losses may reach them was looked at."""
        self.judged = tensors

    def watch_for(self, outside: dict[int, Any], looks: int) -> None:
        """Have losses of so many updates looked at, the open one included, for these."""
        self.outside, self.looks, self.unknown = outside, looks, self.unknown if looks else {}

    def meets_again(self, p: nn.Parameter) -> bool:
        """Whether the losses of the update before reached this parameter of unknown origin too."""
        return self.unknown.setdefault(id(p), (self.looks, p))[0] > self.looks  # it is kept: no id is used twice

    def turn(self, to: str) -> None:
        """Optimizers that train at other weights than they evaluate (schedule-free ones) turn to "train" or "eval"."""
        for optimizer in self.optimizers.values():
            getattr(optimizer, to, int)()


@dataclass
class Feed:
    """What is trained on: the data, its batches by split, the seed of their order, and how the data is made."""

    seed: int
    data: Any = None
    splits: dict[str, Any] = field(default_factory=dict)
    make: Callable[[], Data] | None = None

    def use(self, data: Data, splits: dict[str, Any]) -> None:
        """Train, evaluate and predict with `data`, in these batches by split, from here on."""
        self.data, self.splits = data, splits


@dataclass
class Epoch:
    """The open epoch: what it measured, and while it closes its metrics."""

    is_open: bool = False
    means: Means = field(default_factory=Means)
    logged: Means = field(default_factory=Means)
    recent: Means = field(default_factory=Means)
    """Since the last time that step values were logged."""
    evaluated: dict[str, float] = field(default_factory=dict)
    closing: dict[str, float] | None = None
    measured: set[str] = field(default_factory=set)
    """The names that the training data and evaluations gave, while the epoch closes."""
    monitor: str | None = None
    improved: bool = False
    throughput: Throughput = field(default_factory=Throughput)
    clock: float = 0.0
    seconds: float = 0.0
    steps_before: int | None = None
    """Steps of the run when it began, None where it was resumed in its middle."""

    def put_back(self, saved: Mapping[str, Any]) -> None:
        """Go on with what an open epoch had measured when it was `saved`."""
        for name in ("means", "logged", "recent"):
            getattr(self, name).load_state_dict(saved[name])
        self.evaluated = dict(saved["evaluated"])


@dataclass
class Step:
    """The open step."""

    batch: Any = None
    evaluating: tuple[Any, int] | None = None
    """The means of an evaluation and the examples of its batch: where `log` adds to."""
    measured: list[tuple[dict[str, Tensor], int]] | None = None
    """What the last step measured, if a hook sets it to []."""
    statistics: Any = None
    """A copy of what normalisation layers had learned before (`nonfinite.RunningStatistics`)."""
    doubts: Any = None
    """Steps on a GPU that are looked at later (`doubts.Doubts`)."""

    def note_in(self, doubts: Any) -> None:
        """Have steps looked at later."""
        self.doubts = doubts


@dataclass
class Kept:
    """What a run keeps in mind so that it can be saved and gone on with."""

    attributes_at_start: dict[str, Any]
    """Of the problem's modules, outside of their state dict."""
    run_dir: Path | None = None
    random_before_data: dict[str, Any] | None = None
    random_before_epoch: dict[str, Any] | None = None
    random_to_resume: dict[str, Any] | None = None
    generators_before_epoch: dict[str, Any] = field(default_factory=dict)
    """States of the generators that the loader of the training data has of its own."""
    generators_to_resume: dict[str, Any] = field(default_factory=dict)
    data_prints: dict[str, str] = field(default_factory=dict)
    in_force: dict[str, str] = field(default_factory=dict)
    """Settings of the checkpoint that the run goes on with, where the options now say something else."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Plain values of weft's own hooks; what a checkpoint lacks of them starts anew."""
    resumed_from: Path | None = None
    best_saved: tuple[Any, ...] | None = None
    """Name, value and epoch of the best weights that `best` points to."""
    writer: Any = None
    """Of checkpoints in the background (`checkpoint.background.BackgroundWriter`)."""
    save_wanted: bool = False
    """A hook has asked for a checkpoint while others had not seen the step yet."""

    def begin_data(self, random: dict[str, Any]) -> None:
        """Know in which random state the data is made that follows."""
        self.random_before_data, self.data_prints = random, {}

    def begin_epoch(self, random: dict[str, Any] | None = None, generators: Mapping[str, Any] | None = None) -> None:
        """Know in which random state an epoch begins (None: its data know their order)."""
        self.random_before_epoch, self.generators_before_epoch = random, dict(generators or {})
        self.take_random()

    def put_back_random(self, saved: Mapping[str, Any]) -> None:
        """Know what a checkpoint says of random numbers: before the data, before the open epoch, and at its place."""
        self.random_before_data = saved["random_before_data"]
        self.random_before_epoch = saved["random_before_epoch"]
        self.generators_before_epoch = saved["generators_before_epoch"]
        self.random_to_resume, self.generators_to_resume = saved["random"], saved["generators"]

    def goes_on_from(self, path: Path | None, run_dir: Path | None) -> None:
        """Write into `run_dir` what follows the checkpoint `path`."""
        self.resumed_from, self.run_dir = path, run_dir

    def has_best(self, best: Best) -> None:
        """A checkpoint holds these best weights."""
        self.best_saved = best.place

    def take_random(self) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """The random state that a checkpoint says to go on in, once; then (None, {})."""
        taken = self.random_to_resume, self.generators_to_resume
        self.random_to_resume, self.generators_to_resume = None, {}
        return taken


@dataclass
class Control:
    """Whether and why the run ends, and what is under way."""

    number: int = 0
    """How many fits of this problem came before in this process."""
    continues: bool = False
    """Whether it goes on with a fit that was interrupted, here or in another process."""
    begun: bool = False
    reopened: bool = False
    """Whether it resumes in the middle of an epoch."""
    epochs: int | None = None
    """As many as this fit was asked to train, None: as many as the options say."""
    left_open: bool = False
    """The run stops within an epoch, whose checkpoint is written: its closing is only for what the fit returns."""
    ending: bool = False
    stage: Stage = Stage.REST
    stop_reason: str | None = None
    interruption: Interruption = field(default_factory=Interruption)
    leaving: int = 0
    """The signal that ends the run at the next rest."""
    warned: set[str] = field(default_factory=set)
    clock: float = field(default_factory=time.perf_counter)
    seconds_before: float = 0.0

    def begin(self) -> None:
        """Hooks know that the fit has started: from here on the run trains."""
        self.begun = True

    @property
    def is_new(self) -> bool:
        """Whether no run of this problem came before."""
        return self.number == 0


@dataclass
class Listeners:
    """The hooks of a run, and the functions bound to each event."""

    hooks: list[Any] = field(default_factory=list)
    bound: dict[str, list[Callable[..., Any]]] = field(default_factory=lambda: {e: [] for e in (*EVENTS, AT_REST)})

    def __iter__(self) -> Iterator[Any]:
        return iter(self.hooks)


@dataclass
class RunState:
    """Everything that decides how a run goes on."""

    trainer: Owner
    problem: nn.Module
    training: Training
    feed: Feed
    kept: Kept
    control: Control
    progress: Progress = field(default_factory=Progress)
    history: History = field(default_factory=History)
    best: Best = field(default_factory=Best)
    epoch: Epoch = field(default_factory=Epoch)
    step: Step = field(default_factory=Step)
    hooks: Listeners = field(default_factory=Listeners)
    processes: Processes = field(default_factory=Processes)
    fabric: Fabric = None  # type: ignore[assignment]  # made when the run is prepared

    def __post_init__(self) -> None:
        self.epoch.means.whole = whole_metrics(self.metrics, "train")

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """Metrics besides what steps return: those that the problem brings (`Supervised`), and the trainer's."""
        own = getattr(self.problem, "own_metrics", None)
        if not own:
            return self.trainer.metric_functions
        from weft.step.measures import measures_of

        return {**measures_of(own), **self.trainer.metric_functions}

    @classmethod
    def of(cls, trainer: Owner, problem: nn.Module, previous: RunState | None = None) -> RunState:
        """For a new run, or one that goes on from the `previous` one of the same problem."""
        config = trainer.config
        phases = trainer.phases or [Phase(epochs=max(1, config.epochs))]
        if previous is None:
            kept = Kept(attributes(problem))
            return cls(trainer, problem, Training(phases), Feed(seeding.order_seed(config.seed)), kept, Control())
        was, progress, number = previous.kept, previous.progress, previous.control.number + 1
        training = replace(previous.training, phases=phases, frozen=[], outside=None, compile_choice="eager")
        kept = Kept(was.attributes_at_start, was.run_dir, best_saved=was.best_saved, in_force=was.in_force)
        control, feed = Control(number, seconds_before=progress.seconds), Feed(previous.feed.seed)
        return cls(trainer, problem, training, feed, kept, control, progress, previous.history, previous.best)

    @property
    def config(self) -> TrainerConfig:
        """The trainer's options that are plain data."""
        return self.trainer.config

    @cached_property
    def max_seconds(self) -> float | None:
        """How long this fit may last (s)."""
        return self.config.max_seconds

    @property
    def phase(self) -> Phase:
        """The phase in force."""
        return self.training.phases[self.progress.phase]

    @property
    def seconds(self) -> float:
        """Time spent training this problem so far (s)."""
        return self.control.seconds_before + time.perf_counter() - self.control.clock

    @property
    def is_global_zero(self) -> bool:
        """Whether this process writes files and lines: the first of all."""
        return self.processes.rank == 0

    @property
    def saves(self) -> bool:
        """Whether the run writes checkpoints on its own."""
        return self.config.checkpointing is not None and self.kept.run_dir is not None

    @property
    def resume_next(self) -> str | None:
        """The checkpoint of a later fit of a script than this one: the next fit goes on from it."""
        is_of_later = len(self.progress.fits) > self.control.number
        return str(self.kept.resumed_from) if is_of_later and self.kept.resumed_from is not None else None

    def leave_to_next(self) -> None:
        """Train nothing in this fit: the next one goes on from what was read."""
        self.control.stop_reason, self.progress.last_epoch = None, self.progress.epoch

    # ---- data

    def has(self, split: str) -> bool:
        """Whether there is data for `split`."""
        return self.feed.splits[split] is not None

    def source(self, split: str) -> Any:
        """The batches of `split`, None if there is no data for it."""
        return self.feed.splits[split]

    def rows(self, split: str) -> int | None:
        """Examples in an epoch of `split`; None if there are none, or they cannot be counted beforehand."""
        return getattr(self.feed.splits[split], "rows", None)

    def num_batches(self, split: str) -> int | None:
        """Batches in an epoch of `split`, within `limit_batches`; None if there are none, or nobody knows."""
        return num_batches(self.feed.splits[split], self.config.limit(split))

    def batches_of(self, split: str, start: int = 0) -> Iterable[Any]:
        """The batches of a split, at most as many as `limit_batches` says, without any of the loop's bookkeeping."""
        source = self.feed.splits.get(split)
        if source is None:
            raise ValueError(f"There is no {split} data; given were {[s for s, b in self.feed.splits.items() if b]}.")
        batches = source.epoch(self.progress.epoch, start)
        limit = within(self.config.limit(split), source)
        return islice(batches, None if limit is None else max(0, limit - start))

    # ---- hooks

    def listeners(self, event: str) -> list[Callable[..., Any]]:
        """The functions bound to `event`."""
        return self.hooks.bound[event]

    def call(self, event: str, *args: Any) -> None:
        """Call what listens to `event`."""
        for call in self.hooks.bound[event]:
            call(self.trainer, *args)

    # ---- telling

    def log(self, values: Mapping[str, Any]) -> None:
        """Record scalars: in an evaluation, in the epoch that closes, or in the open one.

        ValueError for what is none.
        """
        check_scalars(values)
        epoch, tried = self.epoch, trial.get()
        if tried is not None:
            tried.logged.update(values)
            return
        self.refuse_taken(values)
        if self.step.evaluating is not None:
            taken = {self.config.dev_metric, self.config.test_metric} & values.keys()
            if taken and self.trainer.names_are_apart:
                raise ValueError(f"log: {min(taken)!r} is taken: it is what an evaluation step returns.")
            means, examples = self.step.evaluating
            means.add(values, examples)
        elif epoch.closing is None:
            epoch.logged.add(values, 1)
        else:
            epoch.closing.update({n: float(v.detach() if isinstance(v, Tensor) else v) for n, v in values.items()})
            self.history.amend(epoch.closing)

    def refuse_taken(self, names: Iterable[str]) -> None:
        """Raise ValueError for a name that stands for something else in the history or in metrics.csv."""
        for name in names:
            if name in ROW_NAMES:
                raise ValueError(f"log: {name!r} is a column of metrics.csv; log the value under another name.")
            if name in self.epoch.measured:
                raise ValueError(
                    f"log: {name!r} is taken: the problem or a step returns it. Log the value under another name, or "
                    "return it from the step."
                )

    def warn_once(self, message: str) -> None:
        """Warn; the same message only once per run, and in the first process only."""
        if message not in self.control.warned and self.is_global_zero:
            self.control.warned.add(message)
            warnings.warn(message, stacklevel=3)

    @contextmanager
    def telling(self, what: str) -> Iterator[None]:
        """Within: something slow, of which the progress line tells."""
        told = [hook.told_of for hook in self.hooks if hasattr(hook, "told_of")]
        for tell in told:
            tell(what, False)
        yield
        for tell in told:
            tell(what, True)

    # ---- ending

    def stop(self, reason: str) -> None:
        """End training after the current step; of several processes after the next, where all stop together."""
        if (tried := trial.get()) is not None:
            tried.wants_to_stop = True
        elif self.processes.world > 1:
            self.processes.wishes.setdefault("stop", reason)
        else:
            self.decide_to_stop(reason)

    def decide_to_stop(self, reason: str) -> None:
        """End training after the current step; every process must come to this decision by itself."""
        self.control.stop_reason = self.control.stop_reason or reason

    def end_phase(self, reason: str) -> None:
        """End this phase after the epoch: the next one begins, or training stops if it was the last."""
        self.progress.phase_ended = reason
        if self.progress.phase + 1 == len(self.training.phases):
            self.decide_to_stop(reason)
