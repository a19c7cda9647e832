"""The whole state of a run as one dict, and back. Saving and loading are mirror images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from weft import checkpoint
from weft.devices import scaler_of
from weft.problem import set_term_weights, term_weights
from weft.seeding import separate

if TYPE_CHECKING:
    from weft.run import Run

FORMAT = 1


def state_of_run(run: Run) -> dict[str, Any]:
    """Everything that decides how the run goes on: tensors and plain values only."""
    weights = term_weights(run.problem)
    return {
        "format": FORMAT,
        "problem": checkpoint.state_of(run.problem),
        "term_weights": {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in weights.items()},
        "optimizers": {name: o.state_dict() for name, o in run.optimizers.items()},
        "schedules": {name: s.state_dict() for name, s in run.schedules.items()},
        "scaler": scaler.state_dict() if (scaler := scaler_of(run.fabric)) is not None else None,
        "progress": {**run.progress.state_dict(), "seconds": run.seconds},
        **_own_state(run),
        "other_processes": run.processes.gather(_own_state(run))[1:],
        "history": run.history.state_dict(),
        "best": run.best.state_dict(),
        "hooks": {name: hook.state_dict() for name, hook in _stateful(run.hooks)},
        "state": dict(run.trainer.state),
        "seed": run.seed,
    }


def _own_state(run: Run) -> dict[str, Any]:
    """What each process has of its own: random numbers, and what it measured in the open epoch."""
    return {
        "means": run.means.state_dict(),
        "logged": run.logged.state_dict(),
        "own_buffers": run.processes.own_buffers(run.problem),
        "random_before_data": run.random_before_data,
        "random_before_epoch": run.random_before_epoch,
        "random": checkpoint.random_state(),
    }


def state_of_process(state: dict[str, Any], rank: int) -> dict[str, Any]:
    """The state with what process `rank` had of its own. That of the first one, if there were not so many."""
    return {**state, **state["other_processes"][rank - 1]} if 0 < rank <= len(state["other_processes"]) else state


def restore_run(run: Run, state: dict[str, Any]) -> None:
    """Go on from what `state_of_run` gave. Random state comes last: everything before it may draw.

    With another number of processes than before, what is drawn from here on differs, and so does the rest of the run.
    """
    processes, before = run.processes, 1 + len(state["other_processes"])
    if processes.world != before:
        run.warn_once(f"The checkpoint is of {before} processes, and {processes.world} go on: random numbers will differ.")
    state = state_of_process(state, processes.rank)
    checkpoint.load_into(run.problem, state["problem"], source="the checkpoint")
    _restore_optimizers(run, state)
    run.progress.load_state_dict(state["progress"])
    run.means.load_state_dict(state["means"])
    run.logged.load_state_dict(state["logged"])
    run.history.load_state_dict(state["history"])
    run.best.load_state_dict(state["best"])
    for name, hook in _stateful(run.hooks):
        hook.load_state_dict(state["hooks"][name])
    run.trainer.state.update(state["state"])
    run.random_before_data, run.random_before_epoch = state["random_before_data"], state["random_before_epoch"]
    run.random_to_resume = state["random"]
    checkpoint.set_random_state(state["random"])
    if processes.rank >= before:
        separate(run.seed + run.progress.step, processes.rank)
        run.random_to_resume = checkpoint.random_state()
    processes.set_own_buffers(run.problem, state["own_buffers"])


def restore_carried(run: Run, state: dict[str, Any]) -> None:
    """Go on, in a second fit, with the optimizers and random numbers of a first one that was in other processes."""
    if run.continues or not any(p.optimizer is not None or p.scheduler is not None for p in run.phases[1:]):
        _restore_optimizers(run, state)
    checkpoint.set_random_state(state_of_process(state, run.processes.rank)["random"])


def restore_hooks(hooks: Iterable[Any], state: dict[str, Any]) -> None:
    """Give `hooks`, the first ones of a run, the state that they had at its end."""
    for name, hook in _stateful(hooks):
        hook.load_state_dict(state["hooks"][name])


def _restore_optimizers(run: Run, state: dict[str, Any]) -> None:
    set_term_weights(run.problem, state["term_weights"])
    for name, optimizer in run.optimizers.items():
        optimizer.load_state_dict(state["optimizers"][name])
    for name, schedule in run.schedules.items():
        schedule.load_state_dict(state["schedules"][name])
    if (scaler := scaler_of(run.fabric)) is not None:
        scaler.load_state_dict(state["scaler"])


def _stateful(hooks: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Hooks with state, by number and class name; modules of the problem are saved with it."""
    for number, hook in enumerate(h for h in hooks if not isinstance(h, nn.Module)):
        if hasattr(hook, "state_dict") and hasattr(hook, "load_state_dict"):
            yield f"{number}.{type(hook).__name__}", hook
