"""`weft.LitTrainer` does what NeuroMANCER's README promises of its LitTrainer; files go both ways."""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import weft
from tests.helpers.bitwise import same
from tests.helpers.neuromancer_problems import (
    FORMULATIONS,
    Formulation,
    NeuromancerLitTrainer,
    augmented_rosenbrock,
    load_state_dict_lightning,
    neuromancer_loader,
    rosenbrock_rows,
)
from tests.helpers.patience import patience
from weft.integrations.neuromancer.lithooks import HOOKS, INSTEAD, LightningHooks, LitModel, from_configure_optimizers

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:Using a target size",  # NeuroMANCER's equality constraints with a number
        "ignore:__array__ implementation",  # cvxpylayers
    )
]

PNLP = FORMULATIONS["pNLP"]


def setup_of(formulation: Formulation, batch_size: int | None = None) -> Any:
    """A data setup function as NeuroMANCER's README has it."""
    return lambda: (*formulation.datasets(), batch_size or formulation.batch_size)


def fitted(formulation: Formulation = PNLP, **options: Any) -> tuple[weft.LitTrainer, Any, weft.FitResult]:
    """A trainer after a fit, with its problem and its result."""
    problem = formulation.make()
    trainer = weft.LitTrainer(**{"epochs": 3, "progress": False, "save_weights": False, **options})
    return trainer, problem, trainer.fit(problem, setup_of(formulation))


