"""After training a problem is in eval mode, by every way; evaluation leaves the modes as it finds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import weft
from weft.integrations.neuromancer import Trainer as NeuromancerTrainer

DATA = {"x": torch.rand(8, 1)}


def dropping() -> weft.Problem:
    """Its predictions are random in training mode."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 20), nn.ReLU(), nn.Dropout(0.5), nn.Linear(20, 1))
    return weft.Problem([weft.Node(net, ["x"], ["u"], name="a")], [weft.objective(lambda u: u.square(), name="m")])


def by_fit(problem: nn.Module) -> None:
    weft.Trainer(epochs=2, progress=False).fit(problem, weft.Data(DATA, DATA))


def by_a_loop_of_ones_own(problem: nn.Module) -> None:
    with weft.Trainer(epochs=2, progress=False).start(problem, DATA) as run:
        for _ in run.epochs():
            for batch in run.batches("train"):
                run.update(batch)


def by_an_error(problem: nn.Module) -> None:
    def fail(*args: Any) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        weft.Trainer(epochs=2, progress=False, hooks=[{"on_step_end": fail}]).fit(problem, DATA)


def by_two_fits(problem: nn.Module) -> None:
    trainer = weft.Trainer(epochs=2, progress=False)
    modes: list[bool] = []
    trainer.hooks.append({"on_step_start": lambda trainer, batch: modes.append(problem.training)})
    trainer.fit(problem, DATA)
    trainer.fit(problem, DATA)
    assert all(modes) and len(modes) == 4


def by_lit_trainer(problem: nn.Module) -> None:
    weft.LitTrainer(epochs=2, save_weights=False, progress=False).fit(problem, lambda: (DATA, DATA, None, 4))


def by_neuromancers_trainer(problem: nn.Module) -> None:
    NeuromancerTrainer(problem, [{**DATA, "name": "train"}], epochs=2, epoch_verbose=9).train()


WAYS = [by_fit, by_a_loop_of_ones_own, by_an_error, by_two_fits, by_lit_trainer, by_neuromancers_trainer]


@pytest.mark.parametrize("train", WAYS, ids=lambda way: way.__name__)
def test_every_way_of_training_leaves_eval_mode(train: Callable[[nn.Module], None]) -> None:
    problem = dropping()
    assert problem.training
    train(problem)
    assert not any(module.training for module in problem.modules())
    with torch.no_grad():
        first, second = (problem({"x": torch.ones(1, 1), "name": "t"})["u"] for _ in range(2))
    assert torch.equal(first, second)


