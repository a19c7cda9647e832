"""The update: forward, backward, clipping, check, optimizer step. The only place that calls backward.

`make_update(run)` picks one of a few plain functions of a batch, once, when a run (or a phase) begins:
one optimizer; several by name; an optimizer that needs a closure; the user's own `update`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from weft.devices import scaler_of, stepping
from weft.finite import READS_ARE_FREE, Doubts, skips_by_itself
from weft.metrics import num_examples
from weft.optimizers import SearchReport, needs_closure, parameters_of, shared_parameters
from weft.processes import own_part
from weft.steps import forward_of, metric_of, reader
from weft.watching import watched

if TYPE_CHECKING:
    from weft.run import Run

Update = Callable[[Any], Tensor]
Combine = Callable[[Tensor, int], Tensor]
Step = Callable[[Tensor | None, Sequence[tuple[Mapping[str, Any], int]]], bool]
"""(Loss, scalars read with their examples) -> whether the optimizers stepped."""

MAX_SKIPPED = 100  # steps in a row that on_nonfinite="skip" leaves out before it gives up
MAX_KEPT = 64  # evaluations of one line search whose parameters are kept to find the accepted one


def make_update(run: Run) -> Update:
    """The function that updates the parameters once from a batch (a list of batches when accumulating).

    It returns the loss, detached and still on the device.
    """
    if run.trainer.overrides("update"):
        return _custom(run)
    return built_in(run, run.begin_step, run.end_step)


def built_in(run: Run, begin: Callable[[Any], None], end: Callable[[Any, Tensor], None]) -> Update:
    """The update that fits the optimizers. `begin` and `end` frame the step (hooks, counting)."""
    if any(needs_closure(o) for o in run.optimizers.values()):
        return _with_closure(run, begin, end)
    return _several(run, begin, end) if len(run.optimizers) > 1 else _single(run, begin, end)


def _single(run: Run, begin: Callable, end: Callable) -> Update:
    forward, backward = forward_of(run, "train"), watched(run.hooks, "backward", run.fabric.backward)
    parts_of, step, combine = _parts(run), make_step(run, list(run.optimizers.values())), combiner(run)

    def update(batch: Any) -> Tensor:
        begin(batch)
        losses, read = [], []
        for part, examples, share in parts_of(batch):
            loss, scalars = forward(part)
            if share != 1.0:
                loss = loss * share
            backward(loss)
            if share:  # the mean over no rows is nan
                losses.append(loss.detach())
            read.append((scalars, examples))
        loss = losses[0] if len(losses) == 1 else _sum(run, losses)
        if combine is not None:
            loss = combine(loss, _num_read(read))
        if step(loss, read):
            record(run, read)
        end(batch, loss)
        return loss

    return update


def _several(run: Run, begin: Callable, end: Callable) -> Update:
    """All gradients first, each loss with respect to its own optimizer's parameters; then every optimizer steps.

    Stepping one before the other's backward would change the tensors that backward still needs.
    A step that returns one loss gives every optimizer its gradients of that.
    """
    if shared := shared_parameters(run.problem, run.optimizers):
        raise ValueError(
            f"Parameters {shared[:5]} belong to several optimizers, and would get the gradients of all their losses. "
            "Give each optimizer its own, or write the steps out in `update` (with self.backward and self.step)."
        )
    forward, backward = forward_of(run, "train"), watched(run.hooks, "backward", run.fabric.backward)
    parts_of, step, combine = _parts(run), make_step(run, list(run.optimizers.values())), combiner(run)
    parameters = {name: [p for p in parameters_of(o) if p.requires_grad] for name, o in run.optimizers.items()}

    def update(batch: Any) -> Tensor:
        begin(batch)
        losses, read = [], []
        for part, examples, share in parts_of(batch):
            found, scalars = forward(part)
            read.append((scalars, examples))
            named = found if isinstance(found, dict) else {None: found}
            for number, (name, loss) in enumerate(named.items(), start=1):
                inputs = parameters[name] if name is not None else None
                backward(loss * share if share != 1.0 else loss, inputs=inputs, retain_graph=number < len(named))
                losses.append(loss.detach() * share)
        loss = _sum(run, losses)
        if combine is not None:
            loss = combine(loss, _num_read(read))
        if step(loss, read):
            record(run, read)
        end(batch, loss)
        return loss

    return update


def _parts(run: Run) -> Callable[[Any], list[tuple[Any, int, float]]]:
    """A function of what `run.batches` yields: its batches, each with its number of examples and its share of all.

    Of several processes one may have no row of a short batch; such a batch is left out. Where the problem is in shards
    all must compute together, and gradients are summed in backward: there a batch's share is its number of examples.
    """
    in_shards, least = run.processes.in_shards, 1 if run.processes.skips_empty else 0

    def one(batch: Any) -> list[tuple[Any, int, float]]:
        n = num_examples(batch)
        return [(batch, n, float(n) if in_shards else 1.0)] if n >= least else []

    def several(batches: Any) -> list[tuple[Any, int, float]]:
        examples = [num_examples(batch) for batch in batches]
        total = 1 if in_shards else max(1, sum(examples))
        return [(batch, n, n / total) for batch, n in zip(batches, examples, strict=True) if n >= least]

    return several if run.config.accumulate > 1 else one


def _sum(run: Run, losses: list[Tensor]) -> Tensor:
    return torch.stack(losses).sum() if losses else torch.zeros((), device=run.fabric.device)


def _num_read(read: Sequence[tuple[Any, int]]) -> int:
    return sum(examples for _, examples in read)


def combiner(run: Run, names: Sequence[str] | None = None) -> Combine | None:
    """What makes the gradients of the named optimizers (or all) those of the global batch; None in a single process."""
    params = [p for name in names or run.optimizers for p in parameters_of(run.optimizers[name])]
    return run.processes.combiner(list(dict.fromkeys(params)))


def _with_closure(run: Run, begin: Callable, end: Callable) -> Update:
    """LBFGS and other line searches: the same loss and gradients, evaluated as often as the optimizer asks.

    Nothing is clipped inside the search (values and gradients must agree), and nothing is evaluated in addition:
    the logged loss is that of the evaluation at the point the search accepted, or of the last one.
    """
    optimizer = _only_closure_optimizer(run)
    forward, backward = forward_of(run, "train"), watched(run.hooks, "backward", run.fabric.backward)
    parts_of, params, before_step = _parts(run), parameters_of(optimizer), run.listeners("on_before_optimizer_step")
    combine = combiner(run)
    search = watched(run.hooks, "optimizer", optimizer.step)

    def update(batch: Any) -> Tensor:
        begin(batch)
        parts = parts_of(batch)
        evaluated: list[tuple[list[Tensor], Tensor, list]] = []  # parameters, loss, scalars
        before, saved, report = _copies(params), _copy_state(optimizer), SearchReport(optimizer)

        def closure() -> Tensor:
            optimizer.zero_grad()
            losses, read = [], []
            for part, examples, share in parts:
                loss, scalars = forward(part)
                backward(loss * share if share != 1.0 else loss)
                losses.append(loss.detach() * share)
                read.append(({k: _detached(v) for k, v in scalars.items()}, examples))
            total = _sum(run, losses)
            if combine is not None:  # all processes must see one number, or their searches part ways
                total = combine(total, _num_read(read))
            if not report.evaluations:
                for call in before_step:
                    call(run.trainer, optimizer)
            report.add(total)
            evaluated.append((_copies(params), total, read))
            del evaluated[:-MAX_KEPT]
            return total

        try:
            search(cast(Any, closure))  # annotated for floats; LBFGS takes tensors
        except BaseException:  # in the middle of a search the weights are those of a trial
            _put_back(optimizer, params, before, saved)
            raise
        accepted = [e for e in evaluated if all(map(torch.equal, e[0], params))]
        _, loss, read = accepted[-1] if accepted else evaluated[-1]
        if math.isfinite(loss.item()) and all(bool(p.isfinite().all()) for p in params):
            record(run, read)
            run.progress.skipped = 0
            _tell(run, report, loss.item())
        else:
            _put_back(optimizer, params, before, saved)
            not_finite(run, evaluated[-1][1], read)
        optimizer.zero_grad()
        end(batch, loss)
        return loss

    return update


def _only_closure_optimizer(run: Run) -> Optimizer:
    """The run's optimizer. Raises ValueError for what cannot go with a line search, warns of what has no effect."""
    optimizer = next(o for o in run.optimizers.values() if needs_closure(o))
    name = type(optimizer).__name__
    if len(run.optimizers) > 1:
        raise ValueError(f"Optimizers {list(run.optimizers)}: {name}, which needs a closure, must be the only one.")
    if scaler_of(run.fabric) is not None:
        raise ValueError(f"{name} cannot run with precision='16-mixed': its line search needs unscaled gradients.")
    if run.config.clip is not None:
        run.warn_once(f"clip={run.config.clip} has no effect with {name}: its line search needs unclipped gradients.")
    return optimizer


