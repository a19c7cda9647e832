"""Tensors that plain functions use go where the run is, and come back. The device "meta" stands in for a GPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.problem.hardcoded import constants_of, constants_on, misplaced
from weft.step.explaining import explained

META = torch.device("meta")
A = torch.tensor([[1.2, 1.0], [0.0, 1.0]])
TABLE = {"B": torch.ones(2, 2)}


def helper(x: Tensor) -> Tensor:
    return x @ A.T


def uses_module(x: Tensor) -> Tensor:
    return helper(x) @ TABLE["B"]


class Plant:
    """An object with tensors of its own; not a torch module."""

    def __init__(self) -> None:
        self.C = torch.eye(2)

    def step(self, x: Tensor) -> Tensor:
        return x @ self.C

    def __call__(self, x: Tensor) -> Tensor:
        return self.step(x)


class WithConstants(nn.Module):
    """A torch module with a plain attribute, a buffer, and a constant of this file."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = torch.ones(2)
        self.register_buffer("known", torch.ones(2))
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) @ A + self.plain + self.known


def closure() -> Any:
    D = torch.full((2, 2), 2.0)
    return lambda x: [row @ D for row in x]


def with_defaults(x: Tensor, E: Tensor = torch.ones(2), *, F: Tensor = torch.ones(2)) -> Tensor:  # noqa: B008
    return x * E + F


def multiply(G: Tensor, x: Tensor) -> Tensor:
    return x @ G


CASES = {
    "globals, also of a function that is called": (uses_module, {"A", "TABLE['B']"}),
    "a closure": (closure(), {"D"}),
    "defaults": (with_defaults, {"default 0", "F"}),
    "a bound method": (Plant().step, {"self.C"}),
    "an object that is called": (Plant(), {"fn.C"}),
    "a partial": (partial(multiply, x=None, G=torch.ones(2, 2)), {"G"}),
    "a module": (WithConstants(), {"plain", "A"}),
}


@pytest.mark.parametrize(("function", "names"), CASES.values(), ids=CASES.keys())
def test_constants_of_a_function_are_found_moved_and_put_back(function: Any, names: set[str]) -> None:
    node = nn.Module()
    node.name = "plant"  # type: ignore[assignment]
    node.fn = function
    before = {c.name: c.value for c in constants_of(node)}
    assert set(before) == names
    with constants_on(node, META, torch.float64):
        inside = {c.name: c.value for c in constants_of(node)}
        assert {c.device.type for c in inside.values()} == {"meta"} and {c.dtype for c in inside.values()} == {
            torch.float64
        }
    assert all(c.value is before[c.name] for c in constants_of(node))


def test_a_function_with_moved_constants_computes_on_the_other_device() -> None:
    node = weft.Node(uses_module, ["x"], ["y"], name="plant")
    x = {"x": torch.ones(3, 2, device=META)}
    with constants_on(node, META):
        assert A.device == META and node(x)["y"].device == META
    assert A.device.type == "cpu" and node({"x": torch.ones(3, 2)})["y"].device.type == "cpu"


def test_a_tensor_in_two_places_stays_one_and_what_was_put_there_meanwhile_stays() -> None:
    shared = torch.ones(2)
    first, second = Plant(), Plant()
    first.C = second.C = shared
    problem = nn.ModuleList([weft.Node(first.step, ["x"], ["y"]), weft.Node(second.step, ["y"], ["z"])])
    with constants_on(problem, META):
        assert first.C is second.C is not shared
        second.C = own = torch.zeros(2)
    assert first.C is shared and second.C is own


def test_an_error_says_which_node_uses_which_constant_where() -> None:
    node = weft.Node(uses_module, ["x"], ["y"], name="plant")
    assert misplaced(node, META) == ["node 'plant' uses A on cpu", "node 'plant' uses TABLE['B'] on cpu"]
    assert misplaced(node, torch.device("cpu")) == []


def test_a_tensor_that_a_function_makes_anew_is_what_the_error_speaks_of_where_no_constant_is_misplaced() -> None:
    error = RuntimeError("Expected all tensors to be on the same device, but found at least two, cuda:0 and cpu!")
    told = explained(error, {}, nn.Linear(2, 2, device=META))
    assert told is not None and str(told).startswith(str(error)) and "make it once outside of the function" in str(told)
    assert explained(error, {}, nn.Linear(2, 2)) is None  # on the CPU it is something else


def test_in_float64_a_plant_with_float32_matrices_trains() -> None:
    net = weft.Node(nn.Linear(2, 2), ["x"], ["u"], name="policy")
    problem = weft.Problem(
        [net, weft.Node(helper, ["u"], ["y"], name="plant")], [weft.objective(lambda y: y.square(), name="f")]
    )
    trainer = weft.Trainer(epochs=2, precision="64-true", progress=False, accelerator="cpu")
    result = trainer.fit(problem, {"x": torch.rand(8, 2)})
    assert len(result.history["train_loss"]) == 2 and A.dtype == torch.float32
