"""The whole state of a run as one dict, and back. Saving and loading are mirror images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from weft import checkpoint
from weft.devices import scaler_of
from weft.problem import set_term_weights, term_weights

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
        "means": run.means.state_dict(),
        "logged": run.logged.state_dict(),
        "history": run.history.state_dict(),
        "best": run.best.state_dict(),
        "hooks": {name: hook.state_dict() for name, hook in _stateful(run)},
        "state": dict(run.trainer.state),
        "seed": run.seed,
        "random_before_data": run.random_before_data,
        "random_before_epoch": run.random_before_epoch,
        "random": checkpoint.random_state(),
    }


def restore_run(run: Run, state: dict[str, Any]) -> None:
    """Go on from what `state_of_run` gave. Random state comes last: everything before it may draw."""
    checkpoint.load_into(run.problem, state["problem"], source="the checkpoint")
    set_term_weights(run.problem, state["term_weights"])
    for name, optimizer in run.optimizers.items():
        optimizer.load_state_dict(state["optimizers"][name])
    for name, schedule in run.schedules.items():
        schedule.load_state_dict(state["schedules"][name])
    if (scaler := scaler_of(run.fabric)) is not None:
        scaler.load_state_dict(state["scaler"])
    run.progress.load_state_dict(state["progress"])
    run.means.load_state_dict(state["means"])
    run.logged.load_state_dict(state["logged"])
    run.history.load_state_dict(state["history"])
    run.best.load_state_dict(state["best"])
    for name, hook in _stateful(run):
        hook.load_state_dict(state["hooks"][name])
    run.trainer.state.update(state["state"])
    run.random_before_data, run.random_before_epoch = state["random_before_data"], state["random_before_epoch"]
    run.random_to_resume = state["random"]
    checkpoint.set_random_state(state["random"])


def _stateful(run: Run) -> Iterator[tuple[str, Any]]:
    """Hooks with state, by number and class name; modules of the problem are saved with it."""
    for number, hook in enumerate(h for h in run.hooks if not isinstance(h, nn.Module)):
        if hasattr(hook, "state_dict") and hasattr(hook, "load_state_dict"):
            yield f"{number}.{type(hook).__name__}", hook
