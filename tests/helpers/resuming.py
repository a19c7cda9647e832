"""Runs that are cut off and resumed: what they train, how they die, and how two of them are compared."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.fabric  # noqa: F401 (its first import draws from the random numbers of python)
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

import weft
from tests.helpers.bitwise import same
from weft.checkpoint import archive
from weft.checkpoint import folder as checkpoints
from weft.devices import seeding
from weft.loggers.csv import read_rows

CLOCKS = {"seconds", "steps_per_second", "examples_per_second", "wait_seconds"}  # what no run repeats


class Crash(Exception):
    """The end of a run that was not foreseen."""


class Fuse:
    """Burns down with each call; raises Crash (or does what it is told) at the last one. Set to 0: never."""

    def __init__(self) -> None:
        self.left = 0
        self.act: Callable[[], None] = self.blow

    def set(self, calls: int, act: Callable[[], None] | None = None) -> None:
        self.left, self.act = calls, act or self.blow

    def burn(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.act()

    def blow(self) -> None:
        raise Crash


FUSE = Fuse()
"""Burns in every forward pass of training of `make_problem`."""


class Net(nn.Module):
    """Dropout, batch norm, a plain counter and a hidden state: everything that a resumed run must not forget."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 1))
        self.calls = 0
        self.hidden = torch.zeros(1)
        self.register_buffer("drift", torch.zeros(1), persistent=False)

    def forward(self, p: Tensor) -> Tensor:
        if self.training:
            FUSE.burn()
            self.calls += 1
            self.hidden = 0.9 * self.hidden + 0.1 * p.detach().mean().reshape(1)
            self.drift += 0.01
        return self.layers(p) + 0.1 * self.hidden + 0.1 * self.drift + math.sin(self.calls) * 0.01


def make_problem(loss: Any = None, seed: int = 0) -> weft.Problem:
    """A small problem with random initial weights that do not touch the global random state."""
    before = torch.get_rng_state()
    torch.manual_seed(seed)
    second = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    problem = weft.Problem(
        [weft.Node(Net(), ["p"], ["x"], name="first"), weft.Node(second, ["x"], ["y"], name="second")],
        objectives=[weft.objective(lambda x, p: (x - p[:, :1] * p[:, 1:]).square(), name="f")],
        constraints=[weft.less_equal("y", 0.1, weight=2.0, name="c")],
        loss=loss,
    )
    torch.set_rng_state(before)
    return problem


def rows(count: int = 22, seed: int = 1) -> Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))


def make_data(**options: Any) -> weft.Data:
    """22 rows in batches of 4: the last one is short."""
    return weft.Data(weft.DictDataset({"p": rows()}), weft.DictDataset({"p": rows(9, 2)}), batch_size=4, **options)


class Augmented(Dataset):
    """Rows with noise from the global random state of torch, numpy and python, and from a generator of its own."""

    def __init__(self) -> None:
        self.p, self.own = rows(), np.random.default_rng(3)

    def __len__(self) -> int:
        return len(self.p)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        noise = torch.rand(2) + random.random() + float(np.random.rand()) + float(self.own.random())
        return {"p": self.p[i] + 0.1 * noise}


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for row in rows():
            yield {"p": row + 0.1 * torch.rand(2)}


class Average(weft.Hook):
    """A hook with state: a running mean of the first weight, which it also writes into the problem at epoch ends."""

    def __init__(self) -> None:
        self.mean: Tensor | None = None
        self.starts = 0

    def on_epoch_start(self, trainer: Any) -> None:
        torch.rand(1)  # draws where a loader has not started yet
        next(trainer.problem.parameters()).data.mul_(0.999)  # must happen once an epoch, resumed or not

    def on_step_end(self, trainer: Any, batch: Any, loss: Any) -> None:
        weight = next(trainer.problem.parameters()).detach()
        self.mean = weight.clone() if self.mean is None else 0.9 * self.mean + 0.1 * weight
        trainer.log({"weight": weight.mean()})
        trainer.state["steps"] = trainer.state.get("steps", 0) + 1
        trainer.state["mean"] = self.mean.mean()

    def on_epoch_end(self, trainer: Any, metrics: Mapping[str, float]) -> None:
        with torch.no_grad():
            next(trainer.problem.parameters()).copy_(self.mean)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.mean = state_dict["mean"]


