"""Numbers that go wrong never reach the weights, the optimizer, the best or the last checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from tests.helpers.bitwise import same
from weft.checkpoint import archive
from weft.checkpoint import folder as checkpoints


class InfiniteGradient(torch.autograd.Function):
    """x itself, with an infinite derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.full_like(grads[0], torch.inf)


class Fragile(nn.Module):
    """Two layers; the `bad` calls of training (from 0) go wrong in the way that is named."""

    def __init__(self, bad: dict[int, str] | None = None, dev: list[float] | None = None) -> None:
        super().__init__()
        before = torch.get_rng_state()
        torch.manual_seed(0)
        self.first, self.second, self.norm = nn.Linear(1, 3), nn.Linear(3, 1), nn.BatchNorm1d(1)
        torch.set_rng_state(before)
        self.bad, self.dev, self.calls = bad or {}, dev, 0

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        p = batch["p"]
        if self.training and self.bad.get(self.calls) == "loss":
            p = p * torch.nan  # which would stay in the running mean for ever
        out = self.second(self.first(self.norm(p)).tanh())
        loss, name = (out - batch["p"] ** 2).square().mean(), batch["name"]
        if not self.training:
            value = self.dev[batch["epoch"]] if self.dev else 0.0
            return {f"{name}_loss": loss + value}
        kind = self.bad.get(self.calls)
        self.calls += 1
        penalty = self.first.weight.square().sum()
        if kind == "term":
            penalty = penalty / 0.0 * 0.0
        elif kind == "loss":
            loss = loss * 1.0  # nan by now
        elif kind == "gradient":
            loss = InfiniteGradient.apply(loss)
        elif kind == "one gradient":
            loss = loss + 0.0 * InfiniteGradient.apply(self.second.bias).sum()
        return {f"{name}_loss": loss + 0.01 * penalty, "penalty": penalty}


class Notes(weft.Hook):
    """Weights and optimizer states before and after each step."""

    def __init__(self) -> None:
        self.before: Any = None
        self.changed: list[bool] = []

    @staticmethod
    def state(trainer: Any) -> Any:
        optimizers = [o.state_dict()["state"] for o in trainer.optimizers.values()]
        return archive.plain([dict(trainer.problem.state_dict()), optimizers], clone=True)

    def on_step_start(self, trainer: Any, batch: Any) -> None:
        self.before = self.state(trainer)

    def on_step_end(self, trainer: Any, batch: Any, loss: Any) -> None:
        self.changed.append(not same(self.before, self.state(trainer)))

    def on_exception(self, trainer: Any, error: BaseException) -> None:
        self.changed.append(not same(self.before, self.state(trainer)))


def twelve_rows() -> weft.Data:
    p = torch.linspace(-1, 1, 12)[:, None]
    return weft.Data(weft.DictDataset({"p": p}), weft.DictDataset({"p": p[::2]}), batch_size=3, shuffle=False)


def several() -> dict[str, Any]:
    return {"first": lambda p: torch.optim.Adam(p, lr=0.01), "second": lambda p: torch.optim.Adam(p, lr=0.01)}


def own_update(trainer: Any, batch: Any) -> Tensor:
    loss = trainer.problem(batch)["train_loss"]
    trainer.backward(loss)
    trainer.step()
    return loss


class OwnUpdate(weft.Trainer):
    update = own_update


WAYS: dict[str, Callable[[], dict[str, Any]]] = {
    "adam": dict,
    "clipped by norm": lambda: {"clip": 0.1},
    "clipped by value": lambda: {"clip": 0.1, "clip_algorithm": "value"},
    "accumulated": lambda: {"accumulate": 2},
    "several optimizers": lambda: {"optimizer": several()},
    "plain sgd": lambda: {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1)},
    "float64": lambda: {"precision": "64-true"},
    "lbfgs": lambda: {"optimizer": lambda p: torch.optim.LBFGS(p, max_iter=3, line_search_fn="strong_wolfe")},
    "own update": lambda: {"of": OwnUpdate},
}
KINDS = ["loss", "term", "gradient", "one gradient"]


def train_fragile(problem: Fragile, root: Path | None = None, **options: Any) -> tuple[weft.Trainer, weft.FitResult]:
    options = {"epochs": 3, "progress": False, **options}
    if root is not None:
        options |= {"root_dir": str(root), "run_name": "run"}
    trainer = options.pop("of", weft.Trainer)(**options)
    return trainer, trainer.fit(problem, twelve_rows())