def fitted_by_neuromancer(problem: Any, formulation: Formulation, **options: Any) -> Any:
    """NeuroMANCER's own LitTrainer after a fit. What Lightning says on the way is left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = NeuromancerLitTrainer(**{"epochs": 3, "accelerator": "cpu", "devices": 1, **options})
        trainer.fit(problem, setup_of(formulation))
    return trainer


@pytest.fixture(autouse=True)
def quiet_lightning() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.ERROR)
    yield
    for log, level in zip(loggers, levels, strict=True):
        log.setLevel(level)


def training_losses(problem: torch.nn.Module) -> list[float]:
    """A list that fills with the loss of every training batch that `problem` sees."""
    found: list[float] = []

    def read(module: Any, args: Any, out: Any) -> None:
        if "train_loss" in out:
            found.append(out["train_loss"].item())

    problem.register_forward_hook(read)
    return found


# ------------------------------------------------------------------------------------------------------------- curves


def test_the_signature_holds_every_keyword_of_the_original_and_of_its_readme() -> None:
    ours, theirs = (inspect.signature(c).parameters for c in (weft.LitTrainer, NeuromancerLitTrainer))
    assert list(ours)[: len(theirs)] == list(theirs)
    assert "monitor_metric" in ours
    different = {name for name in theirs if ours[name].default != theirs[name].default}
    assert different == {"devices", "eval_metric"}  # one device; the dev metric, where there is dev data


CAN_RUN = [n for n, f in FORMULATIONS.items() if len(f.data()) > 1 and n not in ("projected gradient", "Burgers PINN")]


@pytest.mark.parametrize("name", CAN_RUN)
def test_a_tutorial_trains_as_in_the_original_where_that_can_run_it(name: str) -> None:
    formulation = FORMULATIONS[name]
    problems = [formulation.make() for _ in range(2)]
    theirs, ours = map(training_losses, problems)
    fitted_by_neuromancer(problems[0], formulation, save_weights=False, clip=0.5)
    trainer = weft.LitTrainer(epochs=3, clip=0.5, shuffle=False, save_weights=False, progress=False)
    trainer.fit(problems[1], setup_of(formulation))
    assert len(theirs) >= 3 and ours == pytest.approx(theirs, rel=1e-6)


def test_the_comparison_with_the_original_can_fail() -> None:
    problems = [PNLP.make() for _ in range(2)]
    theirs, ours = map(training_losses, problems)
    fitted_by_neuromancer(problems[0], PNLP, save_weights=False)
    trainer = weft.LitTrainer(epochs=3, clip=0.1, shuffle=False, save_weights=False, progress=False)
    trainer.fit(problems[1], setup_of(PNLP))
    assert ours != pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("name", ["projected gradient", "Burgers PINN", "diffusion PINN", "inverse Burgers"])
def test_a_tutorial_trains_that_the_original_cannot_run_or_cannot_save(name: str) -> None:
    """Gradients in evaluation, and no dev data."""
    _, _, result = fitted(FORMULATIONS[name], epochs=10, custom_optimizer=lambda p: torch.optim.Adam(p, 3e-3))
    curve = result.history["train_loss"]
    assert curve[-1] < curve[0] and result.best_metric is not None


def test_training_rows_are_shuffled_unless_asked_otherwise() -> None:
    seen: dict[Any, list[float]] = {}
    for shuffle in (None, True, False):
        problem = PNLP.make()
        firsts: list[float] = []
        hook = {"on_train_batch_start": lambda self, batch, batch_idx, f=firsts: f.append(float(batch["p"][0]))}
        with pytest.raises(TypeError, match="on_train_batch_start"):  # an argument without default too many
            weft.LitTrainer(custom_hooks={"on_train_batch_start": lambda self, batch, batch_idx, more: None})
        trainer = weft.LitTrainer(epochs=1, shuffle=shuffle, save_weights=False, progress=False, custom_hooks=hook)
        trainer.fit(problem, setup_of(PNLP))
        seen[shuffle] = firsts
    rows = PNLP.datasets()[0].datadict["p"][:, 0]  # type: ignore[union-attr]
    assert seen[False] == [float(rows[i]) for i in (0, 16, 32)]
    assert seen[True] != seen[False] and seen[None] == seen[True]


# ----------------------------------------------------------------------------------------------------------- promises


def test_the_given_optimizer_is_used() -> None:
    problem = PNLP.make()
    optimizer = torch.optim.SGD(problem.parameters(), lr=0.0)
    before = {k: v.clone() for k, v in problem.state_dict().items()}
    trainer = weft.LitTrainer(epochs=2, custom_optimizer=optimizer, save_weights=False, progress=False)
    trainer.fit(problem, setup_of(PNLP))
    assert trainer.optimizer is optimizer and same(dict(problem.state_dict()), before)


def test_the_default_optimizer_is_the_one_of_the_readme() -> None:
    trainer, _, _ = fitted(epochs=1)
    group = trainer.optimizer.param_groups[0]
    assert isinstance(trainer.optimizer, torch.optim.Adam) and (group["lr"], group["betas"]) == (0.001, (0.0, 0.9))


def test_the_best_weights_are_in_the_problem_at_the_end() -> None:
    trainer, problem, result = fitted(epochs=15, custom_optimizer=lambda p: torch.optim.Adam(p, 0.3), seed=1)
    curve = result.history["dev_loss"]
    assert result.best_epoch == curve.index(min(curve)) and result.best_epoch != 14
    assert same(trainer.get_weights(), dict(problem.state_dict()))
    assert trainer.validate()["dev_loss"] == pytest.approx(min(curve), rel=1e-6)
    assert not same(trainer.get_weights(), result.last_weights)


def test_get_weights_before_a_fit_says_so() -> None:
    with pytest.raises(RuntimeError, match="call fit first"):
        weft.LitTrainer().get_weights()


@pytest.mark.parametrize("logger", [None, False])
def test_without_weights_and_logger_nothing_is_written(logger: Any) -> None:
    fitted(logger=logger)
    fitted(logger=True, save_weights=True, fast_dev_run=True)
    assert list(Path().iterdir()) == []


def test_a_lightning_logger_gets_the_curves() -> None:
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger("logs", name="mine", version="one")
    _, _, result = fitted(logger=logger)
    lines = Path("logs/mine/one/metrics.csv").read_text().splitlines()
    assert any("dev_loss" in name for name in lines[0].split(",")) and len(lines) >= 4
    assert len(result.history["dev_loss"]) == 3


def test_the_metric_that_decides_may_have_either_name() -> None:
    for option in ("eval_metric", "monitor_metric"):
        _, _, result = fitted(**{option: "train_f"})
        assert result.monitor == "train_f"
    with pytest.raises(ValueError, match="eval_metric='dev_loss' and monitor_metric='train_loss'"):
        weft.LitTrainer(eval_metric="dev_loss", monitor_metric="train_loss")
    with pytest.raises(ValueError, match="'dev_los' never appears"):
        fitted(monitor_metric="dev_los")


def test_the_test_set_is_used_and_can_be_monitored() -> None:
    formulation = Formulation("", PNLP.problem, lambda: {**PNLP.data(), "test": rosenbrock_rows(12)})
    trainer, _, result = fitted(formulation, monitor_metric="test_loss")
    curve = result.history["test_loss"]
    assert len(curve) == 3 and result.best_metric == min(curve)
    assert trainer.test()["test_loss"] == pytest.approx(min(curve), rel=1e-6)
    found = trainer.test(neuromancer_loader(rosenbrock_rows(5), "test", 5))
    assert set(found) == {name for name in result.history if name.startswith("test_")}
    with pytest.raises(ValueError, match="no test data"):
        fitted()[0].test()


def test_patience_counts_after_the_warmup() -> None:
    options = {"epochs": 50, "patience": 2, "custom_optimizer": lambda p: torch.optim.SGD(p, lr=0.0)}
    assert [fitted(warmup=warmup, **options)[2].epochs for warmup in (0, 6)] == [3, 8]
    with pytest.raises(ValueError, match="patience=0: must be at least 1"):
        weft.LitTrainer(patience=0)


def test_a_stop_asked_for_during_the_warmup_holds() -> None:
    hook = {"on_epoch_end": lambda trainer, metrics: trainer.stop("mine") if trainer.current_epoch == 1 else None}
    _, _, result = fitted(epochs=6, patience=2, warmup=5, hooks=hook)
    assert (result.epochs, result.stop_reason) == (2, "mine")


def test_without_dev_data_the_training_loss_decides_and_the_weights_are_saved() -> None:
    formulation = Formulation("", PNLP.problem, lambda: {"train": rosenbrock_rows(20)})
    trainer, _, result = fitted(formulation, save_weights=True, patience=5)
    assert result.monitor == "train_loss" and result.best_metric == min(result.history["train_loss"])
    assert trainer.weights_file is not None and trainer.weights_file.is_file()


def test_other_losses_are_trained_on_and_reported_under_their_own_names() -> None:
    problem = PNLP.make()
    trainer = weft.LitTrainer(
        epochs=2,
        train_metric="train_f",
        dev_metric="dev_f",
        clip=None,
        shuffle=False,
        save_weights=False,
        progress=False,
        custom_optimizer=lambda params: torch.optim.SGD(params, 1e-3),
    )
    result = trainer.fit(problem, setup_of(PNLP))
    raw = PNLP.make()
    optimizer = torch.optim.SGD(raw.parameters(), 1e-3)
    key = f"train_{raw.loss.objectives[0].output_keys[0]}"
    for _ in range(2):
        for batch in PNLP.loaders()[0]:
            optimizer.zero_grad()
            raw(batch)[key].backward()
            optimizer.step()
    assert same(dict(result.last_weights), dict(raw.state_dict())) and result.monitor == "dev_f"


def test_a_dataset_of_another_name_is_an_error_and_no_exit() -> None:
    train, dev, _ = PNLP.datasets()
    with pytest.raises(ValueError, match="A dataset named 'dev' was given as the train data"):
        weft.LitTrainer(progress=False).fit(PNLP.make(), lambda: (dev, train, None, 16))


def test_keyword_arguments_go_to_the_data_setup_function_which_runs_once() -> None:
    calls: list[int] = []

    def data_setup_function(nsim: int, split: int = 4) -> tuple[Any, ...]:
        calls.append(nsim)
        rows = rosenbrock_rows(nsim)
        return (
            weft.DictDataset({k: v[split:] for k, v in rows.items()}),
            weft.DictDataset({k: v[:split] for k, v in rows.items()}),
            None,
            8,
        )

    trainer = weft.LitTrainer(epochs=2, save_weights=False, progress=False)
    result = trainer.fit(PNLP.make(), data_setup_function, nsim=20)
    trainer.validate()
    assert calls == [20] and result.steps == 2 * 2
    with pytest.raises(TypeError):
        trainer.fit(PNLP.make(), data_setup_function, nsims=20)


def test_the_augmented_lagrangian_of_neuromancer_gets_epoch_and_rows() -> None:
    torch.manual_seed(0)
    train = neuromancer_loader(rosenbrock_rows(20), "train", 20)
    problem = augmented_rosenbrock(train)
    trainer = weft.LitTrainer(epochs=5, save_weights=False, progress=False)
    trainer.fit(problem, lambda: (train.dataset, None, None, 20))
    assert float(problem.loss.mu.max()) > 0.001


@pytest.mark.parametrize("kind", [dict, SimpleNamespace], ids=["by key", "by attribute"])
def test_a_sweeps_learning_rate_and_batch_size_are_honoured(kind: Any) -> None:
    trainer, _, result = fitted(hparam_config=kind(learning_rate=0.5, batch_size=20, other="mine"))
    assert trainer.optimizer.param_groups[0]["lr"] == 0.5
    assert result.steps == 3 * 2  # 40 rows
    with pytest.warns(UserWarning, match="learning_rate=0.5 has no effect"):
        weft.LitTrainer(hparam_config=kind(learning_rate=0.5), custom_optimizer=lambda p: torch.optim.SGD(p, 1.0))


def test_an_unknown_keyword_and_two_names_for_one_option_raise() -> None:
    with pytest.raises(TypeError, match="LitTrainer has no option 'epoch'; did you mean 'epochs'"):
        weft.LitTrainer(epoch=3)
    with pytest.raises(TypeError, match="custom_optimizer and optimizer are two names"):
        weft.LitTrainer(custom_optimizer=torch.optim.Adam, optimizer=torch.optim.SGD)


def test_options_of_weft_are_taken_as_well() -> None:
    _trainer, problem, result = fitted(precision="64-true", seed=3, max_steps=4, validate_every=1)
    assert next(problem.parameters()).dtype == torch.float64 and result.steps == 4 and result.seed == 3


def test_a_second_fit_goes_on_and_a_run_can_be_resumed() -> None:
    trainer, problem, first = fitted(epochs=2, checkpoint=True, root_dir="runs", run_name="one")
    assert trainer.fit(problem, setup_of(PNLP)).epochs == 4
    problem = PNLP.make()
    again = weft.LitTrainer(
        epochs=4, checkpoint=True, root_dir="runs", run_name="one", save_weights=False, progress=False
    )
    result = again.fit(problem, setup_of(PNLP), ckpt_path="last")
    assert result.epochs >= 4 and result.history["train_loss"][:2] == first.history["train_loss"]


# ------------------------------------------------------------------------------------------------ files, both ways


def test_the_weights_file_is_named_as_asked_and_holds_the_best() -> None:
    options = {"epochs": 6, "save_weights": True, "custom_optimizer": lambda p: torch.optim.Adam(p, 0.3), "seed": 1}
    trainer, problem, result = fitted(weight_path="some/where", **options)
    best = result.best_epoch
    assert [p.name for p in Path("some/where").iterdir()] == [f"epoch={best}-step={3 * (best + 1)}.ckpt"]
    state = torch.load(trainer.weights_file, weights_only=True)["state_dict"]
    assert same({k.removeprefix("problem."): v for k, v in state.items()}, dict(problem.state_dict()))
    assert all(k.startswith("problem.") for k in state)
    named = fitted(weight_path="named", weight_name="mine_{epoch}_{dev_loss:.2f}", **options)[0].weights_file
    assert named is not None and named.name == f"mine_epoch={best}_dev_loss={result.best_metric:.2f}.ckpt"


def test_a_file_of_an_earlier_fit_is_never_replaced() -> None:
    for number in range(2):
        trainer, *_ = fitted(save_weights=True, weight_name="best", seed=number)
        assert trainer.weights_file is not None and trainer.weights_file.name == ("best.ckpt", "best-v1.ckpt")[number]
    with pytest.raises(ValueError, match="there is no 'epoc'; did you mean 'epoch'"):
        fitted(save_weights=True, weight_name="{epoc}")


def test_a_fit_that_finds_nothing_better_still_leaves_the_best_in_a_file() -> None:
    trainer, problem, _ = fitted(save_weights=True, weight_name="first")
    best = trainer.get_weights()
    trainer.optimizer.param_groups[0]["lr"] = 10.0
    Path("first.ckpt").unlink()
    trainer.fit(problem, setup_of(PNLP))
    state = torch.load("first.ckpt", weights_only=True)
    assert state["epoch"] == 2 and same({k.removeprefix("problem."): v for k, v in state["state_dict"].items()}, best)


def test_a_resumed_run_writes_its_best() -> None:
    options = {"checkpoint": True, "root_dir": "runs", "run_name": "one", "save_weights": True, "seed": 0}
    first, *_ = fitted(**options, epochs=2)
    assert first.weights_file == Path("epoch=1-step=6.ckpt")
    trainer = weft.LitTrainer(**options, epochs=4, progress=False)
    result = trainer.fit(PNLP.make(), setup_of(PNLP), resume="last")
    assert (result.epochs, result.best_epoch) == (4, 3) and trainer.weights_file == Path("epoch=3-step=12.ckpt")
    assert same(dict(weft.load_weights(PNLP.make(), "epoch=3-step=12.ckpt").state_dict()), trainer.get_weights())


def test_the_original_reads_our_weights() -> None:
    from lightning.pytorch import LightningModule
    from neuromancer.problem import LitProblem

    trainer, _problem, _ = fitted(save_weights=True, weight_name="ours")
    fresh = load_state_dict_lightning(PNLP.make(), trainer.weights_file)
    assert same(dict(fresh.state_dict()), trainer.get_weights())
    other = PNLP.make()
    module = LitProblem.load_from_checkpoint("ours.ckpt", problem=other)
    assert isinstance(module, LightningModule) and same(dict(other.state_dict()), trainer.get_weights())
    torch.manual_seed(9)
    assert not same(dict(PNLP.problem().state_dict()), trainer.get_weights())


def test_we_read_the_weights_of_the_original() -> None:
    problem = PNLP.make()
    fitted_by_neuromancer(problem, PNLP, weight_path="theirs", weight_name="best", logger=False)
    torch.manual_seed(9)
    fresh = PNLP.problem()
    assert not same(dict(fresh.state_dict()), dict(problem.state_dict()))
    (path,) = Path("theirs").glob("best*.ckpt")
    weft.load_weights(fresh, path)
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert same({f"problem.{k}": v for k, v in fresh.state_dict().items()}, dict(saved))
    torch.manual_seed(10)
    again = weft.LitTrainer().load_state_dict_lightning(PNLP.problem(), path)
    assert same(dict(again.state_dict()), dict(fresh.state_dict()))


def test_a_weights_file_is_there_after_an_error_and_holds_the_best_so_far() -> None:
    def fail(self: Any) -> None:
        if self.current_epoch == 2:
            raise ArithmeticError("mine")

    problem = PNLP.make()
    trainer = weft.LitTrainer(epochs=5, weight_name="best", progress=False, custom_hooks={"on_train_epoch_end": fail})
    with pytest.raises(ArithmeticError):
        trainer.fit(problem, setup_of(PNLP))
    assert torch.load("best.ckpt", weights_only=True)["epoch"] == 1


# ------------------------------------------------------------------------------------------- custom steps and hooks


def test_neuromancers_example_of_a_custom_step_runs_as_written() -> None:
    def custom_training_step(model: Any, batch: Any) -> Any:
        output = model.problem(batch)
        loss = output[model.train_metric]
        if getattr(model, "past_loss", None) is not None:
            loss = loss + 0.1 * (loss - model.past_loss).abs()
        model.past_loss = loss.detach()
        return loss

    def on_train_epoch_end(self: Any) -> None:
        average = torch.stack(self.training_step_outputs).mean()
        self.log("training_epoch_average", average, on_epoch=True, enable_graph=True, prog_bar=True)
        self.training_step_outputs.clear()
        self.weight = 0.5 * getattr(self, "weight", 1.0)

    hooks = {"on_train_epoch_end": on_train_epoch_end}
    trainer, _, result = fitted(custom_training_step=custom_training_step, custom_hooks=hooks)
    model = trainer.lit_problem
    assert isinstance(model, LitModel) and model.weight == 0.5**3 and model.past_loss > 0
    assert len(result.history["training_epoch_average"]) == 3


def test_a_custom_step_trains_as_the_same_step_in_raw_pytorch() -> None:
    problem, raw = PNLP.make(), PNLP.make()
    trainer = weft.LitTrainer(
        epochs=2,
        shuffle=False,
        save_weights=False,
        progress=False,
        clip=None,
        custom_training_step=lambda model, batch: 2.0 * model.problem(batch)[model.train_metric],
        custom_optimizer=lambda params: torch.optim.SGD(params, 1e-4),
    )
    result = trainer.fit(problem, setup_of(PNLP))
    optimizer = torch.optim.SGD(raw.parameters(), 1e-4)
    for _ in range(2):
        for batch in PNLP.loaders()[0]:
            optimizer.zero_grad()
            (2.0 * raw(batch)["train_loss"]).backward()
            optimizer.step()
    assert same(dict(result.last_weights), dict(raw.state_dict()))


def test_a_step_may_take_care_of_gradients_itself() -> None:
    def custom_training_step(model: Any, batch: Any) -> None:
        optimizer = model.optimizers()
        optimizer.zero_grad()
        for weight in (0.5, 0.5):
            model.manual_backward(weight * model.problem(batch)[model.train_metric])
        model.clip_gradients(optimizer, gradient_clip_val=0.5)
        optimizer.step()

    problem, raw = PNLP.make(), PNLP.make()
    trainer = weft.LitTrainer(
        epochs=2,
        shuffle=False,
        save_weights=False,
        progress=False,
        custom_training_step=custom_training_step,
        automatic_optimization=False,
        custom_optimizer=lambda params: torch.optim.SGD(params, 1e-2),
    )
    result = trainer.fit(problem, setup_of(PNLP))
    optimizer = torch.optim.SGD(raw.parameters(), 1e-2)
    for _ in range(2):
        for batch in PNLP.loaders()[0]:
            optimizer.zero_grad()
            for weight in (0.5, 0.5):
                (weight * raw(batch)["train_loss"]).backward()
            torch.nn.utils.clip_grad_norm_(raw.parameters(), 0.5)
            optimizer.step()
    assert same(dict(result.last_weights), dict(raw.state_dict()))
    assert len(result.history["train_loss"]) == 2 and result.steps == 6


def test_two_optimizers_alternate_as_in_raw_pytorch() -> None:
    formulation = FORMULATIONS["deep Koopman"]
    rates = {"encoder": 1e-2, "decoder": 2e-2}

    def custom_training_step(model: Any, batch: Any) -> Any:
        for optimizer in model.optimizers():
            optimizer.zero_grad()
            loss = model.problem(batch)[model.train_metric]
            model.manual_backward(loss)
            optimizer.step()
        return loss

    def step_of(rate: float) -> Any:
        return lambda params: torch.optim.SGD(params, rate)

    problem, raw = formulation.make(), formulation.make()
    trainer = weft.LitTrainer(
        epochs=2,
        shuffle=False,
        save_weights=False,
        progress=False,
        custom_training_step=custom_training_step,
        automatic_optimization=False,
        custom_optimizer={name: step_of(rate) for name, rate in rates.items()},
    )
    result = trainer.fit(problem, setup_of(formulation))
    parts = {"encoder": raw.nodes[0], "decoder": raw.nodes[2]}
    optimizers = [torch.optim.SGD(parts[name].parameters(), rate) for name, rate in rates.items()]
    for _ in range(2):
        for batch in formulation.loaders()[0]:
            for optimizer in optimizers:
                optimizer.zero_grad()
                raw(batch)["train_loss"].backward()
                optimizer.step()
    assert same(dict(result.last_weights), dict(raw.state_dict())) and result.steps == 6


def step_by_hand(model: Any, batch: Any) -> Any:
    loss = model.problem(batch)[model.train_metric]
    model.manual_backward(loss)
    model.optimizers().step()
    return loss


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"custom_training_step": lambda model, batch: 2.0 * model.problem(batch)[model.train_metric]},
        {"custom_training_step": step_by_hand, "automatic_optimization": False},
    ],
    ids=["its own step", "a custom step", "a step that does its own backward"],
)
def test_two_processes_end_where_one_does(options: dict[str, Any]) -> None:
    ended = []
    for processes in (1, 2):
        problem = PNLP.make()
        several = {"devices": 2, "strategy": "ddp_fork", "timeout": patience()} if processes == 2 else {}
        trainer = weft.LitTrainer(
            epochs=2,
            accelerator="cpu",
            precision="64-true",
            seed=1,
            weight_name=f"of_{processes}",
            progress=False,
            custom_hooks={"on_train_epoch_end": lambda self: self.log("epochs", self.current_epoch)},
            **several,
            **options,
        )
        result = trainer.fit(problem, setup_of(PNLP, batch_size=16 // processes))
        assert result.history["epochs"] == [0.0, 1.0] and trainer.weights_file == Path(f"of_{processes}.ckpt")
        assert same(
            dict(weft.load_weights(PNLP.make().double(), trainer.weights_file).state_dict()), trainer.get_weights()
        )
        ended.append((trainer.get_weights(), result.history["dev_loss"]))
    for name, value in ended[0][0].items():
        torch.testing.assert_close(ended[1][0][name], value, rtol=0, atol=1e-9)
    assert ended[1][1] == pytest.approx(ended[0][1], rel=1e-9)


def test_a_step_that_returns_nothing_or_takes_the_wrong_arguments_is_told_how() -> None:
    with pytest.raises(TypeError, match="custom_training_step returned None"):
        fitted(custom_training_step=lambda model, batch: None)
    with pytest.raises(TypeError, match=r"expected a function custom_training_step\(model, batch\)"):
        weft.LitTrainer(custom_training_step=lambda model, batch, batch_idx: None)
    with pytest.raises(ValueError, match="needs a custom_training_step"):
        weft.LitTrainer(automatic_optimization=False)


def test_step_outputs_are_detached_and_start_anew_with_each_epoch() -> None:
    lengths: list[tuple[int, int]] = []

    def on_train_epoch_end(self: Any) -> None:
        lengths.append((len(self.training_step_outputs), len(self.validation_step_outputs)))
        assert not any(loss.requires_grad for loss in self.training_step_outputs + self.validation_step_outputs)

    fitted(custom_hooks={"on_train_epoch_end": on_train_epoch_end})
    assert lengths == [(3, 1)] * 3


def lightning_signatures() -> dict[str, tuple[str, ...]]:
    """The arguments after `self` of every method of a LightningModule that is a hook or a step, from the package."""
    from lightning.pytorch import LightningModule
    from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks

    names = {n for c in (ModelHooks, DataHooks, CheckpointHooks) for n in vars(c) if not n.startswith("_")}
    names |= {"configure_optimizers", "training_step", "validation_step", "test_step", "predict_step", "backward"}
    names |= {"forward", "optimizer_step", "optimizer_zero_grad", "lr_scheduler_step", "configure_gradient_clipping"}
    found = {}
    for name in names | {"configure_callbacks"}:
        parameters = list(inspect.signature(getattr(LightningModule, name)).parameters.values())[1:]
        found[name] = tuple(
            p.name if p.default is p.empty else f"{p.name}={p.default}"
            for p in parameters
            if p.kind is p.POSITIONAL_OR_KEYWORD
        )
    return found


def test_the_table_of_hooks_is_lightnings() -> None:
    theirs = lightning_signatures()
    free = {"validation_step", "test_step", "predict_step"}  # *args, **kwargs there; documented as (batch, batch_idx)
    assert {name: HOOKS[name] for name in HOOKS.keys() - free} == {name: theirs[name] for name in HOOKS.keys() - free}
    assert all(HOOKS[name] == ("batch", "batch_idx") for name in free)
    not_called = theirs.keys() - HOOKS.keys()
    assert {name for name in not_called if "_model_" not in name} - {"configure_sharded_model"} == INSTEAD.keys()


@pytest.mark.parametrize(
    ("name", "function", "message"),
    [
        ("on_train_epoch_ends", lambda self: None, r"did you mean 'on_train_epoch_end'.*on_train_epoch_end\(self\)"),
        ("optimizer_step", lambda self: None, "use automatic_optimization=False instead"),
        (
            "on_train_batch_end",  # the signature that the original demands, and that Lightning cannot call
            lambda self, batch, batch_idx: None,
            r"wrong signature; expected on_train_batch_end\(self, outputs, batch, batch_idx\)",
        ),
        ("on_fit_start", "print", r"expected a function on_fit_start\(self\)"),
    ],
)
def test_a_wrong_hook_is_an_error_that_shows_the_right_one(name: str, function: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        weft.LitTrainer(custom_hooks={name: function})


def test_annotations_and_argument_names_are_free() -> None:
    def annotated(self: Any, outs: Any, rows: dict, number: int) -> None: ...

    def without_loader(self: Any, outputs: Any, batch: Any, batch_idx: int) -> None: ...

    LightningHooks({"on_train_batch_end": annotated, "on_validation_batch_end": without_loader})


def noting(names: Any, seen: list[str]) -> dict[str, Any]:
    """A function for each hook that notes its name."""
    return {name: lambda *args, name=name, **kwargs: seen.append(name) for name in names}


SET_UP = {"setup", "configure_model", "on_save_checkpoint", "on_load_checkpoint"}
STEPS = {"validation_step", "test_step", "predict_step", "backward", "configure_optimizers"}


def test_hooks_are_called_in_the_order_of_lightning() -> None:
    import lightning.pytorch as pl

    names = HOOKS.keys() - SET_UP - STEPS
    theirs: list[str] = []

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.problem = PNLP.make()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.problem(batch)["train_loss"]

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.problem(batch)

        def test_step(self, batch: Any, batch_idx: int) -> None: ...

        def predict_step(self, batch: Any, batch_idx: int) -> None: ...

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 1e-4)

    for name, function in noting(names, theirs).items():
        setattr(Module, name, function)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0}
    train, dev = PNLP.loaders()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        original, module = pl.Trainer(max_epochs=2, accelerator="cpu", enable_model_summary=False, **options), Module()
        original.fit(module, train, dev)
        original.test(module, dev, verbose=False)
        original.predict(module, dev)

    ours: list[str] = []
    test = weft.DictDataset(PNLP.data()["dev"])
    trainer, _, _ = fitted(epochs=2, custom_hooks=noting(names, ours))
    trainer.test(test)
    trainer.predict(test)
    assert ours == theirs and set(ours) == names


def test_hooks_of_evaluation_are_called_for_the_data_of_the_last_fit_too() -> None:
    names = [name for name in HOOKS if "_validation_" in name]
    seen: list[str] = []
    trainer, _problem, _ = fitted(epochs=1, custom_hooks=noting(names, seen))
    once = list(seen)
    trainer.validate()
    assert seen == 2 * once and len(once) == len(names) == 6


def test_a_hook_of_batches_can_skip_the_rest_of_the_epoch_and_stop() -> None:
    def on_train_batch_start(self: Any, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 1 else None

    def on_train_epoch_end(self: Any) -> None:
        if self.current_epoch == 2:
            self.trainer.should_stop = True

    hooks = {"on_train_batch_start": on_train_batch_start, "on_train_epoch_end": on_train_epoch_end}
    trainer, _, result = fitted(epochs=10, custom_hooks=hooks)
    assert (result.epochs, result.steps, result.stop_reason) == (3, 3, "should_stop") and trainer.should_stop


def test_a_validation_step_and_a_backward_of_ones_own() -> None:
    def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
        self.log_dict({"dev_loss": 3.0 * self.problem(batch)["dev_loss"], "mine": 1.0}, prog_bar=True)

    def backward(self: Any, loss: Any) -> None:
        (2.0 * loss).backward()

    def configure_optimizers(self: Any) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-4)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    functions = (validation_step, backward, configure_optimizers)
    trainer, _, result = fitted(epochs=2, clip=None, shuffle=False, custom_hooks={f.__name__: f for f in functions})
    raw = PNLP.make()
    optimizer = torch.optim.SGD(raw.parameters(), 1e-4)
    for _ in range(2):
        for batch in PNLP.loaders()[0]:
            optimizer.zero_grad()
            (2.0 * raw(batch)["train_loss"]).backward()
            optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.5
    assert same(dict(result.last_weights), dict(raw.state_dict()))
    assert result.history["mine"] == [1.0, 1.0] and result.monitor == "dev_loss"
    assert trainer.validate() == {"dev_loss": pytest.approx(result.best_metric, rel=1e-6), "mine": 1.0}
    with torch.no_grad():
        (batch,) = PNLP.loaders()[1]
        expected = 3.0 * float(raw.eval()({**batch})["dev_loss"])
    assert result.history["dev_loss"][-1] == pytest.approx(expected, rel=1e-6)
    assert trainer.optimizer.param_groups[0]["lr"] == 2.5e-5 and trainer.lit_problem.lr_schedulers() is not None


def test_hooks_of_the_update_see_gradients_and_optimizers() -> None:
    seen: list[tuple[str, bool]] = []

    def has_gradients(self: Any) -> bool:
        return any(p.grad is not None for p in self.parameters())

    hooks = {
        "on_before_zero_grad": lambda self, optimizer: seen.append(("zero", isinstance(optimizer, torch.optim.Adam))),
        "on_before_backward": lambda self, loss: seen.append(
            ("before", not has_gradients(self) and loss.requires_grad)
        ),
        "on_after_backward": lambda self: seen.append(("after", has_gradients(self))),
        "on_before_optimizer_step": lambda self, optimizer: seen.append(("step", has_gradients(self))),
    }
    fitted(epochs=1, custom_hooks=hooks)
    assert seen == [("zero", True), ("before", True), ("after", True), ("step", True)] * 3


def test_what_configure_optimizers_may_return() -> None:
    params = [torch.nn.Parameter(torch.zeros(2))]
    a, b = torch.optim.SGD(params, 0.1), torch.optim.Adam(params)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(b)
    assert from_configure_optimizers(a) == ({"default": a}, {})
    assert from_configure_optimizers([a, b]) == ({"0": a, "1": b}, {})
    found, schedules = from_configure_optimizers(
        ([a, b], [{"scheduler": plateau, "monitor": "dev_f", "interval": "step"}])
    )
    assert found == {"0": a, "1": b} and list(schedules) == ["1"]  # it belongs to the second
    assert (schedules["1"].monitor, schedules["1"].interval) == ("dev_f", "step")
    assert from_configure_optimizers({"optimizer": b, "lr_scheduler": plateau})[1]["default"].factory is plateau
    for wrong in (None, {"optimizr": a}, [None]):
        with pytest.raises(TypeError, match="configure_optimizers returned"):
            from_configure_optimizers(wrong)
    with pytest.raises(TypeError, match="did you mean 'interval'"):
        from_configure_optimizers({"optimizer": b, "lr_scheduler": {"scheduler": plateau, "intervall": "step"}})


def test_the_model_gives_the_problem_and_names_what_nobody_has() -> None:
    trainer, problem, _ = fitted(epochs=1)
    model = trainer.lit_problem
    assert model is not None and model.problem is problem and list(model.parameters()) == list(problem.parameters())
    assert model.nodes is problem.nodes and math.isfinite(model({**next(iter(PNLP.loaders()[0]))})["train_loss"].item())
    assert (model.current_epoch, model.global_step, model.dev_metric) == (1, 3, "dev_loss")
    with pytest.raises(AttributeError, match="Neither weft's model nor Problem has 'nothing'"):
        _ = model.nothing
    with pytest.raises(ValueError, match="averaged over the epoch, nothing else"):
        model.log("x", 1.0, reduce_fx="max")
