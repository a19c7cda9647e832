"""Every kind of run still computes the bits that it computed when digests.json was written.

The digests are of the end weights, the optimizers' states, all history values and the global random state after runs of
a few steps. They hold for one version of torch on one model of processor; elsewhere the comparison is skipped.

    python -m tests.house.test_digests --write            # all of them: only where a change of bits is meant
    python -m tests.house.test_digests --write phases     # those whose names hold a word, the others are kept
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import weft
from tests.helpers.graphs import make_free
from tests.house.bits import compiler, elsewhere, graphs_run_themselves, machine, own_folder, sha256, workloads

FILE = Path(__file__).with_name("digests.json")
SEED = 5
Parts = dict[str, Any]
WORKLOADS = (
    "rosenbrock_weft",
    "rosenbrock_neuromancer",
    "rosenbrock_sgd",
    "rollout",
    "pinn",
    "neural_ode",
    "one_batch",
    "wide",
)


# ---- what is trained -------------------------------------------------------------------------------------------------


def short(name: str, even: bool = False) -> Any:
    """A workload of the benchmarks with three batches an epoch, the last one short; the one-batch workload has one.

    With `even` the last one is as long as the others, so that there is one graph to trace.
    """
    workload = getattr(workloads(), name)()
    rows = 32 if workload.steps == 1 else 96 if even else 74
    workload.batch_size, workload.epochs = 32, 6 if workload.steps == 1 else 2
    workload.train = {k: v[:rows].clone() for k, v in workload.train.items()}
    workload.dev = {k: v[: 32 if even else 40].clone() for k, v in workload.dev.items()}
    return workload


def problem_of(workload: Any, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return workload.make()


def data_of(workload: Any, **options: Any) -> weft.Data:
    train, dev = weft.DictDataset(workload.train), weft.DictDataset(workload.dev)
    given = {"batch_size": workload.batch_size, "inputs_require_grad": workload.require_grad, **options}
    return weft.Data(train, dev, **given)


def trainer_of(workload: Any, seed: int, **options: Any) -> weft.Trainer:
    given = {
        "epochs": workload.epochs,
        "optimizer": workload.optimizer,
        "clip": workload.clip,
        "seed": seed,
        "accelerator": "cpu",
        "progress": False,
    }
    return weft.Trainer(**(given | options))


def parts_of(problem: nn.Module, optimizers: Mapping[str, Any], result: weft.FitResult) -> Parts:
    """What has a digest."""
    names = ("epochs", "steps", "best_metric", "best_epoch", "stop_reason", "monitor", "evaluations", "search_stop")
    return {
        "weights": {"end": problem.state_dict(), "last": result.last_weights},
        "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
        "history": {"values": result.history, **{name: getattr(result, name) for name in names}},
        "random": torch.get_rng_state(),
    }


def fitted(problem: nn.Module, trainer: weft.Trainer, *data: Any, **options: Any) -> Parts:
    result = trainer.fit(problem, *data, **options)
    return parts_of(problem, trainer.optimizers, result)


# ---- the ways in which every workload is trained ---------------------------------------------------------------------


def eager(name: str, seed: int, even: bool = False, **options: Any) -> Parts:
    workload = short(name, even)
    return fitted(problem_of(workload, seed), trainer_of(workload, seed, **options), data_of(workload))


def as_graph(name: str, seed: int, **options: Any) -> Parts:
    """The traced graph itself: what weft hands to the compiler."""
    with pytest.MonkeyPatch.context() as patch, graphs_run_themselves() as ran:
        make_free(patch)  # so that validation has its graph in a short fit, too
        parts = eager(name, seed, even=name != "rosenbrock_weft", compile=True, **options)
    assert len(ran) > 5 and len(set(ran)) > 1, f"{name}: graphs of training and validation ran {len(ran)} times"
    return parts


def with_the_compiler(name: str, seed: int) -> Parts:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*stays eager.*")
        return eager(name, seed, even=True, compile=True)


class Rows(Dataset):
    """Tensors by key, one row at a time, with a little noise from the global random state if asked."""

    def __init__(self, tensors: Mapping[str, Tensor], noise: float = 0.0) -> None:
        self.tensors, self.noise = tensors, noise

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        row = {k: t[i] for k, t in self.tensors.items()}
        return {k: v + self.noise * torch.rand(v.shape) for k, v in row.items()} if self.noise else row


def loaders(workload: Any) -> tuple[DataLoader, DataLoader]:
    """Loaders over rows whose batches hold their split's name, and inputs that require grad."""

    def collate(name: str, rows: list[Any]) -> dict[str, Any]:
        batch = torch.utils.data.default_collate(rows)
        for key in workload.require_grad:
            batch[key].requires_grad_()
        return {**batch, "name": name}

    pairs = (("train", workload.train), ("dev", workload.dev))
    train, dev = (DataLoader(Rows(t), workload.batch_size, collate_fn=partial(collate, name)) for name, t in pairs)
    return train, dev


