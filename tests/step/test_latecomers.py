"""Parameters that come after the optimizers, are kept in holders of python's own, or counts that are none: told."""

from __future__ import annotations

import argparse
import collections
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft

X = torch.rand(12, 2, generator=torch.Generator().manual_seed(0))
DATA = {"x": X, "y": X.sum(1, keepdim=True)}
LATE = "requires grad since its optimizers were made, and is in none of them"


class GrownLater(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.more = nn.Linear(2, 1), nn.ModuleList()
        self.k: Any = None

    def forward(self, batch: Any) -> dict[str, Tensor]:
        out = self.layer(batch["x"]) + sum(m(batch["x"]) for m in self.more)
        return {f"{batch['name']}_loss": (out - batch["y"]).square().mean()}


def blank() -> nn.Linear:
    """One that adds nothing yet, so that the loss goes on falling."""
    layer = nn.Linear(2, 1)
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


def grow(trainer: Any) -> None:
    if trainer.current_epoch == 1:
        trainer.problem.more.append(blank())


def replace(trainer: Any) -> None:
    if trainer.current_epoch == 1:
        trainer.problem.layer.weight = nn.Parameter(torch.ones(1, 2))


def thaw(trainer: Any) -> None:
    trainer.problem.more[0].requires_grad_(trainer.current_epoch >= 1)


def half_frozen() -> GrownLater:
    problem = GrownLater()
    problem.more.append(nn.Linear(2, 1).requires_grad_(False))
    return problem


CASES: dict[str, tuple[Callable[[], GrownLater], Callable[[Any], None], str]] = {
    "grown": (GrownLater, grow, "more.0.weight"),
    "replaced": (GrownLater, replace, "layer.weight"),
    "thawed": (half_frozen, thaw, "more.0.weight"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_parameter_that_comes_after_the_optimizers_is_told_once(name: str) -> None:
    make, hook, parameter = CASES[name]
    with pytest.warns(UserWarning, match=rf"Parameter {parameter} of shape \(1, 2\) {LATE}") as told:
        weft.Trainer(epochs=4, progress=False, hooks={"on_epoch_start": hook}).fit(make(), DATA)
    assert len(told) == 1


def test_a_parameter_made_in_the_first_step_is_told() -> None:
    class Late(GrownLater):
        def forward(self, batch: Any) -> dict[str, Tensor]:
            self.k = nn.Parameter(torch.ones(1)) if self.k is None else self.k
            return {key: loss * self.k.sum() for key, loss in super().forward(batch).items()}

    problem = Late()
    del problem.k
    problem.__dict__["k"] = None
    with pytest.warns(UserWarning, match=LATE):
        weft.Trainer(epochs=1, progress=False).fit(problem, DATA)


def test_parts_that_are_added_or_frozen_as_they_should_are_no_finding() -> None:
    def add(trainer: Any) -> None:
        grow(trainer)
        if trainer.current_epoch == 1:
            trainer.optimizer.add_param_group({"params": [*trainer.problem.more.parameters()]})

    def setup(trainer: Any) -> None:
        trainer.problem.more.append(blank())

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weft.Trainer(epochs=3, progress=False, hooks={"on_epoch_start": add}).fit(GrownLater(), DATA)
        stages = [weft.Phase(epochs=1, freeze=["layer"]), weft.Phase(epochs=1, optimizer=torch.optim.SGD, setup=setup)]
        problem = half_frozen().requires_grad_(True)
        weft.Trainer(progress=False, phases=stages).fit(problem, DATA)
        part = half_frozen().requires_grad_(True)
        weft.Trainer(epochs=2, progress=False, optimizer=torch.optim.SGD(part.layer.parameters(), lr=0.1)).fit(
            part, DATA
        )


HELD: dict[str, tuple[Callable[[nn.Parameter], Any], Callable[[Any], Tensor]]] = {
    "SimpleNamespace": (lambda k: types.SimpleNamespace(k=k), lambda h: h.k),
    "Namespace": (lambda k: argparse.Namespace(k=k), lambda h: h.k),
    "UserDict": (lambda k: collections.UserDict(k=k), lambda h: h["k"]),
    "ChainMap": (lambda k: collections.ChainMap({"k": k}), lambda h: h["k"]),
}


@pytest.mark.parametrize("name", HELD)
def test_a_parameter_in_a_holder_of_pythons_own_is_named(name: str) -> None:
    hold, get = HELD[name]
    held = hold(nn.Parameter(torch.ones(1)))
    torch.manual_seed(0)
    nodes = [weft.Node(nn.Linear(2, 1), ["x"], ["u"]), weft.Node(lambda u: u * get(held), ["u"], ["v"], name="b")]
    problem = weft.Problem(nodes, [weft.objective(lambda v, y: (v - y) ** 2, name="m")])
    with pytest.raises(ValueError, match="node 'b' uses held.*requires grad and is not trained"):
        weft.Trainer(epochs=1, progress=False).fit(problem, DATA)


# ---- what a batch counts for


def said(**more: Any) -> Any:
    return lambda trainer, batch: {**trainer.problem(batch), **more}


@pytest.mark.parametrize("value", [-3, float("nan"), torch.tensor(-2.0), torch.tensor(float("nan"))])
@pytest.mark.parametrize("key", ["num_examples", "train_loss_weight"])
def test_a_denominator_below_zero_or_nan_is_refused(value: Any, key: str) -> None:
    trainer = weft.Trainer(epochs=1, progress=False, training_step=said(**{key: value}))
    with pytest.raises(ValueError, match="expected a number >= 0"):
        trainer.fit(GrownLater(), weft.Data(DATA, batch_size=4))


@pytest.mark.parametrize("value", [-3, float("nan"), torch.tensor([1.0, -2.0])])
def test_a_batch_that_says_less_than_nothing_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match='A batch says "num_examples" .*expected a number >= 0'):
        weft.Trainer(epochs=1, progress=False).fit(GrownLater(), [{**DATA, "num_examples": value}])


def test_weights_of_rows_below_one_are_not_cut_to_whole_numbers() -> None:
    batches = [{**{k: v[i : i + 4] for k, v in DATA.items()}, "num_examples": 0.2 * (i + 1)} for i in (0, 4, 8)]
    still = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.0), "epochs": 1, "progress": False}
    problem = GrownLater()
    result = weft.Trainer(**still).fit(problem, batches, batches)
    with torch.no_grad():
        losses = [float(problem({**batch, "name": "dev"})["dev_loss"]) for batch in batches]
    true = sum(0.2 * (i + 1) * loss for i, loss in zip((0, 4, 8), losses, strict=True)) / (0.2 * 15)
    assert result.history["dev_loss"] == result.history["train_loss"] == [pytest.approx(true, rel=1e-5)]


