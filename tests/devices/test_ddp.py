"""Two processes end where one does. They are forked from the test (`ddp_fork`), which costs half a second a fit."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, WeightedRandomSampler

import weft
from tests.helpers.bitwise import flat_weights
from tests.helpers.patience import patience
from tests.helpers.problems import points
from weft.checkpoint.archive import write as write_checkpoint
from weft.checkpoint.folder import load as load_checkpoint
from weft.data.shares import share
from weft.loggers.csv import read_rows
from weft.step.throughput import Throughput

F64 = "64-true"


class FlexibleFit(nn.Module):
    """A small network fitted to x0 x1 + sin(x1)."""

    def __init__(self, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        middle = [nn.BatchNorm1d(8)] if norm else []
        self.net = nn.Sequential(nn.Linear(2, 8), *middle, nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1))

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        x = batch["x"]
        y = self.net(x)
        loss = (y - x[:, :1] * x[:, 1:] - x[:, 1:].sin()).square().mean()
        return {f"{batch['name']}_loss": loss, f"{batch['name']}_size": x.square().mean(), "y": y}


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def fit_in_processes(
    processes: int, problem: nn.Module, data: Any, **options: Any
) -> tuple[weft.FitResult, weft.Trainer]:
    options = {
        "epochs": 3,
        "seed": 1,
        "precision": F64,
        "progress": False,
        "accelerator": "cpu",
    } | options
    several = {"devices": processes, "strategy": "ddp_fork", "timeout": patience()} if processes > 1 else {}
    trainer = weft.Trainer(**options, **several)
    return trainer.fit(problem, data), trainer


def one_and_two(
    make: Callable[[], nn.Module] = FlexibleFit, rows: int = 51, batch: int = 8, dev: int = 13, **options: Any
) -> tuple[tuple[nn.Module, weft.FitResult], tuple[nn.Module, weft.FitResult]]:
    """The same fit in one process with doubled batches, and in two."""
    ended = []
    torch.manual_seed(0)
    start = make()
    for processes in (1, 2):
        problem = copy.deepcopy(start)
        data = weft.Data(points(rows), points(dev, 1), batch_size=batch * 2 // processes)
        ended.append((problem, fit_in_processes(processes, problem, data, **options)[0]))
    return ended[0], ended[1]


def assert_equal_fits(one: tuple[nn.Module, weft.FitResult], two: tuple[nn.Module, weft.FitResult]) -> None:
    torch.testing.assert_close(flat_weights(two[0]), flat_weights(one[0]), rtol=0, atol=1e-10)
    assert two[1].history.keys() == one[1].history.keys()
    for name, values in one[1].history.items():
        assert two[1].history[name] == pytest.approx(values, rel=1e-10), name
    assert (one[1].steps, one[1].epochs, one[1].best_epoch) == (two[1].steps, two[1].epochs, two[1].best_epoch)


# ---- the same result


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (51, {}),  # the last batch has 3 rows: one here, two there
        (
            49,
            {"optimizer": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9)},
        ),  # 1 row: none here, one there
        (49, {"accumulate": 2, "clip": 0.1}),
        (
            51,
            {
                "optimizer": lambda params: torch.optim.LBFGS(params, line_search_fn="strong_wolfe", max_iter=5),
                "epochs": 2,
            },
        ),
        (
            33,
            {
                "scheduler": lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
                "patience": 2,
            },
        ),
    ],
    ids=["adam", "empty share", "accumulated and clipped", "lbfgs", "plateau and patience"],
)
def test_two_processes_end_where_one_does_with_doubled_batches(rows: int, options: dict[str, Any]) -> None:
    assert_equal_fits(*one_and_two(rows=rows, **options))


def test_the_comparison_of_ends_can_fail() -> None:
    one, _ = one_and_two(epochs=1)
    problem = copy.deepcopy(one[0])
    other = fit_in_processes(1, problem, weft.Data(points(51), points(13, 1), batch_size=8), epochs=1)[0]
    with pytest.raises(AssertionError):
        assert_equal_fits(one, (problem, other))


def test_several_optimizers_and_updates_of_your_own_work_in_two_processes() -> None:
    class Two(FlexibleFit):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(2, 1)

        def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
            out, y = super().forward(batch), self.other(batch["x"])
            return {"net": out[f"{batch['name']}_loss"], "other": (y - out["y"]).abs().mean(), "dev_loss": y.mean()}

    optimizers = {
        "net": lambda params: torch.optim.Adam(params, lr=1e-2),
        "other": lambda params: torch.optim.SGD(params, lr=1e-2),
    }
    assert_equal_fits(*one_and_two(Two, optimizer=optimizers))

    class Alternating(weft.Trainer):
        def update(self, batch: Any) -> dict[str, Tensor]:
            for name in ("net", "other"):
                out = self.problem(batch)
                self.backward(out[name], inputs=list(getattr(self.problem, name).parameters()))
                self.step(name)
            return {"train_loss": out["net"].detach()}

    ends = []
    for processes in (1, 2):
        torch.manual_seed(0)
        problem = Two().double()
        trainer = Alternating(
            epochs=2,
            optimizer=optimizers,
            precision=F64,
            seed=1,
            progress=False,
            devices=processes,
            accelerator="cpu",
            **({"strategy": "ddp_fork", "timeout": patience()} if processes > 1 else {}),
        )
        trainer.fit(problem, weft.Data(points(49), batch_size=16 // processes))
        ends.append(flat_weights(problem))
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-10)


def slow(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05)


class Alone(weft.AugmentedLagrangian):
    """Tells nobody what it has seen."""

    def _share_values(self, processes: Any) -> None:
        pass


def constrained(loss: type[weft.AugmentedLagrangian] = weft.AugmentedLagrangian) -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    return weft.Problem(
        [weft.Node(net, ["x"], ["y"], name="net")],
        objectives=[weft.objective(lambda x, y: ((y - x) ** 2).sum(1), name="near")],
        constraints=[
            weft.equal(lambda y: y.sum(1), 0.3, name="sum"),
            weft.less_equal(lambda y: y[:, :1], lambda x: x[:, 1:], name="below"),
        ],
        loss=loss(mu=2.0, every=2),
    )


@pytest.mark.parametrize("rows", [51, 49])
def test_multipliers_of_an_augmented_lagrangian_are_those_of_one_process(rows: int) -> None:
    one, two = one_and_two(constrained, rows=rows, epochs=7, optimizer=slow)
    assert_equal_fits(one, two)
    for name in ("mu", "violation", "multipliers"):
        found, expected = getattr(two[0].loss, name), getattr(one[0].loss, name)
        assert expected.shape[0] == rows and expected.abs().sum() > 0
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    if rows == 51:
        with pytest.raises((AssertionError, RuntimeError)):
            assert_equal_fits(one, one_and_two(lambda: constrained(Alone), rows=rows, epochs=7, optimizer=slow)[1])


def test_an_augmented_lagrangian_in_two_processes_is_resumed_bitwise_within_an_epoch(tmp_path: Path) -> None:
    def run(resume: str | None, folder: str) -> tuple[Tensor, dict[str, Any]]:
        torch.manual_seed(0)
        problem = constrained()
        options = {
            "epochs": 6,
            "checkpoint": {"every_n_steps": 3, "keep": 99},
            "root_dir": str(tmp_path),
            "run_name": folder,
        }
        result, _ = fit_in_processes(
            2, problem, weft.Data(points(51), points(13, 1), batch_size=8), resume=resume, **options
        )
        return flat_weights(problem), {name: value for name, value in result.last_weights.items() if "loss" in name}

    straight = run(None, "run")
    path = tmp_path / "run" / "checkpoints" / "step-000000009.ckpt"
    state = load_checkpoint(path)[0]
    assert (state["progress"]["epoch"], state["progress"]["batch"]) == (2, 1)
    seen = [state["own_buffers"]["loss.newest"], state["other_processes"][0]["own_buffers"]["loss.newest"]]
    assert [int(s.sum()) for s in seen] == [8, 8] and not (seen[0] * seen[1]).any()
    resumed = run(str(path), "run")
    assert torch.equal(resumed[0], straight[0])
    for name, value in straight[1].items():
        assert torch.equal(resumed[1][name].nan_to_num(), value.nan_to_num()), name


def test_a_parameter_that_no_process_uses_keeps_no_gradient() -> None:
    class Spare(FlexibleFit):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Parameter(torch.ones(3))

    one, two = one_and_two(Spare, optimizer=lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.5))
    assert_equal_fits(one, two)
    assert torch.equal(two[0].spare.detach(), torch.ones(3, dtype=torch.float64))  # type: ignore[union-attr]


def test_batches_of_parts_of_uneven_sizes_give_the_same_result() -> None:
    class Parts(FlexibleFit):
        def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
            inside = super().forward({**batch["interior"], "name": "x"})["x_loss"]
            return {f"{batch['name']}_loss": inside + self.net(batch["boundary"]["x"]).square().mean()}

    torch.manual_seed(0)
    start, ends = Parts(), []
    for processes in (1, 2):
        problem, size = copy.deepcopy(start), 8 // processes
        train = {"interior": weft.DictDataset(points(26)), "boundary": weft.DictDataset(points(5, 1))}
        data = weft.Data(train, batch_size={"train": {"interior": size, "boundary": None}})
        result, _ = fit_in_processes(processes, problem, data, monitor_metric="train_loss")
        ends.append((problem, result))
    assert_equal_fits(*ends)


def test_running_means_of_a_norm_layer_are_alike_in_all_processes(tmp_path: Path) -> None:
    def keep(trainer: weft.Trainer, result: Any) -> None:
        torch.save(trainer.problem.state_dict(), tmp_path / f"{local_rank()}.pt")

    data = weft.Data(points(32), points(8, 1), batch_size=8)
    problem = FlexibleFit(norm=True)
    fit_in_processes(2, problem, data, hooks={"on_fit_end": keep})
    mine, theirs = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert not torch.equal(mine["net.1.running_mean"], torch.zeros(8, dtype=torch.float64))
    assert torch.equal(problem.state_dict()["net.1.running_mean"], mine["net.1.running_mean"])


# ---- who sees what


def seen(tmp_path: Path, name: str = "seen") -> list[list[Any]]:
    return [torch.load(tmp_path / f"{name}{r}.pt", weights_only=True) for r in (0, 1)]


def recorder(tmp_path: Path, record: Callable[[weft.Trainer, Any], Any], name: str = "seen") -> dict[str, Callable]:
    told: list[Any] = []
    return {
        "on_step_start": lambda trainer, batch: told.append(record(trainer, batch)),
        "on_fit_end": lambda trainer, result: torch.save(told, tmp_path / f"{name}{local_rank()}.pt"),
    }


def test_each_row_is_used_once_an_epoch_in_an_order_that_does_not_depend_on_the_number_of_processes(
    tmp_path: Path,
) -> None:
    single: list[list[int]] = []
    data = weft.Data(points(23), batch_size=8)
    fit_in_processes(
        1, FlexibleFit(), data, hooks={"on_step_start": lambda trainer, batch: single.append(batch["index"].tolist())}
    )
    hooks = recorder(tmp_path, lambda trainer, batch: batch["index"].tolist())
    fit_in_processes(2, FlexibleFit(), weft.Data(points(23), batch_size=4), hooks=hooks)
    both = [a + b for a, b in zip(*seen(tmp_path), strict=True)]
    assert both == single
    assert sorted(row for rows in both[:3] for row in rows) == list(range(23)) and both[:3] != both[3:6]


@pytest.mark.parametrize(("rows", "world"), [(7, 2), (1, 4), (64, 3), (0, 2)])
def test_shares_are_as_even_as_can_be_and_leave_no_row_out(rows: int, world: int) -> None:
    shares = [list(range(rows))[share(rows, r, world)] for r in range(world)]
    assert [row for part in shares for row in part] == list(range(rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


class Rows(Dataset):
    def __init__(self, rows: int) -> None:
        self.x = points(rows)["x"]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": self.x[i], "row": torch.tensor(i)}


@pytest.mark.parametrize("kind", ["dataset", "loader"])
def test_datasets_and_loaders_are_shared_out_too(tmp_path: Path, kind: str) -> None:
    train = Rows(17) if kind == "dataset" else DataLoader(Rows(17), batch_size=4, shuffle=True)
    data = weft.Data(train, batch_size=4) if kind == "dataset" else train
    hooks = recorder(tmp_path, lambda trainer, batch: batch["row"].tolist())
    result, _ = fit_in_processes(2, FlexibleFit(), data, hooks=hooks, epochs=2)
    both = [a + b for a, b in zip(*seen(tmp_path), strict=True)]
    assert [len(b) for b in both] == [8, 8, 1] * 2 and result.steps == 6
    assert sorted(row for rows in both[:3] for row in rows) == list(range(17)) and both[:3] != both[3:]


class FiniteStream(IterableDataset):
    def __iter__(self) -> Any:
        return iter([{"x": row} for row in points(8)["x"]])


@pytest.mark.parametrize(
    ("data", "word"),
    [
        ([{**points(4)}], "list"),
        (DataLoader(FiniteStream(), batch_size=4), "iterable"),
        (DataLoader(Rows(8), batch_size=4, sampler=WeightedRandomSampler([1.0] * 8, 8)), "WeightedRandomSampler"),
        (DataLoader(Rows(8), batch_sampler=[[0, 1], [2, 3]]), "list"),
    ],
    ids=["list", "stream", "sampler", "batch sampler"],
)
def test_data_that_cannot_be_divided_is_refused(data: Any, word: str) -> None:
    with pytest.raises(TypeError, match=f"{word}.*Pass a dataset"):
        fit_in_processes(2, FlexibleFit(), data)


def test_random_numbers_of_steps_differ_between_processes_and_those_of_the_data_setup_do_not(tmp_path: Path) -> None:
    def setup() -> tuple[Any, ...]:
        x = torch.rand(16, 2)
        torch.save(x, tmp_path / f"data{local_rank()}.pt")
        return {"x": x}, None, None, 4

    fit_in_processes(
        2,
        FlexibleFit(),
        setup,
        hooks=recorder(tmp_path, lambda trainer, batch: torch.rand(2).tolist()),
        precision="32-true",
    )
    mine, theirs = seen(tmp_path)
    assert all(a != b for a, b in zip(mine, theirs, strict=True))
    data = [torch.load(tmp_path / f"data{r}.pt", weights_only=True) for r in (0, 1)]
    assert torch.equal(*data)


def test_without_a_seed_the_order_is_that_of_the_first_process() -> None:
    torch.manual_seed(77)
    result, _ = fit_in_processes(2, FlexibleFit(), weft.Data(points(16), batch_size=4), seed=None, epochs=1)
    assert result.seed == 77


def test_weights_that_were_initialised_differently_become_those_of_the_first_process(tmp_path: Path) -> None:
    class Different(weft.Trainer):
        def start(self, problem: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if local_rank() == 1:
                torch.manual_seed(99)
                problem.net[0].reset_parameters()  # type: ignore[union-attr]
            return super().start(problem, *args, **kwargs)

    torch.manual_seed(0)
    problem = FlexibleFit()
    before = flat_weights(problem)
    trainer = Different(
        epochs=1,
        devices=2,
        strategy="ddp_fork",
        accelerator="cpu",
        progress=False,
        timeout=patience(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.0),
    )
    trainer.fit(problem, {"x": points(8)["x"].float()})
    assert torch.equal(flat_weights(problem), before)


# ---- numbers and means


def test_means_over_samples_are_exact_where_shares_are_uneven() -> None:
    class Value(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(()))

        def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
            return {f"{batch['name']}_loss": self.w * 0 + batch["v"].mean()}

    v = torch.tensor([1.0, 2.0, 4.0, 8.0, 95.0])  # their mean is 22; with two rows padded it would be 18.5
    _, trainer = fit_in_processes(2, Value(), weft.Data({"v": v}, {"v": v}, {"v": v[:1]}, batch_size=2), epochs=1)
    assert trainer.run is not None
    assert trainer.run.history.values == {"train_loss": [22.0], "dev_loss": [22.0]}
    assert trainer.validate() == {"dev_loss": 22.0}
    assert trainer.test() == {"test_loss": 1.0}  # one row: the first process has none


def test_predictions_of_two_processes_come_in_the_order_of_the_data() -> None:
    problem = FlexibleFit()
    _, trainer = fit_in_processes(2, problem, weft.Data(points(16), batch_size=4), epochs=1)
    x = points(11, 5)
    with torch.no_grad():
        expected = problem({**x, "name": "train"})["y"]
    torch.testing.assert_close(trainer.predict(x)["y"], expected)


@pytest.mark.filterwarnings(
    "ignore:train_loss is nan in step 0 .epoch 0, rank 1", "ignore:'train_loss' does not appear"
)
@pytest.mark.parametrize("policy", ["raise", "skip", "stop"])
def test_a_number_that_is_not_finite_in_one_process_updates_nothing_in_any(policy: str) -> None:
    class Bad(FlexibleFit):
        def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
            out = super().forward(batch)
            return {**out, "train_loss": out["train_loss"] * float("nan")} if local_rank() == 1 else out

    problem = Bad()
    before = flat_weights(problem).double()
    options = {"on_nonfinite": policy, "epochs": 1}
    if policy == "raise":
        with pytest.raises(FloatingPointError, match="train_loss is nan in step 0 .epoch 0, rank 1"):
            fit_in_processes(2, problem, weft.Data(points(16), batch_size=4), **options)
    else:
        result, _ = fit_in_processes(2, problem, weft.Data(points(16), batch_size=4), **options)
        assert result.stop_reason == ("epochs" if policy == "skip" else "nonfinite")
    assert torch.equal(flat_weights(problem).double(), before)


# ---- ending together, coming back


def test_all_processes_stop_together_when_one_asks_to(tmp_path: Path) -> None:
    def stop(trainer: weft.Trainer, batch: Any, loss: Any) -> None:
        if local_rank() == 1 and trainer.global_step == 5:
            trainer.stop("enough")

    hooks = [recorder(tmp_path, lambda trainer, batch: trainer.global_step), {"on_step_end": stop}]
    result, trainer = fit_in_processes(2, FlexibleFit(), weft.Data(points(64), batch_size=4), hooks=hooks)
    assert (result.stop_reason, result.steps) == ("enough", 6)  # one step after it was asked for
    mine, theirs = seen(tmp_path)
    assert mine == theirs == list(range(6))
    assert trainer.run is not None and trainer.run.state.control.stop_reason == "enough"


def test_the_end_of_the_time_in_one_process_ends_all(tmp_path: Path) -> None:
    hooks = recorder(tmp_path, lambda trainer, batch: trainer.global_step)
    result, _ = fit_in_processes(
        2, FlexibleFit(), weft.Data(points(64), batch_size=4), hooks=hooks, max_time=0.2, epochs=10**6
    )
    assert result.stop_reason == "max_time" and result.steps > 0
    mine, theirs = seen(tmp_path)
    assert mine == theirs


def test_weights_history_result_and_state_are_back_in_the_calling_process() -> None:
    class Counter(weft.Hook):
        count = 0

        def on_step_end(self, trainer: Any, batch: Any, loss: Any) -> None:
            self.count += 1
            trainer.state["seen"] = self.count

        def state_dict(self) -> dict[str, int]:
            return {"count": self.count}

        def load_state_dict(self, state_dict: dict[str, int]) -> None:
            self.count = state_dict["count"]

    counter, problem = Counter(), FlexibleFit().double()
    before = flat_weights(problem)
    data = weft.Data(points(32), points(8, 1), batch_size=8)
    result, trainer = fit_in_processes(2, problem, data, hooks=counter)
    assert result is trainer.run.result and trainer.problem is problem  # type: ignore[union-attr]
    assert not torch.equal(flat_weights(problem), before) and len(result.history["dev_loss"]) == 3
    assert (counter.count, trainer.state, trainer.current_epoch, trainer.global_step) == (6, {"seen": 6}, 3, 6)
    assert torch.equal(result.last_weights["net.0.weight"], problem.state_dict()["net.0.weight"])
    assert result.history["dev_loss"][-1] == pytest.approx(trainer.validate()["dev_loss"], rel=1e-12)


def test_a_second_fit_goes_on_where_the_first_ended() -> None:
    torch.manual_seed(0)
    start, ends = FlexibleFit(dropout=0.3), []
    for epochs in ((4,), (2, 2)):
        problem = copy.deepcopy(start)
        data = weft.Data(points(32), batch_size=8)
        trainer = weft.Trainer(
            epochs=epochs[0],
            devices=2,
            strategy="ddp_fork",
            accelerator="cpu",
            seed=3,
            progress=False,
            precision=F64,
            timeout=patience(),
            monitor_metric="train_loss",
            monitor_mode="max",
        )
        for _ in epochs:
            result = trainer.fit(problem, data)
            problem.load_state_dict(result.last_weights)  # the best were put back
        ends.append((flat_weights(problem), result.history["train_loss"]))
    assert torch.equal(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1]


def test_an_error_of_one_process_is_raised_here_with_its_own_traceback() -> None:
    def step(trainer: weft.Trainer, batch: Any) -> Any:
        if local_rank() == 1 and trainer.global_step == 2:
            raise ZeroDivisionError("in the second process")
        return trainer.problem(batch)

    with pytest.raises(ZeroDivisionError, match="in the second process") as raised:
        fit_in_processes(2, FlexibleFit(), weft.Data(points(32), batch_size=4), training_step=step)
    assert "process 1" in raised.value.__notes__[0] and "in step" in raised.value.__notes__[0]
    result, _ = fit_in_processes(
        2, FlexibleFit(), weft.Data(points(8), batch_size=4), epochs=1
    )  # and the next fit works
    assert result.stop_reason == "epochs"


def test_a_loop_of_your_own_is_refused_where_processes_run_a_function() -> None:
    trainer = weft.Trainer(devices=2, strategy="ddp_fork", accelerator="cpu")
    with pytest.raises(TypeError, match="not with trainer.start"):
        trainer.start(FlexibleFit(), weft.Data(points(8)))


# ---- checkpoints


def test_two_processes_resume_to_the_same_bits_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    def run(name: str, problem: nn.Module, **options: Any) -> weft.FitResult:
        return fit_in_processes(
            2,
            problem,
            weft.Data(points(40), points(8, 1), batch_size=4),
            root_dir=str(tmp_path),
            run_name=name,
            checkpoint={"every_n_steps": 3, "keep": 50},
            epochs=3,
            **options,
        )[0]

    torch.manual_seed(0)
    start = FlexibleFit(dropout=0.4, norm=True)
    whole, resumed = copy.deepcopy(start), copy.deepcopy(start)
    first = run("whole", whole)
    path = tmp_path / "whole/checkpoints/step-000000009.ckpt"  # four batches into the second epoch of five
    second = run("again", resumed, resume=str(path))
    assert all(torch.equal(first.last_weights[k], second.last_weights[k]) for k in first.last_weights)
    assert first.history == second.history

    state, _ = load_checkpoint(path)
    state["other_processes"][0]["random"] = state["random"]  # the control: the second process draws as the first
    write_checkpoint(path, state)
    third = run("wrong", copy.deepcopy(start), resume=str(path))
    assert first.history["train_loss"] != third.history["train_loss"]


def test_the_folder_of_a_run_is_written_by_the_first_process_alone(tmp_path: Path) -> None:
    result, _ = fit_in_processes(
        2, FlexibleFit(), weft.Data(points(16), batch_size=4), root_dir=str(tmp_path), checkpoint=True, loggers="csv"
    )
    assert result.run_dir is not None and [p.name for p in tmp_path.iterdir()] == [result.run_dir.name]
    read = weft.load_result(result.run_dir)
    assert read.history["train_loss"] == pytest.approx(result.history["train_loss"], rel=1e-12)
    assert not list(result.run_dir.glob("**/.*.tmp"))


def test_throughput_is_reported_for_each_process_and_for_all(tmp_path: Path) -> None:
    options = {"root_dir": str(tmp_path), "run_name": "run", "loggers": "csv", "epochs": 1}
    fit_in_processes(2, FlexibleFit(), weft.Data(points(50), batch_size=4), **options)
    found = {row.name: row.value for row in read_rows(tmp_path / "run/metrics.csv")}
    for name in ("examples_per_second", "wait_seconds"):
        parts = [found[f"{name}/process_{r}"] for r in (0, 1)]
        assert found[name] == pytest.approx(sum(parts)) and min(parts) > 0


def test_time_spent_waiting_and_examples_are_counted() -> None:
    seconds = iter(range(100))
    throughput = Throughput(clock=lambda: float(next(seconds)))
    assert list(throughput.timed([torch.zeros(3, 1), torch.zeros(2, 1)])) != []
    assert (throughput.examples, throughput.waited, throughput.seconds) == (5, 2.0, 4.0)
    assert throughput.report(lambda own: [own]) == {"examples_per_second": 1.25, "wait_seconds": 2.0}
