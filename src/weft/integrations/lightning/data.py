"""Loaders: of the fit, the module or the data module; iterated as they are, and restarted exactly on resume.

Every batch of a fit comes from a loader whose iterator was started at some moment, in some random state. `Tape`
records these states; an interrupted epoch is replayed from them up to its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from weft.data.loaders import iterator_of
from weft.devices import seeding
from weft.integrations.lightning.names import is_a, lightning_class, overrides

if TYPE_CHECKING:
    from weft.integrations.lightning.context import Context

STAGES = {"train": "train", "dev": "val", "test": "test", "predict": "predict"}
"""Lightning's prefix of each split: the data comes from `{prefix}_dataloader`."""
STEPS = {"train": "training_step", "dev": "validation_step", "test": "test_step", "predict": "predict_step"}


class Source:
    """Where the loaders of one split come from, and the loaders once they are asked for.

    `given`: what fit (validate, ...) was called with: a loader, any iterable of batches, a collection of them, or None.
    """

    resident = True  # for the core: it need not save random states, `Tape` does

    def __init__(self, run: Context, split: str, given: Any = None) -> None:
        self.run, self.split, self.given = run, split, given
        self.loaders: Any = None
        """What the module sees as `trainer.train_dataloader`, ...: what was given or returned; None: not asked yet."""
        self.flat: list[Any] = []
        self.combined: Any = None
        """A CombinedLoader where batches are made of several loaders'; None: one loader, or one after the other."""
        self.limits: list[float] = []

    @property
    def is_defined(self) -> bool:
        """Whether there are such loaders and a step for them (known without asking for the loaders)."""
        step = STEPS[self.split]
        has_step = overrides(self.run.module, step) or (self.split == "predict")
        return has_step and (self.given is not None or self._provider() is not None)

    @property
    def rows(self) -> int | None:
        """Examples in an epoch where the loader's dataset can count them."""
        dataset = getattr(self.flat[0], "dataset", None) if len(self.flat) == 1 else None
        return len(dataset) if hasattr(dataset, "__len__") else None  # type: ignore[arg-type]

    @property
    def num_batches(self) -> list[float]:
        """Batches of each loader, at most as many as `limit_batches` says; inf where it cannot be known."""
        self.load()
        return self.limits

    @property
    def total(self) -> float:
        """Batches of one epoch of training: those of the longest loader (or as the CombinedLoader's mode has it)."""
        numbers = self.num_batches
        if self.combined is not None and self.combined._mode == "min_size":
            return min(numbers)
        return max(numbers, default=0)

    def load(self) -> None:
        """Ask for the loaders, once; `forget` first to have them anew."""
        if self.loaders is not None:
            return
        name = f"{STAGES[self.split]}_dataloader"
        provider = self._provider()
        if self.given is not None:
            self.loaders = self.given
        elif provider is None:
            raise ValueError(f"{type(self.run.module).__name__} has no {name}, and no loaders were given.")
        elif provider is self.run.module:
            self.loaders = self.run.hooks_of.call_module(name)
        else:
            self.loaders = getattr(provider, name)()
        self._flatten(name)

    def forget(self) -> None:
        """Ask anew the next time."""
        self.loaders, self.flat, self.combined = None, [], None

    def end_workers(self) -> None:
        """End the processes of loaders with persistent workers, as Lightning does."""
        for loader in self.flat:
            iterator: Any = getattr(loader, "_iterator", None)
            if hasattr(iterator, "_shutdown_workers"):
                iterator._shutdown_workers()
                loader._iterator = None

    def _provider(self) -> Any:
        """The data module or module that has this dataloader method, None if neither does."""
        name = f"{STAGES[self.split]}_dataloader"
        for owner in [self.run.datamodule] if self.run.datamodule is not None else [self.run.module]:
            if overrides(owner, name):
                return owner
        return None

    def _flatten(self, name: str) -> None:
        combined_class = lightning_class(self.run.module, "utilities.combined_loader.CombinedLoader")
        loaders, sequential = self.loaders, self.split != "train"
        combined = (
            loaders
            if isinstance(loaders, combined_class)
            else combined_class(loaders, "sequential" if sequential else "max_size_cycle")
        )
        if self.split == "train" and combined._mode == "sequential":
            raise ValueError(f"{name}: a CombinedLoader in mode 'sequential' cannot be trained with.")
        self.flat = list(combined.flattened)
        for loader in self.flat:
            try:  # Lightning starts an iterator to see whether it can, and a user's own may draw random numbers
                _ = None if isinstance(loader, DataLoader) else iter(loader)
            except TypeError as error:
                raise TypeError(
                    f"{name}: found {loader!r}; expected a DataLoader, an iterable of batches, or several."
                ) from error
        self.limits = [self._limited(length_of(loader)) for loader in self.flat]
        is_plain = combined._mode == "sequential" or (loaders is self.flat[0] if len(self.flat) == 1 else False)
        self.combined = None if is_plain else combined

    def _limited(self, length: float) -> float:
        limit = self.run.state.config.limit(self.split)
        if limit is None:
            return length
        if isinstance(limit, float) and math.isinf(length):
            raise ValueError(
                f"limit_batches={limit} is a share, but the {self.split} data has no length; give a number."
            )
        return max(1, int(limit * length)) if isinstance(limit, float) else min(limit, length)

    def open(self, tape: Tape | None = None) -> Stream:
        """A new pass through the loaders; iterators of training are started here, as Lightning does."""
        self.load()
        for loader in self.flat:
            set_epoch(loader, self.run.progress.epoch)
        starts = self.flat if tape is None else [Restartable(loader, tape) for loader in self.flat]
        if self.combined is not None:
            combined = self.combined
            if tape is not None:
                combined = lightning_class(self.run.module, "utilities.combined_loader.CombinedLoader")(
                    self.combined.iterables, self.combined._mode
                )
                combined.flattened = starts
            combined.limits = self.limits
            return Stream(iter(combined), self.total, tape)
        return Stream(_in_turn(starts, self.limits), sum(self.limits), tape)


