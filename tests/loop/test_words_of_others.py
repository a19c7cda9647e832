"""Words of other libraries, classes in the place of objects: each is met with the line to write."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import lightning.pytorch
import pytest
import torch
from torch import nn

import weft
from weft.config import TrainerConfig
from weft.loop.options import KNOWN
from weft.recipes import dialects_trainer
from weft.words import foreign

X = torch.rand(8, 2)

ON_A_TRAINER: dict[str, tuple[Any, str]] = {
    "max_epochs": (3, "here it is epochs=3"),
    "callbacks": ([], "here it is hooks="),
    "gradient_clip_val": (1.0, "here it is clip=1.0"),
    "lr": (0.01, "here it is optimizer=lambda params: torch.optim.Adam(params, lr=0.01)"),
    "weight_decay": (0.1, "torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1)"),
    "loss": (nn.MSELoss(), "weft.Supervised(net, loss_fn)"),
    "criterion": (nn.MSELoss(), "weft.Supervised(net, loss_fn)"),
    "batch_size": (32, "weft.Data((X, y), batch_size=32)"),
    "shuffle": (False, "weft.Data(train, dev, shuffle=False)"),
    "verbose": (0, "progress=False"),
    "fp16": (True, 'precision="16-mixed"'),
    "model": (nn.Linear(1, 1), "first argument of fit"),
    "validation_data": (X, "fit(problem, (X, y), dev=(X_dev, y_dev))"),
    "device": ("cuda", 'accelerator="cpu", "gpu"'),
    "gpus": (2, "devices=2"),
    "logger": (None, "loggers=None"),
    "limit_train_batches": (0.5, "limit_batches={'train': 0.5}"),
    "min_steps": (3, "use min_epochs"),
    "num_sanity_val_steps": (0, "weft makes no dry runs"),
    "random_state": (0, "seed=0"),
    "epohcs": (3, "did you mean 'epochs'"),
}


@pytest.mark.parametrize("word", ON_A_TRAINER)
def test_a_word_of_another_library_is_met_with_weftsown(word: str) -> None:
    value, says = ON_A_TRAINER[word]
    with pytest.raises(TypeError) as caught:
        weft.Trainer(**{word: value})
    assert f"Trainer has no option {word!r}; " in str(caught.value) and says in str(caught.value)
    assert "min_epochs'" not in str(caught.value)  # what the nearest spelling of max_epochs was


@pytest.mark.parametrize(("given", "right"), [("fp16", "16-mixed"), ("float64", "64-true"), ("bfloat16", "bf16-mixed")])
def test_a_value_of_another_library_is_met_with_wefts_own(given: str, right: str) -> None:
    with pytest.raises(ValueError, match=f"precision='{given}'.*did you mean '{right}'"):
        weft.Trainer(precision=given)


AT_FIT: dict[str, tuple[Any, str]] = {
    "batch_size": (32, "'batch_size'; here it is a matter of the data: weft.Data((X, y), batch_size=32)"),
    "validation_data": ((X, X), "fit(problem, (X, y), dev=(X_dev, y_dev))"),
    "validation_split": (0.2, "split the rows yourself"),
    "max_epochs": (3, "here it is epochs=3"),
    "ckpt_path": ("last", "here it is resume='last'"),
    "verbose": (0, "progress=False"),
    "lr": (0.1, "optimizer=lambda params"),
    "patience": (3, "weft.Trainer(patience=...)"),
}


@pytest.mark.parametrize("word", AT_FIT)
def test_what_fit_does_not_take_says_where_it_goes(word: str) -> None:
    value, says = AT_FIT[word]
    problem = weft.Supervised(nn.Linear(2, 2), nn.MSELoss())
    with pytest.raises(TypeError) as caught:
        weft.Trainer(progress=False).fit(problem, (X, X), **{word: value})
    assert "only a data setup function takes further arguments" in str(caught.value) and says in str(caught.value)


ON_OTHERS: dict[str, tuple[Any, str, Any, str]] = {
    "validation data": (weft.Data, "validation_data", (X, X), "here it is dev="),
    "short batch size": (weft.Data, "bs", 3, "here it is batch_size=3"),
    "collate": (weft.Data, "collate_fn", None, "fit(problem, DataLoader(..., collate_fn=...))"),
    "epochs of a phase": (weft.Phase, "max_epochs", 3, "here it is epochs=3"),
    "rate of a phase": (weft.Phase, "lr", 0.1, "here it is optimizer=lambda params: torch.optim.Adam(params, lr=0.1)"),
    "how many": (weft.CheckpointConfig, "save_top_k", 3, "here it is keep=3"),
    "which": (weft.CheckpointConfig, "monitor", "a", "option of the trainer: weft.Trainer(monitor_metric='a')"),
    "where": (weft.CheckpointConfig, "dirpath", "a", "option of the trainer: weft.Trainer(root_dir='a')"),
    "trials": (weft.SweepConfig, "n_trials", 3, "here it is trials=3"),
    "direction": (weft.SweepConfig, "direction", "maximize", "here it is mode='max'"),
    "jobs": (weft.SweepConfig, "n_jobs", 3, "here it is workers=3"),
    "direction of a trainer": (weft.Trainer, "direction", "minimize", "here it is monitor_mode='min'"),
    "none": (weft.Phase, "zzz", 3, "there are epochs, optimizer, scheduler, data, freeze"),
}


@pytest.mark.parametrize("case", ON_OTHERS)
def test_every_class_of_options_knows_the_words_of_others(case: str) -> None:
    cls, word, value, says = ON_OTHERS[case]
    with pytest.raises(TypeError) as caught:
        cls(**({"train": {"x": X}} if cls is weft.Data else {}), **{word: value})
    assert f"{cls.__name__} has no option {word!r}; " in str(caught.value) and says in str(caught.value)


@pytest.mark.parametrize(
    ("face", "name", "says"),
    [
        (weft, "EarlyStopping", "weft.Trainer(patience=...)"),
        (weft.hooks, "ModelCheckpoint", "weft.Trainer(checkpoint=True)"),
        (weft, "fit", "weft.Trainer(epochs=...).fit(problem, data)"),
        (weft, "lr_find", "weft.find_lr(problem, data)"),
        (weft, "cross_val_score", "weft.cross_validate"),
        (weft, "minimize", "weft.objective"),
        (weft, "System", "weft.Rollout"),
    ],
)
def test_a_name_of_another_library_is_met_with_wefts_own(face: Any, name: str, says: str) -> None:
    with pytest.raises(AttributeError) as caught:
        getattr(face, name)
    assert f"has no attribute {name!r}; here it is {says}" in str(caught.value)
    assert not hasattr(face, "__wrapped__") and "here it is" not in str(
        pytest.raises(AttributeError, getattr, face, "zz").value
    )


def test_names_that_are_told_are_there_and_those_of_others_are_not() -> None:
    import re

    for words, way in foreign.NAMES.items():
        assert not [word for word in words.split() if hasattr(weft, word)]
        for name in re.findall(r"weft\.(\w+)", way):
            assert hasattr(weft, name), way


CALLS: dict[str, tuple[Any, str]] = {
    "step": (
        lambda: weft.Trainer(training_step=lambda batch: 0.0),
        r"training_step takes \(batch\).*\(trainer, batch\)",
    ),
    "hook": (
        lambda: weft.Trainer(hooks=[type("K", (weft.Hook,), {"on_epoch_end": lambda self, epoch: None})()]),
        r"hooks: K.on_epoch_end takes \(epoch\), and is called with \(trainer, metrics\)",
    ),
    "hook of a dict": (
        lambda: weft.Trainer(hooks={"on_step_end": lambda t: None}),
        r"called with \(trainer, batch, loss\)",
    ),
    "scheduler": (
        lambda: weft.Trainer(scheduler=torch.optim.lr_scheduler.StepLR, progress=False).fit(
            weft.Supervised(nn.Linear(2, 1), nn.MSELoss()), (X, X[:, :1])
        ),
        r"StepLR.*step_size.*such as lambda optimizer: StepLR\(optimizer, ...\)",
    ),
    "optimizer": (
        lambda: weft.Trainer(optimizer="adam").fit(weft.Supervised(nn.Linear(2, 1), nn.MSELoss()), (X, X[:, :1])),
        r"'adam'.*optimizer=lambda params: torch.optim.Adam\(params, lr=1e-3\)",
    ),
    "series": (lambda: weft.windows(X, length=3), r'windows: got Tensor.*windows\(\{"x": series\}'),
}


@pytest.mark.parametrize("case", CALLS)
def test_what_cannot_be_called_as_it_will_be_is_told_before_training(case: str) -> None:
    call, says = CALLS[case]
    with pytest.raises(TypeError, match=says):
        call()


def test_what_takes_any_arguments_or_does_not_tell_is_taken() -> None:
    hooks = [{"on_step_end": lambda *args: None}, {"on_epoch_end": print}, {"on_fit_end": lambda t, r, more=1: None}]
    weft.Trainer(hooks=hooks, training_step=lambda *args, **more: 0.0)


def test_a_metric_that_is_to_grow_is_not_monitored_by_its_smallest_unasked() -> None:
    for name in ("dev_accuracy", "dev_r2", "val_f1", "AUROC"):
        with pytest.warns(UserWarning, match=f"monitor_metric='{name}' is monitored with monitor_mode='min'.*'max'"):
            weft.Trainer(monitor_metric=name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weft.Trainer(monitor_metric="dev_accuracy", monitor_mode="max")
        weft.Trainer(monitor_metric="dev_accuracy", monitor_mode="min")
        weft.Trainer(monitor_metric="dev_loss")


def test_a_supervised_problem_knows_the_words_for_its_parts() -> None:
    for word, ours in (("model", "net"), ("criterion", "loss_fn"), ("metric", "metrics"), ("los_fn", "loss_fn")):
        with pytest.raises(TypeError, match=f"Supervised has no option '{word}'; .*{ours}"):
            weft.Supervised(nn.Linear(1, 1), **{word: nn.MSELoss()})
    with pytest.raises(TypeError, match=r"'lr'; here it is optimizer=lambda params"):
        weft.Supervised(nn.Linear(1, 1), nn.MSELoss(), lr=0.1)  # type: ignore[call-arg]


def test_several_unknown_options_are_told_at_once() -> None:
    with pytest.raises(TypeError, match=r"'max_epochs'; here it is epochs=3\. Trainer has no option 'lr'; here"):
        weft.Trainer(max_epochs=3, lr=0.1)


def test_every_word_leads_to_an_option_that_there_is() -> None:
    others = {f.name for cls in (weft.Data, weft.CheckpointConfig, weft.SweepConfig) for f in dataclasses.fields(cls)}
    ours = {*KNOWN, "net", "loss_fn"}
    assert set(foreign.SAME) <= ours | others and foreign.OF_OTHERS == set(foreign.SAME) - KNOWN | {"metrics"}
    assert not set(foreign._SAME) & set(TrainerConfig.__dataclass_fields__)
    assert not set(foreign._INSTEAD) & KNOWN
    legal = set(map(str, TrainerConfig.__annotations__)) and {
        "16-mixed",
        "32-true",
        "64-true",
        "bf16-mixed",
        "min",
        "max",
        "norm",
    }
    assert set(foreign.VALUES.values()) <= legal
    for word in (*foreign._SAME, *foreign._INSTEAD):
        assert foreign.advice(word, 1, KNOWN).startswith("; ")  # and its braces are right


def test_python_and_config_dialects_share_the_table() -> None:
    import inspect

    lightning_knows = set(inspect.signature(lightning.pytorch.Trainer).parameters)
    told = {*foreign._SAME, *foreign._INSTEAD, *foreign.NEUTRAL, *foreign.NOTED}
    silent = lightning_knows - told - KNOWN
    assert silent <= {"reload_dataloaders_every_n_epochs", "model_registry", "enable_autolog_hparams"}, silent
    assert dialects_trainer.RENAMED is foreign.RENAMED and foreign.RENAMED.keys() <= foreign._SAME.keys()


class Doubled(nn.Module):
    def forward(self, batch: Any) -> Any:
        return batch["x"].sum()


CLASSES: dict[str, tuple[Any, str]] = {
    "hook": (lambda: weft.Trainer(hooks=weft.hooks.EMA), r"hooks: WeightAverage is a class; give an object|EMA"),
    "hook of one's own": (
        lambda: weft.Trainer(hooks=[type("Mine", (weft.Hook,), {"on_fit_end": lambda self, t, r: None})]),
        r"Mine is a class; give an object of it, Mine\(...\)",
    ),
    "node": (lambda: weft.Node(nn.Tanh, ["x"], ["y"]), r"got the class Tanh. Give an object of it, Tanh\(...\)"),
    "objective": (lambda: weft.objective(nn.MSELoss), r"got the class MSELoss"),
    "side": (lambda: weft.equal("x", nn.Tanh), r"got the class Tanh"),
    "problem": (lambda: weft.Trainer().fit(Doubled, {"x": X}), r"problem is the class Doubled; give an object of it"),
    "loss": (
        lambda: weft.Problem([], [weft.objective(lambda x: x)], loss=weft.PenaltyLoss),  # type: ignore[arg-type]
        "loss must be an instance",
    ),
    "metric": (lambda: weft.Trainer(metrics={"a": nn.MSELoss}), "is the class MSELoss; give an instance"),
}


@pytest.mark.parametrize("place", CLASSES)
def test_a_class_in_the_place_of_an_object_is_told_in_one_sentence(place: str) -> None:
    call, says = CLASSES[place]
    with pytest.raises(TypeError, match=says), warnings.catch_warnings():
        warnings.simplefilter("error")
        call()