def fit(
    root: Path, setting: Mapping[str, Any], *, every: Any = 2, resume: str | None = "auto", **changes: Any
) -> tuple[weft.FitResult, weft.Problem]:
    """Train `setting` in `root`: with new objects throughout, as a new process would."""
    options: dict[str, Any] = {"epochs": 4, "progress": False, "loggers": "csv", "run_name": "run", **changes}
    made = {name: value() for name, value in setting.items()}
    problem, data = made.pop("problem", None) or make_problem(), made.pop("data", None) or make_data()
    how = made.pop("checkpoint", {})
    train = made.pop("loop", weft.Trainer.fit)
    options |= {"checkpoint": {"every_n_steps": every, **how}, **made}
    trainer = weft.Trainer(root_dir=str(root), resume=resume, **options)
    return train(trainer, problem, data), problem


def last_state(root: Path) -> dict[str, Any]:
    """Everything in the last checkpoint but the seconds."""
    state, _ = checkpoints.load(root / "run")
    del state["progress"]["seconds"]
    return state


def fingerprint(value: Any) -> str:
    """A sha256 over every bit of a state."""
    digest = hashlib.sha256()

    def add(item: Any) -> None:
        digest.update(type(item).__name__.encode())
        if isinstance(item, Tensor):
            digest.update(f"{item.dtype}{tuple(item.shape)}".encode())
            digest.update(item.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(item, Mapping):
            for key, entry in item.items():
                digest.update(repr(key).encode())
                add(entry)
        elif isinstance(item, list | tuple):
            for entry in item:
                add(entry)
        else:
            digest.update(repr(item).encode())

    add(value)
    return digest.hexdigest()


def summary(root: Path, result: weft.FitResult, problem: nn.Module) -> dict[str, Any]:
    """All that two runs must have in common, down to the last bit."""
    numbers = {
        k: getattr(result, k) for k in ("epochs", "steps", "best_metric", "best_epoch", "stop_reason", "history")
    }
    logged = [r[:4] for r in read_rows(root / "run" / "metrics.csv") if r.name not in CLOCKS]
    return {
        "result": numbers,
        "last weights": dict(result.last_weights),
        "weights": dict(problem.state_dict()),
        "rows": sorted(logged),
        "state": last_state(root),
    }


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two summaries differ, for a message."""
    if isinstance(a, Mapping) and isinstance(b, Mapping) and a.keys() == b.keys():
        return [text for key in a for text in differences(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [text for i, (x, y) in enumerate(zip(a, b, strict=True)) for text in differences(x, y, f"{where}[{i}]")]
    return [] if same(a, b) else [f"{where}: {str(a)[:60]} / {str(b)[:60]}"]


# ---- processes that know nothing of each other
# ------------------------------------------------------------------------


def disturb() -> None:
    """A new process has other random numbers."""
    random.seed(77), np.random.seed(77), torch.manual_seed(77)


def start_alike() -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)


def rewrite(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Changes the state in the last checkpoint."""

    def tamper(root: Path) -> None:
        state, path = checkpoints.load(root / "run")
        change(state)
        archive.write(path, state)

    return tamper


def forget_random(state: dict[str, Any]) -> None:
    state["random"] = seeding.random_state()


# ---- settings --------------------------------------------------------------------------------------------------------

Setting = dict[str, Callable[[], Any]]


def loader(dataset: Callable[[], Any] = Augmented, **options: Any) -> Callable[[], weft.Data]:
    def make() -> weft.Data:
        made = {name: value() if name in ("generator", "sampler") else value for name, value in options.items()}
        return weft.Data(DataLoader(dataset(), batch_size=4, **made), DataLoader(DevRows(), batch_size=4))

    return make


class DevRows(Dataset):
    def __len__(self) -> int:
        return 9

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"p": rows(9, 2)[i]}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def setup_that_draws() -> weft.Data:
    return weft.Data(
        weft.DictDataset({"p": torch.randn(22, 2)}), weft.DictDataset({"p": rows(9, 2)}), batch_size=4, refresh_every=2
    )


def two_optimizers() -> dict[str, Any]:
    return {
        "first": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
        "second": lambda params: torch.optim.AdamW(params, lr=0.01, amsgrad=True),
    }


def two_losses(trainer: Any, batch: Any) -> dict[str, Tensor]:
    out = trainer.problem(batch)
    return {"first": out["train_loss"], "second": out["train_loss"] * 2}


def stages() -> list[weft.Phase]:
    return [
        weft.Phase(epochs=2, freeze=["second"]),
        weft.Phase(epochs=2, data=phase_data, weights={"c": 5.0}, optimizer=lambda p: torch.optim.SGD(p, lr=0.01)),
        weft.Phase(epochs=3, patience=1, scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5)),
    ]


def phase_data() -> weft.Data:
    return weft.Data(
        weft.DictDataset({"p": torch.randn(14, 2)}), weft.DictDataset({"p": rows(9, 2)}), batch_size=4, refresh_every=2
    )


def nested_data() -> weft.Data:
    parts = {"inside": weft.DictDataset({"p": rows()}), "edge": weft.DictDataset({"p": rows(8, 4)})}
    return weft.Data(parts, batch_size={"train": {"inside": 4, "edge": 3}})