def module_of(workload: Any, problem: nn.Module) -> Any:
    from lightning.pytorch import LightningModule

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.problem = problem

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            out = self.problem(batch)
            self.log("train_loss", out["train_loss"], on_step=False, on_epoch=True, batch_size=batch_rows(batch))
            return out["train_loss"]

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            with torch.set_grad_enabled(bool(workload.require_grad)):
                loss = self.problem(batch)["dev_loss"].detach()
            self.log("dev_loss", loss, batch_size=batch_rows(batch))

        def configure_optimizers(self) -> Any:
            optimizer = workload.optimizer(self.parameters())
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    return Module()


def batch_rows(batch: Any) -> int:
    return next(len(v) for v in batch.values() if isinstance(v, Tensor))


def as_module(name: str, seed: int) -> Parts:
    workload = short(name)
    module, (train, dev) = module_of(workload, problem_of(workload, seed)), loaders(workload)
    trainer = trainer_of(workload, seed, optimizer=None, clip=0.5)
    return fitted(module, trainer, train_dataloaders=train, val_dataloaders=dev)


class Cut(Exception):
    """The end of a run that was not foreseen."""


def part_of_a_run(workload: Any, seed: int, cut: int, **options: Any) -> Parts:
    def count(trainer: Any, batch: Any, loss: Any) -> None:
        if trainer.global_step == cut:
            raise Cut

    given = {"hooks": {"on_step_end": count}, "root_dir": "runs", "run_name": "run", "checkpoint": {"every_n_steps": 2}}
    trainer = trainer_of(workload, seed, **(given | options))
    return fitted(problem_of(workload, seed), trainer, data_of(workload))


def resumed(name: str, seed: int) -> Parts:
    """Cut off in the second epoch, then gone on with from the checkpoint in its middle, amid other random numbers."""
    workload = short(name)
    with contextlib.suppress(Cut):
        part_of_a_run(workload, seed, 5)
    torch.manual_seed(77)
    return part_of_a_run(workload, seed, 0, resume="last")


WAYS: dict[str, Callable[[str, int], Parts]] = {
    "eager": eager,
    "as a graph": as_graph,
    "as a LightningModule": as_module,
    "resumed": resumed,
}


# ---- the trainers with NeuroMANCER's signatures ----------------------------------------------------------------------


def lit_trainer(name: str, seed: int, **options: Any) -> Parts:
    workload = short(name)
    problem = problem_of(workload, seed)
    trainer = weft.LitTrainer(
        epochs=3,
        clip=0.5,
        patience=5,
        custom_optimizer=workload.optimizer(problem.parameters()),
        weight_name="best",
        accelerator="cpu",
        seed=seed,
        progress=False,
        **options,
    )
    datasets = (weft.DictDataset(workload.train), weft.DictDataset(workload.dev), None, workload.batch_size)
    parts = fitted(problem, trainer, lambda: datasets)
    parts["weights"]["file"] = torch.load("best.ckpt", weights_only=True)["state_dict"]
    parts["weights"]["given"] = trainer.get_weights()
    return parts


