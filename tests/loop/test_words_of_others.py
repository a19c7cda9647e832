"""Words of other libraries, classes in the place of objects: each is met with the line to write."""

from __future__ import annotations

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
    ours = {*KNOWN, "net", "loss_fn"}
    assert set(foreign._SAME.values()) <= ours
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
