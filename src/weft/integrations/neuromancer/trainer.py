"""NeuroMANCER's base `Trainer`, on weft: change the import line, and a script keeps its curves.

    from weft.integrations.neuromancer import Trainer            # was: from neuromancer.trainer import Trainer

    trainer = Trainer(problem, train_loader, dev_loader, optimizer=optimizer, epochs=200, patience=50)
    best_model = trainer.train()

It is a loop of its own around `weft.Trainer.start`; what follows is all that differs from `weft.Trainer.fit`.
NeuroMANCER is never imported; any problem that returns a dict will do.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from weft.checkpoint.weights import state_of
from weft.data.batches import num_examples
from weft.data.data import Data
from weft.data.loaders import iterator_of
from weft.devices.seeding import random_state, set_random_state
from weft.loop import trainer as weft_trainer
from weft.loop.result import FitResult
from weft.loop.run import Run
from weft.step.evaluation import evaluate, evaluating
from weft.step.forward import Forward, forward_of
from weft.step.metrics import Means, named
from weft.step.optimizers import needs_closure, parameters_of
from weft.step.state import RunState, trial
from weft.types import suggest

DEFAULT_CLIP = 100.0


class Callback:
    """NeuroMANCER's callback with nothing in it: what is called when none was given."""

    def begin_train(self, trainer: Any) -> None: ...
    def begin_epoch(self, trainer: Any, output: Any) -> None: ...
    def begin_eval(self, trainer: Any, output: Any) -> None: ...
    def end_batch(self, trainer: Any, output: Any) -> None: ...
    def end_eval(self, trainer: Any, output: Any) -> None: ...
    def end_epoch(self, trainer: Any, output: Any) -> None: ...
    def end_train(self, trainer: Any, output: Any) -> None: ...
    def begin_test(self, trainer: Any) -> None: ...
    def end_test(self, trainer: Any, output: Any) -> None: ...