def own_lit_step(model: Any, batch: Any) -> Tensor:
    out = model.problem(batch)
    return out["train_loss"] + 1e-3 * sum(p.square().sum() for p in model.problem.parameters())


def base_trainer(name: str, seed: int, schedule: Any = None) -> Parts:
    from weft.integrations.neuromancer import Trainer

    workload = short(name)
    problem, (train, dev) = problem_of(workload, seed), loaders(workload)
    optimizer = workload.optimizer(problem.parameters())
    trainer = Trainer(
        problem,
        train,
        dev,
        optimizer=optimizer,
        epochs=4,
        patience=2,
        warmup=1,
        clip=0.5,
        epoch_verbose=2,
        lr_scheduler=schedule and schedule(optimizer),
    )
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        best = trainer.train()
        tested = trainer.test(best)
    parts = parts_of(problem, {"optimizer": optimizer}, trainer.result)
    parts["weights"]["best"] = best
    losses = {k: v for k, v in tested.items() if k.endswith("_loss")}  # other keys may be numbers of objects
    parts["history"] |= {"printed": printed.getvalue(), "tested": losses}
    return parts


# ---- further ways, on the Rosenbrock problem or on one made for them -------------------------------------------------


def rosenbrock(seed: int, data: Mapping[str, Any] | None = None, problem: Any = None, **options: Any) -> Parts:
    workload = short("rosenbrock_weft")
    problem = problem if problem is not None else problem_of(workload, seed)
    return fitted(problem, trainer_of(workload, seed, **({"epochs": 4} | options)), data_of(workload, **(data or {})))


def with_loss(loss: Callable[[], Any]) -> Callable[[int], Parts]:
    """The Rosenbrock problem's nodes and terms under another loss."""

    def run(seed: int) -> Parts:
        workload = short("rosenbrock_weft")
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
        problem = weft.Problem(
            [weft.Node(net, ["a", "p"], ["x"], name="net")],
            [weft.objective(lambda x, a: (1 - x[:, [0]]) ** 2 + a * (x[:, [1]] - x[:, [0]] ** 2) ** 2, name="f")],
            [
                weft.less_equal(lambda x: x.square().sum(1, keepdim=True), lambda p: p**2, weight=3.0, name="outer"),
                weft.equal(lambda x: x[:, [0]], lambda x: x[:, [1]], name="even"),
            ],
            loss=loss(),
        )
        return fitted(problem, trainer_of(workload, seed, epochs=5, clip=None), data_of(workload))

    return run


def adam_then_lbfgs(seed: int) -> Parts:
    stages = [
        weft.Phase(epochs=2, optimizer=lambda p: torch.optim.Adam(p, lr=1e-3)),
        weft.Phase(
            epochs=2, optimizer=lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4, line_search_fn="strong_wolfe")
        ),
    ]
    workload = short("rosenbrock_weft")
    trainer = weft.Trainer(phases=stages, seed=seed, accelerator="cpu", progress=False)
    return fitted(problem_of(workload, seed), trainer, data_of(workload))


def phases_that_freeze_and_weigh(seed: int) -> Parts:
    workload = short("rosenbrock_weft")
    stages = [
        weft.Phase(epochs=2, weights={"inner": 3.0}),
        weft.Phase(epochs=2, data=data_of(workload, batch_size=16), weights={"order": 1.0}, patience=1),
        weft.Phase(epochs=2, scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5)),
    ]
    trainer = weft.Trainer(phases=stages, seed=seed, accelerator="cpu", progress=False)
    return fitted(problem_of(workload, seed), trainer, data_of(workload))


def twice(seed: int) -> Parts:
    """A second fit trains on."""
    workload = short("rosenbrock_weft")
    problem, trainer = problem_of(workload, seed), trainer_of(workload, seed)
    trainer.fit(problem, data_of(workload))
    return fitted(problem, trainer, data_of(workload))


