"""The update: forward, backward, clipping, check, optimizer step. The only place that calls backward.

`make_update(run)` picks one of a few plain functions of a batch, once, when a run (or a phase) begins:
one optimizer; several by name; an optimizer that needs a closure; the user's own `update`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from weft.devices import stepping
from weft.metrics import num_examples
from weft.optimizers import needs_closure, parameters_of
from weft.problem import term_keys
from weft.types import suggest

if TYPE_CHECKING:
    from weft.run import Run

Update = Callable[[Any], Tensor]
Forward = Callable[[Any], tuple[Any, dict[str, Any]]]  # batch -> loss (or losses by optimizer), scalars by name

MAX_SKIPPED = 100  # steps in a row that on_nonfinite="skip" leaves out before it gives up


def make_update(run: Run) -> Update:
    """The function that updates the parameters once from a batch (a list of batches when accumulating).

    It returns the loss, detached and still on the device; nothing is read back on a GPU unless a hook asks.
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
    forward, backward, add = run.forward("train"), run.fabric.backward, run.means.add
    accumulating = run.config.accumulate > 1
    step = make_step(run, next(iter(run.optimizers.values())))

    def update(batch: Any) -> Tensor:
        begin(batch)
        parts = batch if accumulating else (batch,)
        examples = [num_examples(part) for part in parts]
        total, losses, read = sum(examples), [], []
        for part, n in zip(parts, examples, strict=True):
            loss, scalars = forward(part)
            if n != total:
                loss = loss * (n / total)  # its share of the one big batch
            backward(loss)
            losses.append(loss.detach())
            read.append((scalars, n))
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        if step(loss, read):
            for scalars, n in read:
                add(scalars, n)
        end(batch, loss)
        return loss

    return update


def _several(run: Run, begin: Callable, end: Callable) -> Update:
    """All gradients first, each loss with respect to its own optimizer's parameters; then every optimizer steps.

    Stepping one before the other's backward would change the tensors that backward still needs.
    """
    forward, backward, add = run.forward("train"), run.fabric.backward, run.means.add
    accumulating = run.config.accumulate > 1
    parameters = {name: parameters_of(o) for name, o in run.optimizers.items()}
    steps = {name: make_step(run, o) for name, o in run.optimizers.items()}

    def update(batch: Any) -> Tensor:
        begin(batch)
        parts = batch if accumulating else (batch,)
        examples = [num_examples(part) for part in parts]
        total, read, total_loss = sum(examples), [], torch.zeros(())
        for part, n in zip(parts, examples, strict=True):
            losses, scalars = forward(part)
            read.append((scalars, n))
            if not isinstance(losses, Mapping):
                backward(losses * (n / total) if n != total else losses)
                total_loss = total_loss.to(losses.device) + losses.detach() * (n / total)
                continue
            for i, (name, loss) in enumerate(losses.items()):
                last = i == len(losses) - 1
                backward(loss * (n / total) if n != total else loss, inputs=parameters[name], retain_graph=not last)
                total_loss = total_loss.to(loss.device) + loss.detach() * (n / total)
        if all([step(total_loss, read) for step in steps.values()]):
            for scalars, n in read:
                add(scalars, n)
        end(batch, total_loss)
        return total_loss

    return update


def _with_closure(run: Run, begin: Callable, end: Callable) -> Update:
    """LBFGS and other line searches: the same loss and gradients, evaluated as often as the optimizer asks.

    Nothing is clipped inside the search (values and gradients must agree), and nothing is evaluated in addition:
    the logged loss is that of the evaluation at the point the search accepted, or of the last one.
    """
    forward, backward, add = run.forward("train"), run.fabric.backward, run.means.add
    accumulating, trainer, before_step = run.config.accumulate > 1, run.trainer, run.listeners("on_before_optimizer_step")
    if len(run.optimizers) > 1:
        raise ValueError(f"Optimizers {list(run.optimizers)}: one that needs a closure must be the only one.")
    (optimizer,) = run.optimizers.values()
    if run.config.clip is not None:
        name = type(optimizer).__name__
        run.warn_once(f"clip={run.config.clip} has no effect with {name}: its line search needs unclipped gradients.")
    params = parameters_of(optimizer)

    def update(batch: Any) -> Tensor:
        begin(batch)
        parts = batch if accumulating else (batch,)
        examples = [num_examples(part) for part in parts]
        total = sum(examples)
        evaluated: list[tuple[list[Tensor], Tensor, list]] = []
        before, saved = [p.detach().clone() for p in params], _copy_state(optimizer)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss_sum, read = torch.zeros((), dtype=before[0].dtype, device=before[0].device), []
            for part, n in zip(parts, examples, strict=True):
                loss, scalars = forward(part)
                backward(loss * (n / total) if n != total else loss)
                loss_sum = loss_sum + loss.detach() * (n / total)
                read.append(({k: _detached(v) for k, v in scalars.items()}, n))
            if not evaluated:
                for call in before_step:
                    call(trainer, optimizer)
            if run.reduce is not None:  # all ranks must see one number, or their searches part ways
                loss_sum = run.reduce(loss_sum) / run.fabric.world_size
            evaluated.append(([p.detach().clone() for p in params], loss_sum, read))
            del evaluated[:-MAX_KEPT]
            return loss_sum

        optimizer.step(closure)
        accepted = [e for e in evaluated if all(torch.equal(a, p) for a, p in zip(e[0], params, strict=True))]
        _, loss, read = accepted[-1] if accepted else evaluated[-1]
        if not all(math.isfinite(x) for x in (float(loss), *(float(p.detach().sum()) for p in params))):
            with torch.no_grad():
                for p, old in zip(params, before, strict=True):
                    p.copy_(old)
            optimizer.state.clear()
            optimizer.state.update(saved)
            not_finite(run, evaluated[-1][1], read)
        else:
            for scalars, n in read:
                add(scalars, n)
            run.progress.skipped = 0
        optimizer.zero_grad()
        end(batch, loss)
        return loss

    return update