class Trainer:
    """Trains a NeuroMANCER problem with the signature, the attributes and the curves of NeuroMANCER's `Trainer`.

    Its rules, kept because a curve depends on them: the loaders are iterated as they are; the default optimizer is
    Adam(lr=0.01, betas=(0.0, 0.9)); gradients are clipped by the norm over all of the problem's parameters (gradients
    of those that the optimizer does not hold are never cleared and add up; a warning says so); "epoch" stands in
    training batches; `multi_fidelity` adds the nodes' alpha losses; an epoch's means are over batches;
    `lr_scheduler=True` halves the rate after 100 epochs without a better mean training loss; training stops once more
    than `patience` epochs after epoch `warmup` were no better; a line is printed every `epoch_verbose` epochs
    unless there is a `logger`; callbacks are called at its points (`begin_epoch` after the epoch's batches).

    Where its rule is a defect, this one is right instead:

    * What decides about best weights and patience is the mean of `eval_metric` over the batches, not its last batch.
    * Without dev data an `eval_metric` of the dev set means that of the training set; `test` leaves out what
      is missing.
    * `eval_mode="max"` also works for negative metrics. A loss or gradient that is not finite raises before the step.
    * Optimizers that need a closure (LBFGS) work; nothing is clipped inside their line search. `clip=None` is allowed.
    * Weights are copied tensor by tensor, so sparse buffers (cvxpylayers) do no harm; no graph outlives its step.
    * The problem is moved to `device`, as its batches are.
    * Interrupting (also in the first epoch) ends the training; the best weights so far are returned.
    * Each `train()` trains `epochs` more, with patience counted anew, and compares with what the problem as it now is
      (a longer rollout) reaches on the dev data as they now are, not with a number from before the change. Where that
      cannot be measured (no dev data, a callback's own metric), it is compared with the best before, as there.

    Two arguments are weft's own. `compile`: False, True or "auto", as in `weft.Trainer`; `clip` is then as it was when
    `train` began, and a callback that reads each batch's output keeps training eager, which is said once.
    `eval_batches`: "all", or "last" for NeuroMANCER's own rule, by which the last dev batch alone decides.

    `train_data`, `dev_data`, `test_data` are loaders of dicts. All arguments are attributes that may be changed between
    two calls of `train`; the data, `clip` and `patience` also by a callback, for the next epoch. `result` is the last
    `FitResult`.
    """

    def __init__(
        self,
        problem: nn.Module,
        train_data: Iterable[Any],
        dev_data: Iterable[Any] | None = None,
        test_data: Iterable[Any] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        logger: Any = None,
        callback: Any = None,
        lr_scheduler: Any = False,
        epochs: int = 1000,
        epoch_verbose: int = 1,
        patience: int | None = 5,
        warmup: int = 0,
        train_metric: str = "train_loss",
        dev_metric: str = "dev_loss",
        test_metric: str = "test_loss",
        eval_metric: str = "dev_loss",
        eval_mode: str = "min",
        clip: float | None = DEFAULT_CLIP,
        multi_fidelity: bool = False,
        device: Any = "cpu",
        compile: bool | str = False,
        eval_batches: str = "all",
    ) -> None:
        if eval_batches not in ("all", "last"):
            raise ValueError(f"eval_batches={eval_batches!r}: expected 'all' or 'last'.")
        self.model, self.train_data, self.dev_data, self.test_data = problem, train_data, dev_data, test_data
        self.optimizer = optimizer or torch.optim.Adam(problem.parameters(), 0.01, betas=(0.0, 0.9))
        self.logger, self.callback = logger, callback if callback is not None else Callback()
        self.lr_scheduler: Any = lr_scheduler or None
        if lr_scheduler is True:
            self.lr_scheduler = ReduceLROnPlateau(self.optimizer, mode="min", factor=0.5, patience=100)
        self.epochs, self.epoch_verbose, self.patience, self.warmup = epochs, epoch_verbose, patience, warmup
        self.train_metric, self.dev_metric, self.test_metric = train_metric, dev_metric, test_metric
        self.eval_metric, self.eval_mode = eval_metric, eval_mode
        self.clip, self.multi_fidelity, self.device = clip, multi_fidelity, device
        self.compile, self.eval_batches = compile, eval_batches
        self.current_epoch = self.badcount = 0
        self.best_model: dict[str, Any] = state_of(problem)
        self.best_devloss: float = np.float64(np.finfo(np.float32).max * (1 if self._eval_min else -1))
        """The best value so far: a float that also has `.item()`. As there, very bad before anything was compared."""
        self.result: FitResult | None = None
        self._seen: list[tuple[Tensor, Tensor | None]] = []  # of each batch of a pass: the loss, and what decides
        self._last: dict[str, Any] = {}  # the output of the last of them
        self._output: dict[str, Any] = {}
        self._fresh: dict[str, Any] = {}  # what the last step returned; nothing where it ran as a graph
        self._compiles: Any = False
        self._compared: tuple[str, str] | None = None  # the metric and mode of `best_devloss`
        self._not_held: dict[str, Tensor] = {}
        self._piled: dict[Tensor, Tensor] = {}  # gradients that the optimizer does not clear
        if logger is not None:
            logger.log_weights(problem)

    # ---------------------------------------------------------------------------------------------------------- train

    def train(self) -> dict[str, Any]:
        """The best state dict, which the problem then also holds.

        Trains for `epochs` epochs, or until patience ends.
        """
        held = set(map(id, parameters_of(self.optimizer)))
        self._not_held = {n: p for n, p in self.model.named_parameters() if id(p) not in held}
        run, self._output, self.badcount = self._start(), {}, 0
        run.progress.epoch = self.current_epoch
        run.progress.begin_fit(self.epochs, None)
        self.optimizer.zero_grad()
        if self.current_epoch:
            self._set_value_to_beat(run)
        self.callback.begin_train(self)
        try:
            with run:
                self._loop(run)
        except KeyboardInterrupt:  # the run has ended in good order, with the best weights back in the problem
            pass
        self.result, self.best_model = run.result, state_of(self.model)
        if self.logger is not None:
            self.logger.log_artifacts({"best_model_state_dict.pth": self.best_model, "best_model.pth": self.model})
        return self.best_model

    def _loop(self, run: Run) -> None:
        try:
            for _ in run.epochs():
                self._seen = []
                for batch in run.batches("train"):
                    run.update(batch)
                run.log({self._monitor: self._evaluated(run)})
        except KeyboardInterrupt:
            print("Interrupted training loop.")
            self.callback.end_train(self, self._output)
            raise
        self.model.eval()
        self.callback.end_train(self, self._output)

    def _start(self) -> Run:
        """A run with the attributes as they are now. Nothing is trained before it is entered."""
        device = torch.device(self.device)
        self._compiles = self._may_compile()
        clips = bool(self._compiles) and not self._not_held and not needs_closure(self.optimizer)
        hooks = {} if clips else {"on_before_optimizer_step": self._clip}
        trainer = weft_trainer.Trainer(
            epochs=self.epochs,
            optimizer=self.optimizer,
            train_metric=self.train_metric,
            dev_metric=self.dev_metric,
            test_metric=self.test_metric,
            monitor_metric=self._monitor,
            monitor_mode=self.eval_mode,  # pyright: ignore[reportArgumentType]: checked there
            accelerator=device.type,
            devices=1 if device.index is None else [device.index],
            training_step=self._training_step,
            validation_step=self._validation_step,
            hooks={**hooks, "on_step_end": self._end_batch, "on_epoch_end": self._end_epoch},
            clip=self.clip if clips else None,
            compile=self._compiles,
            progress=False,
        )
        names = ("train_data", "dev_data", "test_data")
        train, dev, test = (None if getattr(self, name) is None else _loader(self, name) for name in names)
        return trainer.start(self.model, Data(train, dev, test))

    def _may_compile(self) -> Any:
        """`compile`, or False where something reads what a graph does not give: the whole output of a batch."""
        reads = {"end_batch", "begin_epoch", "begin_eval", "end_eval", "end_epoch", "end_train"}
        own = [n for kind in type(self.callback).__mro__[:-1] if kind.__name__ != "Callback" for n in vars(kind)]
        if not self.compile or not (found := sorted(reads.intersection(own))):
            return self.compile
        if self.compile is True:
            kind = type(self.callback).__name__
            warnings.warn(f"compile=True: training stays eager, {kind}.{found[0]} reads outputs.", stacklevel=4)
        return False

    @property
    def _eval_min(self) -> bool:
        return self.eval_mode == "min"

    @property
    def _eval_metric(self) -> str:
        """`eval_metric`, or the training metric where it belongs to a dev set that is missing."""
        missing = self.dev_data is None and self.eval_metric.removeprefix("mean_") in (self.dev_metric, "dev_loss")
        return self.train_metric if missing else self.eval_metric

    @property
    def _monitor(self) -> str:
        """The name in the history of what decides."""
        return "mean_" + self._eval_metric.removeprefix("mean_")

    def _training_step(self, trainer: Any, batch: Any) -> dict[str, Any]:
        output = self.model(_own_name(batch))
        if self.multi_fidelity:
            called: list[Any] = [node.callable for node in self.model.nodes]  # type: ignore[union-attr]
            alphas = [c.get_alpha_loss() for c in called if hasattr(c, "get_alpha_loss")]
            if not alphas:
                raise TypeError("multi_fidelity=True, but no node's callable has get_alpha_loss(), as StackedMLP has.")
            output[self.train_metric] = output[self.train_metric] + sum(alphas)
        if trial.get() is None:  # no step that is only traced or tried
            self._fresh = output
        return output

    def _clip(self, trainer: Any, optimizer: Any) -> None:
        if needs_closure(optimizer):
            if self.clip not in (None, DEFAULT_CLIP):
                name = type(optimizer).__name__
                trainer.run.state.warn_once(
                    f"clip={self.clip} has no effect with {name}: a line search needs true gradients."
                )
            return
        if self.clip is None:
            return
        stale = {n: p for n, p in self._not_held.items() if p.grad is not None}
        for p in stale.values():
            self._piled[p] = p.grad if p not in self._piled else p.grad.add_(self._piled[p])  # type: ignore[union-attr]
        if stale and trainer.global_step == 0:
            trainer.run.state.warn_once(
                f"{', '.join(list(stale)[:5])}: these get gradients, but the optimizer does not hold them. They add "
                "up over the run and enter the clipping norm, as in NeuroMANCER; freeze them, or pass clip=None."
            )
        trainer.run.state.processes.clip(list(self.model.parameters()), self.clip)

    def _end_batch(self, trainer: Any, batch: Any, loss: Tensor) -> None:
        fresh = self._fresh if type(self.callback) is Callback else _detached(self._fresh)  # 1 us for each tensor
        self._output, self._fresh = {**fresh, self.train_metric: loss}, {}
        self.callback.end_batch(self, self._output)
        self._note(loss, self._output)

    def _note(self, loss: Tensor, output: dict[str, Any]) -> None:
        value = output.get(self._eval_metric.removeprefix("mean_"))
        decides = value.detach() if isinstance(value, Tensor) and value.numel() == 1 else None
        self._seen.append((loss.detach(), decides))
        self._last = output

    def _evaluated(self, run: Run) -> Any:
        """What decides about best weights, after the epoch's callbacks, the scheduler and the dev set."""
        mean = torch.stack([loss for loss, _ in self._seen]).mean()
        self._output = {**_detached(self._output), f"mean_{self.train_metric}": mean}
        means = {**self._means(), f"mean_{self.train_metric}": mean}
        self.callback.begin_epoch(self, self._output)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step(*((mean,) if isinstance(self.lr_scheduler, ReduceLROnPlateau) else ()))
        if run.has("dev"):
            last, dev_means = self._over_dev(run)
            self._output, means = {**self._output, **last}, {**means, **dev_means}
        name = self._eval_metric
        measured = self._output.get(name)
        self._call_evaluating("begin_eval")
        if self._output.get(name) is not measured:  # the callback's own measure
            return self._output[name]
        if self.eval_batches == "last" and name in self._output:
            return self._output[name]
        if self._monitor not in means:
            known = sorted(
                name for name, value in self._output.items() if isinstance(value, Tensor) and value.numel() == 1
            )
            raise ValueError(f"eval_metric={name!r} never appears{suggest(name, known)}; there are {known}.")
        return means[self._monitor]

    def _call_evaluating(self, *points: str) -> None:
        if type(self.callback) is not Callback:  # for one with nothing in it the modes need not change
            with evaluating(self.model):
                for point in points:
                    getattr(self.callback, point)(self, self._output)

    def _over_dev(self, run: Run) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The last dev batch's output with the mean loss, and the means over batches."""
        self._seen = []
        if self._compiles:
            forward = forward_of(run.state, "dev")
            if run.graphs is not None:  # the run has begun
                forward = run.graphs.forward("dev", forward)
            run.state.epoch.evaluated.update(evaluate(run.state, "dev", forward, self._by_graphs))
        else:
            run.evaluate("dev")
        mean = torch.stack([loss for loss, _ in self._seen]).mean()
        means = {**self._means(), f"mean_{self.dev_metric}": mean}
        return {**_detached(self._last), f"mean_{self.dev_metric}": mean}, means

    def _validation_step(self, trainer: Any, batch: Any) -> dict[str, Any]:
        output = self.model(_own_name(batch))
        if self._compiles:
            self._fresh = _detached(output) if trial.get() is None else {}
        else:
            self._note(output[self.dev_metric], output)
        return output

    def _by_graphs(self, state: RunState, split: str, forward: Forward) -> dict[str, float]:
        """The dev set, of whose batches a graph gives the scalars alone."""
        means = Means()
        for batch in state.batches_of(split):
            self._fresh = {}
            _, scalars = forward(batch)
            values = {**dict(scalars.items()), **self._fresh}
            self._note(values[named(self.dev_metric, split)], values)
            means.add(scalars, num_examples(batch))
        self._fresh = {}
        return means.compute()

    def _means(self) -> dict[str, Tensor]:
        """The mean over the batches just seen of the metric that decides, if they have it."""
        name = self._eval_metric.removeprefix("mean_")
        values = [value for _, value in self._seen if value is not None]
        return {f"mean_{name}": torch.stack(values).mean()} if values else {}

    def _set_value_to_beat(self, run: Run) -> None:
        """What the problem reaches now; where that cannot be measured, the best value before, if it is of the same."""
        means, last = dict[str, Tensor](), dict[str, Any]()
        if run.has("dev"):
            random = random_state()  # a loader draws when it is iterated; the curve must not depend on this look
            last, means = self._over_dev(run)
            set_random_state(random)
        before = self.best_devloss if self._compared == (self._monitor, self.eval_mode) else None
        value = float(means[self._monitor]) if self._monitor in means else before
        if self.eval_batches == "last" and run.has("dev") and self._eval_metric in last:
            value = float(last[self._eval_metric])
        if run.best.update(self._monitor, value, self.current_epoch - 1, self.eval_mode, self.model) and not means:
            run.best.weights.load_state_dict(self.best_model)  # type: ignore[union-attr]

    def _end_epoch(self, trainer: Any, metrics: dict[str, float]) -> None:
        run, epoch = trainer.run, trainer.current_epoch
        if run.state.epoch.improved:
            self.best_model, self.best_devloss, self.badcount = (
                run.best.weights.state_dict(),
                np.float64(run.best.value),
                0,
            )
            self._compared = self._monitor, self.eval_mode
        elif epoch > self.warmup:
            self.badcount += 1
        if self.logger is not None:
            self.logger.log_metrics(self._output, step=epoch)
        elif epoch % self.epoch_verbose == 0:
            print(f"epoch: {epoch}  {self.train_metric}: {self._output[f'mean_{self.train_metric}']}")
        self._call_evaluating("end_eval", "end_epoch")
        if self.patience is not None and self.badcount > self.patience:
            print("Early stopping!!!")
            run.stop("patience")
        self.current_epoch = epoch + 1

    # ----------------------------------------------------------------------------------------------------------- test

    def test(self, best_model: dict[str, Any]) -> dict[str, Any]:
        """The last batch's output of every split, and the mean losses over batches (`mean_train_loss`, ...).

        The problem then holds `best_model`. Splits without data are left out.
        """
        self.model.load_state_dict(best_model, strict=False)
        run, output = self._start(), {}
        self.model.eval()
        metrics = {"train": self.train_metric, "dev": self.dev_metric, "test": self.test_metric}
        with evaluating(self.model):
            self.callback.begin_test(self)
            for split, metric in metrics.items():
                if run.has(split):
                    outputs = [_detached(self.model(_own_name(batch))) for batch in run.batches_of(split)]
                    mean = torch.stack([out[metric] for out in outputs]).mean()
                    output = {**output, f"mean_{metric}": mean, **outputs[-1]}
        self.callback.end_test(self, output)
        if self.logger is not None:
            self.logger.log_metrics({f"best_{k}": v for k, v in output.items()})
        return output

    def evaluate(self, best_model: dict[str, Any]) -> dict[str, Any]:
        """`test` under its old name; `best_model` is a state dict."""
        return self.test(best_model)