def nested_step(trainer: Any, batch: Any) -> Tensor:
    losses = [trainer.problem({**batch[part], "name": "train"})["train_loss"] for part in ("inside", "edge")]
    return losses[0] + losses[1]


def cosine() -> Any:
    return lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 7)


def one_cycle() -> Any:
    return weft.Schedule(lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=40), interval="step")


def plateau() -> Any:
    return lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5)


def lagrangian() -> weft.Problem:
    return make_problem(weft.AugmentedLagrangian(every=2))


class Freeze(weft.Hook):
    """Trains one part of the problem in the first epoch only, and its normalisation no longer than that."""

    def on_epoch_end(self, trainer: Any, metrics: Mapping[str, float]) -> None:
        if trainer.current_epoch == 0:
            trainer.problem.nodes[0].fn.layers[0].requires_grad_(False)
            trainer.problem.nodes[0].fn.layers[1].eval()


class Mindful(nn.Module):
    """Keeps what it saw in a list and a dict, and draws from generators of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.seen, self.counts = Net(), list[float](), {"calls": 0.0}
        self.own, self.other = torch.Generator().manual_seed(3), np.random.default_rng(4)

    def forward(self, p: Tensor) -> Tensor:
        if self.training:
            p = p + 0.1 * torch.rand(p.shape, generator=self.own) + 0.1 * float(self.other.random())
            self.seen.append(float(p.detach().mean()))
            self.counts["calls"] += 1
        return self.net(p) + 0.01 * sum(self.seen[-3:]) + 0.01 * self.counts["calls"]


def mindful() -> weft.Problem:
    before = torch.get_rng_state()
    torch.manual_seed(0)
    problem = make_problem()
    problem.nodes[0] = weft.Node(Mindful(), ["p"], ["x"], name="first")
    torch.set_rng_state(before)
    return problem


def kept(place: str) -> Callable[[], weft.Data]:
    """Batches with noise that are made once."""
    return lambda: weft.Data(Augmented(), Augmented(), batch_size=4, pre_batch=place)


def given(value: Any) -> Callable[[], Any]:
    return lambda: value


SETTINGS: dict[str, Setting] = {
    "plain": {},
    "hooks with state, logged steps": {"hooks": Average, "log_every": given(4), "scheduler": cosine},
    "accumulate": {"accumulate": given(3), "clip": given(0.5)},
    "patience": {"patience": given(1), "epochs": given(20), "optimizer": given(lambda p: torch.optim.SGD(p, lr=0.2))},
    "step schedule": {"scheduler": one_cycle},
    "plateau": {"scheduler": plateau},
    "lbfgs": {
        "precision": given("64-true"),
        "optimizer": given(lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4, line_search_fn="strong_wolfe")),
    },
    "several optimizers": {"optimizer": two_optimizers, "training_step": given(two_losses)},
    "refresh": {"data": given(setup_that_draws), "epochs": given(6)},
    "refresh, seeded": {"data": given(setup_that_draws), "seed": given(3), "epochs": given(6)},
    "phases": {"phases": stages, "epochs": given(7)},
    "nested parts": {"data": nested_data, "training_step": given(nested_step)},
    "augmented lagrangian": {"problem": lagrangian, "epochs": given(6)},
    "loader, global random state": {"data": loader(shuffle=True), "hooks": Average},
    "loader, own generator": {"data": loader(shuffle=True, generator=seeded)},
    "loader, drawing sampler": {
        "data": lambda: loader(sampler=lambda: RandomSampler(range(22), replacement=True, generator=seeded()))()
    },
    "loader, workers": {"data": loader(shuffle=True, num_workers=2), "epochs": given(3)},
    "loader of a stream": {"data": loader(Stream)},
    "dataset": {"data": lambda: weft.Data(Augmented(), DevRows(), batch_size=4)},
    "list of batches": {"data": lambda: weft.Data([{"p": rows(4, i)} for i in range(6)], [{"p": rows(9, 2)}])},
    "float64": {"precision": given("64-true")},
    "bfloat16": {"precision": given("bf16-mixed")},
    "most steps": {"max_steps": given(15)},
    "validated now and then": {"validate_every": given(2)},
    "in the background": {"checkpoint": given({"background": True})},
    "frozen by a hook": {"hooks": Freeze},
    "lists and generators of a module": {"problem": mindful},
    "averaged weights": {"hooks": lambda: weft.hooks.EMA(0.9)},
    "kept batches": {"data": kept("in_memory")},
    "kept batches, on disk": {"data": kept("on_disk")},
    "limited": {"limit_batches": given(0.5), "patience": given(2)},
}