@pytest.mark.parametrize("loss", ["cosine_similarity", "pairwise_distance"])
def test_further_functions_of_torch_that_pair_rows_are_told(loss: str) -> None:
    fn = getattr(nn.functional, loss)
    problem = weft.Problem(
        [weft.Node(nn.Linear(2, 1), ["x"], ["u"])], [weft.objective(lambda u, y: fn(u[:, 0], y), name="m")]
    )
    with pytest.warns(UserWarning, match="every row with every other"):
        weft.Trainer(epochs=1, progress=False).fit(problem, DATA)


def with_a_hidden_factor() -> tuple[nn.Parameter, weft.Problem]:
    torch.manual_seed(0)
    k = nn.Parameter(torch.tensor(0.5))
    node = weft.Node(nn.Linear(2, 1), ["x"], ["u"])
    return k, weft.Problem([node], [weft.objective(lambda u, y: (k * u - y) ** 2, name="fit")])


def test_what_a_refusal_says_to_give_to_the_problem_is_trained_by_the_same_trainer() -> None:
    ends = []
    for is_refused_before in (False, True):
        k, problem = with_a_hidden_factor()
        trainer = weft.Trainer(epochs=5, progress=False)
        if is_refused_before:
            with pytest.raises(ValueError, match=r"`problem.k = k`"):
                trainer.fit(problem, DATA)
        problem.k = k
        result = trainer.fit(problem, DATA)
        assert result.epochs == 5 and k.item() != 0.5
        ends.append(torch.cat([p.detach().flatten() for p in problem.parameters()]))
    assert torch.equal(*ends)


@pytest.mark.parametrize("between", ["given", "thawed", "nothing"])
def test_a_parameter_that_comes_between_two_fits_is_told(between: str) -> None:
    k, problem = with_a_hidden_factor()
    k.requires_grad_(False)
    if between == "thawed":
        problem.k = k
    trainer = weft.Trainer(epochs=2, progress=False, optimizer=lambda q: torch.optim.Adam([p for p in q], lr=1e-3))
    trainer.fit(problem, DATA)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if between != "nothing":
            problem.k = k.requires_grad_(True)
        trainer.fit(problem, DATA)
    found = [str(w.message) for w in told if LATE in str(w.message)]
    held = any(k is p for group in trainer.optimizer.param_groups for p in group["params"])
    assert len(found) == (between != "nothing" and not held)
    assert (k.item() != 0.5) == (between != "nothing" and held)
    if found:
        other = weft.Trainer(epochs=2, progress=False)  # a new one makes new optimizers: the way out
        other.fit(problem, DATA)
        assert k.item() != 0.5