def own_loop(seed: int) -> Parts:
    workload = short("rosenbrock_weft")
    problem, trainer = problem_of(workload, seed), trainer_of(workload, seed)
    with trainer.start(problem, data_of(workload)) as run:
        for _ in run.epochs():
            for number, batch in enumerate(run.batches("train")):
                if number == 1:
                    run.backward(problem(batch)["train_loss"])
                    run.step()
                else:
                    run.update(batch)
            run.evaluate("dev")
    return parts_of(problem, trainer.optimizers, run.result)


class TwoSteps(weft.Trainer):
    """Two optimizer steps on each batch."""

    def update(self, batch: Any) -> Tensor:
        for _ in range(2):
            loss = self.problem(batch)[self.train_metric]
            self.backward(loss)
            self.step()
        return loss


def own_update(seed: int) -> Parts:
    workload = short("rosenbrock_weft")
    trainer = TwoSteps(epochs=2, optimizer=workload.optimizer, clip=0.5, seed=seed, accelerator="cpu", progress=False)
    return fitted(problem_of(workload, seed), trainer, data_of(workload))


class Dropping(nn.Module):
    """Batch norm, dropout, noise and a buffer of its own: what random numbers and modes of modules decide about."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        y = self.net(torch.cat([batch["a"], batch["p"]], 1))
        if self.training:
            self.seen = self.seen + len(y)
            y = y + 0.01 * torch.randn_like(y)
        return {f"{batch['name']}_loss": (y - batch["p"]).square().mean(), "size": y.abs().mean()}


def dropping(seed: int, graph: bool = False) -> Parts:
    torch.manual_seed(seed)
    problem = Dropping()
    if not graph:
        return rosenbrock(seed, problem=problem)
    with graphs_run_themselves() as ran:
        parts = rosenbrock(seed, problem=problem, compile=True)
    assert len(ran) > 3
    return parts


def through_loader(seed: int, **options: Any) -> Parts:
    """A loader without workers that shuffles with a generator of its own, over rows with noise."""
    workload = short("rosenbrock_weft")
    own = torch.Generator().manual_seed(3)
    loader = DataLoader(Rows(workload.train, noise=0.1), 16, shuffle=True, generator=own, num_workers=0)
    trainer = trainer_of(workload, seed, epochs=3, **options)
    data = weft.Data(loader, DataLoader(Rows(workload.dev), 16, num_workers=0))
    parts = fitted(problem_of(workload, seed), trainer, data)
    return {**parts, "random": {"global": parts["random"], "own": own.get_state()}}


def dataset_in_batches(seed: int) -> Parts:
    """A dataset of rows that weft itself puts into batches, kept in memory after the first epoch."""
    workload = short("rosenbrock_weft")
    data = weft.Data(Rows(workload.train, noise=0.1), Rows(workload.dev), batch_size=16, pre_batch="in_memory")
    return fitted(problem_of(workload, seed), trainer_of(workload, seed, epochs=3), data)


def nested_parts(seed: int) -> Parts:
    def step(trainer: Any, batch: Any) -> Tensor:
        losses = [trainer.problem({**batch[part], "name": "train"})["train_loss"] for part in ("inside", "edge")]
        return losses[0] + 2 * losses[1]

    workload = short("rosenbrock_weft")
    edge = {k: v[:20] + 0.1 for k, v in workload.train.items()}
    parts = {"inside": weft.DictDataset(workload.train), "edge": weft.DictDataset(edge)}
    data = weft.Data(parts, batch_size={"train": {"inside": 16, "edge": 6}})
    return fitted(problem_of(workload, seed), trainer_of(workload, seed, training_step=step), data)


def refreshed(seed: int) -> Parts:
    """Data that are drawn anew every second epoch."""

    def setup(rows: int) -> weft.Data:
        drawn = {"a": torch.rand(rows, 1), "p": 0.5 + torch.rand(rows, 1)}
        return weft.Data(weft.DictDataset(drawn), weft.DictDataset(workload.dev), batch_size=16, refresh_every=2)

    workload = short("rosenbrock_weft")
    return fitted(problem_of(workload, seed), trainer_of(workload, seed, epochs=5), setup, rows=40)


class Gan(nn.Module):
    """Two players with a loss each."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
        self.critic = nn.Sequential(nn.Linear(1, 8), nn.LeakyReLU(), nn.Linear(8, 1))

    def fake(self, batch: Mapping[str, Any]) -> Tensor:
        return self.generator(torch.cat([batch["a"], batch["p"]], 1))

    def of_generator(self, batch: Mapping[str, Any]) -> Tensor:
        return nn.functional.softplus(-self.critic(self.fake(batch))).mean()

    def of_critic(self, batch: Mapping[str, Any]) -> Tensor:
        fake, real = self.critic(self.fake(batch).detach()), self.critic(batch["p"])
        return (nn.functional.softplus(fake) + nn.functional.softplus(-real)).mean()

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        losses = {"generator": self.of_generator(batch), "critic": self.of_critic(batch)}
        return {f"{batch['name']}_loss": losses["generator"] + losses["critic"], "real": losses["critic"]}


