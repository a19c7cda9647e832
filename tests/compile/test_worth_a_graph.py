"""Which kinds of batch are worth a graph, from counts alone; and scalars that a graph computes once."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from tests.helpers.bitwise import same
from tests.helpers.problems import parameter_rows, small_rosenbrock, tanh_net
from weft.compile import choosing, functional
from weft.compile import graph as graphs


def counted_fit(compile: Any, epochs: int = 6, problem: nn.Module | None = None, **options: Any) -> tuple[Any, Any]:
    """43 rows in batches of 10, the last of 3; 10 rows of dev data."""
    given = weft.Data(parameter_rows(43), parameter_rows(10, 2), batch_size=10)
    trainer = weft.Trainer(**{"epochs": epochs, "seed": 0, "progress": False, "compile": compile} | options)
    return trainer.fit(copy.deepcopy(problem or small_rosenbrock()), given), trainer


def graphs_counted(trainer: Any) -> list[int]:
    return list(trainer.run.graphs.made.values())


# ---- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"validate_every": 2}], ids=str)
def test_how_often_a_kind_will_come_is_known_when_it_comes_again(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: dict[str, float] = {}
    came: Counter[str] = Counter()
    pays, find = choosing.Chosen._pays, choosing.Chosen.find

    def note(chosen: Any, kind: str) -> bool:
        said[kind] = choosing.times_to_come(chosen.state, chosen.split, *chosen.graphs.met[kind][:2])
        return pays(chosen, kind)

    def count(chosen: Any, batch: Any) -> Any:
        found = find(chosen, batch)
        rows = len(batch["a"])
        for kind in said:
            came[kind] += kind.startswith(f"('{chosen.split}'") and f"Size([{rows}, 1])" in kind
        return found

    monkeypatch.setattr(choosing.Chosen, "_pays", note)
    monkeypatch.setattr(choosing.Chosen, "find", count)
    counted_fit(True, epochs=12, **options)
    assert len(said) == 3  # full and short batches, dev
    for kind, number in said.items():
        assert came[kind] / 2 < number < came[kind] * 2, kind  # not all batches are full


@pytest.mark.usefixtures("uncompiled", "true_costs")
def test_a_short_fit_has_a_graph_of_full_batches_alone_and_says_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, trainer = counted_fit(True)
    assert graphs_counted(trainer) == [1, -1, -1]  # full batches, the short last one, dev
    eager, _ = counted_fit(False)
    for name, values in eager.history.items():
        assert found.history[name] == pytest.approx(values, rel=1e-5)


@pytest.mark.usefixtures("uncompiled", "true_costs")
@pytest.mark.parametrize(("seconds", "expected"), [(0.001, [1, 1, 1]), (0.1, [1, -1, -1])])
def test_a_kind_that_wins_what_it_costs_has_its_graph(
    seconds: float, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 epochs: of a short batch of about 450 nodes at 1.5 us 0.13 s are saved, of a dev set of 60 about 0.02 s."""
    monkeypatch.setattr(choosing, "SECONDS_PER_GRAPH", seconds)
    monkeypatch.setattr(choosing, "SECONDS_PER_NODE", 0.0 if seconds < 0.1 else 0.001)

    def stop(trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == 2:
            trainer.stop("enough")

    _, trainer = counted_fit(True, epochs=200, hooks={"on_epoch_end": stop})
    assert graphs_counted(trainer) == expected


@pytest.mark.usefixtures("uncompiled", "true_costs")
def test_a_very_large_graph_is_made_where_the_steps_to_come_pay_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "MAX_UNASKED", 100)

    def stop(trainer: Any, *_: Any) -> None:
        if trainer.global_step == 5:
            trainer.stop("enough")

    with pytest.warns(UserWarning, match=r"eager: a graph of about \d+ operations takes \d+ s to make"):
        _, few = counted_fit(True)
    assert graphs_counted(few)[0] == choosing.EAGER
    _, many = counted_fit(True, epochs=10**6, hooks={"on_step_end": stop})
    assert graphs_counted(many)[0] == 1


