"""Bad input gets a clear error before anything is trained, and nothing is lost."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.utils.data import DataLoader

import weft
from tests.helpers.bitwise import same
from tests.helpers.byhand import OPTIMIZERS, problem, tensors


def fit_one_epoch(
    given: Any = None, module: nn.Module | None = None, dev: Any = None, **options: Any
) -> weft.FitResult:
    trainer = weft.Trainer(**{"epochs": 1, "progress": False, **options})
    return trainer.fit(problem() if module is None else module, tensors(8) if given is None else given, dev)


class Returns(nn.Module):
    """A problem that returns whatever it is told to."""

    def __init__(self, make: Callable[[Tensor, dict[str, Any]], Any]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))
        self.make = make

    def forward(self, batch: dict[str, Any]) -> Any:
        return self.make(self.w, batch)


def returning(make: Callable[[Tensor, dict[str, Any]], Any], **options: Any) -> weft.FitResult:
    return fit_one_epoch(module=Returns(make), **options)


def lbfgs_and_adam() -> dict[str, Any]:
    return {"net": OPTIMIZERS["adam"], "net.0": lambda params: torch.optim.LBFGS(params)}


def other_parameters() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)


def frozen() -> nn.Module:
    return problem().requires_grad_(False)


def with_scheduler_of_another_optimizer() -> weft.FitResult:
    scheduler = torch.optim.lr_scheduler.StepLR(other_parameters(), 1)
    return fit_one_epoch(scheduler=scheduler)


OPTIONS = {
    "unknown option": (lambda: weft.Trainer(epoch=3), TypeError, r"no option 'epoch'; did you mean 'epochs'\?"),
    "unknown checkpoint option": (
        lambda: weft.Trainer(checkpoint={"kep": 3}),
        ValueError,
        r"checkpoint.kep=3: there is no such option; did you mean 'keep'",
    ),
    "negative epochs": (lambda: weft.Trainer(epochs=-1), ValueError, "epochs=-1: must be at least 0"),
    "several wrong": (
        lambda: weft.Trainer(epochs=1.5, clip=0.0),
        ValueError,
        r"epochs=1.5: expected a whole number; clip=0.0: must be gr",
    ),
    "misspelt choice": (lambda: weft.Trainer(monitor_mode="mn"), ValueError, "monitor_mode='mn'.*did you mean 'min'"),
    "nan": (lambda: weft.Trainer(min_delta=float("nan")), ValueError, "min_delta=nan: expected a finite number"),
    "time": (lambda: weft.Trainer(max_time="soon"), ValueError, 'max_time=.soon.: expected seconds or "DD:HH:MM:SS"'),
    "unknown split": (lambda: weft.Trainer(limit_batches={"trian": 1}), ValueError, r"no split is named \['trian'\]"),
    "unknown hook": (
        lambda: weft.Trainer(hooks={"on_stpe_end": print}),
        TypeError,
        r"'on_stpe_end'.*did you mean 'on_step_end'\?",
    ),
    "hook object": (
        lambda: weft.Trainer(hooks=[type("Log", (), {"on_epoch_ends": print})()]),
        TypeError,
        "Hook 'Log' has .*'on_epoch_end'",
    ),
    "hook without events": (lambda: weft.Trainer(hooks=object()), TypeError, "'object' has no event to be called at"),
    "hook is no function": (
        lambda: weft.Trainer(hooks={"on_step_end": 3}),
        TypeError,
        "'on_step_end' is 3; expected a func",
    ),
    "step is no function": (lambda: weft.Trainer(training_step=3), TypeError, r"training_step=3: expected a function"),
    "metrics": (lambda: weft.Trainer(metrics=[len]), TypeError, "metrics=.*expected a dict of functions by name"),
    "metric": (lambda: weft.Trainer(metrics={"a": 3}), TypeError, "'a'.*expected a function"),
    "phases": (lambda: weft.Trainer(phases=[3]), TypeError, "phases: 3 is no weft.Phase"),
    "one phase": (lambda: weft.Trainer(phases=weft.Phase(epochs=1)), TypeError, "phases.*expected a list"),
    "epochs and phases": (
        lambda: weft.Trainer(phases=[weft.Phase(epochs=2)], epochs=3),
        ValueError,
        "contradicts the phases",
    ),
    "phase epochs": (lambda: weft.Phase(epochs=0), ValueError, "Phase: epochs=0: must be at least 1"),
    "phase epochs type": (lambda: weft.Phase(epochs=1.5), ValueError, "epochs=1.5: expected a whole number"),
    "phase freeze": (lambda: weft.Phase(epochs=1, freeze="net"), ValueError, "freeze='net': expected a list"),
    "schedule": (
        lambda: weft.Schedule(print, interval="steps"),
        ValueError,
        "interval='steps': expected 'epoch' or 'step'; did you mean 'step'",
    ),
    "loggers": (lambda: fit_one_epoch(loggers="tensorbord"), ValueError, "'tensorbord'; did you mean 'tensorboard'"),
    "accelerator": (lambda: fit_one_epoch(accelerator="gqu"), (ValueError, RuntimeError), "sked for accelerator='gqu'"),
}

DATA = {
    "unequal lengths": (
        lambda: weft.DictDataset({"x": torch.rand(3, 1), "t": torch.rand(4, 1)}),
        ValueError,
        r"unequal lengths \{'x': 3, 't': 4\}",
    ),
    "empty": (
        lambda: weft.DictDataset({"x": torch.rand(0, 1)}),
        ValueError,
        r"empty: its tensors \['x'\] have no rows",
    ),
    "no tensors": (lambda: fit_one_epoch({}), ValueError, "train data is empty"),
    "empty loader": (
        lambda: fit_one_epoch(DataLoader(weft.DictDataset(tensors(3)), 5, drop_last=True)),
        ValueError,
        "train data is empty",
    ),
    "empty iterable": (lambda: fit_one_epoch(filter(None, [])), ValueError, "yielded no batch"),
    "empty dev": (lambda: fit_one_epoch(dev=[]), ValueError, "dev data is empty"),
    "none": (lambda: weft.Trainer().fit(problem()), TypeError, "no data given"),
    "no training set": (lambda: fit_one_epoch(weft.Data(None, tensors(4))), ValueError, "no training data"),
    "batch size": (
        lambda: weft.Data(tensors(4), batch_size=0),
        ValueError,
        "Data: batch_size=0: must be at least 1",
    ),
    "fractional batch size": (lambda: weft.Data(tensors(4), batch_size=1.5), ValueError, "batch_size=1.5"),
    "batch size of a part": (
        lambda: fit_one_epoch(weft.Data(tensors(4), batch_size={"dev": 2})),
        ValueError,
        "no entry for 'train'",
    ),
    "misnamed split": (
        lambda: fit_one_epoch(weft.DictDataset(tensors(4), name="trian")),
        ValueError,
        "'trian' was given as the train data",
    ),
    "other split": (
        lambda: fit_one_epoch(dev=weft.DictDataset(tensors(4), name="train")),
        ValueError,
        "'train' was given as the dev",
    ),
    "keywords": (lambda: weft.Trainer().fit(problem(), tensors(4), nsim=3), TypeError, r"unknown arguments \['nsim'\]"),
    "setup returns": (
        lambda: fit_one_epoch(lambda: tensors(4)),
        TypeError,
        r"expected \(train, dev, test, batch_size\)",
    ),
    "setup and dev": (
        lambda: fit_one_epoch(lambda: (tensors(4), None, None, 2), dev=tensors(4)),
        TypeError,
        "returns its own dev set",
    ),
    "refresh": (
        lambda: weft.Data(tensors(4), refresh_every=1.5),
        ValueError,
        "refresh_every=1.5: expected a whole number",
    ),
    "shuffle": (lambda: weft.Data(tensors(4), shuffle="yes"), ValueError, "shuffle='yes': expected true or false"),
    "workers": (lambda: weft.Data(tensors(4), num_workers=-1), ValueError, "num_workers=-1: must be at least 0"),
    "grad keys": (
        lambda: weft.Data(tensors(4), inputs_require_grad="x"),
        ValueError,
        "inputs_require_grad='x': expected a list",
    ),
    "limit of an iterable": (
        lambda: fit_one_epoch((b for b in [tensors(4)]), limit_batches=0.5),
        TypeError,
        "train data .generator. has no length",
    ),
    "no module": (
        lambda: weft.Trainer().fit(problem, tensors(4)),
        TypeError,
        "problem is function .*expected a torch.nn.Module",
    ),
    "dev given twice": (
        lambda: weft.Trainer().fit(problem(), tensors(4), tensors(4), val_dataloaders=tensors(4)),
        TypeError,
        "val_dataloaders",
    ),
}

TRAINING = {
    "no loss": (
        lambda: returning(lambda w, b: {"residual": w.sum(), "mae": w}),
        ValueError,
        "no 'train_loss'.*'mae', 'residual'",
    ),
    "misspelt loss": (lambda: returning(lambda w, b: {"train_los": w.sum()}), ValueError, "did you mean 'train_los'"),
    "nothing": (lambda: returning(lambda w, b: None), ValueError, "no 'train_loss'.*got NoneType"),
    "not a scalar": (
        lambda: returning(lambda w, b: {"loss": w}),
        ValueError,
        r"'train_loss' has shape \(2,\); expected a scalar",
    ),
    "a number": (lambda: returning(lambda w, b: {"loss": 3.0}), TypeError, "is float 3.0; expected a scalar tensor"),
    "no grad": (
        lambda: returning(lambda w, b: w.detach().sum()),
        ValueError,
        "does not depend on anything that requires grad",
    ),
    "not finite": (
        lambda: returning(lambda w, b: w.sum() / 0),
        FloatingPointError,
        r"train_loss is inf in step 0 \(epoch 0, rank 0\)",
    ),
    "bad gradient": (
        lambda: returning(lambda w, b: (w * 0).sqrt().sum()),
        FloatingPointError,
        "a gradient is not finite in step 0",
    ),
    "dev loss": (
        lambda: returning(lambda w, b: {"train_loss": w.sum()}, dev=tensors(4)),
        UserWarning,
        r"'dev_loss' does not appear \(the metrics are \['dev_train_loss', 'train_loss'\]\), so no best weights are",
    ),
    "no dev scalar": (
        lambda: fit_one_epoch(dev=tensors(4), validation_step=lambda t, b: {"y": torch.ones(2)}),
        ValueError,
        "dev data gave nothing to report",
    ),
    "other parameters": (
        lambda: fit_one_epoch(optimizer=other_parameters()),
        ValueError,
        "none of the parameters of Regression",
    ),
    "nothing to train": (lambda: fit_one_epoch(module=frozen()), ValueError, "no parameters that require grad"),
    "no optimizers": (lambda: fit_one_epoch(optimizer={}), ValueError, "expected at least one optimizer"),
    "no optimizer": (lambda: fit_one_epoch(optimizer=3), TypeError, "is 3; expected a torch optimizer or a function"),
    "optimizer class": (
        lambda: fit_one_epoch(optimizer=lambda params: None),
        TypeError,
        "returned NoneType; expected an optimizer",
    ),
    "optimizer of nothing": (
        lambda: fit_one_epoch(optimizer={"nett": OPTIMIZERS["sgd"], "net": OPTIMIZERS["sgd"]}),
        ValueError,
        "'nett'; did you mean 'net'",
    ),
    "closure among several": (
        lambda: fit_one_epoch(optimizer=lbfgs_and_adam()),
        ValueError,
        "which needs a closure, must be the only one",
    ),
    "scheduler": (lambda: fit_one_epoch(scheduler=3), TypeError, "scheduler 'default' is 3; expected"),
    "scheduler name": (
        lambda: fit_one_epoch(scheduler={"defalt": print}),
        ValueError,
        "no such optimizer; did you mean 'default'",
    ),
    "foreign scheduler": (with_scheduler_of_another_optimizer, ValueError, "belongs to another optimizer"),
    "plateau by step": (
        lambda: fit_one_epoch(scheduler=weft.Schedule(torch.optim.lr_scheduler.ReduceLROnPlateau, interval="step")),
        ValueError,
        "follows a metric, which is known once an epoch",
    ),
    "metric for nothing": (
        lambda: fit_one_epoch(
            scheduler=weft.Schedule(lambda o: torch.optim.lr_scheduler.StepLR(o, 1), monitor="dev_loss")
        ),
        ValueError,
        "takes no metric: monitor='dev_loss' would have no effect",
    ),
    "missing metric of a scheduler": (
        lambda: fit_one_epoch(
            scheduler=weft.Schedule(torch.optim.lr_scheduler.ReduceLROnPlateau, monitor="dev_los"), dev=tensors(4)
        ),
        ValueError,
        r"needs the metric 'dev_los'.*\['dev_loss', 'train_loss'\]; did you mean 'dev_loss'",
    ),
    "missing metric": (
        lambda: fit_one_epoch(monitor_metric="dev_los", dev=tensors(4)),
        ValueError,
        r"'dev_los' never appears; the metrics are \['dev_loss', 'train_loss'\]; did you mean 'dev_loss'",
    ),
    "missing metric with patience": (
        lambda: returning(
            lambda w, b: {"my_loss": w.sum()},
            train_metric="my_loss",
            patience=2,
            dev=tensors(4),
            validation_step=lambda t, b: {"error": 1.0},
        ),
        ValueError,
        r"'dev_loss' never appears; the metrics are \['dev_error', 'my_loss'\]",
    ),
    "frozen nothing": (
        lambda: fit_one_epoch(phases=[weft.Phase(epochs=1, freeze=["netz"])], epochs=1),
        ValueError,
        "'netz'; did you mean 'net'",
    ),
    "weights of nothing": (
        lambda: fit_one_epoch(phases=[weft.Phase(epochs=1, weights={"f": 1.0})], epochs=1),
        ValueError,
        "no term 'f'",
    ),
    "metric reads": (lambda: fit_one_epoch(metrics={"m": lambda yy: yy}), KeyError, "'m' reads 'yy'"),
    "log": (
        lambda: fit_one_epoch(hooks={"on_step_end": lambda t, b, l: t.log("a", "text")}),
        ValueError,
        "log: 'a' is 'text'; expected a number",
    ),
    "no test set": (lambda: evaluated("test"), ValueError, "no test data"),
    "no predict set": (lambda: evaluated("predict"), ValueError, "no predict data"),
    "double data": (
        lambda: fit_one_epoch({k: v.double() for k, v in tensors(8).items()}),
        TypeError,
        r"'x': 'torch.float64'.*precision='64-true'",
    ),
    "integers": (
        lambda: fit_one_epoch({k: v.long() for k, v in tensors(8).items()}),
        TypeError,
        r"'x': 'torch.int64'.*Convert the data",
    ),
    "nan in data": (
        lambda: fit_one_epoch({"x": torch.tensor([[1.0, torch.nan], [1, 1]]), "t": torch.ones(2, 1)}, strict_data=True),
        ValueError,
        "train data: 'x' has NaN or Inf in 1 of 2 rows",
    ),
}


def evaluated(what: str) -> Any:
    trainer = weft.Trainer(epochs=1, progress=False)
    trainer.fit(problem(), tensors(4))
    return getattr(trainer, what)()


CASES = {**OPTIONS, **DATA, **TRAINING}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gets_an_error_that_says_what_was_found_and_expected(case: str) -> None:
    make, kind, message = CASES[case]
    with pytest.raises(kind, match=message):
        make()


def test_what_goes_wrong_before_the_first_step_leaves_the_weights_as_they_were() -> None:
    module = problem()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    for options in ({"optimizer": other_parameters()}, {"loggers": "tensorbord"}, {"scheduler": 3}):
        with pytest.raises((ValueError, TypeError)):
            fit_one_epoch(module=module, **options)
    with pytest.raises(TypeError):
        fit_one_epoch({k: v.double() for k, v in tensors(8).items()}, module)
    assert same(before, dict(module.state_dict()))
    assert all(p.grad is None and p.requires_grad for p in module.parameters())


def test_nan_in_the_data_is_a_warning_with_key_and_rows_unless_strict() -> None:
    bad = {**tensors(8), "unused": torch.tensor([1.0, torch.inf] + [torch.nan] * 2 + [0.0] * 4)}
    with pytest.warns(UserWarning, match="train data: 'unused' has NaN or Inf in 3 of 8 rows"):
        fit_one_epoch(bad)


def test_a_loss_that_is_not_finite_never_reaches_the_weights() -> None:
    def make(w: Tensor, batch: dict[str, Any]) -> Tensor:
        return (w * batch["x"]).sum() * (torch.nan if batch["index"][0] == 2 else 1.0)

    def trainer(policy: str) -> tuple[weft.Trainer, Returns, weft.Data]:
        options = {"epochs": 2, "progress": False, "optimizer": OPTIMIZERS["sgd"], "on_nonfinite": policy}
        return weft.Trainer(**options), Returns(make), weft.Data(tensors(4), batch_size=1, shuffle=False)

    x = tensors(4)["x"]
    raising, module, data = trainer("raise")
    with pytest.raises(FloatingPointError, match="train_loss is nan in step 2"):
        raising.fit(module, data)
    assert torch.allclose(module.w, 1 - 0.05 * x[:2].sum(0))
    skipping, module, data = trainer("skip")
    with pytest.warns(UserWarning, match="the step is skipped"):
        result = skipping.fit(module, data)
    assert torch.allclose(result.last_weights["w"], 1 - 0.1 * x[[0, 1, 3]].sum(0))
    stopping, module, data = trainer("stop")
    with pytest.warns(UserWarning, match="training stops"):
        result = stopping.fit(module, data)
    assert (result.stop_reason, result.steps, result.epochs) == ("nonfinite", 3, 1)
    assert torch.allclose(result.last_weights["w"], 1 - 0.05 * x[:2].sum(0))


def test_clip_with_lbfgs_says_that_it_has_no_effect() -> None:
    with pytest.warns(UserWarning, match="clip=1.0 has no effect with LBFGS"):
        fit_one_epoch(optimizer=lambda params: torch.optim.LBFGS(params), clip=1.0)


# ---------------------------------------------------------------- any input: a working trainer or one of our own errors

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 5),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from(["auto", "min", "norm", "raise"]),
    st.lists(st.integers(0, 2), max_size=2),
    st.dictionaries(st.sampled_from(["train", "dev", "keep", 3]), st.integers(-1, 3)),
    st.just(print),
    st.just(object()),
)
names = st.sampled_from([*inspect.signature(weft.Trainer).parameters, "epoch", "hook", "max_epochs"])


@given(st.dictionaries(names, scalars, max_size=4))
@settings(max_examples=150)
def test_any_options_give_a_trainer_or_one_of_our_own_errors(options: dict[str, Any]) -> None:
    try:
        trainer = weft.Trainer(**options)
    except (TypeError, ValueError) as error:
        assert _is_ours(error), f"{options}: {error!r}"
        return
    repr(trainer)
    assert weft.TrainerConfig(**trainer.config.to_dict()) == trainer.config


harmless = {
    "epochs": st.integers(0, 2),
    "accumulate": st.integers(1, 3),
    "validate_every": st.integers(1, 3),
    "patience": st.integers(1, 2),
    "clip": st.floats(0.01, 2),
    "clip_algorithm": st.sampled_from(["norm", "value"]),
    "max_steps": st.integers(0, 3),
    "limit_batches": st.one_of(st.integers(1, 2), st.floats(0.01, 1.0)),
    "fast_dev_run": st.booleans(),
    "seed": st.integers(0, 9),
    "on_nonfinite": st.sampled_from(["raise", "skip", "stop"]),
    "monitor_mode": st.sampled_from(["min", "max"]),
    "monitor_metric": st.sampled_from(["dev_loss", "train_loss", "nothing"]),
    "min_epochs": st.integers(0, 3),
    "optimizer": st.sampled_from(list(OPTIMIZERS.values())),
    "log_every": st.integers(1, 2),
    "precision": st.sampled_from(["64-true", 32]),
}


@given(st.fixed_dictionaries({}, optional=harmless), st.integers(1, 9), st.booleans())
@settings(max_examples=40)
def test_any_legal_options_train_or_say_why_not(options: dict[str, Any], rows: int, with_dev: bool) -> None:
    given = weft.Data(tensors(rows), tensors(3) if with_dev else None, batch_size=2)
    trainer = weft.Trainer(**{"epochs": 2, "progress": False, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = trainer.fit(problem().to(torch.get_default_dtype()), given)
        except ValueError as error:
            assert "never appears" in str(error)
            return
    assert all(len(column) == result.epochs for column in result.history.values())
    assert all(type(value) is float for column in result.history.values() for value in column)
    assert all(bool(v.isfinite().all()) for v in result.last_weights.values())
    assert result.epochs <= options.get("epochs", 2)


columns = st.one_of(
    st.integers(0, 4).map(lambda n: torch.rand(n, 2)),
    st.integers(1, 4).map(lambda n: np.random.default_rng(0).random((n, 2))),
    st.integers(1, 4).map(lambda n: [[1.0, 2.0]] * n),
    st.sampled_from(
        [
            torch.tensor(1.0),
            3,
            None,
            "text",
            torch.ones(2, 2, dtype=torch.int32),
            torch.full((2, 2), torch.nan),
            [[1], [1, 2]],
        ]
    ),
)
batch_sizes = st.one_of(
    st.none(),
    st.integers(-1, 5),
    st.floats(0, 3),
    st.dictionaries(st.sampled_from(["train", "dev"]), st.integers(0, 3)),
)


@given(
    st.dictionaries(st.sampled_from(["x", "t", "u"]), columns, max_size=3), batch_sizes, st.booleans(), st.booleans()
)
@settings(max_examples=80)
def test_any_data_trains_or_gets_one_of_our_own_errors(
    tensors: dict[str, Any], batch_size: Any, shuffle: bool, drop_last: bool
) -> None:
    def loss(w: Tensor, batch: dict[str, Any]) -> Tensor:
        return sum(
            (w.to(v.dtype) * v.nan_to_num()).sum() for v in batch.values() if isinstance(v, Tensor) and v.dim() == 2
        )  # pyright: ignore[reportReturnType]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            data = weft.Data(tensors, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last)
            result = returning(loss, given=data)
        except (TypeError, ValueError) as error:
            assert _is_ours(error), f"{tensors}: {error!r}"
            return
    assert result.steps >= 1


def _is_ours(error: BaseException) -> bool:
    """Whether the error was raised by a line of weft, and not by something weft called."""
    trace = error.__traceback__
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    return "/weft/" in trace.tb_frame.f_code.co_filename