def _tell(run: Run, report: SearchReport, loss: float) -> None:
    """Log how many evaluations a search used, keep why it ended, and say so if float32 was what ended it."""
    progress, name = run.progress, type(report.optimizer).__name__
    progress.evaluations += report.evaluations
    progress.search_stop = report.reason(loss)
    run.log({f"{name.lower()}_evaluations": report.evaluations})
    if report.is_at_the_end_of_float32(loss):
        run.warn_once(
            f"{name} no longer finds a lower loss where the digits of float32 end (`result.search_stop` says what ended "
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


def _custom(run: Run) -> Update:
    """The user's `update`, framed by the same hooks and counting. What it returns (a loss, a dict) is logged."""
    read = reader(run.problem, "train", metric_of(run, "train"), {}, ())
    begin, end, trainer = run.begin_step, run.end_step, run.trainer

    def update(batch: Any) -> Tensor:
        begin(batch)
        run.in_update, run.last_loss, run.built_in_loss = True, None, None
        try:
            returned = trainer.update(batch)
        finally:
            run.in_update = False
        loss, scalars = read(returned, batch)
        if returned is None or returned is not run.built_in_loss:  # super().update() has counted its own
            record(run, [(scalars, sum(map(num_examples, batch)) if isinstance(batch, list) else num_examples(batch))])
        loss = loss.detach() if isinstance(loss, Tensor) else run.last_loss
        loss = torch.zeros(()) if loss is None else loss
        end(batch, loss)
        return loss

    return update


# ---------------------------------------------------------------- in a loop, or an `update`, of the user's own


def own_backward(run: Run, loss: Tensor, **kwargs: Any) -> None:
    """Gradients of `loss`, added to those that are there; outside an update it is also logged as the training loss.

    With several optimizers the first call after a step starts from no gradients: what the loss before it left in the
    parameters of the others (a generator's loss in the discriminator) is not added to this one's.
    """
    if run.has_stepped and len(run.optimizers) > 1:
        for optimizer in run.optimizers.values():
            optimizer.zero_grad()
    run.last_loss, run.has_stepped = loss.detach(), False
    if not run.in_update and len(run.optimizers) == 1:
        run.means.add({metric_of(run, "train"): loss}, num_examples(run.batch))
    scaled = loss * _rows_of(run) if run.processes.in_shards else loss
    watched(run.hooks, "backward", run.fabric.backward)(scaled, **kwargs)


def _rows_of(run: Run) -> int:
    return sum(map(num_examples, run.batch)) if isinstance(run.batch, list) else num_examples(run.batch)


def own_update(run: Run, batch: Any) -> Tensor:
    """The built-in update; inside an `update` of the user's own without its frame."""
    if not run.in_update:
        return run.update(batch)
    if run.plain_update is None:
        run.plain_update = built_in(run, lambda batch: None, lambda batch, loss: None)
    run.built_in_loss = run.plain_update(batch)
    return run.built_in_loss


def own_step(run: Run, optimizer: Optimizer | str | None) -> bool:
    """Step one optimizer (itself or its name) or all; outside an update this counts as a step of the run.

    With several optimizers it counts when the first one steps. Raises ValueError for an optimizer of another run.
    """
    names = [name for name, known in run.optimizers.items() if optimizer is None or optimizer is known or optimizer == name]
    if not names:
        raise ValueError(f"{optimizer!r} is none of this run's optimizers: {list(run.optimizers)}.")
    if (key := tuple(names)) not in run.own_steps:
        run.own_steps[key] = make_step(run, [run.optimizers[name] for name in names]), combiner(run, names)
    step, combine = run.own_steps[key]
    if combine is not None:
        examples, loss = _rows_of(run), _sum(run, []) if run.last_loss is None else run.last_loss
        loss = combine(loss * examples if run.processes.in_shards else loss, examples)
        run.last_loss = None if run.last_loss is None else loss
    done, run.has_stepped = step(run.last_loss, ()), True
    if not run.in_update and names[0] == next(iter(run.optimizers)):
        run.end_step(run.batch, run.last_loss)
    return done


# ---------------------------------------------------------------- the optimizer step


def record(run: Run, read: Sequence[tuple[Mapping[str, Any], int]]) -> None:
    """Count what a step measured: for each of its batches, the scalars by name and the number of examples."""
    if run.measured is not None:
        run.measured = [({name: torch.as_tensor(v).detach() for name, v in s.items()}, n) for s, n in read]
    for scalars, examples in read:
        run.means.add(scalars, examples)


def make_step(run: Run, optimizers: Sequence[Optimizer]) -> Step:
    """A function (loss, what was read) -> whether the optimizers stepped: hooks, clipping, the check, the steps.

    Gradients that are NaN or infinite never reach an optimizer: either all of them step or none. Clears the gradients.
    """
    for optimizer in optimizers:
        if needs_closure(optimizer):
            raise TypeError(f"{type(optimizer).__name__} evaluates the loss itself (a closure): call update(batch).")
    before_step, trainer, progress, clip = run.listeners("on_before_optimizer_step"), run.trainer, run.progress, _clip(run)
    by_value, own = run.config.clip_algorithm == "value", [(o, parameters_of(o)) for o in optimizers]
    params, (do_step, unscale) = [p for _, mine in own for p in mine], stepping(run.fabric, optimizers)
    do_step = watched(run.hooks, "optimizer", do_step)
    is_finite = finite_check(params, scaled=unscale is not None)
    doubts, guarded = _doubts(run, optimizers, scaled=unscale is not None), () if unscale is not None else optimizers

    def step(loss: Tensor | None, read: Sequence) -> bool:
        norms = []
        for optimizer, mine in own:
            if unscale is not None:
                unscale(optimizer)
            for call in before_step:
                call(trainer, optimizer)
            if clip is not None and not by_value:
                norms.append(clip(mine))
        if doubts is not None:  # nothing waits for the GPU; `look_back` raises later
            doubts.guard(progress.step, loss, norms, params, guarded)
            finite = True
        else:
            finite = run.processes.all_of(is_finite(loss, norms))
        if finite:
            if clip is not None and by_value:  # after the check: it makes infinite gradients finite
                clip(params)
            do_step()
            progress.skipped = 0
        for p in params:
            p.grad = None
        if not finite:
            not_finite(run, loss, read)
        return finite

    return step


def _doubts(run: Run, optimizers: Sequence[Optimizer], scaled: bool) -> Doubts | None:
    """Where steps that are not finite are noted for later, on a GPU; None where each step is looked at by itself."""
    if run.fabric.device.type in READS_ARE_FREE or run.processes.in_shards:  # there all ask each other anyhow
        return None
    names = [type(o).__name__ for o in optimizers if not (scaled or skips_by_itself(o))]
    if run.config.on_nonfinite == "skip" or names:
        why = f"{names[0]} is not fused" if names else "on_nonfinite='skip' counts them"
        run.warn_once(f"The check for numbers that are not finite waits for the GPU in each step, as {why}.")
        return None
    run.doubts = run.doubts or Doubts(run.fabric.device)
    return run.doubts


def look_back(run: Run) -> None:
    """Act on a step since the last look that was not finite, where steps are not looked at one by one. It was left out."""
    if run.doubts is not None and (step := run.doubts.look()) is not None:
        not_finite(run, None, [(run.means.compute(), 1)], step)


def _clip(run: Run) -> Callable[[Sequence[Tensor]], Tensor | None] | None:
    """A function that clips the gradients of some parameters and returns their norm, if it is known; None: no clipping."""
    limit = run.config.clip
    if limit is None:
        return None
    if run.processes.in_shards:
        return partial(run.processes.clip, limit=limit, by_value=run.config.clip_algorithm == "value")
    if run.config.clip_algorithm == "value":
        return lambda params: torch.nn.utils.clip_grad_value_(params, limit)
    return lambda params: torch.nn.utils.clip_grad_norm_(params, limit)


def finite_check(params: Sequence[Tensor], scaled: bool) -> Callable[[Tensor | None, Sequence[Tensor | None]], bool]:
    """A function (loss, gradient norms where known) -> whether loss and all gradients are finite, exactly.

    With known norms these are looked at; else torch's own multi-tensor check, which costs about 2 % of a small
    step. Under a gradient scaler the scaler decides about gradients (an overflow skips the step by design).
    """
    check = torch._amp_foreach_non_finite_check_and_unscale_  # pyright: ignore[reportPrivateImportUsage]
    by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for p in params:
        by_kind.setdefault((p.dtype, p.device), []).append(p)
    kinds = [(alike, torch.zeros((), dtype=torch.float32, device=device)) for (_, device), alike in by_kind.items()]
    one = {found.device: torch.ones_like(found) for _, found in kinds}

    def is_finite(loss: Tensor | None, norms: Sequence[Tensor | None]) -> bool:
        if loss is not None and not math.isfinite(loss.item()):
            return False
        if scaled:
            return True
        if norms and norms[0] is not None:
            return all(math.isfinite(norm.item()) for norm in norms if norm is not None)
        for alike, found in kinds:
            own = [own_part(p.grad) for p in alike if p.grad is not None]
            grads = [g.coalesce().values() if g.is_sparse else g for g in own]
            if alike[0].is_complex():
                grads = [torch.view_as_real(grad) for grad in grads]
            check(grads, found.zero_(), one[found.device])
            if found.item():
                return False
        return True

    return is_finite


def not_finite(run: Run, loss: Tensor | None, read: Sequence, step: int | None = None) -> None:
    """Act on a loss or gradient that is not finite, as `on_nonfinite` says. Nothing was updated in that step.

    Raises FloatingPointError naming step, epoch, rank and the first term that was not finite.
    """
    progress, policy = run.progress, run.config.on_nonfinite
    if step is None:  # else the steps since then have gone on with what that one left
        run.statistics.restore()
    values = [(name, _as_float(value)) for scalars, _ in read for name, value in scalars.items()]
    values.append(("the loss", 0.0 if loss is None else loss.item()))
    here = next((f"{name} is {value}" for name, value in values[:-1] if not math.isfinite(value)), None)
    told = run.processes.gather(here)  # all processes are here: they check the same sums
    rank, what = next(((rank, what) for rank, what in enumerate(told) if what), (0, None))
    what = what or ("a gradient is not finite" if math.isfinite(values[-1][1]) else f"the loss is {values[-1][1]}")
    message = f"{what} in step {progress.step if step is None else step} (epoch {progress.epoch}, rank {rank})"
    if policy == "raise":
        raise FloatingPointError(f"{message}; the weights are as they were. on_nonfinite='skip' or 'stop' goes on.")
    if policy == "stop":
        run.warn_once(f"{message}; training stops (on_nonfinite='stop').")
        run.decide_to_stop("nonfinite")
        return
    progress.skipped += 1
    progress.skipped_total += 1
    if progress.skipped_total == 1:
        run.warn_once(f"{message}; the step is skipped (on_nonfinite='skip'), and so are others without a word.")
    if progress.skipped >= MAX_SKIPPED:
        raise FloatingPointError(f"{message}; {MAX_SKIPPED} steps in a row were skipped.")


def _as_float(value: Any) -> float:
    return float(value.detach().double().mean()) if isinstance(value, Tensor) else float(value)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