PLAYERS = {
    "generator": lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.5, 0.9)),
    "critic": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


def gan(seed: int, **options: Any) -> Parts:
    torch.manual_seed(seed)
    return rosenbrock(seed, problem=Gan(), optimizer=PLAYERS, **options)


def both_losses(trainer: Any, batch: Any) -> dict[str, Tensor]:
    return {"generator": trainer.problem.of_generator(batch), "critic": trainer.problem.of_critic(batch)}


def gan_as_module(seed: int) -> Parts:
    """Manual optimization: toggled optimizers that take turns, and a scheduler that the module steps."""
    from lightning.pytorch import LightningModule

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.gan, self.automatic_optimization = Gan(), False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer, loss_of in zip(self.optimizers(), (self.gan.of_generator, self.gan.of_critic), strict=True):
                self.toggle_optimizer(optimizer)
                loss = loss_of(batch)
                self.log(loss_of.__name__, loss, batch_size=batch_rows(batch))
                optimizer.zero_grad()
                self.manual_backward(loss)
                self.clip_gradients(optimizer, 0.5, "norm")
                optimizer.step()
                self.untoggle_optimizer(optimizer)
            self.lr_schedulers().step()

        def configure_optimizers(self) -> Any:
            made = [PLAYERS[name](getattr(self.gan, name).parameters()) for name in PLAYERS]
            return made, [torch.optim.lr_scheduler.StepLR(made[0], 2, 0.5)]

    workload = short("rosenbrock_weft")
    torch.manual_seed(seed)
    trainer = trainer_of(workload, seed, optimizer=None, clip=None)
    return fitted(Module(), trainer, train_dataloaders=loaders(workload)[0])


def cosine(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7)


def plateau(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.9)


def schedule_by_step() -> weft.Schedule:
    return weft.Schedule(lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=40), interval="step")


def hooked(seed: int, *names: str, **options: Any) -> Parts:
    """With hooks of weft by name, each made anew."""
    made = {
        "EMA": lambda: weft.hooks.EMA(0.9),
        "SWA": lambda: weft.hooks.SWA(1),
        "ReLoBRaLo": lambda: weft.hooks.ReLoBRaLo(),
        "SoftAdapt": lambda: weft.hooks.SoftAdapt(),
        "SelfAdaptive": lambda: weft.hooks.SelfAdaptive(),
        "GradNorm": lambda: weft.hooks.GradNorm(every=2),
        "LearningRateAnnealing": lambda: weft.hooks.LearningRateAnnealing("f", every=2),
        "Curriculum": lambda: weft.hooks.Curriculum(lambda epoch: {"inner": 10.0 * (epoch + 1)}),
        "GradientNorms": lambda: weft.hooks.GradientNorms(),
    }
    return rosenbrock(seed, hooks=[made[name]() for name in names], **options)