MAX_KEPT = 64  # evaluations of one line search whose parameters are kept to find the accepted one


def _custom(run: Run) -> Update:
    """The user's `update`, framed by the same hooks and counting. What it returns (a loss, a dict) is logged."""
    read = reader(run.problem, "train", run.config.train_metric, {}, ())
    begin, end, add, trainer = run.begin_step, run.end_step, run.means.add, run.trainer

    def update(batch: Any) -> Tensor:
        begin(batch)
        returned = trainer.update(batch)
        loss, scalars = torch.zeros(()), {}
        if returned is not None:
            found, scalars = read(returned, batch, required=False)
            loss = found.detach() if isinstance(found, Tensor) else loss
        if returned is None or returned is not run.built_in_loss:  # super().update() has counted its own
            add(scalars, sum(map(num_examples, batch)) if isinstance(batch, list) else num_examples(batch))
        run.built_in_loss = None
        end(batch, loss)
        return loss

    return update


def make_step(run: Run, optimizer: Optimizer) -> Callable[[Tensor | None, Sequence], bool]:
    """A function (loss, what was read) -> whether the optimizer stepped: hooks, clipping, the check, the step.

    Gradients that are NaN or infinite never reach the optimizer. Clears the gradients of its parameters.
    """
    before_step, trainer, progress = run.listeners("on_before_optimizer_step"), run.trainer, run.progress
    clip, by_value = run.config.clip, run.config.clip_algorithm == "value"
    params, (do_step, scaled) = parameters_of(optimizer), stepping(run.fabric, optimizer)
    is_finite = finite_check(params, scaled)

    def step(loss: Tensor | None, read: Sequence) -> bool:
        for call in before_step:
            call(trainer, optimizer)
        if scaled is not None:
            scaled(optimizer)
        norm = None
        if clip is not None:
            if by_value:
                torch.nn.utils.clip_grad_value_(params, clip)
            else:
                norm = torch.nn.utils.clip_grad_norm_(params, clip)
        if not is_finite(loss, norm):
            for p in params:
                p.grad = None
            not_finite(run, loss, read)
            return False
        do_step()
        for p in params:
            p.grad = None
        progress.skipped = 0
        return True

    return step


def finite_check(params: Sequence[Tensor], scaled: Any) -> Callable[[Tensor | None, Tensor | None], bool]:
    """A function (loss, gradient norm or None) -> whether loss and all gradients are finite, exactly.

    With a known norm the norm is looked at; else torch's own multi-tensor check, which costs about 2 % of a small
    step. Under a gradient scaler the scaler decides about gradients (an overflow skips the step by design).
    """

    def is_finite(loss: Tensor | None, norm: Tensor | None) -> bool:
        if loss is not None and not math.isfinite(loss.item()):
            return False
        if scaled is not None:
            return True
        if norm is not None:
            return math.isfinite(norm.item())
        by_kind: dict[tuple, list[Tensor]] = {}
        for p in params:
            if p.grad is not None:
                g = p.grad.coalesce().values() if p.grad.is_sparse else p.grad
                by_kind.setdefault((g.dtype, g.device), []).append(g)
        for (dtype, device), grads in by_kind.items():
            if dtype.is_complex:
                if not all(bool(g.isfinite().all()) for g in grads):
                    return False
                continue
            found = torch.zeros((), dtype=torch.float32, device=device)
            torch._amp_foreach_non_finite_check_and_unscale_(grads, found, torch.ones_like(found))
            if found.item():
                return False
        return True

    return is_finite


def not_finite(run: Run, loss: Tensor | None, read: Sequence) -> None:
    """Act on a loss or gradient that is not finite, as `on_nonfinite` says. Nothing was updated.

    Raises FloatingPointError naming step, epoch, rank and the first term that was not finite.
    """
    progress, policy = run.progress, run.config.on_nonfinite
    values = [(name, float(_detached(v).double().mean()) if isinstance(v, Tensor) else v) for s, _ in read for name, v in s.items()]
    values.append(("the loss", float(loss) if loss is not None else 0.0))
    what = next((f"{name} is {v}" for name, v in values if not math.isfinite(v)), "a gradient is not finite")
    message = f"{what} in step {progress.step} (epoch {progress.epoch}, rank {run.fabric.global_rank})"
    if policy == "raise":
        raise FloatingPointError(f"{message}; the weights are as they were. on_nonfinite='skip' or 'stop' goes on.")
    if policy == "stop":
        run.warn_once(f"{message}; training stops (on_nonfinite='stop').")
        run.stop("nonfinite")
        return
    progress.skipped += 1
    progress.skipped_total += 1
    if progress.skipped_total == 1:
        run.warn_once(f"{message}; the step is skipped (on_nonfinite='skip'), and so are others without a word.")
    if progress.skipped >= MAX_SKIPPED:
        raise FloatingPointError(f"{message}; {MAX_SKIPPED} steps in a row were skipped.")


