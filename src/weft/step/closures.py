"""Closure optimizers: the update as a line search, and what it tells."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from weft.devices.precision import scaler_of
from weft.step.forward import forward_of
from weft.step.instrument import watched
from weft.step.microbatches import combiner, divided, is_nothing, num_read, parts_of, record, total, weight_of
from weft.step.nonfinite import not_finite
from weft.step.optimizer_step import ignores
from weft.step.optimizers import needs_closure, parameters_of
from weft.step.trained import look, rest_of

if TYPE_CHECKING:
    from weft.step.state import RunState, Update


class SearchReport:
    """What one step of a closure optimizer did: how often it evaluated the loss, and why torch's LBFGS ended."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.evaluations = optimizer, 0
        self._params = parameters_of(optimizer)
        self._iterations_before = optimizer.state.get(self._params[0], {}).get("n_iter", 0)
        self._first: torch.Tensor | None = None
        self._gradients: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, loss: torch.Tensor) -> None:
        """Count one evaluation of the closure, whose gradients are there."""
        self.evaluations += 1
        self._first = loss if self._first is None else self._first
        if isinstance(self.optimizer, torch.optim.LBFGS):
            grads = [p.grad for p in self._params if p.grad is not None]
            self._gradients.append((loss, nn.utils.get_total_norm(grads, norm_type=math.inf)))

    def reason(self, loss: float) -> str | None:
        """Which option of LBFGS ended the step, given the loss it accepted; of another optimizer its `search_stop`.

        In the order in which torch.optim.LBFGS.step looks at them (torch 2.13).
        """
        if not isinstance(self.optimizer, torch.optim.LBFGS):
            return getattr(self.optimizer, "search_stop", None)
        group, state = self.optimizer.param_groups[0], self.optimizer.state[self._params[0]]
        iterations, change = state["n_iter"] - self._iterations_before, group["tolerance_change"]
        if iterations == 0:
            return "tolerance_grad"
        if float(state["prev_flat_grad"].dot(state["d"])) > -change:
            return "tolerance_change (slope)"
        if iterations >= group["max_iter"]:
            return "max_iter"
        if self.evaluations >= group["max_eval"]:
            return "max_eval"
        if any(float(g) <= group["tolerance_grad"] for value, g in self._gradients if float(value) == loss):
            return "tolerance_grad"
        moved = float(state["d"].mul(state["t"]).abs().max())
        return "tolerance_change (step)" if moved <= change else "tolerance_change (loss)"

    def is_at_the_end_of_float32(self, loss: float) -> bool:
        """Whether the search ended without a lower loss where float32 has no digits for one."""
        reason = self.reason(loss) or ""
        if (
            not reason.startswith(("tolerance_change", "no lower loss"))
            or self._first is None
            or self._params[0].dtype == torch.float64
        ):
            return False
        first = float(self._first)
        return abs(first - loss) <= 10 * torch.finfo(torch.float32).eps * abs(first)


MAX_KEPT = 64  # evaluations of one line search whose parameters are kept to find the accepted one


Read = list[tuple[Any, int]]
Evaluation = Callable[[Any], tuple[Tensor, Read]]
"""Batch -> its loss, and what was read with the numbers of examples; the gradients of the loss are in `.grad`."""


def evaluation_of(state: RunState) -> Evaluation:
    """The loss and gradients of a batch in the parts it is worked through in; gradients add to those that are there."""
    forward, backward = forward_of(state, "train"), watched(state.hooks, "backward", state.fabric.backward)
    split, combine = parts_of(state), combiner(state)

    def evaluate(batch: Any) -> tuple[Tensor, Read]:
        losses, read = [], []
        for part, examples, share in split(batch):
            loss, scalars = forward(part)
            if state.training.looks:
                look(state, loss)
            share = weight_of(state, scalars, share)
            read.append(({k: v.detach() if isinstance(v, Tensor) else v for k, v in scalars.items()}, examples))
            if is_nothing(state, share):
                continue
            backward(loss * share if share != 1.0 else loss)
            losses.append(loss.detach() * share)
        loss = divided(state, total(state, losses), read)
        if combine is not None:  # all processes must see one number, or their searches part ways
            loss = combine(loss, num_read(read))
        return loss, read

    return evaluate


