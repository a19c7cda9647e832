"""`weft.integrations.neuromancer.Trainer` against NeuroMANCER's own: what it prints, when it stops, what it calls."""

from __future__ import annotations

import inspect
import math
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.bitwise import same
from tests.helpers.neuromancer_problems import (
    FORMULATIONS,
    BasicLogger,
    Callback,
    Formulation,
    LossLogger,
    NeuromancerTrainer,
    augmented_rosenbrock,
    neuromancer_loader,
    rosenbrock_rows,
    sine_rows,
    splits,
    stacked,
)
from weft.integrations.neuromancer import Trainer

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:Using a target size",  # NeuroMANCER's equality constraints with a number
        "ignore:__array__ implementation",  # cvxpylayers
    )
]

LINE = re.compile(r"epoch: (\d+)  train_loss: (\S+)")
ONE_DEV_BATCH = {"eval_metric": "dev_loss"}


def trained_by(cls: Any, formulation: Formulation, shuffle: bool = True, **options: Any) -> Any:
    """A trainer of class `cls` that has trained the formulation as its tutorial does."""
    problem, loaders = formulation.make(), formulation.loaders(shuffle)
    torch.manual_seed(2)
    trainer = cls(problem, *loaders, optimizer=formulation.optimizer(problem), **options)
    trainer.train()
    return trainer


def curve(printed: str) -> list[tuple[int, float]]:
    """The epochs and losses that were printed."""
    return [(int(epoch), float(loss)) for epoch, loss in LINE.findall(printed)]


def alike(ours: str, theirs: str, rel: float = 1e-6) -> bool:
    """Whether two trainers printed the same epochs and the same losses."""
    a, b = curve(ours), curve(theirs)
    numbers = all(i == j and math.isclose(x, y, rel_tol=rel) for (i, x), (j, y) in zip(a, b, strict=False))
    return bool(a) and len(a) == len(b) and numbers and LINE.sub("", ours) == LINE.sub("", theirs)


def options_for(formulation: Formulation) -> dict[str, Any]:
    metric = "mean_dev_loss" if len(formulation.loaders()) > 1 else "mean_train_loss"
    return {"epochs": 6, "patience": 2, "warmup": 1, "eval_metric": metric, "clip": 0.5}


@pytest.mark.filterwarnings("ignore:.*the optimizer does not hold")
@pytest.mark.parametrize("name", [name for name, f in FORMULATIONS.items() if f.deep_copies])
def test_a_tutorial_prints_the_losses_it_prints_in_neuromancer(name: str, capsys: pytest.CaptureFixture) -> None:
    formulation = FORMULATIONS[name]
    theirs = trained_by(NeuromancerTrainer, formulation, **options_for(formulation))
    printed = capsys.readouterr().out
    ours = trained_by(Trainer, formulation, **options_for(formulation))
    assert alike(capsys.readouterr().out, printed)
    assert all(torch.allclose(v, theirs.best_model[k], rtol=1e-5, atol=1e-7) for k, v in ours.best_model.items())
    assert same(dict(ours.model.state_dict()), ours.best_model)  # the problem holds the best weights


def test_the_comparison_of_printed_losses_can_fail(capsys: pytest.CaptureFixture) -> None:
    trained_by(NeuromancerTrainer, FORMULATIONS["pNLP"], epochs=3)
    theirs = capsys.readouterr().out
    trained_by(Trainer, FORMULATIONS["pNLP"], epochs=3, clip=0.1)
    assert not alike(capsys.readouterr().out, theirs)