def test_a_hook_at_the_end_sees_the_modes_that_stay() -> None:
    problem, modes = dropping(), []
    hooks = [{"on_fit_end": lambda trainer, result: modes.append(problem.training)}]
    weft.Trainer(epochs=1, progress=False, hooks=hooks).fit(problem, DATA)
    assert modes == [False]


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_modes_as_they_were(training: bool) -> None:
    problem = dropping()
    trainer = weft.Trainer(epochs=1, progress=False)
    trainer.fit(problem, weft.Data(DATA, DATA, DATA))
    problem.train(training)
    trainer.validate()
    trainer.test()
    trainer.predict(DATA)
    assert all(module.training is training for module in problem.modules())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_lightning_module_is_in_eval_mode_after_weft_has_trained_it() -> None:
    import lightning.pytorch as lp

    class Module(lp.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(1, 1), nn.Dropout())

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net(batch["x"]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module, modes = Module(), []
    module.on_train_batch_start = lambda *args: modes.append([part.training for part in module.modules()])
    trainer = weft.Trainer(epochs=1, progress=False)
    for one in (trainer, trainer, weft.Trainer(epochs=1, progress=False)):  # the next fit trains all that trained
        one.fit(module, train_dataloaders=DataLoader(weft.DictDataset(DATA), batch_size=8))
        assert not any(part.training for part in module.modules())
    assert modes == [[True] * 4] * 3


# ---- NeuroMANCER's scripts


def neuromancers(loss: str = "penalty", linear: bool = False) -> Any:
    """A problem of NeuroMANCER's (with dropout, unless it is linear), and loaders of every split."""
    from neuromancer.constraint import variable
    from neuromancer.dataset import DictDataset
    from neuromancer.loss import AugmentedLagrangeLoss, PenaltyLoss
    from neuromancer.problem import Problem
    from neuromancer.system import Node

    torch.manual_seed(0)
    dropout = nn.Sequential(nn.Linear(1, 20), nn.ReLU(), nn.Dropout(0.5), nn.Linear(20, 1))
    net = nn.Linear(1, 1) if linear else dropout
    x, p = variable("x"), variable("p")
    objectives, constraints = [((x - p) ** 2).minimize(name="f")], [(x <= 10.0)]
    rows = [DictDataset({"p": torch.rand(8, 1)}, name=name) for name in ("train", "dev", "test")]
    loaders = [DataLoader(data, batch_size=8, collate_fn=data.collate_fn) for data in rows]
    if loss == "penalty":
        return Problem([Node(net, ["p"], ["x"], name="m")], PenaltyLoss(objectives, [])), loaders
    lagrange = AugmentedLagrangeLoss(objectives, constraints, loaders[0])
    return Problem([Node(net, ["p"], ["x"], name="m")], lagrange), loaders


def trainers() -> list[Any]:
    from neuromancer.trainer import Trainer as Theirs

    return [Theirs, NeuromancerTrainer]


@pytest.mark.filterwarnings("ignore")
def test_a_neuromancer_problem_predicts_the_same_number_thrice_after_training() -> None:
    found = []
    for kind in trainers():
        problem, loaders = neuromancers()
        kind(problem, *loaders[:2], epochs=2, epoch_verbose=9).train()
        point = {"p": torch.ones(1, 1), "name": "t"}
        found.append([problem.training, *(problem(point)["t_x"].item() for _ in range(3))])
    assert found[0] == pytest.approx(found[1]) and len(set(found[1][1:])) == 1


@pytest.mark.filterwarnings("ignore")
def test_an_augmented_lagrange_loss_is_evaluated_afterwards_without_an_epoch() -> None:
    problem, _ = neuromancers("lagrange")
    rows = {"p": torch.rand(8, 1), "index": torch.arange(8), "name": "train"}
    NeuromancerTrainer(problem, [rows], epochs=2, epoch_verbose=9).train()
    assert problem({"p": torch.ones(1, 1), "name": "t", "index": torch.tensor([0])})["t_loss"].isfinite()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("metric", ["eval_mse", "train_loss"])
def test_a_second_training_does_not_forget_an_earlier_best(metric: str) -> None:
    from neuromancer.callbacks import Callback

    class Mine(Callback):
        def begin_eval(self, trainer: Any, output: Any) -> None:
            output["eval_mse"] = trainer.model.nodes[0].callable.weight.detach().abs().sum()

    held = []
    for kind in trainers():
        problem, loaders = neuromancers(linear=True)
        optimizer = torch.optim.SGD(problem.parameters(), 1e-6)
        options = {"eval_metric": metric, "epochs": 2, "patience": 9, "epoch_verbose": 9}
        trainer = kind(problem, loaders[0], optimizer=optimizer, callback=Mine(), **options)
        trainer.train()
        first = {name: value.clone() for name, value in problem.state_dict().items()}
        optimizer.param_groups[0].update(lr=0.5, weight_decay=-20.0)
        best = trainer.train()
        assert metric == "train_loss" or all(torch.equal(first[name], best[name]) for name in first)
        held.append(problem.nodes[0].callable.weight.abs().sum().item())
    assert held[0] == held[1]


@pytest.mark.filterwarnings("ignore")
def test_a_callback_sees_the_modes_that_neuromancer_gives_it() -> None:
    from neuromancer.callbacks import Callback

    seen: list[list[Any]] = []

    class Modes(Callback):
        def end_train(self, trainer: Any, output: Any) -> None:
            seen[-1].append(("end_train", trainer.model.training, torch.is_grad_enabled()))

        def begin_test(self, trainer: Any) -> None:
            seen[-1].append(("begin_test", trainer.model.training, torch.is_grad_enabled()))

        def end_test(self, trainer: Any, output: Any) -> None:
            seen[-1].append(("end_test", trainer.model.training, torch.is_grad_enabled()))

    for kind in trainers():
        problem, loaders = neuromancers()
        seen.append([])
        options = {"callback": Modes(), "epochs": 2, "epoch_verbose": 9}
        trainer = kind(problem, *loaders, **options)
        trainer.test(trainer.train())
    assert seen[0] == seen[1]
