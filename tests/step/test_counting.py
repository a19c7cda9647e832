"""A batch counts for what it holds: rows by what most tensors agree on, or what the step or the batch says."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.data.batches import disagreement, num_examples, rows_in
from weft.step.metrics import Means, Vector

Batch = Any
SIZES = (10, 10, 10, 1)


def x_of(rows: int) -> Tensor:
    return torch.randn(rows, 1, generator=torch.Generator().manual_seed(rows)) + (5.0 if rows == 1 else 0.0)


def edges() -> Tensor:
    return torch.zeros(2, 7, dtype=torch.long)


class Square(nn.Module):
    """(w x)^2, whatever batch x is found in."""

    def __init__(self, find: Callable[[Batch], Tensor], says: bool = False) -> None:
        super().__init__()
        self.layer, self.find, self.says = nn.Linear(1, 1, bias=False), find, says
        nn.init.ones_(self.layer.weight)

    def forward(self, batch: Batch) -> dict[str, Any]:
        x = self.find(batch)
        said = {"num_examples": len(x)} if self.says else {}
        return {"loss": self.layer(x).square().mean(), **said}


class Stored:
    """A batch as libraries of graphs have it: its tensors are in a mapping that it holds."""

    def __init__(self, store: dict[str, Tensor]) -> None:
        self._store = store

    def to(self, device: Any) -> Stored:
        return self


KINDS: dict[str, tuple[Callable[[Tensor], Batch], Callable[[Batch], Tensor]]] = {
    "dict": (lambda x: {"x": x}, lambda b: b["x"]),
    "dict, two keys": (lambda x: {"x": x, "y": x}, lambda b: b["x"]),
    "graph, edges first": (lambda x: {"edge_index": edges(), "x": x}, lambda b: b["x"]),
    "graph, edges last": (lambda x: {"x": x, "edge_index": edges()}, lambda b: b["x"]),
    "graph, with targets": (lambda x: {"edge_index": edges(), "x": x, "y": x}, lambda b: b["x"]),
    "grid first": (lambda x: {"t": torch.rand(50), "x": x, "y": x}, lambda b: b["x"]),
    "one number first": (lambda x: {"dt": torch.tensor(0.1), "x": x}, lambda b: b["x"]),
    "tuple": (lambda x: (x, x), lambda b: b[0]),
    "list with a grid": (lambda x: [torch.rand(50), x, x], lambda b: b[1]),
    "tuple of tuples": (lambda x: ((x, x), 3), lambda b: b[0][0]),
    "tensor": (lambda x: x, lambda b: b),
    "nested": (lambda x: {"a": {"e": edges(), "x": x, "y": x}, "b": {"x": torch.rand(4, 1)}}, lambda b: b["a"]["x"]),
    "batch says": (lambda x: {"t": torch.rand(50), "x": x.T, "num_examples": len(x)}, lambda b: b["x"].T),
    "batch says by row": (lambda x: {"x": x.T, "num_examples": torch.ones(len(x))}, lambda b: b["x"].T),
    "object says": (lambda x: SimpleNamespace(x=x, num_examples=len(x)), lambda b: b.x),
    "object": (lambda x: SimpleNamespace(edge_index=edges(), x=x, y=x, name="g"), lambda b: b.x),
    "object of a store": (lambda x: Stored({"edge_index": edges(), "x": x, "y": x}), lambda b: b._store["x"]),
}


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("says", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_means_and_accumulated_updates_are_those_of_all_rows_for_every_kind_of_batch(
    kind: str, says: bool, accumulate: int
) -> None:
    make, find = KINDS[kind]
    batches = [make(x_of(rows)) for rows in SIZES]
    x = torch.cat([x_of(rows) for rows in SIZES])
    problem = Square(find, says)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The tensors of a batch differ")
        sgd = partial(torch.optim.SGD, lr=0.1 if accumulate > 1 else 0.0)
        trainer = weft.Trainer(epochs=1, progress=False, accumulate=accumulate, accelerator="cpu", optimizer=sgd)
        result = trainer.fit(problem, batches, batches)
    true = x.square().mean().item()
    assert result.history["train_loss"][0] == pytest.approx(true, rel=1e-5)
    if accumulate == 1:
        assert result.history["dev_loss"][0] == pytest.approx(true, rel=1e-5)
    else:
        assert problem.layer.weight.item() == pytest.approx(1 - 0.2 * true, rel=1e-5)
    assert "train_num_examples" not in result.history


def test_where_tensors_differ_it_is_said_once_and_not_where_the_step_says() -> None:
    make, find = KINDS["graph, edges first"]
    batches = [make(x_of(rows)) for rows in SIZES]
    for says in (False, True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            weft.Trainer(epochs=3, progress=False).fit(Square(find, says), batches, batches)
        told = [str(w.message) for w in caught if "first dimension" in str(w.message)]
        assert len(told) == (0 if says else 1)
        if not says:
            assert "2 by edge_index, 10 by x" in told[0] and "counted as 10" in told[0]


@pytest.mark.parametrize(
    ("batch", "rows"),
    [
        ({"a": torch.rand(3, 2), "b": torch.rand(5), "c": torch.rand(5, 1)}, 5),
        ({"a": torch.rand(3, 2), "b": torch.rand(5)}, 3),  # as many: the first
        ({"a": torch.zeros(3, dtype=torch.long), "b": torch.rand(5)}, 5),  # as many: of floating point numbers
        ({"index": torch.arange(5), "a": torch.rand(3), "b": torch.rand(3)}, 5),
        ({"a": torch.rand(())}, 1),
        ({"name": "train"}, 1),
        ((torch.rand(4, 3), [{"boxes": torch.rand(2, 4)}, {"boxes": torch.rand(2, 4)}]), 4),
        ([{"x": torch.rand(6)}, {"x": torch.rand(2)}], 6),
        ("text", 1),
        (None, 1),
        ({"x": torch.rand(0, 3)}, 0),
    ],
)
def test_rows_are_what_most_of_the_outermost_tensors_agree_on(batch: Batch, rows: int) -> None:
    assert rows_in(batch) == num_examples(batch) == rows


def test_a_batch_that_says_what_it_counts_for_does_not_disagree() -> None:
    assert disagreement({"e": edges(), "x": x_of(4), "num_examples": 4}) is None
    assert disagreement({"e": edges(), "x": x_of(4), "index": torch.arange(4)}) is None
    assert disagreement({"x": x_of(4), "y": x_of(4)}) is None
    assert disagreement([edges(), x_of(4)]) is not None


# ---- denominators


def masked(rows: int = 64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(rows, n, generator=generator, dtype=torch.float64) for n in (3, 1))
    some = torch.rand(rows, 1, generator=generator) < torch.linspace(0.05, 1, rows)[:, None]
    return {"x": x, "y": y, "m": some.double()}


class Masked(nn.Module):
    """The mean of squares over the entries that are there, and its denominator where it is to say so."""

    def __init__(self, says: bool = True) -> None:
        super().__init__()
        self.layer, self.says = nn.Linear(3, 1, dtype=torch.float64), says

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        there = batch["m"].sum()
        found = {f"{batch['name']}_loss": ((self.layer(batch["x"]) - batch["y"]) ** 2 * batch["m"]).sum() / there}
        return found | ({"num_examples": there} if self.says else {})


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "LBFGS": lambda p: torch.optim.LBFGS(p, max_iter=3),
}


def fit_masked(batch_size: int, says: bool = True, data: Any = None, **options: Any) -> tuple[Tensor, weft.FitResult]:
    torch.manual_seed(0)
    problem = Masked(says)
    options = {"epochs": 2, "seed": 1, "progress": False, "accelerator": "cpu", "precision": "64-true"} | options
    data = masked() if data is None else data
    result = weft.Trainer(**options).fit(problem, weft.Data(data, data, batch_size=batch_size, shuffle=False))
    return torch.cat([p.detach().flatten() for p in problem.parameters()]), result


@pytest.mark.parametrize("optimizer", ["SGD", "LBFGS"])
def test_masked_means_accumulate_exactly_where_the_step_returns_its_denominator(optimizer: str) -> None:
    options = {"optimizer": OPTIMIZERS[optimizer]}
    whole, one = fit_masked(64, **options)
    parts, several = fit_masked(16, accumulate=4, **options)
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-12)
    for name in ("train_loss", "dev_loss"):
        assert several.history[name] == pytest.approx(one.history[name], rel=1e-10)
    silent, _ = fit_masked(16, accumulate=4, says=False, **options)
    assert not torch.allclose(silent, whole, atol=1e-4)  # the negative control


def test_several_optimizers_share_a_denominator() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 1), nn.Linear(3, 1)

        def forward(self, batch: Batch) -> dict[str, Tensor]:
            there = batch["m"].sum()
            errors = {name: getattr(self, name)(batch["x"]) - batch["y"] for name in ("first", "second")}
            losses = {name: (error**2 * batch["m"]).sum() / there for name, error in errors.items()}
            return {**losses, "num_examples": there}

    def sgd(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1)

    ended = []
    for size, accumulate in ((64, 1), (16, 4)):
        torch.manual_seed(0)
        problem = Both()
        optimizers = {"first": sgd, "second": sgd}
        options = {
            "epochs": 1,
            "progress": False,
            "accelerator": "cpu",
            "precision": "64-true",
            "monitor_metric": False,
        }
        trainer = weft.Trainer(accumulate=accumulate, optimizer=optimizers, **options)
        result = trainer.fit(problem, weft.Data(masked(), batch_size=size, shuffle=False))
        ended.append((problem.first.weight.detach(), problem.second.bias.detach(), result.history["train_loss"][0]))
    torch.testing.assert_close(ended[1], ended[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("says", [True, False])
def test_masked_means_of_two_processes_are_those_of_one(says: bool) -> None:
    one, alone = fit_masked(32, says=says)
    two, shared = fit_masked(16, says=says, devices=2, strategy="ddp_fork", timeout=60)
    is_same = torch.allclose(one, two, rtol=1e-10, atol=1e-12)
    assert is_same is says
    if says:
        for name in ("train_loss", "dev_loss"):
            assert shared.history[name] == pytest.approx(alone.history[name], rel=1e-10)


def test_two_processes_that_accumulate_masked_means_end_where_one_does() -> None:
    one, _ = fit_masked(64)
    two, _ = fit_masked(8, accumulate=4, devices=2, strategy="ddp_fork", timeout=60)
    torch.testing.assert_close(two, one, rtol=1e-10, atol=1e-12)


def test_a_micro_batch_without_any_entry_is_left_out() -> None:
    data = masked()
    data["m"][:16] = 0.0  # 0 / 0 in the first of four
    whole, one = fit_masked(64, data=data)
    parts, several = fit_masked(16, accumulate=4, data=data)
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-12)
    assert several.history["dev_loss"] == pytest.approx(one.history["dev_loss"], rel=1e-10)


def test_compiled_updates_use_the_denominator() -> None:
    eager, _ = fit_masked(16, accumulate=2, epochs=6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled, _ = fit_masked(16, accumulate=2, epochs=6, compile=True)
    torch.testing.assert_close(compiled, eager, rtol=1e-8, atol=1e-10)


def test_a_term_is_a_mean_over_its_own_weight() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, batch: Batch) -> dict[str, Tensor]:
            some = batch["m"].sum()
            part = (batch["x"] * batch["m"]).sum() / some
            return {"loss": self.layer(batch["x"]).mean(), "seen": part, "seen_weight": some, "all": batch["x"].mean()}

    data = {"x": torch.arange(11.0)[:, None], "m": (torch.arange(11)[:, None] % 4 == 0).float()}
    result = weft.Trainer(epochs=1, progress=False).fit(Two(), weft.Data(data, data, batch_size=4, shuffle=False))
    true = data["x"][data["m"] > 0].mean().item()
    assert result.history["dev_seen"] == result.history["train_seen"] == [pytest.approx(true)]
    assert result.history["dev_all"] == [pytest.approx(5.0)]
    assert result.history["dev_seen_weight"][0] > 0  # is reported as ever: it may be a weight of the loss as well


def test_means_with_denominators_add_up_in_any_order_and_resume() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [(float(v), float(w)) for v, w in torch.rand(70, 2, generator=generator).tolist()]
    true = sum(v * w for v, w in rows) / sum(w for _, w in rows)
    means = Means()
    for number, (v, w) in enumerate(rows):
        given = {"a": torch.tensor(v), "/": torch.tensor(w), "plain": 1.0, "/plain": 2.0}
        row = torch.tensor(list(given.values()), dtype=torch.float64)
        means.add(Vector(tuple(given), row) if number % 2 else given, 3)
        if number == 41:
            saved, means = copy.deepcopy(means.state_dict()), Means()
            means.load_state_dict(saved)
    assert means.compute() == {"a": pytest.approx(true), "plain": pytest.approx(1.0)}


def test_a_denominator_that_is_no_number_is_named() -> None:
    step = lambda trainer, batch: {"train_loss": trainer.problem(batch["x"]).mean(), "num_examples": "many"}
    with pytest.raises(TypeError, match="'num_examples' as str 'many'; expected a number"):
        weft.Trainer(epochs=1, progress=False, training_step=step).fit(nn.Linear(1, 1), {"x": torch.rand(4, 1)})


# ---- parts of a split


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        zero = 0 * self.layer(batch["i"]["x"]).sum()
        i, b = batch["i"]["x"].mean(), batch["b"]["x"].mean()
        return {"loss": zero + i + 10 * b, "i": i, "b": b}


def parts() -> dict[str, weft.DictDataset]:
    inner = torch.randn(100, 1, generator=torch.Generator().manual_seed(0))
    return {"i": weft.DictDataset({"x": inner}), "b": weft.DictDataset({"x": torch.arange(15.0)[:, None]})}


@pytest.mark.parametrize("order", ["ib", "bi"])
@pytest.mark.parametrize("batch_size", [None, 1, 7, 10, 100, {"i": 30, "b": 4}, {"i": 100, "b": 2}, {"i": 20, "b": 3}])
def test_each_part_of_a_split_is_evaluated_once_and_counts_by_its_own_rows(batch_size: Any, order: str) -> None:
    data = {name: parts()[name] for name in order}
    result = weft.Trainer(epochs=1, progress=False).fit(Parts(), weft.Data(data, data, batch_size=batch_size))
    inner = data["i"].datadict["x"].mean().item()
    assert result.history["dev_b"] == [pytest.approx(7.0, abs=1e-5)]
    assert result.history["dev_i"] == [pytest.approx(inner, abs=1e-5)]
    assert result.history["dev_loss"] == [pytest.approx(inner + 70.0, abs=1e-4)]


def test_each_row_of_a_part_is_seen_once_while_the_others_stay() -> None:
    seen: dict[str, list[int]] = {"i": [], "b": []}

    class Looks(Parts):
        def forward(self, batch: Batch) -> dict[str, Tensor]:
            if batch["name"] == "dev":
                for part, rows in seen.items():
                    rows += batch[part]["index"].tolist()
            return super().forward(batch)

    weft.Trainer(epochs=1, progress=False).fit(Looks(), weft.Data(parts(), parts(), batch_size=10))
    assert {row: seen["i"].count(row) for row in range(10, 100)} == dict.fromkeys(range(10, 100), 1)
    assert {row: seen["b"].count(row) for row in range(10, 15)} == dict.fromkeys(range(10, 15), 1)


def test_parts_of_equal_shares_are_evaluated_together() -> None:
    data = {"a": weft.DictDataset({"x": torch.rand(12, 1)}), "b": weft.DictDataset({"x": torch.rand(24, 1)})}
    calls = []

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, batch: Batch) -> Tensor:
            calls.append(batch["name"])
            return self.layer(batch["a"]["x"]).mean()

    weft.Trainer(epochs=1, progress=False).fit(Counts(), weft.Data(data, data, batch_size={"a": 5, "b": 10}))
    assert calls.count("dev") == 3


def test_parts_are_evaluated_alike_by_two_processes() -> None:
    ended = []
    for several in ({}, {"devices": 2, "strategy": "ddp_fork", "timeout": 60}):
        torch.manual_seed(0)
        trainer = weft.Trainer(epochs=1, progress=False, accelerator="cpu", precision="64-true", **several)
        size = {"i": 7, "b": 2} if several else {"i": 14, "b": 4}
        ended.append(trainer.fit(Parts(), weft.Data(parts(), parts(), batch_size=size)).history)
    assert ended[1]["dev_b"] == [pytest.approx(7.0)]
    assert ended[1]["dev_loss"] == pytest.approx(ended[0]["dev_loss"])


def test_a_part_with_a_denominator_of_its_own_is_weighted_by_it() -> None:
    class Gaps(Parts):
        def forward(self, batch: Batch) -> dict[str, Tensor]:
            there = batch["b"]["m"].sum()
            return {**super().forward(batch), "m": (batch["b"]["x"] * batch["b"]["m"]).sum() / there, "m_weight": there}

    data = parts()
    mask = (torch.arange(15)[:, None] % 3 == 0).float()
    data["b"] = weft.DictDataset({"x": torch.arange(15.0)[:, None], "m": mask})
    for size in (None, 4, 10):
        history = weft.Trainer(epochs=1, progress=False).fit(Gaps(), weft.Data(data, data, batch_size=size)).history
        assert history["dev_m"] == [pytest.approx(6.0, abs=1e-5)]