class Stream:
    """A pass through loaders: yields (batch, number, number of the loader) and knows in advance which is the last.

    Where the length is unknown, one batch is read ahead, as Lightning does. It may draw random numbers, so the `tape`
    keeps the state in which that was done.
    """

    def __init__(self, triples: Iterator[tuple[Any, int, int]], length: float, tape: Tape | None = None) -> None:
        self._triples, self._length, self._taken, self._tape = triples, length, 0, tape
        self._ahead: list[Any] = []
        self.is_last = length == 0
        if math.isinf(length):
            self._ahead = _take(triples)

    def skip(self, batches: int) -> None:
        """Leave out so many batches; what is read ahead at the end is read in the state in which it was once."""
        tape, ahead = self._tape, self._tape.ahead if self._tape is not None else None
        for number in range(batches):
            if tape is not None and number == batches - 1:
                tape.ahead_to_play = ahead
            next(self)

    def __iter__(self) -> Iterator[tuple[Any, int, int]]:
        return self

    def __next__(self) -> tuple[Any, int, int]:
        if math.isinf(self._length):
            if not self._ahead:
                raise StopIteration
            (found,) = self._ahead
            if self._tape is not None:
                self._tape.mark_ahead()
            self._ahead = _take(self._triples)
            self.is_last = not self._ahead
            return found
        if self._taken >= self._length:
            raise StopIteration
        found = next(self._triples)
        self._taken += 1
        self.is_last = self._taken >= self._length
        return found


class Tape:
    """The random states in which the loaders of an epoch were started; played back, they start alike again."""

    def __init__(self, generators: Callable[[], list[torch.Generator]]) -> None:
        self.states: list[dict[str, Any]] = []
        self.ahead: dict[str, Any] | None = None
        """The state in which the batch that is read ahead was read."""
        self.ahead_to_play: dict[str, Any] | None = None
        self._generators, self._to_play = generators, 0

    def mark(self) -> None:
        """Record the state here; while playing, put back the one that was recorded here."""
        if self._to_play:
            self._put(self.states[-self._to_play])
            self._to_play -= 1
        else:
            self.states.append(self.now())

    def mark_ahead(self) -> None:
        """Record the state before a batch is read ahead, or put back `ahead_to_play`."""
        if self.ahead_to_play is None:
            self.ahead = self.now()
        else:
            self._put(self.ahead_to_play)
            self.ahead, self.ahead_to_play = self.ahead_to_play, None

    def now(self) -> dict[str, Any]:
        """The random state of the process and of the loaders' own generators."""
        return {"global": seeding.random_state(), "own": [g.get_state() for g in self._generators()]}

    def play(self, states: list[dict[str, Any]]) -> None:
        """Go through `states` again with the next marks."""
        self.states, self._to_play = list(states), len(states)

    def own_states(self) -> list[torch.Tensor]:
        """The states of the loaders' own generators."""
        return [g.get_state() for g in self._generators()]

    def set_own(self, states: list[torch.Tensor]) -> None:
        """Put back what `own_states` gave."""
        for generator, state in zip(self._generators(), states, strict=True):
            generator.set_state(state)

    def _put(self, state: dict[str, Any]) -> None:
        seeding.set_random_state(state["global"])
        self.set_own(state["own"])


