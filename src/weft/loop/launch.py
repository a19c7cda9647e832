"""Training in processes that are started for one call: what `ddp_spawn`, `ddp_fork` and `ddp_notebook` do.

A method of the trainer runs in each of them. What it returns, the weights and the state of the run come back to the
calling process through a file, so `result`, `problem` and `trainer` are what they would be after a fit in this process.
Everything else that changed there (an attribute of the trainer, a list that a hook appends to) stays there;
`trainer.state` comes back.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from weft.checkpoint import archive
from weft.checkpoint.weights import load_into, state_of
from weft.devices import seeding, signals
from weft.devices.fabric import quiet, start_method
from weft.devices.group import dumps
from weft.devices.signals import SignalExit, handled_by, interactive
from weft.events import Hook
from weft.loop.cells import shown_for_children
from weft.loop.contents import state_of_run
from weft.loop.result import FitResult
from weft.loop.resume import put_back_hooks
from weft.loop.run import Run
from weft.step.optimizers import build_optimizers
from weft.step.trained import hold

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def call(trainer: Any, fabric: Fabric, method: str, problem: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`getattr(trainer, method)(*args, **kwargs)` in the processes of `fabric`; what the first of them returns.

    `problem` and `trainer.run` are afterwards as they are there. The error of the process that failed first is raised.
    """
    spawns = start_method(fabric) == "spawn"
    with (
        tempfile.TemporaryDirectory(prefix="weft-") as folder,
        _same_environment(),
        _signals_go_to_children() as asked,
    ):
        work: Any = (trainer, problem, method, args, kwargs)
        if spawns:  # pickle cannot send lambdas, cloudpickle can
            import cloudpickle

            work = dumps(work, cloudpickle.Pickler)
        try:
            with quiet(), shown_for_children(forks=not spawns):
                fabric.launch(_work, work, folder, _Quiet())  # pyright: ignore[reportArgumentType]: takes arguments
        except Exception as error:
            if asked:
                raise _meant_by(asked) from error
            _raise_first(Path(folder), error)
        told = archive.read(Path(folder) / "told.ckpt")
    fabric.strategy.precision.convert_module(problem)  # as it was there (64-true, bf16-true)
    try:
        load_into(problem, told["problem"], source="the launched processes", any_size=True)
    except ValueError as misfit:  # it has grown there
        why = str(misfit).partition("; pass")[0]
        warnings.warn(f"The problem keeps its weights of before, result.last_weights are the new: {why}.", stacklevel=3)
    if told["state"] is not None:
        problem.eval()
        trainer.run = _run_after(trainer, problem, told)
        if others := told["state"].get("others"):
            _put_back_others(trainer, others)
    if asked and not (asked[-1] == signal.SIGINT and interactive()):  # it came when all was over
        raise _meant_by(asked)
    return told["returned"] if told["state"] is None else trainer.run.result


def _meant_by(asked: list[int]) -> BaseException:
    return KeyboardInterrupt() if asked[-1] == signal.SIGINT else SignalExit(asked[-1])


class _Quiet:
    """Turns off Fabric's lines about processes that start, in a new process: where it is unpickled."""

    def __reduce__(self) -> Any:
        return _be_quiet, ()


def _be_quiet() -> None:
    import lightning.fabric  # sets the levels when it is imported

    logging.getLogger(lightning.fabric.__name__).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def _work(fabric: Fabric, work: Any, folder: str, quiet: Any = None) -> None:
    """What each process does. `told.ckpt` is written by the first, `error-<rank>` by one that fails."""
    try:
        if isinstance(work, bytes):
            import cloudpickle

            work = cloudpickle.loads(work)
        trainer, problem, method, args, kwargs = work
        signals.ECHO = 1.0
        trainer.launched = fabric
        returned = getattr(trainer, method)(*args, **kwargs)
        is_fit = isinstance(returned, FitResult)
        state = state_of_run(trainer.run.state) if is_fit else None  # of all processes
        if fabric.is_global_zero:
            resumed_from = trainer.run.state.kept.resumed_from if is_fit else None
            returned = _plain_result(returned) if is_fit else returned
            told = {"problem": state_of(problem), "state": state, "returned": returned}
            told["resumed_from"] = None if resumed_from is None else str(resumed_from)
            archive.write(Path(folder) / "told.ckpt", told)
        if torch.distributed.is_initialized():  # else a process of ddp_spawn aborts when it exits
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
    except BaseException as error:
        told = (time.monotonic(), _pickled(error), traceback.format_exc())
        Path(folder, f"error-{fabric.global_rank}").write_bytes(pickle.dumps(told))
        raise


