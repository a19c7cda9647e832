"""Lightning's and physicsml's configs mean here what they mean there, and say so where they cannot."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import weft
from weft import yamlfile
from weft.recipes import recipe, schema
from weft.recipes.dialects import translate
from weft.recipes.schema import ConfigError

PHYSICSML = """
name: my.models:make
data: my.data:setup
config:
  x_features: [numbers]
  y_features: [energy]
  hidden: 64
  optimizer: {name: AdamW, config: {lr: 1e-3}}
  scheduler: {name: ReduceLROnPlateau, config: {factor: 0.5}, interval: epoch, frequency: 2, monitor: val/total/loss}
  datamodule: {train: {batch_size: 64, drop_last: false}, validation: {batch_size: 128}, predict: {batch_size: 7},
               num_workers: all, pre_batch: in_memory, cut_off: 5.0}
  trainer: {max_epochs: 20, min_epochs: 2, accelerator: cpu, devices: 1, 
            strategy: {name: DDPStrategy, config: {static_graph: true}},
            precision: 64, gradient_clip_val: 10, gradient_clip_algorithm: value, default_root_dir: here,
            enable_checkpointing: true,
            callbacks: {stop: {name: EarlyStopping, config: {monitor: val/total/loss, patience: 5, min_delta: 0.1}}},
            logger: {name: TensorBoardLogger}}
