"""A second fit of the same problem: on other data its best is its own; gradients and optimizers of others."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft


def problem_of(net: nn.Module, loss: Any) -> weft.Problem:
    return weft.Problem([weft.Node(net, ["x"], ["u"], name="net")], [weft.objective(loss, name="fit")])


def squared(u: Tensor, y: Tensor) -> Tensor:
    return (u - y) ** 2


def points_of_a_line(slope: float, offset: float = 0.0) -> dict[str, Tensor]:
    x = torch.linspace(0, 1, 32)[:, None]
    return {"x": x, "y": slope * x + offset}


def trainer(**options: Any) -> weft.Trainer:
    return weft.Trainer(
        **{"epochs": 20, "progress": False, "seed": 0, "optimizer": lambda q: torch.optim.SGD(q, lr=0.1)} | options
    )


@pytest.mark.parametrize("with_dev", [False, True])
def test_a_second_fit_on_other_data_keeps_what_it_learned(with_dev: bool) -> None:
    torch.manual_seed(0)
    net = nn.Linear(1, 1)
    problem, one = problem_of(net, squared), trainer()
    data = [
        weft.Data(d, d if with_dev else None, batch_size=8) for d in (points_of_a_line(1.0), points_of_a_line(3.0, 2.0))
    ]
    one.fit(problem, data[0])
    first = net.weight.detach().clone()
    with pytest.warns(UserWarning, match="data are others than in the fit before"):
        result = one.fit(problem, data[1])
    assert result.best_epoch is not None and result.best_epoch >= 20 and not torch.equal(first, net.weight)
    assert torch.equal(net.weight, result.last_weights["nodes.0.fn.weight"])  # it falls all the way


def test_a_second_fit_on_the_same_data_keeps_the_best_of_both() -> None:
    torch.manual_seed(0)
    net = nn.Linear(1, 1)
    problem, one = problem_of(net, squared), trainer()
    one.fit(problem, weft.Data(points_of_a_line(1.0), batch_size=8))
    best = net.weight.detach().clone()
    one.optimizer.param_groups[0]["lr"] = 10.0  # makes it worse
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one.fit(problem, weft.Data(points_of_a_line(1.0), batch_size=8), epochs=2)
    assert torch.equal(net.weight, best)


@pytest.mark.parametrize(
    "event", ["on_epoch_start", "on_epoch_end", "on_step_end", "on_validation_end", "on_step_start"]
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_backward_of_a_hook_is_in_no_step(event: str, accumulate: int) -> None:
    torch.manual_seed(0)
    start = nn.Linear(1, 1)
    ends = []
    for looks in (False, True):
        net = copy.deepcopy(start)
        problem = problem_of(net, squared)

        def look(*_: Any, problem: nn.Module = problem) -> None:
            problem(points_of_a_line(5.0))["train_loss"].backward()

        data = weft.Data(points_of_a_line(1.0), points_of_a_line(1.0), batch_size=8)
        trainer(epochs=3, accumulate=accumulate, hooks={event: look} if looks else None).fit(problem, data)
        ends.append(net.weight.detach().clone())
    assert torch.equal(*ends)


def test_what_somebody_else_s_optimizer_holds_is_no_finding() -> None:
    torch.manual_seed(0)
    weight, net = nn.Parameter(torch.ones(1)), nn.Linear(1, 1)
    ascent = torch.optim.SGD([weight], lr=0.1, maximize=True)

    def step(*_: Any) -> None:
        ascent.step()
        ascent.zero_grad()

    problem = problem_of(net, lambda u, y: weight * (u - y) ** 2)
    by_hand, own = copy.deepcopy(net), nn.Parameter(torch.ones(1))
    ours, theirs = torch.optim.SGD(by_hand.parameters(), lr=0.1), torch.optim.SGD([own], lr=0.1, maximize=True)
    data = points_of_a_line(1.0)
    trainer(epochs=5, hooks={"on_step_end": step}, monitor_metric=None).fit(problem, weft.Data(data))
    for _ in range(5):
        ours.zero_grad()
        theirs.zero_grad()
        (own * (by_hand(data["x"]) - data["y"]) ** 2).mean().backward()
        ours.step()
        theirs.step()
    assert torch.equal(weight, own) and weight.item() > 1.0
    with pytest.raises(ValueError, match="requires grad and is not trained"):  # the control: nobody holds it
        lonely = nn.Parameter(torch.ones(1))
        trainer(epochs=1).fit(problem_of(nn.Linear(1, 1), lambda u: lonely * u**2), weft.Data({"x": data["x"]}))


def test_an_event_that_is_a_method_of_a_trainer_is_an_error() -> None:
    class Mine(weft.Trainer):
        def on_epoch_end(self, trainer: Any, metrics: Any) -> None: ...

    with pytest.raises(TypeError, match="'on_epoch_end', which is an event"):
        Mine()

    class Own(weft.Trainer):
        def __init__(self) -> None:
            super().__init__(hooks={"on_epoch_end": self.on_epoch_end})

        def on_epoch_end(self, trainer: Any, metrics: Any) -> None: ...

    Own()


@pytest.mark.parametrize("same_problem", [True, False])
def test_a_refused_fit_leaves_the_run_before_it(same_problem: bool) -> None:
    problem, one = problem_of(nn.Linear(1, 1), squared), trainer()
    result = one.fit(problem, points_of_a_line(1.0))
    before = one.predict(points_of_a_line(1.0))["u"]
    other = problem if same_problem else problem_of(nn.Linear(1, 1), squared)
    for data, more in (({"x": torch.ones(3, 1), "y": torch.ones(2, 1)}, {}), (points_of_a_line(1.0), {"epohcs": 3})):
        with pytest.raises((TypeError, ValueError)):
            one.fit(other, data, **more)
    assert one.problem is problem and torch.equal(one.predict(points_of_a_line(1.0))["u"], before)
    assert one.fit(problem, points_of_a_line(1.0)).epochs == 2 * result.epochs
    if not same_problem:  # one that is not refused takes its place
        assert one.fit(other, points_of_a_line(3.0)).epochs == 20 and one.problem is other