def averaged_as_graph(seed: int) -> Parts:
    return as_graph("rosenbrock_weft", seed, hooks=weft.hooks.EMA(0.9), clip=0.5, epochs=4)


SLOW = {f"{name}, with the compiler": partial(with_the_compiler, name) for name in ("one_batch", "pinn")}
CASES: dict[str, Callable[[int], Parts]] = {
    **{f"{name}, {way}": partial(run, name) for way, run in WAYS.items() for name in WORKLOADS},
    **{f"{name}, LitTrainer": partial(lit_trainer, name) for name in ("rosenbrock_neuromancer", "rollout")},
    "LitTrainer, own step": partial(lit_trainer, "rosenbrock_neuromancer", custom_training_step=own_lit_step),
    "LitTrainer, unshuffled": partial(lit_trainer, "rosenbrock_neuromancer", shuffle=False, eval_metric="train_loss"),
    **{f"{name}, NeuroMANCER's Trainer": partial(base_trainer, name) for name in ("rosenbrock_neuromancer", "rollout")},
    "NeuroMANCER's Trainer, schedule": partial(base_trainer, "rosenbrock_neuromancer", schedule=cosine),
    "accumulate": partial(rosenbrock, accumulate=2, clip=0.5),
    "accumulate, as a graph": partial(as_graph, "rosenbrock_weft", accumulate=2, epochs=4, clip=0.5),
    "phases, Adam then LBFGS": adam_then_lbfgs,
    "phases that weigh": phases_that_freeze_and_weigh,
    "clip and EMA": lambda seed: hooked(seed, "EMA", clip=0.5),
    "clip and EMA, as a graph": averaged_as_graph,
    **{
        f"hook {name}": lambda seed, name=name: hooked(seed, name)
        for name in (
            "SWA",
            "ReLoBRaLo",
            "SoftAdapt",
            "SelfAdaptive",
            "GradNorm",
            "LearningRateAnnealing",
            "Curriculum",
            "GradientNorms",
        )
    },
    "clip by value": partial(rosenbrock, clip=1e-3, clip_algorithm="value"),
    "no clip, default optimizer": partial(rosenbrock, clip=None, optimizer=None),
    "64-true": partial(rosenbrock, precision="64-true"),
    "64-true, as a graph": partial(as_graph, "rosenbrock_weft", precision="64-true"),
    "bf16-mixed": partial(rosenbrock, precision="bf16-mixed"),
    "AugmentedLagrangian": with_loss(lambda: weft.AugmentedLagrangian(every=2)),
    "BarrierLoss": with_loss(lambda: weft.BarrierLoss("softexp")),
    "nested parts": nested_parts,
    "refreshed data": refreshed,
    "drop last": partial(rosenbrock, data={"drop_last": True}),
    "unshuffled": partial(rosenbrock, data={"shuffle": False, "batch_size": 20}),
    "all rows in a batch": partial(rosenbrock, data={"batch_size": None}),
    "limited batches": partial(rosenbrock, data={"batch_size": 16}, limit_batches={"train": 3, "dev": 1}),
    "loader without workers": through_loader,
    "dataset in batches": dataset_in_batches,
    "dropout and batch norm": dropping,
    "dropout and batch norm, as a graph": partial(dropping, graph=True),
    "schedule by epoch": partial(rosenbrock, scheduler=cosine),
    "schedule by step": lambda seed: rosenbrock(seed, scheduler=schedule_by_step()),
    "plateau": partial(rosenbrock, scheduler=plateau),
    "patience": partial(rosenbrock, optimizer=lambda p: torch.optim.SGD(p, lr=0.05), patience=1, epochs=12, warmup=1),
    "most steps, validated now and then": partial(rosenbrock, max_steps=8, validate_every=2),
    "two fits": twice,
    "own loop": own_loop,
    "own update": own_update,
    "GAN, a step of two losses": partial(gan, training_step=both_losses),
    "GAN, two optimizers on one loss": gan,
    "GAN, as a LightningModule by hand": gan_as_module,
    **SLOW,
}