def is_finite(problem: nn.Module) -> bool:
    return all(bool(value.isfinite().all()) for value in problem.state_dict().values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_the_error_names_the_step_and_nothing_was_changed(way: str, kind: str, tmp_path: Path) -> None:
    options, notes = WAYS[way](), Notes()
    steps = 2 if options.get("accumulate") else 4
    call = 6 if way != "lbfgs" else 0  # LBFGS calls as often as it likes
    problem = Fragile({n: kind for n in range(call, 10**6)})
    with pytest.raises(FloatingPointError) as caught:
        train_fragile(problem, tmp_path, hooks=notes, checkpoint={"every_n_steps": 1}, **options)
    step = call // (4 // steps)
    assert f"in step {step} (epoch {step // steps}, rank 0)" in str(caught.value)
    names = {"loss": "train_loss is ", "term": "penalty is nan", "gradient": "a gradient is not finite"}
    if way not in ("lbfgs", "own update"):
        assert names.get(kind, names["gradient"]) in str(caught.value)
    assert not notes.changed[-1] and all(notes.changed[:-1]) and len(notes.changed) == step + 1
    assert is_finite(problem)
    if step:
        for which in ("last", "best"):
            state, _ = checkpoints.load(tmp_path / "run", which)
            assert all(value.isfinite().all() for value in state["problem"].values())
            assert state["progress"]["step"] == (step if which == "last" else steps)
        assert same(dict(checkpoints.load(tmp_path / "run")[0]["problem"]), dict(problem.state_dict()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", [way for way in WAYS if way != "lbfgs"])
def test_a_skipped_step_changes_nothing_and_is_counted(way: str, kind: str) -> None:
    notes, problem = Notes(), Fragile({1: kind, 6: kind})
    options = WAYS[way]()
    every = options.get("accumulate", 1)
    with pytest.warns(UserWarning, match="the step is skipped"):
        trainer, result = train_fragile(problem, hooks=notes, on_nonfinite="skip", **options)
    assert trainer.run is not None and trainer.run.progress.skipped_total == 2 and trainer.run.progress.skipped == 0
    assert [i for i, changed in enumerate(notes.changed) if not changed] == [1 // every, 6 // every]
    assert result.steps == 12 // every and is_finite(problem)
    if way != "own update" or kind in ("gradient", "one gradient"):  # what an own update returns is the user's to log
        assert all(math.isfinite(value) for value in result.history["train_loss"])


def test_the_numbers_of_a_skipped_step_are_left_out_of_the_means() -> None:
    with pytest.warns(UserWarning, match="skipped"):
        _, result = train_fragile(
            Fragile({1: "loss"}), epochs=1, on_nonfinite="skip", optimizer=lambda p: torch.optim.SGD(p, lr=0.0)
        )
    problem, losses = Fragile(), []
    for i, p in enumerate(twelve_rows().train.datadict["p"].split(3)):
        if i != 1:
            losses.append(problem({"p": p, "name": "train", "epoch": 0})["train_loss"].detach().double())
    assert result.history["train_loss"] == [pytest.approx(float(torch.stack(losses).mean()), rel=1e-6)]


def test_a_hundred_skipped_steps_in_a_row_are_an_error_also_over_a_resume(tmp_path: Path) -> None:
    def bad() -> Fragile:
        return Fragile({n: "loss" for n in range(5, 1000)})

    with pytest.warns(UserWarning, match="skipped"), pytest.raises(FloatingPointError, match="100 steps in a row"):
        train_fragile(bad(), epochs=100, on_nonfinite="skip")
    options: dict[str, Any] = {"on_nonfinite": "skip", "checkpoint": True, "epochs": 100, "resume": "auto"}
    with pytest.warns(UserWarning, match="skipped"):
        train_fragile(bad(), tmp_path, max_steps=60, **options)
    assert checkpoints.load(tmp_path / "run")[0]["progress"]["skipped"] == 55
    trainer_steps = {"max_steps": 1000}
    with pytest.raises(
        FloatingPointError, match=r"in step 104 .*100 steps in a row"
    ):  # 5 good ones, then the hundredth
        train_fragile(bad(), tmp_path, **trainer_steps, **options)


def test_stop_ends_the_run_with_its_best_weights(tmp_path: Path) -> None:
    notes, problem = Notes(), Fragile({6: "gradient"})
    with pytest.warns(UserWarning, match=r"a gradient is not finite in step 6 .*training stops"):
        _, result = train_fragile(problem, tmp_path, hooks=notes, on_nonfinite="stop", checkpoint=True)
    assert result.stop_reason == "nonfinite" and not notes.changed[-1] and len(notes.changed) == 7
    assert is_finite(problem) and result.best_epoch is not None
    state, _ = checkpoints.load(tmp_path / "run")
    assert all(v.isfinite().all() for v in state["problem"].values())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_is_never_the_best(bad: float, tmp_path: Path) -> None:
    problem = Fragile(dev=[bad, 0.5, bad, 0.0, bad])
    _, result = train_fragile(problem, tmp_path, epochs=5, checkpoint=True)
    assert result.best_epoch == 3 and result.best_metric is not None and math.isfinite(result.best_metric)
    state, path = checkpoints.load(tmp_path / "run", "best")
    assert path.name == "step-000000016.ckpt" and same(dict(state["problem"]), dict(problem.state_dict()))


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_without_any_finite_metric_the_problem_keeps_its_last_weights(bad: float, mode: str, tmp_path: Path) -> None:
    problem = Fragile(dev=[bad] * 3)
    with pytest.warns(UserWarning, match="not finite in any of 3 epochs"):
        _, result = train_fragile(problem, tmp_path, checkpoint=True, monitor_mode=mode)
    assert result.best_epoch is None and result.best_metric is None and result.epochs == 3
    assert same(dict(result.last_weights), dict(problem.state_dict())) and is_finite(problem)
    assert not (tmp_path / "run/checkpoints/best").exists()
    fresh = weft.load_weights(Fragile(), tmp_path / "run")
    assert same(dict(fresh.state_dict()), dict(problem.state_dict()))


def test_patience_counts_a_metric_that_is_not_finite_as_no_improvement() -> None:
    _, result = train_fragile(Fragile(dev=[0.0, *[math.nan] * 9]), epochs=10, patience=3)
    assert result.stop_reason == "patience" and result.epochs == 4 and result.best_epoch == 0
    with pytest.warns(UserWarning, match="not finite in any of 3 epochs"):
        _, result = train_fragile(Fragile(dev=[*[math.nan] * 5, 0.0, *[0.0] * 4]), epochs=10, patience=3)
    assert result.stop_reason == "patience" and result.epochs == 3 and result.best_epoch is None


def test_a_skip_is_resumed_bitwise(tmp_path: Path) -> None:
    options: dict[str, Any] = {"on_nonfinite": "skip", "checkpoint": {"every_n_steps": 1}}
    with pytest.warns(UserWarning, match="skipped"):
        train_fragile(Fragile({3: "loss", 5: "gradient"}), tmp_path / "whole", **options)
    with pytest.warns(UserWarning, match="skipped"):
        train_fragile(Fragile({3: "loss", 5: "gradient"}), tmp_path / "cut", max_steps=4, **options)
    state, _ = checkpoints.load(tmp_path / "cut/run")
    assert state["progress"]["skipped_total"] == 1 and state["progress"]["step"] == 4
    train_fragile(Fragile({3: "loss", 5: "gradient"}), tmp_path / "cut", resume="last", **options)
    ends = [checkpoints.load(tmp_path / name / "run")[0] for name in ("whole", "cut")]
    for end in ends:
        del end["progress"]["seconds"]
    assert ends[0]["progress"]["skipped_total"] == 2 and same(*[e["problem"] for e in ends])
    assert same(*[e["progress"] for e in ends]) and same(*[e["history"] for e in ends])


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.LBFGS])
@pytest.mark.parametrize("bad", [math.inf, 1.0])
@pytest.mark.filterwarnings("ignore:LBFGS no longer finds a lower loss")
def test_ignored_numbers_train_on_as_a_plain_loop_does(optimizer: Any, bad: float) -> None:
    """Weights that a loop by hand has after steps with an infinite loss (control: with a finite one)."""
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))

    class Scaled(nn.Linear):
        def forward(self, batch: Any) -> Any:
            return super().forward(batch["x"]).square().mean() * (bad if batch["epoch"] == 1 else 1.0)

    torch.manual_seed(0)
    ours, theirs = Scaled(2, 1), Scaled(2, 1)
    theirs.load_state_dict(ours.state_dict())
    trainer = weft.Trainer(epochs=3, optimizer=optimizer, on_nonfinite="ignore", accelerator="cpu", progress=False)
    trainer.fit(ours, weft.Data(weft.DictDataset({"x": x}), batch_size="all"))
    steps = optimizer(theirs.parameters())
    for epoch in range(3):

        def closure(epoch: int = epoch) -> Any:
            steps.zero_grad()
            loss = theirs({"x": x, "epoch": epoch})
            loss.backward()
            return loss

        steps.step(closure)
    last = trainer.run.result.last_weights  # type: ignore[union-attr]
    assert all(torch.equal(last[k], v) or (last[k].isnan() & v.isnan()).all() for k, v in theirs.state_dict().items())
    assert bool(theirs.weight.isnan().any()) == (bad == math.inf)


def test_an_ignoring_run_is_not_compiled() -> None:
    data = weft.Data(weft.DictDataset({"x": torch.ones(4, 1)}), batch_size=2)
    trainer = weft.Trainer(epochs=1, compile=True, on_nonfinite="ignore", accelerator="cpu", progress=False)
    with pytest.warns(UserWarning, match="stays eager: on_nonfinite='ignore' steps with numbers"):
        trainer.fit(weft.Problem([weft.Node(nn.Linear(1, 1), ["x"], ["y"])], [weft.objective(lambda y: y**2)]), data)