def _plain_result(result: FitResult) -> dict[str, Any]:
    values = {field.name: getattr(result, field.name) for field in fields(result)}
    return {**values, "run_dir": None if result.run_dir is None else str(result.run_dir)}


def _run_after(trainer: Any, problem: nn.Module, told: dict[str, Any]) -> Run:
    """The run as it is after the fit, in a process that did not train."""
    previous, state = trainer.run, told["state"]
    run = Run(trainer, problem, previous if previous is not None and previous.is_of(problem) else None)
    run.carried, run.state.feed.seed = state, state["seed"]
    run.progress.load_state_dict(state["progress"])
    run.history.load_state_dict(state["history"])
    run.best.load_state_dict(state["best"], problem)
    trainer.state.update(state["state"])
    put_back_hooks([*(m for m in problem.modules() if isinstance(m, Hook)), *trainer.hooks], state)
    values = told["returned"]
    run_dir, resumed_from = values["run_dir"], told["resumed_from"]
    run.state.kept.goes_on_from(resumed_from and Path(resumed_from), run_dir and Path(run_dir))
    run.result = FitResult(**{**values, "run_dir": run.run_dir})
    run.state.control.stop_reason = run.result.stop_reason
    seeding.set_random_state({**state["random"], "cuda": []})  # as if the first process had been this one
    return run


def _put_back_others(trainer: Any, saved: dict[str, Any]) -> None:
    """What only the optimizers hold, as it is in the processes that trained it; so they are made here too."""
    state = trainer.run.state
    phases = state.training.phases[: state.progress.phase + 1]
    given = [phase.optimizer for phase in phases if phase.optimizer is not None]
    if phases[0].optimizer is None:
        given.insert(0, trainer.configure_optimizers())
    for one in given:
        hold(state, build_optimizers(one, state.problem))
    for name, tensor in (state.training.others.tensors | state.training.others.buffers).items():
        if name in saved and tensor.dtype != saved[name].dtype:  # as the problem is, which was converted (64-true)
            tensor.data = tensor.data.to(saved[name].dtype)
    state.training.others.load_state_dict(saved, source="The state of the launched processes")


def _pickled(error: BaseException) -> bytes | None:
    try:
        import cloudpickle

        data = cloudpickle.dumps(error)
        cloudpickle.loads(data)
    except Exception:  # noqa: BLE001, an exception that cannot travel
        return None
    return data


def _raise_first(folder: Path, error: Exception) -> None:
    """Raise the error of the process that failed first, as it was there; those of the others follow from it."""
    told = [(*pickle.loads(path.read_bytes()), path.name) for path in folder.glob("error-*")]
    if not told:
        raise error
    _, pickled, text, name = min(told)
    first = pickle.loads(pickled) if pickled is not None else RuntimeError(text.strip().splitlines()[-1])
    first.add_note(f"Raised in process {name.removeprefix('error-')} of the launched ones:\n{text}")
    raise first from None


@contextmanager
def _same_environment() -> Iterator[None]:
    """Fabric leaves the address of its processes in the environment, where the next ones would look for it."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _signals_go_to_children() -> Iterator[list[int]]:
    """A signal is only noted here, and handed on: the children end their step, save and leave, then this process does.

    A Ctrl-C may have reached them already, or not (`kill -INT` of this process, an editor's stop button): they take two
    at almost the same time for one.
    """
    asked: list[int] = []
    others = set(multiprocessing.active_children())

    def note(number: int, frame: Any) -> None:
        asked.append(number)
        for child in set(multiprocessing.active_children()) - others:
            with suppress(ProcessLookupError):
                os.kill(child.pid or 0, number)

    with handled_by(note):
        yield asked