def with_closure(state: RunState, begin: Callable, end: Callable, evaluate: Evaluation | None = None) -> Update:
    """LBFGS and other line searches: the same loss and gradients, evaluated as often as the optimizer asks.

    Nothing is clipped inside the search (values and gradients must agree), and nothing is evaluated in addition:
    the logged loss is that of the evaluation at the point the search accepted, or of the last one.
    `evaluate`: how a batch is evaluated; None: by `evaluation_of`.
    """
    optimizer = _only_closure_optimizer(state)
    measured = evaluate or evaluation_of(state)
    params, before_step, rest = parameters_of(optimizer), state.listeners("on_before_optimizer_step"), rest_of(state)
    search = watched(state.hooks, "optimizer", optimizer.step)
    bound_to = getattr(optimizer, "bound_to", None)  # of one that looks behind the loss, at residuals

    def clear() -> None:
        optimizer.zero_grad()
        for p in rest:
            p.grad = None

    def update(batch: Any) -> Tensor:
        begin(batch)
        evaluated: list[tuple[list[Tensor], Tensor, list]] = []  # parameters, loss, scalars
        before, saved, report = _copies(params), _copy_state(optimizer), SearchReport(optimizer)

        def closure() -> Tensor:
            clear()
            loss, read = measured(batch)
            if not report.evaluations:
                for call in before_step:
                    call(state.trainer, optimizer)
            report.add(loss)
            evaluated.append((_copies(params), loss, read))
            del evaluated[:-MAX_KEPT]
            return loss

        try:
            asked = closure if bound_to is None else bound_to(state.problem, batch, closure)
            search(cast(Any, asked))  # annotated for floats; LBFGS takes tensors
        except BaseException:  # in the middle of a search the weights are those of a trial
            _put_back(optimizer, params, before, saved)
            raise
        accepted = [e for e in evaluated if all(map(torch.equal, e[0], params))]
        _, loss, read = accepted[-1] if accepted else evaluated[-1]
        if ignores(state) or (math.isfinite(loss.item()) and all(bool(p.isfinite().all()) for p in params)):
            record(state, read)
            state.progress.skipped = 0
            _tell(state, report, loss.item())
        else:
            _put_back(optimizer, params, before, saved)
            not_finite(state, evaluated[-1][1], read)
        clear()
        end(batch, loss)
        return loss

    return update


def _only_closure_optimizer(state: RunState) -> Optimizer:
    """The run's optimizer. Raises ValueError for what cannot go with a line search, warns of what has no effect."""
    optimizer = next(o for o in state.training.optimizers.values() if needs_closure(o))
    name = type(optimizer).__name__
    if len(state.training.optimizers) > 1:
        raise ValueError(
            f"Optimizers {list(state.training.optimizers)}: {name}, which needs a closure, must be the only one."
        )
    if scaler_of(state.fabric) is not None:
        raise ValueError(f"{name} cannot run with precision='16-mixed': its line search needs unscaled gradients.")
    if state.config.clip is not None:
        state.warn_once(
            f"clip={state.config.clip} has no effect with {name}: its line search needs unclipped gradients."
        )
    if getattr(optimizer, "needs_residuals", False):
        _refuse_parts_of_residuals(state, name)
    batches = state.num_batches("train")
    if getattr(optimizer, "needs_full_batch", False) and batches is not None and batches > state.config.accumulate:
        state.warn_once(
            f"{name} uses what it learned of one batch for the next, and an epoch has {batches} batches: a line search "
            "on one of them may raise the loss of the others. Make the whole set one batch (batch_size: all rows)."
        )
    return optimizer


def _refuse_parts_of_residuals(state: RunState, name: str) -> None:
    """Raise ValueError where the residuals that an optimizer asks for would be those of a part of the batch."""
    wrong = {
        f"{state.processes.world} processes": state.processes.world > 1,
        f"accumulate={state.config.accumulate}": state.config.accumulate > 1,
        f"precision={state.config.precision!r}": "mixed" in str(state.config.precision),
    }
    if found := [what for what, there in wrong.items() if there]:
        raise ValueError(f"{name} needs all residuals of a step together and in full precision; not with {found[0]}.")


def _tell(state: RunState, report: SearchReport, loss: float) -> None:
    """Log how many evaluations a search used, keep why it ended, and say so if float32 was what ended it."""
    progress, name = state.progress, type(report.optimizer).__name__
    report.evaluations += getattr(report.optimizer, "evaluations", 0)
    progress.evaluations += report.evaluations
    progress.search_stop = report.reason(loss)
    state.log({f"{name.lower()}_evaluations": report.evaluations})
    if report.is_at_the_end_of_float32(loss):
        state.warn_once(
            f"{name} no longer finds a lower loss where the digits of float32 end (`result.search_stop` says what "
            "ended "
            "its steps); precision='64-true' lets it go on."
        )


def _copies(params: Sequence[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def _copy_state(optimizer: Optimizer) -> dict[Any, Any]:
    """The state of a closure optimizer, so that it can be put back after a search that went wrong."""

    def copied(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) else list(value) if isinstance(value, list) else value

    return {p: {k: copied(v) for k, v in state.items()} for p, state in optimizer.state.items()}


@torch.no_grad()
def _put_back(optimizer: Optimizer, params: Sequence[Tensor], before: Sequence[Tensor], state: dict[Any, Any]) -> None:
    for p, old in zip(params, before, strict=True):
        p.copy_(old)
    optimizer.state.clear()
    optimizer.state.update(state)