"""


def trainer_of(**options: Any) -> dict[str, Any]:
    return translate({"trainer": options}).get("trainer", {})


def problems_of(config: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        translate(config)
    return caught.value.problems


def test_a_physicsml_config_becomes_this() -> None:
    assert translate(yamlfile.load(PHYSICSML)) == {
        "problem": {
            "class_path": "my.models:make",
            "init_args": {"x_features": ["numbers"], "y_features": ["energy"], "hidden": 64},
        },
        "data": {"class_path": "my.data:setup", "init_args": {"cut_off": 5.0}},
        "batches": {
            "batch_size": {"train": 64, "dev": 128, "test": 64, "predict": 7},
            "drop_last": False,
            "num_workers": "all",
            "pre_batch": "in_memory",
        },
        "optimizer": {"class_path": "AdamW", "init_args": {"lr": 1e-3}},
        "scheduler": {
            "class_path": "ReduceLROnPlateau",
            "init_args": {"factor": 0.5},
            "interval": "epoch",
            "frequency": 2,
            "monitor": "dev_loss",
        },
        "trainer": {
            "epochs": 20,
            "min_epochs": 2,
            "accelerator": "cpu",
            "devices": 1,
            "precision": 64,
            "clip": 10,
            "clip_algorithm": "value",
            "root_dir": "here",
            "checkpoint": True,
            "patience": 5,
            "min_delta": 0.1,
            "monitor_metric": "dev_loss",
        },
        "strategy": {"class_path": "lightning.fabric.strategies.DDPStrategy", "init_args": {"static_graph": True}},
        "loggers": ["tensorboard"],
    }


def test_what_a_physicsml_config_leaves_out_gets_its_own_defaults() -> None:
    assert translate({"name": "a:b", "config": {}}) == {
        "problem": {"class_path": "a:b", "init_args": {}},
        "optimizer": {"class_path": "Adam", "init_args": {"lr": 1e-3}},
        "scheduler": {"class_path": "CosineAnnealingLR", "init_args": {"T_max": "num_steps"}, "interval": "step"},
        "trainer": {"epochs": 1, "root_dir": "training", "checkpoint": False},
        "batches": {"batch_size": {"train": 1, "dev": 1, "test": 1, "predict": 1}, "drop_last": True},
    }


def test_a_lightning_cli_config_becomes_this() -> None:
    config = {
        "seed_everything": 3,
        "ckpt_path": "last",
        "model": {"class_path": "m.Model", "init_args": {"width": 3}},
        "data": {"class_path": "m.Data"},
        "trainer": {
            "max_epochs": 7,
            "max_steps": -1,
            "accumulate_grad_batches": 4,
            "check_val_every_n_epoch": 2,
            "log_every_n_steps": 5,
            "limit_train_batches": 10,
            "limit_val_batches": 1.0,
            "max_time": {"hours": 1, "minutes": 30},
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"every_n_train_steps": 50, "monitor": "val_loss"},
                },
                {"class_path": "my.Callback", "init_args": {"a": 1}},
            ],
            "logger": [{"class_path": "lightning.pytorch.loggers.MLFlowLogger", "init_args": {"experiment_name": "x"}}],
            "enable_progress_bar": False,
            "reload_dataloaders_every_n_epochs": 3,
            "profiler": "simple",
        },
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
        "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.ExponentialLR", "init_args": {"gamma": 0.9}},
    }
    assert translate(config) == {
        "problem": config["model"],
        "data": config["data"],
        "trainer": {
            "epochs": 7,
            "accumulate": 4,
            "validate_every": 2,
            "log_every": 5,
            "limit_batches": {"train": 10},
            "max_time": 5400.0,
            "checkpoint": {"every_n_steps": 50},
            "monitor_metric": "val_loss",
            "progress": False,
            "profiler": "simple",
            "seed": 3,
            "resume": "last",
        },
        "hooks": [{"class_path": "my.Callback", "init_args": {"a": 1}}],
        "loggers": config["trainer"]["logger"],
        "batches": {"refresh_every": 3},
        "optimizer": config["optimizer"],
        "scheduler": config["lr_scheduler"],
    }


def test_stages_of_transfer_learning_are_phases() -> None:
    config = {
        "name": "a:b",
        "config": {
            "optimizer": {"name": "Adam", "config": {"lr": 1e-3}},
            "scheduler": None,
            "trainer": {"max_epochs": 9},
            "transfer_learning": {
                "pre_trained_model_path": "old.ckpt",
                "modules_to_match": {"new": "old"},
                "stages": [
                    {"freeze_modules": ["body"], "trainer": {"max_epochs": 2}},
                    {
                        "optimizer": {"config": {"lr": 1e-5}},
                        "scheduler": {"name": "StepLR", "config": {"step_size": 2}},
                        "datamodule": {"train": {"batch_size": 4}},
                        "trainer": {"callbacks": [{"name": "EarlyStopping", "config": {"patience": 6}}]},
                    },
                ],
            },
        },
    }
    found = translate(config)
    assert found["weights"] == {"path": "old.ckpt", "match": {"new": "old"}}
    assert "epochs" not in found["trainer"]
    assert found["phases"] == [
        {"epochs": 2, "freeze": ["body"], "optimizer": {"class_path": "Adam", "init_args": {"lr": 1e-3}}},
        {
            "epochs": 9,
            "patience": 6,
            "optimizer": {"class_path": "Adam", "init_args": {"lr": 1e-5}},
            "scheduler": {"class_path": "StepLR", "init_args": {"step_size": 2}, "interval": "step"},
            "batches": {"batch_size": dict.fromkeys(("train", "dev", "test", "predict"), 4)},
        },
    ]
    _, wrong = schema.normal({**found, "weights": None, "problem": "weft.demo:make_problem"})
    assert wrong == []


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"max_epochs": 3}, {"epochs": 3}),
        ({"gradient_clip_val": 0.0}, {}),
        ({"gradient_clip_val": 0.5}, {"clip": 0.5}),
        ({"gradient_clip_algorithm": None}, {}),
        ({"limit_test_batches": 0.5}, {"limit_batches": {"test": 0.5}}),
        ({"limit_train_batches": 1}, {"limit_batches": {"train": 1}}),
        ({"precision": "bf16-mixed"}, {"precision": "bf16-mixed"}),
        ({"detect_anomaly": False, "sync_batchnorm": False, "val_check_interval": None}, {}),
        ({"enable_checkpointing": False}, {"checkpoint": False}),
        ({"profiler": {"name": "PyTorchProfiler"}}, {"profiler": "pytorch"}),
        ({"callbacks": [{"name": "Timer", "config": {"duration": "00:01:00:00"}}]}, {"max_time": "00:01:00:00"}),
        ({"callbacks": ["ModelCheckpointApply"]}, {}),
        ({"epochs": 3, "patience": 2}, {"epochs": 3, "patience": 2}),
    ],
)
def test_a_lightning_option_means_this(given: dict[str, Any], meant: dict[str, Any]) -> None:
    assert trainer_of(**given) == meant


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"trainer": {"max_epoch": 3}}, "did you mean 'max_epochs'"),
        ({"trainer": {"val_check_interval": 0.5}}, "use validate_every"),
        ({"trainer": {"max_epochs": -1}}, "a run has a number of epochs"),
        ({"trainer": {"overfit_batches": 3}}, "limit_batches"),
        ({"trainer": {"detect_anomaly": True}}, "set_detect_anomaly"),
        ({"trainer": {"deterministic": "warn"}}, "expected true or false"),
        ({"trainer": {"callbacks": [{"nam": "EarlyStopping"}]}}, "expected {name, config}"),
        (
            {"trainer": {"callbacks": [{"name": "EarlyStopping", "config": {"stopping_threshold": 1}}]}},
            "stopping_threshold=1: has no meaning",
        ),
        (
            {
                "trainer": {
                    "callbacks": [
                        {"name": "EarlyStopping", "config": {"monitor": "val_a"}},
                        {"name": "ModelCheckpoint", "config": {"monitor": "val_b"}},
                    ]
                }
            },
            "one monitored metric",
        ),
        ({"datamodule": {"train": {"batch_sizes": 3}}}, "did you mean 'batch_size'"),
        ({"datamodule": {"cut_off": 3}}, "goes to the data setup function"),
        ({"datamodule": {"train": 3}}, "expected a dict like {batch_size: 64}"),
        ({"optimizer": {"name": "Adam", "confg": {}}}, "did you mean 'config'"),
        ({"scheduler": {"name": "StepLR", "strict": False}}, "strict=False"),
        ({"name": "mace_model", "config": {}}, "name yours as `problem"),
        ({"float32_matmul_precision": "high"}, "set_float32_matmul_precision"),
        ({"seed_everything": True}, "give a number"),
        ({"transfer_learning": {"stages": [], "repo_url": "x"}}, "pre_trained_model_path"),
        ({"transfer_learning": {"stages": [{"freeze": ["a"]}]}}, "there is no such key; did you mean 'freeze_modules'"),
        ({"transfer_learning": {"stages": [{"trainer": {"precision": 64}}]}}, "one for the whole run"),
    ],
)
def test_a_key_without_meaning_here_says_so(config: dict[str, Any], message: str) -> None:
    assert any(message in problem for problem in problems_of(config)), problems_of(config)


def test_all_problems_are_told_at_once() -> None:
    assert len(problems_of({"trainer": {"max_epoch": 3, "detect_anomaly": True}, "seed_everything": True})) == 3


def test_what_changes_no_result_is_noted() -> None:
    found = translate(
        {"trainer": {"num_sanity_val_steps": 2, "enable_model_summary": True, "callbacks": ["RichProgressBar"]}}
    )
    assert found["trainer"] == {}
    assert [note.split(":")[0] for note in found["notes"]] == [
        "trainer.num_sanity_val_steps=2",
        "trainer.enable_model_summary=True",
        "trainer.callbacks.0='RichProgressBar'",
    ]


def test_overrides_of_a_call_end_with_it() -> None:
    config = yamlfile.load(PHYSICSML)
    before = copy.deepcopy(config)
    once = translate(
        config, trainer_config={"max_epochs": 2}, optimizer_config={"config": {"lr": 1.0}}, ckpt_path="x.ckpt"
    )
    assert (once["trainer"]["epochs"], once["trainer"]["resume"]) == (2, "x.ckpt")
    assert once["optimizer"] == {"class_path": "AdamW", "init_args": {"lr": 1.0}}  # its name stays
    assert config == before
    assert translate(config)["trainer"]["epochs"] == 20 and "resume" not in translate(config)["trainer"]


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "problem": st.just("a:b"),
            "trainer": st.dictionaries(
                st.sampled_from(["epochs", "patience", "clip", "devices", "precision"]), plain, max_size=4
            ),
            "batches": st.dictionaries(st.sampled_from(["batch_size", "shuffle"]), plain, max_size=2),
            "optimizer": st.just({"class_path": "AdamW", "init_args": {"lr": 0.1}}) | st.just({"a": "x:y", "b": "x:z"}),
            "hooks": st.lists(st.just("a:B"), max_size=2),
        },
    )
)
def test_wefts_own_configs_stay_as_they_are(config: dict[str, Any]) -> None:
    before = copy.deepcopy(config)
    assert translate(config) == before
    assert config == before


def test_a_cosine_over_num_steps_ends_at_zero_after_the_last_step(tmp_path: Any) -> None:
    config = {
        "name": "weft.demo:make_problem",
        "data": {"class_path": "weft.demo:data_setup", "init_args": {"nsim": 90}},
        "config": {
            "datamodule": {"train": {"batch_size": 8}},
            "trainer": {
                "max_epochs": 3,
                "accelerator": "cpu",
                "default_root_dir": str(tmp_path),
                "enable_progress_bar": False,
            },
        },
    }
    rates: list[float] = []
    made = recipe.make(recipe.check(translate(config)))
    made.trainer.hooks.append(
        {"on_step_end": lambda trainer, batch, loss: rates.append(trainer.optimizer.param_groups[0]["lr"])}
    )
    result = made.fit()
    assert result.steps == 3 * (30 // 8)  # drop_last, as in physicsml
    expected = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([torch.zeros(1)], lr=1e-3), result.steps)
    raw = []
    for _ in range(result.steps):
        expected.optimizer.step()
        expected.step()
        raw.append(expected.get_last_lr()[0])
    assert rates == raw and rates[-1] == pytest.approx(0, abs=1e-12)


def test_a_physicsml_config_trains_like_the_same_written_by_hand(tmp_path: Any) -> None:
    config = {
        "name": "weft.demo:make_problem",
        "data": {"class_path": "weft.demo:data_setup", "init_args": {"nsim": 90}},
        "config": {
            "optimizer": {"name": "SGD", "config": {"lr": 1e-3}},
            "scheduler": None,
            "datamodule": {"train": {"batch_size": 8, "drop_last": False}},
            "trainer": {
                "max_epochs": 2,
                "accelerator": "cpu",
                "default_root_dir": str(tmp_path),
                "enable_progress_bar": False,
                "gradient_clip_val": 0.5,
            },
        },
    }
    torch.manual_seed(3)
    by_config = recipe.make(recipe.check(translate(config))).fit()
    torch.manual_seed(3)
    from weft.demo import data_setup, make_problem

    trainer = weft.Trainer(
        epochs=2, accelerator="cpu", progress=False, clip=0.5, optimizer=lambda p: torch.optim.SGD(p, lr=1e-3)
    )
    by_hand = trainer.fit(make_problem(), data_setup, nsim=90, batch_size=8)
    assert by_config.history == by_hand.history
    torch.manual_seed(3)
    other = weft.Trainer(
        epochs=2, accelerator="cpu", progress=False, clip=0.4, optimizer=lambda p: torch.optim.SGD(p, lr=1e-3)
    )
    assert other.fit(make_problem(), data_setup, nsim=90, batch_size=8).history != by_hand.history
