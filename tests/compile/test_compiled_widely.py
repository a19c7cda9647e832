"""Compiled runs in the wide: every workload of the benchmarks, several processes, layers that are not torch's."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from tests.helpers.bitwise import same
from tests.helpers.patience import patience
from weft.compile import graph as graphs


@pytest.fixture
def uncompiled_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the traced graphs themselves, without the C++ compiler: quick, where a test is not about what it makes."""

    def run_itself(graph: torch.fx.GraphModule, inputs: Any, moving: int) -> Callable[[Any], Any]:
        def run(given: list[Tensor]) -> Any:
            Path("ran-as-a-graph").touch()
            with torch.no_grad():
                return graph(*given)

        return run

    monkeypatch.setattr(graphs, "compile_graph", run_itself)


def eager_and_compiled(
    problem: nn.Module, data: Any, **options: Any
) -> tuple[weft.FitResult, weft.FitResult, list[int]]:
    """An eager and a compiled fit from the same weights; how many graphs there are for each kind of batch."""
    results = []
    for compiled in (False, True):
        trainer = weft.Trainer(**{"epochs": 20, "seed": 0, "progress": False} | options, compile=compiled)
        results.append(trainer.fit(copy.deepcopy(problem), data))
    assert trainer.run is not None
    return results[0], results[1], list(trainer.run.graphs.made.values())


# ---- twenty epochs ---------------------------------------------------------------------------------------------------

WORKLOADS = [
    "rosenbrock_weft",
    "rosenbrock_neuromancer",
    "rosenbrock_sgd",
    "rollout",
    "pinn",
    "neural_ode",
    "one_batch",
    "wide",
]