@pytest.mark.usefixtures("uncompiled", "true_costs")
@pytest.mark.parametrize("stop_at", [2, 5, 6, 11])
def test_a_resumed_run_decides_as_the_uninterrupted_one(
    stop_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SECONDS_PER_GRAPH", "SECONDS_PER_NODE"):
        monkeypatch.setattr(choosing, name, 1e-4 if name == "SECONDS_PER_GRAPH" else 1.4e-5)
    is_armed = False

    def stop(trainer: Any, *_: Any) -> None:
        if is_armed and trainer.global_step == stop_at:
            raise InterruptedError

    options: dict[str, Any] = {"epochs": 12, "hooks": {"on_step_end": stop}}
    whole, first = counted_fit(True, **options)
    assert graphs_counted(first) == [1, 1, 1] or -1 in graphs_counted(first)
    options |= {"root_dir": str(tmp_path), "run_name": "run", "checkpoint": {"every_n_steps": 1}}
    is_armed = True
    with pytest.raises(InterruptedError):
        counted_fit(True, **options)
    is_armed = False
    rest, second = counted_fit(True, resume="last", **options)
    assert second.run.graphs.made == first.run.graphs.made
    assert same(rest.last_weights, whole.last_weights)


@pytest.mark.usefixtures("uncompiled", "true_costs")
def test_the_size_of_a_graph_is_known_before_it_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[int] = []
    pays = choosing.Chosen._pays
    monkeypatch.setattr(
        choosing.Chosen, "_pays", lambda c, kind: (said.append(c.graphs.met[kind][2]), pays(c, kind), True)[2]
    )
    sizes: list[int] = []
    run_itself = graphs.compile_graph
    monkeypatch.setattr(
        graphs, "compile_graph", lambda g, *a, **k: (sizes.append(len(g.graph.nodes)), run_itself(g, *a, **k))[1]
    )
    counted_fit(True)
    assert len(said) == len(sizes) == 3
    for guess, size in zip(said, sizes, strict=True):
        assert 0.4 * size < guess < 1.4 * size


# ---- scalars computed once -------------------------------------------------------------------------------------------


def traced(fn: Any, *inputs: Tensor) -> tuple[torch.fx.GraphModule, list[Tensor]]:
    return graphs.trace(fn, inputs)


def test_equal_scalars_are_one_but_not_over_a_change_and_not_if_they_are_drawn() -> None:
    counter = torch.tensor(1.0)

    def fn(x: Tensor) -> list[Tensor]:
        first, second = 1 - 0.9**counter, 1 - 0.9**counter
        fresh = counter.clone()
        fresh.add_(1)
        other = counter.clone()
        counter.add_(1)
        later = 1 - 0.9**counter
        drawn = [torch.rand(()), torch.rand(())]
        return [x * first, x + second, x * later, fresh + x, other + x, drawn[0] - drawn[1]]

    graph, fixed = traced(fn, torch.ones(3))
    powers = [n for n in graph.graph.nodes if "pow" in str(n.target)]
    assert len(powers) == 2
    found = graph(torch.ones(3), *fixed)
    counter.fill_(1.0)
    for mine, value in zip(found[:5], fn(torch.ones(3))[:5], strict=True):
        assert torch.equal(mine, value)
    assert found[5] != 0


OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
    "Adamax": torch.optim.Adamax,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "Groups": lambda p: torch.optim.Adam([{"params": [q], "lr": 1e-3 * i} for i, q in enumerate(p, 1)]),
}


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_counter_for_all_parameters_gives_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    run_itself = graphs.compile_graph
    monkeypatch.setattr(
        graphs, "compile_graph", lambda g, *a, **k: (sizes.append(len(g.graph.nodes)), run_itself(g, *a, **k))[1]
    )
    shared, _ = counted_fit(True, optimizer=OPTIMIZERS[name], limit_batches=2)
    monkeypatch.setattr(functional, "COUNTING_ONCE", ())
    own, trainer = counted_fit(True, optimizer=OPTIMIZERS[name], limit_batches=2)
    assert same(shared.last_weights, own.last_weights)
    assert type(trainer.run.graphs.all()[0]).__name__ == "UpdateGraph"
    assert (sizes[0] < sizes[2]) == (name != "Groups")


class TwoStages(nn.Module):
    """Its second layer is only used from the third epoch on, so its counter is behind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.uses_both = tanh_net(1, 1), nn.Linear(1, 1), False

    def forward(self, batch: dict[str, Any]) -> Tensor:
        y = self.first(batch["a"])
        return ((self.second(y) if self.uses_both else y) - batch["p"]).square().mean()


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("resets", [False, True])
def test_counters_that_differ_stay_their_own(resets: bool) -> None:
    def turn(trainer: Any) -> None:
        trainer.problem.uses_both = trainer.current_epoch >= 2
        if resets and trainer.current_epoch == 4:
            optimizer = trainer.run.optimizers["default"]
            optimizer.state[trainer.problem.second.bias]["step"].zero_()

    options: dict[str, Any] = {"hooks": {"on_epoch_start": turn}, "problem": TwoStages()}
    eager, _ = counted_fit(False, **options)
    compiled, trainer = counted_fit(True, **options)
    assert min(graphs_counted(trainer)) >= 1
    for name, values in eager.history.items():
        assert compiled.history[name] == pytest.approx(values, rel=1e-5)
    counters = [float(s["step"]) for s in trainer.run.optimizers["default"].state.values()]
    assert len(set(counters)) == (3 if resets else 2)
