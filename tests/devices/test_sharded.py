"""A problem in shards trains as a whole one does."""

from __future__ import annotations

import contextlib
import copy
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

import weft
from tests.helpers.bitwise import same
from tests.helpers.patience import patience
from tests.helpers.problems import adam, points
from tests.helpers.shards import (
    assert_same_end,
    in_shards,
    in_two,
    options,
    shard_all,
    shard_net,
    split_and_shard,
    split_layers,
    start,
    state,
    train,
)
from weft.hooks.averaging import EMA
from weft.hooks.gradients import GradientNorms

# ---- the same result


@pytest.mark.parametrize(
    ("parallelize", "rows", "changed"),
    [
        (shard_net, 51, {}),  # the last batch has 3 rows: one here, two there
        (shard_net, 49, {"clip": 0.1, "accumulate": 2}),  # 1 row: none here, one there
        (shard_net, 51, {"clip": 0.01, "clip_algorithm": "value"}),
        (shard_all, 49, {}),
        (shard_all, 51, {"clip": 0.1}),
    ],
    ids=["uneven", "clipped by norm, empty share", "clipped by value", "all, empty share", "all, clipped"],
)
def test_two_processes_in_shards_end_where_one_does_with_doubled_batches(
    parallelize: Callable, rows: int, changed: dict[str, Any]
) -> None:
    two = in_two(train, in_shards(parallelize, **changed), rows)
    one = train(options(**changed), rows, batch=16)
    assert_same_end(one, two[0])
    assert_same_end(one, two[1])
    other = train(options(**changed), rows, batch=8)
    with pytest.raises(AssertionError):
        assert_same_end(other, two[0])


def test_averaged_weights_are_averages_of_shards() -> None:
    def fit(given: dict[str, Any], batch: int) -> Any:
        return train(given | {"hooks": EMA(0.9)}, 51, batch)

    one = fit(options(), 16)
    assert_same_end(one, in_two(fit, in_shards(), 8)[0])
    with pytest.raises(AssertionError):
        assert_same_end(one, train(options(), batch=16))


class Derivative(nn.Module):
    """u'' + c u = y, learned from the residual."""

    grad_inference = True

    def __init__(self, scalar: bool) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.ones(() if scalar else 1, dtype=torch.float64))
        self.net = nn.Sequential(nn.Linear(2, 7), nn.Tanh(), nn.Linear(7, 1)).double()

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        x = batch["x"].clone().requires_grad_(True)
        u = self.net(x)
        du = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
        ddu = torch.autograd.grad(du[:, 0].sum(), x, create_graph=True)[0]
        return {f"{batch['name']}_loss": (ddu[:, :1] + self.c * u - x[:, 1:]).square().mean()}


def solve_derivative(given: dict[str, Any], batch: int, scalar: bool = False) -> Any:
    torch.manual_seed(0)
    problem = Derivative(scalar)
    result = weft.Trainer(**given).fit(problem, weft.Data(points(51), points(13, 1), batch_size=batch))
    return state(problem), result


@pytest.mark.parametrize("how", ["by hand", "fsdp"])
def test_a_loss_of_derivatives_trains_where_the_problem_is_sharded_as_a_whole(how: str) -> None:
    given = in_shards(shard_all) if how == "by hand" else options(strategy="fsdp", devices=2, timeout=patience())
    scalar = how == "fsdp"  # a single number cannot be sharded, and stays whole
    assert_same_end(solve_derivative(options(), 16, scalar), in_two(solve_derivative, given, 8, scalar)[0])


def test_a_loss_of_derivatives_of_a_sharded_block_is_an_error_that_says_what_to_do() -> None:
    def explained() -> str:
        with pytest.raises(RuntimeError) as error:
            solve_derivative(in_shards(shard_net), 8)
        return " ".join(error.value.__notes__)

    assert all("Shard the problem as a whole: fully_shard(problem" in told for told in in_two(explained))


def test_norms_of_gradients_are_those_of_all_shards() -> None:
    def fit(given: dict[str, Any], batch: int) -> Any:
        return train(given | {"hooks": GradientNorms()}, 51, batch)

    one = fit(options(), 16)
    assert "grad_norm" in one[1].history
    assert_same_end(one, in_two(fit, in_shards(), 8)[0])


