"""NeuroMANCER's trainers with `compile=True`: the curves of eager, from graphs; and what scripts read of them."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from tests.helpers.bitwise import same
from tests.helpers.graphs import make_free, run_as_traced
from tests.helpers.problems import parameter_rows, small_rosenbrock
from weft.compile.choosing import Graphs
from weft.integrations.neuromancer import Trainer
from weft.integrations.neuromancer.trainer import Callback

MADE: list[Graphs] = []


@pytest.fixture(autouse=True)
def graphs_as_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    make_free(monkeypatch)
    run_as_traced(monkeypatch)
    MADE.clear()
    begin = Graphs.__init__
    monkeypatch.setattr(Graphs, "__init__", lambda self, state: (begin(self, state), MADE.append(self))[0])


def batches(rows: int, name: str, seed: int = 1) -> list[dict[str, Any]]:
    columns = parameter_rows(rows, seed).datadict
    return [{**{k: v[i : i + 10] for k, v in columns.items()}, "name": name} for i in range(0, rows, 10)]


def train_script(compile: Any, lr: float = 0.01, **options: Any) -> Trainer:
    """43 training rows and 15 of dev data, in batches of 10."""
    problem = copy.deepcopy(small_rosenbrock())
    optimizer = torch.optim.Adam(problem.parameters(), lr, betas=(0.0, 0.9))
    given: dict[str, Any] = {"epochs": 6, "epoch_verbose": 100, "optimizer": optimizer} | options
    trainer = Trainer(problem, batches(43, "train"), batches(15, "dev", 2), compile=compile, **given)
    trainer.train()
    return trainer


# ---- the base trainer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"clip": 0.1}, {"clip": None}, {"eval_metric": "train_loss"}], ids=str)
def test_a_compiled_script_has_the_curves_of_an_eager_one(options: dict[str, Any]) -> None:
    eager = train_script(False, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = train_script(True, **options)
    assert sorted(MADE[-1].made.values()) == [1, 1, 1, 1]  # full and short batches of both sets
    assert type(MADE[-1].all()[0]).__name__ == "UpdateGraph"
    assert compiled.result.history.keys() == eager.result.history.keys()
    for name, values in eager.result.history.items():
        assert compiled.result.history[name] == pytest.approx(values, rel=1e-5), name
    assert compiled.best_devloss == pytest.approx(eager.best_devloss, rel=1e-5)
    assert train_script(True, 0.0101, **options).best_devloss != pytest.approx(eager.best_devloss, rel=1e-5)


def test_a_second_training_goes_on_compiled() -> None:
    def twice(compile: Any) -> Trainer:
        trainer = train_script(compile)
        trainer.train()
        return trainer

    eager, compiled = twice(False), twice(True)
    assert compiled.current_epoch == eager.current_epoch == 12
    assert compiled.best_devloss == pytest.approx(eager.best_devloss, rel=1e-5)


class Watching(Callback):
    def __init__(self) -> None:
        self.seen: list[set[str]] = []

    def end_batch(self, trainer: Any, output: Any) -> None:
        self.seen.append(set(output))


def test_a_callback_that_reads_outputs_keeps_training_eager_and_says_so() -> None:
    with pytest.warns(UserWarning, match="stays eager, Watching.end_batch reads outputs") as caught:
        compiled = train_script(True, callback=Watching())
    assert len(caught) == 1
    eager = train_script(False, callback=Watching())
    assert same(compiled.best_model, eager.best_model)
    assert compiled.callback.seen == eager.callback.seen
    assert "x" in compiled.callback.seen[-1]


def test_the_best_value_is_a_number_before_and_after_training() -> None:
    trainer = Trainer(small_rosenbrock(), batches(20, "train"), batches(10, "dev", 2), epochs=1, epoch_verbose=9)
    assert trainer.best_devloss > 1e30
    assert trainer.best_devloss.item() == trainer.best_devloss  # type: ignore[attr-defined]
    trainer.train()
    assert 0 < trainer.best_devloss.item() < 1e3  # type: ignore[attr-defined]
    assert f"{trainer.best_devloss:.3f}" == f"{float(trainer.best_devloss):.3f}"
    assert Trainer(small_rosenbrock(), [], eval_mode="max").best_devloss < -1e30


class Noting(Callback):
    def __init__(self) -> None:
        self.last: list[float] = []

    def end_eval(self, trainer: Any, output: Any) -> None:
        self.last.append(float(output["dev_loss"]))


def test_the_last_dev_batch_may_decide_as_in_neuromancer() -> None:
    last = train_script(False, callback=Noting(), eval_batches="last", patience=None)
    assert last.best_devloss == pytest.approx(min(last.callback.last), rel=1e-6)
    over_all = train_script(False, callback=Noting(), patience=None)
    assert over_all.best_devloss != pytest.approx(min(over_all.callback.last), rel=1e-6)
    compiled = train_script(True, eval_batches="last", patience=None)
    assert compiled.best_devloss == pytest.approx(last.best_devloss, rel=1e-5)
    with pytest.raises(ValueError, match="expected 'all' or 'last'"):
        Trainer(small_rosenbrock(), [], eval_batches="first")


# ---- LitTrainer ------------------------------------------------------------------------------------------------------


def lit(compile: Any, **options: Any) -> weft.LitTrainer:
    trainer = weft.LitTrainer(epochs=4, save_weights=False, progress=False, compile=compile, seed=0, **options)
    trainer.fit(copy.deepcopy(small_rosenbrock()), lambda: (parameter_rows(40), parameter_rows(10, 2), None, 10))
    return trainer


def test_a_compiled_lightning_script_has_the_curves_of_an_eager_one() -> None:
    eager = lit(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = lit(True)
    assert compiled.run is not None
    assert eager.run is not None
    assert list(compiled.run.graphs.made.values()) == [1, 1]
    for name, values in eager.run.history.values.items():
        assert compiled.run.history.values[name] == pytest.approx(values, rel=1e-5), name


def test_hooks_of_evaluations_are_called_as_often_with_graphs() -> None:
    def called(compile: Any) -> list[int]:
        calls: list[int] = []
        hook = {"on_validation_batch_end": lambda self, out, batch, index: calls.append(index)}
        trainer = lit(compile, custom_hooks=hook)
        assert not compile or list(trainer.run.graphs.made.values()) == [1]
        return calls

    assert called(True) == called(False) == [0] * 4


def test_what_scripts_read_of_the_trainer_is_there(tmp_path: Path) -> None:
    optimizer = torch.optim.Adam(small_rosenbrock().parameters())
    trainer = weft.LitTrainer(
        epochs=3, patience=2, warmup=1, clip=5.0, weight_path=tmp_path, weight_name="best", progress=False
    )
    assert (trainer.epochs, trainer.max_epochs, trainer.patience, trainer.warmup, trainer.clip) == (3, 3, 2, 1, 5.0)
    assert (trainer.weight_path, trainer.weight_name, trainer.eval_metric) == (tmp_path, "best", "dev_loss")
    for name in ("custom_optimizer", "custom_training_step", "logger", "profiler", "hparam_config", "lit_data_module"):
        assert getattr(trainer, name) is None, name
    assert trainer.custom_hooks == trainer.callback_metrics == {}
    assert weft.LitTrainer(custom_optimizer=optimizer).custom_optimizer is optimizer
    result = trainer.fit(small_rosenbrock(), lambda: (parameter_rows(20), parameter_rows(10, 2), None, 10))
    assert float(trainer.callback_metrics["dev_loss"]) == pytest.approx(result.history["dev_loss"][-1])
    assert trainer.logged_metrics == trainer.callback_metrics
    assert trainer.checkpoint_callback.best_model_path == str(trainer.weights_file)
    assert float(trainer.checkpoint_callback.best_model_score) == pytest.approx(min(result.history["dev_loss"]))
    assert trainer.lit_data_module is not None
    assert not hasattr(trainer, "eval_metrics")
    with pytest.raises(AttributeError, match="epochs is an option"):
        trainer.epochs = 5