def reader(
    problem: nn.Module, split: str, metric: str, metrics: Mapping[str, Callable], optimizers: Sequence[str]
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """A function (what a step returned, batch) -> (loss, scalars by their name in the history).

    The loss is under `metric`, f"{split}_loss" or "loss", or is what was returned; a dict keyed by the names of
    several optimizers gives one loss each. Terms of a weft or NeuroMANCER problem are picked by name; from any other
    dict, every scalar is reported. Raises TypeError / ValueError that name what was found.
    """
    keys, default, names = term_keys(problem, split), f"{split}_loss", set(optimizers)

    def read(out: Any, batch: Any, required: bool = True) -> tuple[Any, dict[str, Any]]:
        if isinstance(out, Tensor):
            loss, scalars = out, {metric: out}
        elif isinstance(out, Mapping):
            if len(names) > 1 and names <= out.keys():
                loss = {n: _checked(out[n], n, problem, out, split) for n in optimizers}
                scalars = {default: torch.stack([x.detach() for x in loss.values()]).sum()}
            else:
                loss = next((out[k] for k in (metric, *((default, "loss") if metric == default else ())) if k in out), None)
                scalars = {metric: loss} if loss is not None else {}
            if keys is not None and keys[default] in out:
                scalars = {name: out[key] for name, key in keys.items() if key in out} | scalars
            else:
                scalars = {_named(k, split): v for k, v in out.items() if _is_scalar(v) and k != "loss"} | scalars
            for name, fn in metrics.items():
                scalars[_named(name, split)] = fn(out, batch)
        else:
            loss, scalars = None, {}
        if isinstance(loss, Mapping):
            return loss, scalars
        if required or loss is not None:
            loss = _checked(loss, metric, problem, out, split)
        return loss, scalars

    return read


def _checked(loss: Any, key: str, problem: nn.Module, out: Any, split: str) -> Tensor:
    if isinstance(loss, Tensor) and loss.dim() == 0 and (loss.requires_grad or not torch.is_grad_enabled()):
        return loss
    who = f"Problem {getattr(problem, 'name', None) or type(problem).__name__!r}"
    found = f"got keys {sorted(map(str, out))}" if isinstance(out, Mapping) else f"got {type(out).__name__}"
    if loss is None:
        known = list(out) if isinstance(out, Mapping) else []
        raise ValueError(
            f"{who} returned no {key!r}. The {split} step needs a scalar tensor under that key "
            f"(or 'loss', or the scalar itself); {found}{suggest(key, known)}."
        )
    if not isinstance(loss, Tensor):
        raise TypeError(f"{who}: {key!r} is {type(loss).__name__} {loss!r}; expected a scalar tensor.")
    if loss.numel() != 1:
        raise ValueError(f"{who}: {key!r} has shape {tuple(loss.shape)}; expected a scalar. Take its mean or sum.")
    if split == "train" and torch.is_grad_enabled() and not loss.requires_grad:
        raise ValueError(
            f"{who}: {key!r} does not depend on anything that requires grad, so nothing can be trained. "
            "Is it detached, or computed under no_grad?"
        )
    return loss.reshape(())


def _named(key: str, split: str) -> str:
    return key if key.startswith(f"{split}_") else f"{split}_{key}"


def _is_scalar(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.dim() == 0 and not value.is_complex()
    return isinstance(value, int | float) and not isinstance(value, bool)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _copy_state(optimizer: Optimizer) -> dict[Any, Any]:
    """The state of a closure optimizer, so that it can be put back after a search that went wrong."""
    def copied(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) else list(value) if isinstance(value, list) else value

    return {p: {k: copied(v) for k, v in state.items()} for p, state in optimizer.state.items()}


def explain(error: Exception, batch: Any, problem: nn.Module) -> Exception:
    """The error to raise for one that a step raised: a mixture of dtypes gets a message that says what to do."""
    text = str(error)
    if "dtype" not in text and "must be the same" not in text and "expected scalar type" not in text:
        return error
    weights = {p.dtype for p in problem.parameters() if p.is_floating_point()}
    data = {k: v.dtype for k, v in batch.items() if isinstance(v, Tensor)} if isinstance(batch, Mapping) else {}
    other = {k: str(d) for k, d in data.items() if d not in weights}
    if not other:
        return error
    return TypeError(
        f"{text}. The data has {other}, the parameters are {sorted(map(str, weights))}. Convert the data, "
        "or train with precision='64-true', which casts both."
    )