def call_layers_often(given: dict[str, Any], batch: int) -> Any:
    """A closed loop, in which each layer of a policy is called ten times before backward."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    loop = [
        weft.Node(net, ["x"], ["u"], name="policy"),
        weft.Node(lambda x, u: 1.1 * x + 0.5 * u, ["x", "u"], ["x"], name="plant"),
    ]
    problem = weft.Problem([weft.Rollout(loop, steps=10)], objectives=[weft.objective(lambda x: x**2, name="f")])
    data = weft.Data({"x": points(51)["x"][:, None, :1]}, {"x": points(13, 1)["x"][:, None, :1]}, batch_size=batch)
    result = weft.Trainer(**given).fit(problem, data)
    return state(problem), result


def shard_layers(problem: Any, mesh: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for layer in [module for module in problem.modules() if isinstance(module, nn.Linear)]:
        fully_shard(layer, mesh=mesh["data_parallel"])
    return problem


def test_a_layer_in_shards_may_be_called_often() -> None:
    assert_same_end(call_layers_often(options(), 16), in_two(call_layers_often, in_shards(shard_layers), 8)[0])


def test_processes_that_split_the_layers_end_where_one_does() -> None:
    two = in_two(train, in_shards(split_layers, data=1, clip=0.1), 51, 8, 8)
    one = train(options(clip=0.1), width=8)
    assert_same_end(one, two[0])
    with pytest.raises(AssertionError):
        assert_same_end(train(options(clip=0.2), width=8), two[0])


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")  # of torch 2.13: in-place operations on views
def test_four_processes_that_split_layers_and_shard_the_pieces_end_where_one_does_and_are_resumed(
    tmp_path: Path,
) -> None:
    def run(given: dict[str, Any], resume: str | None = None) -> Any:
        folder = {
            "root_dir": str(tmp_path),
            "run_name": "run",
            "checkpoint": {"every_n_epochs": 1, "keep": 9},
            "resume": resume,
        }
        return train({**given, **folder}, 51, 8, 8)

    given = in_shards(split_and_shard, data=2, world=4, clip=0.1)
    four = in_two(run, given, world=4)
    assert_same_end(train(options(clip=0.1), 51, 16, 8), four[3])
    again = in_two(run, given, str(tmp_path / "run" / "checkpoints" / "step-000000004.ckpt"), world=4)
    assert same(again[0][0], four[0][0]) and same(dict(again[0][1].last_weights), dict(four[0][1].last_weights))


@pytest.mark.parametrize("kind", ["FULL_SHARD", "SHARD_GRAD_OP"])
def test_fsdp_shards_the_nodes_of_a_problem(kind: str) -> None:
    def fit(strategy: Any, devices: int, batch: int) -> tuple[Any, ...]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        node = weft.Node(net, ["x"], ["y"], name="net")
        problem = weft.Problem(
            [node], objectives=[weft.objective(lambda y, x: (y - x.sum(1, keepdim=True)) ** 2, name="f")]
        )
        sharded = []
        hooks = {"on_fit_start": lambda trainer: sharded.extend(hasattr(p, "to_local") for p in problem.parameters())}
        trainer = weft.Trainer(**options(strategy=strategy, devices=devices, hooks=hooks))
        data = weft.Data(points(51), points(13, 1), test=points(9, 2), predict=points(5, 3), batch_size=batch)
        result = trainer.fit(problem, data)
        return (state(problem), result), sharded, trainer.predict(), trainer.test(), trainer.validate()

    told = in_two(lambda: fit(FSDPStrategy(sharding_strategy=kind), 2, 8))
    one = fit("auto", 1, 16)
    for two in told:
        assert_same_end(one[0], two[0])
        assert one[1] == [False] * 4 and two[1] == [True] * 4
        torch.testing.assert_close(two[2], one[2], rtol=0, atol=1e-10)
        assert two[3] == pytest.approx(one[3]) and two[4] == pytest.approx(one[4])


SCRIPT = """
import json, sys
sys.path.insert(0, ROOT)
import torch
from tests.helpers.shards import options, train