@pytest.fixture
def workloads(repo: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(repo))
    from benchmarks import workloads

    assert [make.__name__ for make in workloads.WORKLOADS] == WORKLOADS
    return workloads


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # of what `import neuromancer` imports
@pytest.mark.parametrize("precision", ["32-true", "64-true"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_twenty_epochs_of_every_workload_have_the_losses_of_eager(name: str, precision: str, workloads: Any) -> None:
    """A few batches an epoch, the last of them short. `make bench` trains them in full.

    Where training itself magnifies rounding (momentum does, on a steep penalty), they may be as far apart as two eager
    runs whose first weights differ in their last bit.
    """
    workload = getattr(workloads, name)()
    rows, size = len(next(iter(workload.train.values()))), workload.batch_size
    rows = min(rows, 2 * size + size // 3) if rows > size else rows
    train, dev = (
        {k: v[:most] for k, v in t.items()} for t, most in ((workload.train, rows), (workload.dev, size // 2))
    )
    data = weft.Data(
        weft.DictDataset(train), weft.DictDataset(dev), batch_size=size, inputs_require_grad=workload.require_grad
    )
    torch.manual_seed(0)
    problem, options = workload.make(), {"optimizer": workload.optimizer, "clip": workload.clip, "precision": precision}
    eager, compiled, made = eager_and_compiled(problem, data, **options)
    assert made and min(made) == 1
    allowed = 1e-5 if precision == "32-true" else 1e-10
    if furthest(eager, compiled) > allowed:
        shifted = copy.deepcopy(problem).to(torch.float32 if precision == "32-true" else torch.float64)
        with torch.no_grad():
            for p in shifted.parameters():
                p.mul_(1 + torch.finfo(p.dtype).eps)
        other = weft.Trainer(epochs=20, seed=0, progress=False, **options).fit(shifted, data)
        allowed = 2 * furthest(eager, other)
    assert furthest(eager, compiled) <= allowed < 1e-3
    assert eager.history["train_loss"][-1] != pytest.approx(
        eager.history["train_loss"][-2], rel=allowed
    )  # it does move


def furthest(one: weft.FitResult, other: weft.FitResult) -> float:
    """The largest relative difference of the losses of two fits, over all epochs."""
    pairs = [pair for k in ("train_loss", "dev_loss") for pair in zip(one.history[k], other.history[k], strict=True)]
    return max(abs(a - b) / abs(a) for a, b in pairs)


# ---- several processes
# -------------------------------------------------------------------------------------------------


def small() -> weft.Problem:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    f = weft.objective(lambda x, a: (1 - x[:, :1]) ** 2 + a * (x[:, 1:] - x[:, :1] ** 2) ** 2, name="f")
    upper = weft.less_equal(lambda x: x.square().sum(1, keepdim=True), lambda p: p**2, weight=10.0, name="upper")
    return weft.Problem([weft.Node(net, ["a", "p"], ["x"], name="net")], [f], [upper])


def parameter_rows_in_double(n: int, seed: int = 1) -> weft.DictDataset:
    generator = torch.Generator().manual_seed(seed)
    a, p = (torch.rand(n, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    return weft.DictDataset({"a": a.float(), "p": 0.5 + p.float()})


@pytest.mark.parametrize(
    ("precision", "rel", "options", "with_compiler"),
    [
        pytest.param("32-true", 1e-5, {"clip": 0.5}, True, marks=pytest.mark.long),
        ("64-true", 1e-10, {}, False),
        ("64-true", 1e-10, {"accumulate": 2, "clip": 0.5}, False),
    ],
    ids=["float32, clipped", "float64", "float64, accumulated and clipped"],
)
def test_two_processes_that_compile_end_where_two_eager_ones_do(
    precision: str, rel: float, options: dict[str, Any], with_compiler: bool, request: pytest.FixtureRequest
) -> None:
    """51 rows in batches of 8 for each of two processes: the last batch has 3 rows, two here and one there."""
    if not with_compiler:
        request.getfixturevalue("uncompiled_and_told")
    pair: dict[str, Any] = {
        "devices": 2,
        "strategy": "ddp_fork",
        "accelerator": "cpu",
        "timeout": patience(),
        "epochs": 6,
    }
    found = []
    for compiled in (False, True):
        problem = small()
        trainer = weft.Trainer(seed=1, progress=False, precision=precision, compile=compiled, **pair, **options)
        result = trainer.fit(problem, weft.Data(parameter_rows_in_double(51), batch_size=8))
        found.append((result.history, [p.detach().clone() for p in problem.parameters()]))
    (eager, weights), (compiled_history, compiled_weights) = found
    for name, values in eager.items():
        assert compiled_history[name] == pytest.approx(values, rel=rel, abs=rel * 1e-2), name
    torch.testing.assert_close(compiled_weights, weights, rtol=100 * rel, atol=rel)
    assert not same(compiled_weights, weights) if with_compiler else Path("ran-as-a-graph").exists()
    one = weft.Trainer(seed=1, progress=False, precision=precision, epochs=6, **options)
    assert one.fit(small(), weft.Data(parameter_rows_in_double(51), batch_size=8)).history["train_loss"][
        -1
    ] != pytest.approx(eager["train_loss"][-1], rel=rel)  # with other batches it ends elsewhere


# ---- what is no torch code
# ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning", "ignore:.*:UserWarning:cvxpy")
def test_a_problem_with_an_optimization_layer_stays_eager_and_says_so_once() -> None:
    """A traced cvxpylayers layer would repeat the solution of the batch that was traced."""
    cp = pytest.importorskip("cvxpy")
    layers = pytest.importorskip("cvxpylayers.torch")
    z, x, p = cp.Variable(2), cp.Parameter(2), cp.Parameter(1, nonneg=True)
    project = layers.CvxpyLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(z - x)), [cp.norm1(z) <= p]), parameters=[x, p], variables=[z]
    )
    torch.manual_seed(0)
    weights = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).state_dict()

    def make() -> weft.Problem:
        net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
        net.load_state_dict(weights)
        nodes = [
            weft.Node(net, ["a", "p"], ["x"], name="net"),
            weft.Node(lambda x, p: project(x, p)[0], ["x", "p"], ["z"], name="projection"),
        ]
        return weft.Problem(nodes, [weft.objective(lambda z, a: (z - a).square(), name="f")])

    data, ends = weft.Data(parameter_rows_in_double(12), batch_size=6), []
    for compiled in (False, True):
        problem = make()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = weft.Trainer(epochs=3, seed=0, progress=False, compile=compiled).fit(problem, data)
        ends.append((result.history, result.last_weights))
        told = [str(w.message) for w in caught if "stays eager" in str(w.message)]
        assert len(told) == compiled, told
    assert "compile=True: the update stays eager: " in told[0]
    assert ends[0][0] == ends[1][0]
    assert same(ends[0][1], ends[1][1])
    assert ends[0][0]["train_loss"][-1] < ends[0][0]["train_loss"][0]


# ---- randomness ------------------------------------------------------------------------------------------------------


class WithDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1))

    def forward(self, batch: dict[str, Any]) -> Tensor:
        return (self.net(torch.cat([batch["a"], batch["p"]], 1)) - batch["p"]).square().mean()


@pytest.mark.usefixtures("uncompiled_and_told")
def test_dropout_draws_what_it_draws_in_eager_also_in_a_short_last_batch() -> None:
    data = weft.Data(parameter_rows_in_double(27), batch_size=10)
    eager, compiled, made = eager_and_compiled(WithDropout(), data, epochs=5)
    assert made == [1, 1]
    assert compiled.history["train_loss"] == pytest.approx(eager.history["train_loss"], rel=1e-5)
    other = weft.Trainer(epochs=5, seed=1, progress=False, compile=True).fit(WithDropout(), data)
    assert other.history["train_loss"] != pytest.approx(eager.history["train_loss"], rel=1e-2)