def _loader(trainer: Trainer, attribute: str) -> _Loader:
    return (_SizedLoader if hasattr(getattr(trainer, attribute), "__len__") else _Loader)(trainer, attribute)


class _Loader:
    """The loader that an attribute of the trainer holds when an epoch begins, as it is.

    The name that a batch has (its dataset's, which prefixes the metrics) is put aside.
    """

    def __init__(self, trainer: Trainer, attribute: str) -> None:
        self.trainer, self.attribute = trainer, attribute

    def __iter__(self) -> Iterator[Any]:
        for batch in iterator_of(getattr(self.trainer, self.attribute)):
            yield {_OWN_NAME if k == "name" else k: v for k, v in batch.items()} if isinstance(batch, dict) else batch


class _SizedLoader(_Loader):
    def __len__(self) -> int:
        return len(getattr(self.trainer, self.attribute))


_OWN_NAME = "name given by its loader"


def _own_name(batch: Any) -> Any:
    if not isinstance(batch, dict) or _OWN_NAME not in batch:
        return batch
    return {**{k: v for k, v in batch.items() if k != _OWN_NAME}, "name": batch[_OWN_NAME]}


def _detached(output: dict[str, Any]) -> dict[str, Any]:
    return {k: v.detach() if isinstance(v, Tensor) else v for k, v in output.items()}