def test_a_cvxpy_layer_trains_though_its_sparse_buffers_cannot_be_deep_copied(capsys: pytest.CaptureFixture) -> None:
    formulation = FORMULATIONS["cvxpy layer"]
    with pytest.raises(NotImplementedError, match="SparseCsr"):
        trained_by(NeuromancerTrainer, formulation, epochs=1)
    trained_by(Trainer, formulation, shuffle=False, epochs=4)
    printed = curve(capsys.readouterr().out)

    problem, (train, _) = formulation.make(), formulation.loaders()
    optimizer, losses = formulation.optimizer(problem), []
    for _ in range(4):  # the tutorial's loop in raw PyTorch
        (batch,) = train
        loss = problem(batch)["train_loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(problem.parameters(), 100.0)
        optimizer.step()
        losses.append(loss.item())
    assert [loss for _, loss in printed] == losses


@pytest.mark.parametrize(
    ("batch_size", "metric"), [(64, "dev_loss"), (7, "mean_dev_loss")], ids=["one dev batch", "the mean over batches"]
)
def test_it_stops_in_the_epoch_in_which_neuromancer_stops(
    batch_size: int, metric: str, capsys: pytest.CaptureFixture
) -> None:
    formulation = Formulation("", FORMULATIONS["pNLP"].problem, FORMULATIONS["pNLP"].data, batch_size, lr=0.2)
    options = {"epochs": 60, "patience": 4, "warmup": 6, "eval_metric": metric}
    trained_by(NeuromancerTrainer, formulation, **options)
    theirs = capsys.readouterr().out
    ours = trained_by(Trainer, formulation, **options)
    printed = capsys.readouterr().out
    assert alike(printed, theirs) and "Early stopping!!!" in printed
    assert 6 + 4 < len(curve(printed)) < 60 and ours.result.stop_reason == "patience"


def test_the_signature_is_neuromancers() -> None:
    ours, theirs = (inspect.signature(c).parameters for c in (Trainer, NeuromancerTrainer))
    assert list(ours) == list(theirs)
    different = {name for name in ours if ours[name].default != theirs[name].default}
    assert different == {"callback"}  # there an object made at import, here one that does nothing as well


def test_the_default_optimizer_is_neuromancers(capsys: pytest.CaptureFixture) -> None:
    formulation, printed = FORMULATIONS["NODE"], []
    for cls in (NeuromancerTrainer, Trainer):
        cls(formulation.make(), *formulation.loaders(), epochs=4).train()
        printed.append(capsys.readouterr().out)
    assert alike(printed[1], printed[0])


class Noted(Callback):
    """What a callback can see at each of its points."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def note(self, point: str, trainer: Any, output: Any = None) -> None:
        losses = {k: v for k, v in (output or {}).items() if k.endswith("_loss")}
        values = {k: v.detach().item() for k, v in losses.items()}
        state = (trainer.current_epoch, trainer.badcount, trainer.model.training, torch.is_grad_enabled())
        self.seen.append((point, state if point != "begin_train" else None, values))


for point in [name for name in vars(Callback) if not name.startswith("_")]:
    setattr(Noted, point, lambda self, trainer, output=None, point=point: self.note(point, trainer, output))


def test_callbacks_are_called_at_their_points_and_see_what_they_see_in_neuromancer() -> None:
    seen = []
    for cls in (NeuromancerTrainer, Trainer):
        callback = Noted()
        trainer = trained_by(cls, FORMULATIONS["pNLP"], epochs=3, epoch_verbose=100, callback=callback)
        trainer.test_data = neuromancer_loader(rosenbrock_rows(5), "test", 5)
        trainer.test(trainer.best_model)
        seen.append(callback.seen)
    theirs, ours = seen
    assert [point for point, *_ in ours] == [point for point, *_ in theirs]
    assert {point for point, *_ in ours} == {name for name in vars(Callback) if not name.startswith("_")}
    for (point, state, values), (_, their_state, their_values) in zip(ours, theirs, strict=True):
        assert state == their_state, point
        assert values == pytest.approx(their_values, rel=1e-6), point


@pytest.mark.parametrize("kind", [BasicLogger, LossLogger])
def test_neuromancers_loggers_write_what_they_write_there(kind: Any, capsys: pytest.CaptureFixture) -> None:
    printed = []
    for cls, folder in ((NeuromancerTrainer, "theirs"), (Trainer, "ours")):
        logger = kind(
            savedir=folder, verbosity=1, stdout=["train_loss", "dev_loss", "mean_train_loss", "mean_dev_loss"]
        )
        trainer = trained_by(cls, FORMULATIONS["pNLP"], epochs=3, logger=logger)
        trainer.test_data = trainer.dev_data
        printed.append(re.sub(r"eltime: +\S+", "", capsys.readouterr().out))
        assert {p.name for p in Path(folder).iterdir()} == {"best_model_state_dict.pth", "best_model.pth"}
        weights = torch.load(Path(folder, "best_model_state_dict.pth"), weights_only=True)
        assert same(dict(weights), dict(trainer.best_model))
    assert printed[0] == printed[1] and "mean_dev_loss: " in printed[1]


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")  # NeuroMANCER's, in its scheduler's step
def test_the_learning_rate_is_halved_after_a_hundred_epochs_without_progress() -> None:
    rates = []
    for cls in (NeuromancerTrainer, Trainer):
        formulation = Formulation("", FORMULATIONS["pNLP"].problem, lambda: splits(rosenbrock_rows, 4, 2), 4, lr=1e-7)
        trainer = trained_by(cls, formulation, False, lr_scheduler=True, epochs=104, patience=200, epoch_verbose=1000)
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates == [5e-8, 5e-8]


def test_multi_fidelity_adds_the_alpha_losses_of_the_nodes(capsys: pytest.CaptureFixture) -> None:
    formulation, printed = Formulation("", stacked, lambda: splits(sine_rows)), []
    for cls, flag in ((NeuromancerTrainer, True), (Trainer, True), (Trainer, False)):
        trained_by(cls, formulation, epochs=3, multi_fidelity=flag)
        printed.append(capsys.readouterr().out)
    assert alike(printed[1], printed[0]) and not alike(printed[2], printed[0])
    with pytest.raises(TypeError, match="get_alpha_loss"):
        trained_by(Trainer, FORMULATIONS["pNLP"], epochs=1, multi_fidelity=True)


def test_the_augmented_lagrangian_reads_the_epoch_and_updates_once_a_batch(capsys: pytest.CaptureFixture) -> None:
    torch.manual_seed(0)
    tensors = {**rosenbrock_rows(20), "index": torch.arange(20)}
    printed, multipliers = [], []
    for cls in (NeuromancerTrainer, Trainer):
        torch.manual_seed(1)
        train = neuromancer_loader(tensors, "train", 20)
        problem = augmented_rosenbrock(train)
        cls(problem, train, neuromancer_loader(tensors, "dev", 20), epochs=7).train()
        printed.append(capsys.readouterr().out)
        multipliers.append(problem.loss.mu)
    assert alike(printed[1], printed[0])
    assert torch.allclose(multipliers[0], multipliers[1]) and float(multipliers[1].max()) > 0.001


def test_a_loader_named_otherwise_keeps_its_name(capsys: pytest.CaptureFixture) -> None:
    metrics = dict.fromkeys(("train_metric", "dev_metric", "eval_metric"), "mine_loss")
    formulation, printed = FORMULATIONS["pNLP"], []
    for cls in (NeuromancerTrainer, Trainer):
        torch.manual_seed(4)
        tensors = rosenbrock_rows(10)
        problem = formulation.make()
        cls(
            problem,
            neuromancer_loader(tensors, "mine", 10),
            neuromancer_loader(tensors, "mine", 10),
            epochs=3,
            **metrics,
        ).train()
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and "mine_loss" in printed[1]


def test_a_callback_can_change_the_data_for_the_next_epoch(capsys: pytest.CaptureFixture) -> None:
    class Resampled(Callback):
        def end_epoch(self, trainer: Any, output: Any) -> None:
            torch.manual_seed(trainer.current_epoch)
            trainer.train_data = neuromancer_loader(rosenbrock_rows(12), "train", 5, shuffle=True)

    printed = []
    for cls in (NeuromancerTrainer, Trainer):
        trained_by(cls, FORMULATIONS["pNLP"], epochs=4, callback=Resampled())
        printed.append(capsys.readouterr().out)
    assert alike(printed[1], printed[0])


class Weighed(Callback):
    """An evaluation of one's own, made before the decision about best weights."""

    def begin_eval(self, trainer: Any, output: dict[str, Any]) -> None:
        output["size"] = -sum(float(p.detach().abs().sum()) for p in trainer.model.parameters())


def test_a_callback_can_bring_the_metric_that_decides(capsys: pytest.CaptureFixture) -> None:
    ours = trained_by(Trainer, FORMULATIONS["pNLP"], epochs=3, callback=Weighed(), eval_metric="size")
    assert ours.result.history["mean_size"][ours.result.best_epoch] == min(ours.result.history["mean_size"])
    with pytest.raises(ValueError, match="eval_metric='dev_lss' never appears; did you mean 'dev_loss'"):
        trained_by(Trainer, FORMULATIONS["pNLP"], epochs=1, eval_metric="dev_lss")


# ------------------------------------------------------------------------------- where NeuroMANCER's rule is a defect


def test_the_best_weights_are_those_of_the_mean_over_all_dev_batches(capsys: pytest.CaptureFixture) -> None:
    class Means(Callback):
        def __init__(self) -> None:
            super().__init__()
            self.means: list[float] = []
            self.last: list[float] = []

        def end_epoch(self, trainer: Any, output: Any) -> None:
            self.means.append(float(output["mean_dev_loss"]))
            self.last.append(float(output["dev_loss"]))

    formulation = Formulation("", FORMULATIONS["pNLP"].problem, FORMULATIONS["pNLP"].data, 7, lr=0.2)
    callback = Means()
    trainer = trained_by(Trainer, formulation, shuffle=False, epochs=20, patience=100, callback=callback)
    assert trainer.result.best_epoch == callback.means.index(min(callback.means))
    assert callback.means.index(min(callback.means)) != callback.last.index(min(callback.last))  # as NeuroMANCER has it
    assert trainer.best_devloss == min(callback.means)
    means = [trainer.model(batch)["dev_loss"] for batch in trainer.dev_data]
    assert float(torch.stack(means).mean()) == pytest.approx(min(callback.means), rel=1e-6)


def test_without_dev_data_the_training_loss_decides_and_test_leaves_out_what_is_missing(
    capsys: pytest.CaptureFixture,
) -> None:
    formulation = FORMULATIONS["pNLP"]
    problem, train = formulation.make(), formulation.loaders()[0]
    with pytest.raises(KeyError):
        NeuromancerTrainer(problem, train, epochs=1).train()
    trainer = Trainer(problem, train, epochs=3)
    best = trainer.train()
    losses = [loss for _, loss in curve(capsys.readouterr().out)][-3:]
    assert trainer.result is not None and trainer.result.best_metric == pytest.approx(min(losses), rel=1e-6)
    found = trainer.test(best)
    assert "mean_train_loss" in found and "mean_dev_loss" not in found


def test_lbfgs_trains(capsys: pytest.CaptureFixture) -> None:
    formulation = FORMULATIONS["inverse Burgers"]  # a rollout's line search may leave the numbers of float32
    problem, loaders = formulation.make(), formulation.loaders()
    optimizer = torch.optim.LBFGS(problem.parameters(), line_search_fn="strong_wolfe")
    first = float(problem(next(iter(loaders[0])))["train_loss"].detach())
    with pytest.raises(TypeError):
        NeuromancerTrainer(problem, *loaders, optimizer=optimizer, epochs=1).train()
    Trainer(problem, *loaders, optimizer=optimizer, epochs=4).train()
    losses = [loss for _, loss in curve(capsys.readouterr().out)]
    assert losses[-1] < losses[0] < first
    with pytest.warns(UserWarning, match="clip=1.0 has no effect with LBFGS"):
        Trainer(problem, *loaders, optimizer=optimizer, epochs=1, clip=1.0).train()


def test_clipping_can_be_switched_off(capsys: pytest.CaptureFixture) -> None:
    options = {"epochs": 3, "epoch_verbose": 1}
    trained_by(Trainer, FORMULATIONS["pNLP"], clip=None, **options)
    unclipped = capsys.readouterr().out
    trained_by(NeuromancerTrainer, FORMULATIONS["pNLP"], clip=1e9, **options)
    assert alike(unclipped, capsys.readouterr().out)


def interrupting(at: int) -> Callable[[Any, Any, Any], None]:
    calls = iter(range(1, 1000))
    return lambda module, args, out: os.kill(os.getpid(), signal.SIGINT) if next(calls) == at else None


@pytest.mark.parametrize("at", [1, 14], ids=["first epoch", "third epoch"])
def test_an_interrupt_ends_training_and_returns_the_best_weights(at: int, capsys: pytest.CaptureFixture) -> None:
    formulation, callback = FORMULATIONS["pNLP"], Noted()
    problem = formulation.make()
    handle = problem.register_forward_hook(interrupting(at))
    trainer = Trainer(problem, *formulation.loaders(), epochs=50, callback=callback)
    best = trainer.train()
    assert same(dict(best), dict(problem.state_dict())) and "Interrupted training loop." in capsys.readouterr().out
    assert [point for point, *_ in callback.seen].count("end_train") == 1
    assert trainer.result is not None and trainer.result.stop_reason == "interrupted"
    handle.remove()
    trainer.epochs = 2
    trainer.train()  # and on it goes
    assert trainer.result.epochs == trainer.current_epoch and trainer.result.stop_reason == "epochs"


def test_after_an_early_stop_training_goes_on_with_full_patience(capsys: pytest.CaptureFixture) -> None:
    formulation = Formulation("", FORMULATIONS["pNLP"].problem, FORMULATIONS["pNLP"].data, lr=0.2)
    epochs = {}
    for cls in (NeuromancerTrainer, Trainer):
        trainer = trained_by(cls, formulation, epochs=40, patience=2)
        assert "Early stopping" in capsys.readouterr().out
        trainer.optimizer.param_groups[0]["lr"] = 1e-3
        trainer.train()
        epochs[cls] = len(curve(capsys.readouterr().out))
    assert epochs[NeuromancerTrainer] == 1 and epochs[Trainer] > 3


def test_a_negative_metric_can_be_maximised(capsys: pytest.CaptureFixture) -> None:
    trainer = trained_by(
        Trainer, FORMULATIONS["pNLP"], epochs=4, callback=Weighed(), eval_metric="size", eval_mode="max"
    )
    sizes = trainer.result.history["mean_size"]
    assert max(sizes) < 0 and trainer.result.best_metric == max(sizes)


def test_a_loss_that_is_not_finite_stops_before_the_step() -> None:
    formulation = FORMULATIONS["pNLP"]
    problem = formulation.make()
    before = {k: v.clone() for k, v in problem.state_dict().items()}
    rows = rosenbrock_rows(8)
    rows["p"][3] = math.nan
    with pytest.raises(FloatingPointError, match="step 0"):
        Trainer(problem, neuromancer_loader(rows, "train", 8), epochs=2).train()
    assert same(dict(problem.state_dict()), before)


def test_a_longer_rollout_trains_on_and_keeps_what_it_learned(capsys: pytest.CaptureFixture) -> None:
    formulation, printed, weights = FORMULATIONS["linear system"], [], []
    for cls in (NeuromancerTrainer, Trainer):
        problem, loaders = formulation.make(), formulation.loaders(shuffle=True)
        torch.manual_seed(2)
        trainer = cls(problem, *loaders, optimizer=torch.optim.Adam(problem.parameters(), 0.003), epochs=5, patience=50)
        first = {k: v.clone() for k, v in trainer.train().items()}
        problem.nodes[0].nsteps = 12
        second = trainer.train()
        printed.append(capsys.readouterr().out)
        weights.append(same(dict(first), dict(second)))
    assert alike(printed[1], printed[0])  # the same curves, and the numbers of the epochs go on
    assert [epoch for epoch, _ in curve(printed[1])] == list(range(10))
    assert weights == [True, False]  # there the best of the easier problem comes back, and the second training is lost


def test_a_second_training_that_only_gets_worse_gives_back_what_it_started_from(capsys: pytest.CaptureFixture) -> None:
    trainer = trained_by(Trainer, FORMULATIONS["pNLP"], epochs=5)
    best, value = trainer.best_model, trainer.best_devloss
    trainer.optimizer.param_groups[0]["lr"] = 10.0
    assert same(dict(trainer.train()), dict(best))
    assert trainer.result.best_metric == pytest.approx(value, rel=1e-6) and trainer.result.best_epoch == 4


def test_gradients_that_the_optimizer_does_not_hold_are_named(capsys: pytest.CaptureFixture) -> None:
    with pytest.warns(UserWarning, match=r"c1, .*c2: these get gradients, but the optimizer does not hold them"):
        trained_by(Trainer, FORMULATIONS["reference tracking"], epochs=2)


def test_no_graph_outlives_its_step(capsys: pytest.CaptureFixture) -> None:
    class Graphs(Callback):
        def check(self, trainer: Any, output: Any) -> None:
            assert not any(v.requires_grad and v.grad_fn for v in output.values() if isinstance(v, torch.Tensor))

        end_batch = begin_epoch = begin_eval = end_eval = end_epoch = check

    trained_by(Trainer, FORMULATIONS["Burgers PINN"], epochs=2, callback=Graphs())