class Restartable:
    """A loader whose starts are marked on a tape: when its iterator is made, and before it is first used.

    Both moments draw random numbers: the first the seed of its workers, the second that of a random sampler.
    """

    def __init__(self, loader: Any, tape: Tape) -> None:
        self._loader, self._tape = loader, tape

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        self._tape.mark()
        return self._first_marked(iterator_of(self._loader))

    def _first_marked(self, iterator: Iterator[Any]) -> Iterator[Any]:
        self._tape.mark()
        yield from iterator


class Transfer:
    """The way of a batch from the loader to the step: precision, the transfer hooks, the device.

    Hooks are those of the data module if it has its own, else the module's. On the CPU, where nobody overrides
    anything, a batch passes as it is.
    """

    def __init__(self, run: Context) -> None:
        fabric, module, datamodule = run.fabric, run.module, run.datamodule
        self._device = fabric.device
        precision = fabric._precision.precision
        self._convert = (
            fabric._precision.convert_input if precision.endswith("-true") and precision != "32-true" else None
        )

        def hook(name: str) -> Callable[..., Any] | None:
            if datamodule is not None and overrides(datamodule, name):
                return getattr(datamodule, name)
            return run.hooks_of.bind(name, callbacks=False) if overrides(module, name) else None

        self._before, self._to_device = hook("on_before_batch_transfer"), hook("transfer_batch_to_device")
        self._after = hook("on_after_batch_transfer")
        if self._to_device is None and fabric.device.type != "cpu":
            self._to_device = lambda batch, device, index: fabric.to_device(batch)
        self.is_needed = any((self._convert, self._before, self._to_device, self._after))

    def __call__(self, batch: Any, loader: int) -> Any:
        """The batch as the step gets it."""
        if self._convert is not None:
            batch = self._convert(batch)
        if self._before is not None:
            batch = self._before(batch, loader)
        if self._to_device is not None:
            batch = self._to_device(batch, self._device, loader)
        return self._after(batch, loader) if self._after is not None else batch


def generators_of(loaders: list[Any]) -> list[torch.Generator]:
    """The generators that loaders and their samplers draw from, each once."""
    found: dict[int, torch.Generator] = {}
    for loader in loaders:
        samplers = [getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
        samplers.append(getattr(samplers[1], "sampler", None))
        for owner in (loader, *samplers):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                found[id(generator)] = generator
    return list(found.values())


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell the samplers of a loader which epoch it is, where they ask for it."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    for sampler in dict.fromkeys((getattr(loader, "sampler", None), getattr(batch_sampler, "sampler", None))):
        if callable(tell := getattr(sampler, "set_epoch", None)):
            tell(epoch)


def length_of(loader: Any) -> float:
    """The number of batches, inf where it is unknown."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return math.inf


def is_datamodule(thing: Any) -> bool:
    """Whether this is a LightningDataModule."""
    return is_a(thing, "LightningDataModule")


_END = object()


def _take(iterator: Iterator[Any]) -> list[Any]:
    """The next item in a list, an empty list at the end."""
    item = next(iterator, _END)
    return [] if item is _END else [item]


def _in_turn(loaders: list[Any], limits: list[float]) -> Iterator[tuple[Any, int, int]]:
    """The batches of the loaders one after the other. The first iterator is made now, the others when needed."""
    first: Iterator[Any] = iterator_of(loaders[0]) if loaders else iter(())

    def triples() -> Iterator[tuple[Any, int, int]]:
        for loader, limit in enumerate(limits):
            iterator = first if loader == 0 else iterator_of(loaders[loader])
            number = 0
            while number < limit:
                batch = next(iterator, _END)
                if batch is _END:
                    break
                yield batch, number, loader
                number += 1

    return triples()
