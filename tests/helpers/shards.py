"""Two processes that hold a problem in shards: what they train, how they are started, how their ends are compared."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.strategies import ModelParallelStrategy
from torch import Tensor, nn

import weft
from tests.helpers.patience import patience
from tests.helpers.problems import adam, points


class Fit(nn.Module):
    """A small network in float64, with a scale of its own, fitted to x0 x1 + sin(x1)."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1)).double()
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        x = batch["x"]
        y = self.net(x) * self.scale.mean()
        loss = (y - x[:, :1] * x[:, 1:] - x[:, 1:].sin()).square().mean()
        return {f"{batch['name']}_loss": loss, f"{batch['name']}_size": x.square().mean(), "y": y}


def start(width: int = 7) -> Fit:
    torch.manual_seed(0)
    return Fit(width)


def shard_net(problem: Any, mesh: Any) -> Any:
    """Two layers sharded, the scale whole in each process."""
    from torch.distributed.fsdp import fully_shard

    for layer in (problem.net[0], problem.net[2]):
        fully_shard(layer, mesh=mesh["data_parallel"])
    return problem


def shard_all(problem: Any, mesh: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(problem, mesh=mesh["data_parallel"])


def split_layers(problem: Any, mesh: Any) -> Any:
    """Each layer's columns or rows in another process."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    return parallelize_module(
        problem, mesh["tensor_parallel"], {"net.0": ColwiseParallel(), "net.2": RowwiseParallel()}
    )


def split_and_shard(problem: Any, mesh: Any) -> Any:
    """Each layer in two processes, and these parts sharded over as many."""
    return shard_net(split_layers(problem, mesh), mesh)


def in_two(function: Callable[..., Any], *args: Any, world: int = 2) -> list[Any]:
    """What `function(*args)` returns in each of two processes (or more) that torchrun could have started.

    An error in one of them is raised here.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork, ranks = multiprocessing.get_context("fork"), range(world)
    children = [fork.Process(target=_child, args=(rank, world, port, function, args)) for rank in ranks]
    for child in children:
        child.start()
    for child in children:
        child.join(patience())
        if child.is_alive():
            child.kill()
            child.join()
    told = [pickle.loads(path.read_bytes()) for rank in ranks if (path := Path(f"told-{port}-{rank}")).exists()]
    errors = [(text, error) for error, text, _ in told if error is not None]
    if errors:
        text, error = next(((t, e) for t, e in errors if "LostProcess" not in t), errors[0])
        error.add_note(text)
        raise error
    assert len(told) == world, [child.exitcode for child in children]
    return [value for _, _, value in told]


def _child(rank: int, world: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "GROUP_RANK": "0",
    }
    torch.set_num_threads(1)
    try:
        told = (None, "", function(*args))
    except BaseException as error:  # noqa: BLE001, raised by the test
        try:
            told = (pickle.loads(pickle.dumps(error)), traceback.format_exc(), None)
        except Exception:  # noqa: BLE001, an exception that cannot travel
            told = (RuntimeError(str(error)), traceback.format_exc(), None)
    Path(f"told-{port}-{rank}").write_bytes(pickle.dumps(told))
    if torch.distributed.is_initialized() and told[0] is None:
        torch.distributed.barrier()
    os._exit(0)  # the parent's own exit handlers are not ours to run


def options(**changed: Any) -> dict[str, Any]:
    given = {"epochs": 3, "seed": 1, "progress": False, "accelerator": "cpu", "optimizer": adam}
    return given | changed


def in_shards(parallelize: Callable = shard_net, data: int = 2, world: int = 2, **changed: Any) -> dict[str, Any]:
    strategy = ModelParallelStrategy(parallelize, data_parallel_size=data, tensor_parallel_size=world // data)
    return options(devices=world, strategy=strategy, timeout=patience(), **changed)


def state(problem: nn.Module) -> dict[str, Tensor]:
    assert {type(v) for v in problem.state_dict().values()} == {Tensor}
    return {name: value.detach().clone() for name, value in problem.state_dict().items()}


def train(
    options: dict[str, Any], rows: int = 51, batch: int = 8, width: int = 7, **fit: Any
) -> tuple[dict[str, Tensor], weft.FitResult]:
    problem = start(width)
    result = weft.Trainer(**options).fit(problem, weft.Data(points(rows), points(13, 1), batch_size=batch), **fit)
    return state(problem), result


def assert_same_end(
    one: tuple[dict[str, Tensor], weft.FitResult], two: tuple[dict[str, Tensor], weft.FitResult]
) -> None:
    for name, value in one[0].items():
        torch.testing.assert_close(two[0][name], value, rtol=0, atol=1e-10)
        torch.testing.assert_close(two[1].last_weights[name], one[1].last_weights[name], rtol=0, atol=1e-10)
    assert two[1].history.keys() == one[1].history.keys()
    for name, values in one[1].history.items():
        assert two[1].history[name] == pytest.approx(values, rel=1e-10), name
    assert (one[1].steps, one[1].epochs, one[1].best_epoch) == (two[1].steps, two[1].epochs, two[1].best_epoch)
