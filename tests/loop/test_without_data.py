"""Loops that make what they train on, streams without an end, parameters by their own names, runs that were refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from tests.helpers.bitwise import same
from weft.records.lease import FOLDER

GOAL = torch.tensor([0.3, -0.7])


class Policy(nn.Module):
    """One number for each of two actions."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(2))

    def reward(self, generator: torch.Generator) -> Tensor:
        tried = self.mean + 0.1 * torch.randn(16, 2, generator=generator)
        return -(tried - GOAL).square().sum(1).mean()


def sgd_with(rate: float) -> Any:
    return lambda params: torch.optim.SGD(params, lr=rate)


def play(policy: Policy, epochs: int = 5, resume: str | None = None, **options: Any) -> weft.FitResult:
    trainer = weft.Trainer(epochs=epochs, progress=False, optimizer=sgd_with(0.1), **options)
    with trainer.start(policy, resume=resume) as run:
        for epoch in run.epochs():
            for episode in range(4):
                loss = -policy.reward(torch.Generator().manual_seed(10 * epoch + episode))
                run.backward(loss)
                run.step()
            run.log({"reward": -float(loss.detach())})
    assert run.result is not None
    return run.result


def test_a_loop_of_ones_own_needs_no_data() -> None:
    policy, hand = Policy(), Policy()
    result = play(policy)
    optimizer, losses = sgd_with(0.1)(hand.parameters()), []
    for epoch in range(5):
        for episode in range(4):
            loss = -hand.reward(torch.Generator().manual_seed(10 * epoch + episode))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert torch.equal(result.last_weights["mean"], hand.mean.detach())
    assert result.steps == 20 and result.history["train_loss"][-1] == pytest.approx(sum(losses[-4:]) / 4)
    assert not torch.equal(result.last_weights["mean"], torch.zeros(2))


def test_a_loop_without_data_stops_saves_and_resumes(tmp_path: Path) -> None:
    files: dict[str, Any] = {"checkpoint": True, "root_dir": str(tmp_path), "seed": 0}
    whole = play(Policy(), run_name="whole", **files)
    play(Policy(), epochs=2, run_name="parts", **files)
    resumed = play(Policy(), resume="auto", run_name="parts", **files)
    assert same(resumed.last_weights, whole.last_weights) and resumed.history == whole.history
    assert play(Policy(), max_steps=6, monitor_metric="reward", monitor_mode="max").epochs == 2


def test_a_fit_and_the_batches_of_a_run_need_data() -> None:
    with pytest.raises(TypeError, match="fit: no data given. Pass \\(X, y\\)"):
        weft.Trainer(progress=False).fit(Policy())
    with pytest.raises(TypeError, match="no data given"), weft.Trainer(progress=False).start(Policy()) as run:
        for _ in run.epochs():
            next(iter(run.batches("train")))


# ---- streams


def endless() -> Iterator[dict[str, Tensor]]:
    number = 0.0
    while True:
        yield {"x": torch.full((2, 1), number)}
        number += 1


class Seen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.numbers = nn.Parameter(torch.ones(1)), list[float]()

    def forward(self, batch: Any) -> Tensor:
        self.numbers.append(float(batch["x"][0, 0]))
        return (self.w * batch["x"]).mean()


def test_an_endless_generator_goes_on_where_the_limit_ended_the_epoch() -> None:
    problem = Seen()
    result = weft.Trainer(epochs=3, progress=False, limit_batches=4).fit(problem, endless())
    assert problem.numbers == [float(n) for n in range(12)] and result.steps == 12


def test_a_generator_that_comes_to_its_end_is_told() -> None:
    short = [{"x": torch.ones(2, 1)}] * 6
    with pytest.raises(RuntimeError, match="used up by the epochs before.*limit_batches"):
        weft.Trainer(epochs=3, progress=False, limit_batches=4).fit(problem := Seen(), iter(short))
    assert len(problem.numbers) == 6  # four, two, and then none
    with pytest.raises(RuntimeError, match="used up by the epochs before"):
        weft.Trainer(epochs=2, progress=False).fit(Seen(), iter(short))


# ---- parameters by their own names