# ---- digests and their file ------------------------------------------------------------------------------------------


def digests_of(name: str, seed: int = SEED) -> dict[str, str]:
    """The digest of each part of a run, made in a folder of its own."""
    with own_folder(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other tests look at warnings
        torch.manual_seed(seed)
        return {part: sha256(value) for part, value in CASES[name](seed).items()}


def recorded() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def write(words: list[str]) -> None:
    here, kept = {**machine(), "compiler": compiler()}, {}
    if words:
        file = recorded()
        if why := elsewhere(file["machine"], here):
            raise SystemExit(f"Write all of them: {why}.")
        kept = file["digests"]
    chosen = [name for name in CASES if not words or any(word in name for word in words)]
    made = {name: digests_of(name) for name in chosen}
    digests = {name: made.get(name) or kept[name] for name in CASES if name in made or name in kept}
    FILE.write_text(json.dumps({"machine": here, "digests": digests}, indent=1) + "\n", encoding="utf-8")
    changed = [name for name in made if name in kept and kept[name] != made[name]]
    print(f"{len(made)} written, {len(changed)} changed: {', '.join(changed)}")


# ---- the laws --------------------------------------------------------------------------------------------------------


@pytest.fixture
def comparable(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """The recorded digests by name, where this machine can repeat them."""
    file = recorded()
    needed = {k: v for k, v in file["machine"].items() if k != "compiler" or request.node.get_closest_marker("long")}
    if why := elsewhere(needed, {**machine(), "compiler": compiler()}):
        pytest.skip(why)
    yield file["digests"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long if n in SLOW else ()) for n in CASES])
def test_a_run_computes_the_recorded_bits(name: str, comparable: dict[str, Any]) -> None:
    found = digests_of(name)
    different = [part for part in found if found[part] != comparable[name].get(part)]
    assert found.keys() == comparable[name].keys()
    assert not different, f"{name}: other bits in {', '.join(different)}"


def test_every_way_of_training_is_recorded_and_no_other() -> None:
    assert list(recorded()["digests"]) == list(CASES)
    assert tuple(make.__name__ for make in workloads().WORKLOADS) == WORKLOADS


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_recorded_resumed_runs_end_where_the_undisturbed_ones_do(name: str) -> None:
    digests = recorded()["digests"]
    assert digests[f"{name}, resumed"] == digests[f"{name}, eager"]


@pytest.mark.parametrize("name", ["one_batch, eager", "one_batch, as a graph", "rollout, LitTrainer"])
def test_a_run_from_another_seed_has_other_digests(name: str) -> None:
    one, other = digests_of(name), digests_of(name, SEED + 1)
    assert one == digests_of(name)
    assert all(one[part] != other[part] for part in ("weights", "optimizers", "history", "random"))


def test_a_digest_sees_the_last_bit_the_sign_of_zero_and_the_shape() -> None:
    x = torch.ones(2, 3)
    y = x.clone()
    y[1, 2] = torch.nextafter(y[1, 2], torch.tensor(2.0))
    assert len({sha256(v) for v in (x, y, x.double(), x.reshape(3, 2), {"x": x}, [x])}) == 6
    assert sha256(torch.tensor(0.0)) != sha256(torch.tensor(-0.0)) and sha256(0.1 + 0.2) != sha256(0.3)
    assert sha256({"a": 1, "b": x}) == sha256({"b": x.clone(), "a": 1}) and sha256(1) != sha256(1.0) != sha256(True)
    with pytest.raises(TypeError, match="only tensors and plain values"):
        sha256(object())


if __name__ == "__main__":
    if sys.argv[1:2] != ["--write"]:
        raise SystemExit(__doc__)
    write(sys.argv[2:])
