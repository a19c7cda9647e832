"""What `Trainer.predict` returns. Loaded when something is predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from weft.problem.outputs import forward_nodes, picked
from weft.step.prediction import predict
from weft.step.state import RunState


def predictions(state: RunState, keys: Sequence[str] | None = None) -> Any:
    """The predictions for the predict set by key, or these keys of them; of a `Supervised` what its net returns."""
    is_own, step = state.trainer.overrides("predict_step"), state.trainer.step_function("predict", state.problem)
    if keys is not None and is_own:
        step = picked(step, keys)
    elif keys is not None:
        step = forward_nodes(state.problem, keys)
    try:
        found = predict(state, step)
    except RuntimeError as error:
        from weft.step.explaining import explained

        if (clearer := explained(error, {}, state.problem, "predict")) is None:
            raise
        raise clearer from None
    put_back = None if is_own or keys is not None else getattr(state.problem, "own_output", None)
    return found if put_back is None else put_back(found)