class Growth(nn.Module):
    """y = k net(x), with a bare parameter k."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.k = nn.Linear(1, 1), nn.Parameter(torch.tensor(2.0))

    def forward(self, batch: Any) -> Tensor:
        return (self.k * self.net(batch["x"]) - batch["x"].sin()).square().mean()


def test_a_bare_parameter_has_an_optimizer_of_its_own_name() -> None:
    data, hand = {"x": torch.linspace(0, 1, 8)[:, None]}, Growth()
    result = weft.Trainer(epochs=4, progress=False, optimizer={"net": sgd_with(0.1), "k": sgd_with(0.01)}).fit(
        Growth(), data
    )
    optimizers = [sgd_with(0.1)(hand.net.parameters()), sgd_with(0.01)([hand.k])]
    for _ in range(4):
        for optimizer in optimizers:
            optimizer.zero_grad()
        hand(data).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert same(result.last_weights, dict(hand.state_dict()))
    other = weft.Trainer(epochs=4, progress=False, optimizer=sgd_with(0.1)).fit(Growth(), data)
    assert not torch.equal(other.last_weights["k"], result.last_weights["k"])


def test_one_optimizer_may_train_a_bare_parameter_alone_and_a_phase_may_freeze_it() -> None:
    data, before = {"x": torch.linspace(0, 1, 8)[:, None]}, Growth().state_dict()
    alone = weft.Trainer(epochs=2, progress=False, optimizer={"k": sgd_with(0.1)}).fit(Growth(), data).last_weights
    assert alone["k"] != before["k"] and torch.equal(alone["net.weight"], before["net.weight"])
    phases = [weft.Phase(epochs=2, freeze=["k"])]
    frozen = weft.Trainer(phases=phases, progress=False, optimizer=sgd_with(0.1)).fit(Growth(), data).last_weights
    assert frozen["k"] == before["k"] and not torch.equal(frozen["net.weight"], before["net.weight"])
    with pytest.raises(ValueError, match=r"no node or submodule 'kk'; did you mean 'k'"):
        weft.Trainer(progress=False, optimizer={"net": sgd_with(0.1), "kk": sgd_with(0.1)}).fit(Growth(), data)


# ---- runs that were refused

REFUSED: dict[str, dict[str, Any]] = {
    "logger": {"loggers": "tensorbord"},
    "hook": {"loggers": "csv", "hooks": {"on_fit_start": lambda t: None}, "optimizer": 3},
    "optimizer": {"checkpoint": True, "optimizer": {"nett": sgd_with(0.1), "net": sgd_with(0.1)}},
    "no data": {"checkpoint": True},
    "one-shot data": {"checkpoint": True},
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("name", [None, "a"])
def test_a_refused_fit_leaves_no_folder(
    case: str, name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = {"x": torch.ones(4, 1)}
    given = {"no data": None, "one-shot data": iter([data])}.get(case, data)
    trainer = weft.Trainer(epochs=1, progress=False, run_name=name, **REFUSED[case])
    with pytest.raises((TypeError, ValueError)):
        trainer.fit(Growth(), given)
    assert os.listdir(tmp_path) == []
    weft.Trainer(epochs=1, progress=False, run_name=name, checkpoint=True).fit(Growth(), data)
    assert len(os.listdir(tmp_path / "runs")) == 1


def files_below(folder: Path) -> list[Path]:
    """All but who owned the folder."""
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if FOLDER not in p.parts)


def test_a_refused_fit_leaves_the_run_of_its_name_where_it_is(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "epochs": 1,
        "progress": False,
        "root_dir": str(tmp_path),
        "run_name": "a",
        "checkpoint": True,
    }
    data = {"x": torch.ones(4, 1)}
    weft.Trainer(**options).fit(Growth(), data)
    before = files_below(tmp_path)
    with pytest.raises(TypeError):
        weft.Trainer(**options, optimizer=3).fit(Growth(), data)
    assert files_below(tmp_path) == before
    weft.Trainer(**options).fit(Growth(), data)
    assert (tmp_path / "a" / "old" / "1" / "metrics.csv").is_file()  # one that begins moves it


def test_epochs_of_a_fit_train_so_many_more() -> None:
    trainer, problem, data = weft.Trainer(epochs=2, progress=False), Growth(), {"x": torch.ones(4, 1)}
    trainer.fit(problem, data)
    assert trainer.fit(problem, data, epochs=5).epochs == 7


def test_a_scalar_with_a_gradient_is_logged_at_the_end_of_an_epoch() -> None:
    hooks = {"on_epoch_end": lambda t, m: t.log("size", t.problem.k * 2)}
    result = weft.Trainer(epochs=1, progress=False, hooks=hooks).fit(problem := Growth(), {"x": torch.ones(4, 1)})
    assert result.history["size"] == [pytest.approx(2 * problem.k.item())]