weights, result = train(options(strategy="fsdp", devices=2, timeout=600, accelerator=ACCELERATOR))
if not torch.distributed.get_rank():
    torch.save({**weights}, sys.argv[1])
"""


def weights_by_script(folder: Path, accelerator: str) -> dict[str, Tensor]:
    """What a plain script, which starts its second process itself, ends with."""
    root, source = Path(__file__).parents[2], Path(weft.__file__).parents[1]
    (folder / "script.py").write_text(SCRIPT.replace("ROOT", repr(str(root))).replace("ACCELERATOR", repr(accelerator)))
    command = [sys.executable, str(folder / "script.py"), str(folder / "weights")]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        timeout=patience(),
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return torch.load(folder / "weights", weights_only=True)


def test_a_plain_script_with_strategy_fsdp_ends_where_one_process_does(tmp_path: Path) -> None:
    one = train(options(), batch=16)[0]
    for name, value in weights_by_script(tmp_path, "cpu").items():
        torch.testing.assert_close(value, one[name], rtol=0, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_in_shards_end_where_one_process_does(tmp_path: Path) -> None:
    one = train(options(), batch=16)[0]
    for name, value in weights_by_script(tmp_path, "gpu").items():
        assert value.device.type == "cpu"
        torch.testing.assert_close(value, one[name], rtol=0, atol=1e-10)


# ---- steps of your own, checks


def test_a_loop_and_an_update_of_your_own_train_in_shards_as_in_one_process() -> None:
    class Own(weft.Trainer):
        def update(self, batch: Any) -> Any:
            loss = self.problem(batch)["train_loss"]
            self.backward(loss)
            self.step()
            return loss

    def fit(kind: str, options: dict[str, Any], batch: int) -> dict[str, Tensor]:
        problem, data = start(), weft.Data(points(49), batch_size=batch)
        if kind == "update":
            Own(**options).fit(problem, data)
            return state(problem)
        with weft.Trainer(**options).start(problem, data) as run:
            for _ in run.epochs():
                for part in run.batches("train"):
                    run.backward(problem(part)["train_loss"])
                    run.step()
        return state(problem)

    for kind in ("update", "loop"):
        one = fit(kind, options(), 16)
        for two in in_two(fit, kind, in_shards(), 8):
            for name, value in one.items():
                torch.testing.assert_close(two[name], value, rtol=0, atol=1e-10)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_gradient_that_is_not_finite_in_one_shard_stops_all_processes(clip: float | None) -> None:
    def fit() -> tuple[str, dict[str, Tensor]]:
        problem = start()

        def spoil(trainer: Any, optimizer: Any) -> None:
            if torch.distributed.get_rank() == 1 and trainer.global_step == 2:
                problem.net[0].weight.grad.to_local()[0, 0] = torch.inf

        trainer = weft.Trainer(**in_shards(clip=clip, on_nonfinite="stop", hooks={"on_before_optimizer_step": spoil}))
        with pytest.warns(UserWarning, match="not finite") if os.environ["RANK"] == "0" else contextlib.nullcontext():
            result = trainer.fit(problem, weft.Data(points(49), batch_size=8))
        return result.stop_reason, result.steps, state(problem)

    told = in_two(fit)
    for reason, steps, weights in told:
        assert (reason, steps) == ("nonfinite", 3)
        assert all(value.isfinite().all() for value in weights.values())


def test_a_lit_trainer_writes_whole_weights(tmp_path: Path) -> None:
    def fit() -> dict[str, Tensor]:
        problem = start()
        given = {name: value for name, value in in_shards().items() if name in ("devices", "strategy", "accelerator")}
        trainer = weft.LitTrainer(
            epochs=2, weight_path=str(tmp_path), weight_name="best", custom_optimizer=adam, **given
        )
        trainer.fit(problem, lambda: (points(51), points(13, 1), None, 8))
        return state(problem)

    told = in_two(fit)
    loaded = weft.load_weights(start(), tmp_path / "best.ckpt")
    for name, value in state(loaded).items():
        assert torch.equal(value, told[0][name]) and torch.equal(value, told[1][name])


def test_a_second_fit_and_an_evaluation_go_on_from_the_first() -> None:
    def fits(options: dict[str, Any], batch: int) -> Any:
        problem, trainer = start(), weft.Trainer(**options | {"epochs": 2})
        data = weft.Data(points(51), points(13, 1), predict=points(3), batch_size=batch)
        trainer.fit(problem, data)
        between = state(problem), trainer.predict()["y"], trainer.validate()
        other = trainer.validate(weft.Data(points(8), points(7, 2), batch_size=batch))
        result = trainer.fit(problem, data)
        copied = copy.deepcopy(problem)
        trainer.save_weights(f"weights-{batch}-{os.environ.get('RANK')}")
        return (state(problem), result), between, other, state(copied)

    one = fits(options(), 16)
    for rank, two in enumerate(in_two(fits, in_shards(), 8)):
        assert_same_end(one[0], two[0])
        torch.testing.assert_close(two[1], one[1], rtol=1e-9, atol=1e-10)
        assert two[2] == pytest.approx(one[2])
        loaded = weft.load_weights(start(3 + 4), f"weights-8-{rank}")
        for name, value in state(loaded).items():
            assert torch.equal(value, two[0][0][name]) and torch.equal(value, two[3][name])


# ---- what cannot be combined


def refused(
    changed: dict[str, Any], parallelize: Callable[..., Any] = shard_net, problem: nn.Module | None = None
) -> tuple[str, int]:
    """The error of a fit and the number of batches that it saw before."""
    steps: list[Any] = []
    given = in_shards(parallelize, hooks={"on_step_start": lambda trainer, batch: steps.append(1)})
    try:
        weft.Trainer(**given | changed).fit(problem or start(), weft.Data(points(16), batch_size=4))
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}", len(steps)
    return "", len(steps)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"compile": True}, "cannot be combined with compile=True; use compile=False"),
        ({"checkpoint": {"background": True}}, "checkpoints in the background; use background=False"),
        ({"optimizer": lambda params: torch.optim.LBFGS(params)}, "one optimizer that takes no closure, not .'LBFGS'"),
        ({"optimizer": {"net": adam, "": adam}}, "one optimizer that takes no closure, not .'Adam', 'Adam'"),
        ({"phases": [weft.Phase(epochs=1, freeze=["net"])], "epochs": 1}, r"Phase\(freeze=...\); set requires_grad"),
        ({"precision": "64-true"}, "does not support .*64-true"),
        ({"hooks": GradientNorms(terms=True)}, "no named terms|in shards"),
        ({"optimizer": None}, ""),
    ],
)
def test_what_cannot_go_with_shards_is_refused_before_the_first_step(changed: dict[str, Any], message: str) -> None:
    for told, steps in in_two(refused, changed):
        assert re.search(message, told) and (steps == 0) == bool(message), told


def test_shards_that_nobody_could_train_rightly_are_refused() -> None:
    def other(problem: Any, mesh: Any) -> Any:
        return copy.deepcopy(problem)

    for function, message in (
        (lambda problem, mesh: problem, "sharded no parameter of Fit; use strategy='ddp'"),
        (other, "returned another module"),
        (sharded_elsewhere, "unsharded over 'data_parallel'"),
    ):
        for told, steps in in_two(refused, {}, function):
            assert message in told and not steps, told


def sharded_elsewhere(problem: Any, mesh: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(problem, mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("mine",)))


@pytest.mark.parametrize("number", [5, 4], ids=["with one that stays whole", "all sharded"])
def test_an_optimizer_that_was_made_before_is_refused(number: int) -> None:
    def fit() -> tuple[str, int]:
        return refused({"optimizer": adam(list(problem.parameters())[-number:])}, problem=problem)

    problem = start()
    for told, steps in in_two(fit):
        assert re.search("[Pp]ass a function of the parameters", told) and not steps, told


@pytest.mark.parametrize("strategy", ["fsdp", ModelParallelStrategy(shard_net)], ids=["fsdp", "model parallel"])
def test_one_process_has_nobody_to_share_with(strategy: Any) -> None:
    trainer = weft.Trainer(strategy=strategy, devices=1, accelerator="cpu", progress=False)
    with pytest.raises(ValueError, match=r"one process \(devices=1\).*use strategy='auto'"):
        trainer.fit(start(), weft.Data(points(8), batch_size=4))
