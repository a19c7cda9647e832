"""A compiled run is an eager run, only faster: the same losses, random numbers, buffers and files; else it says why."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor  # pyright: ignore[reportPrivateImportUsage]

import weft
from tests.helpers.bitwise import same
from tests.helpers.problems import parameter_rows, small_rosenbrock, tanh_net
from weft.compile import graph as graphs

# A graph takes about 5 s to make, and tests that need the same one find it in the cache of the session.


def rosenbrock_data(train: int = 40, dev: int = 10, batch_size: int = 10) -> weft.Data:
    return weft.Data(parameter_rows(train), parameter_rows(dev, 2), batch_size=batch_size)


def fit_copy(problem: nn.Module, given: Any, compile: Any, **options: Any) -> tuple[weft.FitResult, weft.Trainer]:
    trainer = weft.Trainer(**{"epochs": 5, "seed": 0, "progress": False, "compile": compile} | options)
    return trainer.fit(copy.deepcopy(problem), given), trainer


def assert_agree(problem: nn.Module, given: Any, rel: float = 1e-5, **options: Any) -> weft.Trainer:
    """The histories and last weights of an eager and a compiled fit agree, and the compiled one did run as a graph."""
    eager, _ = fit_copy(problem, given, False, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled, trainer = fit_copy(problem, given, True, **options)
    assert_all_graphs(trainer)
    assert eager.history.keys() == compiled.history.keys()
    for name, values in eager.history.items():
        assert compiled.history[name] == pytest.approx(values, rel=rel, abs=rel * 1e-2), name
    for name, tensor in eager.last_weights.items():
        torch.testing.assert_close(compiled.last_weights[name], tensor, rtol=rel * 100, atol=rel)
    return trainer


def assert_all_graphs(trainer: weft.Trainer) -> None:
    assert trainer.run is not None
    made = trainer.run.graphs.made
    assert made and all(number >= 1 for number in made.values()), made


def graphs_made(trainer: weft.Trainer) -> list[int]:
    assert trainer.run is not None
    return list(trainer.run.graphs.made.values())


# ---- equal to eager --------------------------------------------------------------------------------------------------


def test_twenty_epochs_of_a_weft_problem_have_the_losses_of_eager() -> None:
    assert_agree(small_rosenbrock(), rosenbrock_data(), epochs=20, clip=1.0)


@pytest.mark.long
def test_twenty_epochs_in_float64_agree_to_ten_digits() -> None:
    assert_agree(
        small_rosenbrock(),
        weft.Data(parameter_rows(40), batch_size=10),
        rel=1e-10,
        epochs=20,
        clip=1.0,
        precision="64-true",
    )


def test_the_comparison_of_histories_can_fail() -> None:
    one, _ = fit_copy(small_rosenbrock(), rosenbrock_data(), False, clip=1.0)
    other, _ = fit_copy(
        small_rosenbrock(), rosenbrock_data(), False, clip=1.0, optimizer=lambda p: torch.optim.Adam(p, lr=1.001e-3)
    )
    assert one.history["train_loss"][-1] != pytest.approx(other.history["train_loss"][-1], rel=1e-5)


class Stateful(nn.Module):
    """A module with every kind of state: batch norm, dropout, a buffer that it sets anew, the epoch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = tanh_net(2, 1, 8, nn.BatchNorm1d(8), nn.Dropout(0.3))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        y = self.net(torch.cat([batch["a"], batch["p"]], 1))
        if self.training:
            self.seen = self.seen + len(y)
        noise = 0.01 * torch.randn_like(y) if self.training else 0.0
        loss = (y + noise - batch["p"]).square().mean() + 0.01 * batch["epoch"]
        return {f"{batch['name']}_loss": loss, "size": y.abs().mean()}


@pytest.mark.long
def test_batch_norm_dropout_noise_buffers_and_the_epoch_are_those_of_eager() -> None:
    trainer = assert_agree(Stateful(), rosenbrock_data(train=43, batch_size=10), epochs=6)  # its last batch has 3 rows
    assert trainer.problem.seen == 43 * 6
    fit_copy(Stateful(), rosenbrock_data(train=43), False, epochs=6)
    after = torch.rand(())
    fit_copy(Stateful(), rosenbrock_data(train=43), True, epochs=6)
    assert torch.rand(()) == after  # the global random state ends where it does in eager


def test_momentum_and_coupled_weight_decay_agree() -> None:
    """Inductor of torch 2.13 drops the alpha of `grad.add(param, alpha=weight_decay)` after a matrix product."""
    assert_agree(
        small_rosenbrock(),
        rosenbrock_data(),
        optimizer=lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=1e-2),
        epochs=20,
    )


@pytest.mark.usefixtures("uncompiled")
def test_a_graph_that_is_wrong_never_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(graph: torch.fx.Graph) -> None:
        for node in graph.nodes:
            if node.target == torch.ops.aten.tanh.default:
                node.target = torch.ops.aten.sin.default

    optimizer = lambda p: torch.optim.SGD(p, lr=1e-2)
    monkeypatch.setattr(graphs, "_spell_out_alpha", wrong)
    with pytest.warns(UserWarning, match="does not agree with the eager step: .* differs by"):
        compiled, trainer = fit_copy(
            small_rosenbrock(), weft.Data(parameter_rows(40), batch_size=10), True, optimizer=optimizer
        )
    eager, _ = fit_copy(small_rosenbrock(), weft.Data(parameter_rows(40), batch_size=10), False, optimizer=optimizer)
    assert same(eager.last_weights, compiled.last_weights)
    assert graphs_made(trainer) == [-1]


class Neuro:
    """The constrained Rosenbrock problem made of NeuroMANCER's own classes."""

    @staticmethod
    def make() -> Any:
        neuromancer = pytest.importorskip("neuromancer")
        from neuromancer.constraint import variable
        from neuromancer.loss import PenaltyLoss
        from neuromancer.problem import Problem
        from neuromancer.system import Node

        torch.manual_seed(0)
        net = neuromancer.modules.blocks.MLP(2, 2, hsizes=[8], nonlin=nn.Tanh)
        node = Node(net, ["a", "p"], ["x"], name="net")
        x, a, p = variable("x"), variable("a"), variable("p")
        x1, x2 = x[:, [0]], x[:, [1]]
        objective = ((1 - x1) ** 2 + a * (x2 - x1**2) ** 2).minimize(weight=1.0, name="f")
        outer = 10.0 * (x1**2 + x2**2 <= p**2)
        outer.name = "outer"
        return Problem([node], PenaltyLoss([objective], [outer]))


@pytest.mark.filterwarnings("ignore")  # of what `import neuromancer` imports
def test_a_real_neuromancer_problem_has_the_losses_of_eager() -> None:
    assert_agree(Neuro.make(), weft.Data(parameter_rows(40), batch_size=10), epochs=20)


def test_second_derivatives_have_the_losses_of_eager() -> None:
    def residual(u: Tensor, x: Tensor) -> Tensor:  # u'' = -sin(x)
        first = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
        return (torch.autograd.grad(first.sum(), x, create_graph=True)[0] + x.sin()).square()

    torch.manual_seed(0)
    node = weft.Node(tanh_net(1, 1), ["x"], ["u"], name="net")
    problem = weft.Problem([node], [weft.objective(residual, name="pde")], grad_inference=True)
    x = torch.linspace(0, 3, 30)[:, None]
    assert_agree(problem, weft.Data(weft.DictDataset({"x": x}), inputs_require_grad=["x"]))


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("uncompiled")
def test_accumulated_batches_agree() -> None:
    assert_agree(small_rosenbrock(), weft.Data(parameter_rows(36), batch_size=10), accumulate=2, clip=0.5)


@pytest.mark.usefixtures("uncompiled")
def test_a_hook_that_reads_the_gradients_gets_them() -> None:
    norms: dict[bool, list[float]] = {False: [], True: []}
    for compiled in norms:
        hook = {
            "on_before_optimizer_step": lambda trainer, _, c=compiled: norms[c].append(
                float(nn.utils.get_total_norm([p.grad for p in trainer.problem.parameters()]))
            )
        }
        _, trainer = fit_copy(small_rosenbrock(), weft.Data(parameter_rows(40), batch_size=10), compiled, hooks=hook)
    assert_all_graphs(trainer)
    assert len(norms[True]) == 20
    assert norms[True] == pytest.approx(norms[False], rel=1e-4)


@pytest.mark.usefixtures("uncompiled")
def test_schedules_change_the_rate_without_a_new_graph() -> None:
    schedule = weft.Schedule(lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9), interval="step")
    trainer = assert_agree(small_rosenbrock(), rosenbrock_data(), scheduler=schedule, clip=1.0)
    assert set(graphs_made(trainer)) == {1}


@pytest.mark.usefixtures("uncompiled")
def test_what_a_step_logs_and_asks_of_the_trainer_is_in_the_graph() -> None:
    def step(trainer: weft.Trainer, batch: dict[str, Any]) -> Tensor:
        out = trainer.problem(batch)
        trainer.log({"half": out["train_loss"] / 2})
        return out["train_loss"] * (1 + 0.1 * trainer.current_epoch)

    trainer = assert_agree(small_rosenbrock(), weft.Data(parameter_rows(40), batch_size=10), training_step=step)
    assert trainer.run is not None
    assert trainer.run.history.values["half"][0] == pytest.approx(
        trainer.run.history.values["train_loss"][0] / 2, rel=1e-5
    )


@pytest.mark.usefixtures("uncompiled")
def test_an_attribute_that_changes_gets_its_own_graph() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net, self.scale = tanh_net(1, 1), 1.0

        def forward(self, batch: dict[str, Any]) -> Tensor:
            return self.scale * (self.net(batch["a"]) - batch["p"]).square().mean()

    def double(trainer: weft.Trainer) -> None:
        trainer.problem.scale = 1.0 if trainer.current_epoch < 3 else 2.0

    trainer = assert_agree(
        Scaled(), weft.Data(parameter_rows(40), batch_size=10), hooks={"on_epoch_start": double}, epochs=6
    )
    assert graphs_made(trainer) == [2]


@pytest.mark.usefixtures("uncompiled")
def test_a_weight_that_is_not_finite_is_skipped_as_in_eager() -> None:
    bad = parameter_rows(40)
    bad.datadict["a"][7] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options: dict[str, Any] = {"on_nonfinite": "skip", "clip": 1.0}
        eager, one = fit_copy(small_rosenbrock(), weft.Data(bad, batch_size=10), False, **options)
        compiled, other = fit_copy(small_rosenbrock(), weft.Data(bad, batch_size=10), True, **options)
    assert graphs_made(other) == [1]
    assert one.run.progress.skipped_total == other.run.progress.skipped_total == 5
    assert compiled.history["train_loss"] == pytest.approx(eager.history["train_loss"], rel=1e-5)
    with pytest.raises(FloatingPointError, match="train_f is nan in step"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit_copy(small_rosenbrock(), weft.Data(bad, batch_size=10), True, clip=1.0)


# ---- optimizers ------------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=0.1, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, nesterov=True, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True, momentum=0.9),
    "Groups": lambda p: torch.optim.Adam([{"params": [q], "lr": 1e-3 * i} for i, q in enumerate(p, 1)]),
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "Adagrad": torch.optim.Adagrad,
    "Adamax": torch.optim.Adamax,
    "Adadelta": torch.optim.Adadelta,
    "ASGD": torch.optim.ASGD,
    "Rprop": torch.optim.Rprop,
    "Adafactor": torch.optim.Adafactor,  # reads tensors, so it stays outside
}


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_in_the_graph_and_outside_of_it_agree(name: str) -> None:
    problem = weft.Problem(
        [weft.Node(nn.Linear(1, 1), ["a"], ["x"])], [weft.objective(lambda x, p: (x - p) ** 2, name="f")]
    )
    trainer = assert_agree(problem, weft.Data(parameter_rows(20), batch_size=10), optimizer=OPTIMIZERS[name], epochs=10)
    assert trainer.run is not None
    is_inside = [type(graph).__name__ == "UpdateGraph" for graph in trainer.run.graphs.all()]
    assert is_inside == [name != "Adafactor"]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_a_line_search_evaluates_graphs(line_search: str | None) -> None:
    options: dict[str, Any] = {
        "optimizer": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=5, line_search_fn=line_search),
        "epochs": 4,
        "precision": "64-true",
    }
    given = weft.Data(parameter_rows(20), parameter_rows(10, 2), batch_size=20)
    trainer = assert_agree(small_rosenbrock(), given, rel=1e-9, **options)
    assert trainer.run is not None
    assert trainer.run.progress.evaluations > 4 * 4
    eager, other = fit_copy(small_rosenbrock(), given, False, **options)
    assert other.run.progress.evaluations == trainer.run.progress.evaluations
    assert eager.history["train_loss"][-1] < 0.9 * eager.history["train_loss"][0]


@pytest.mark.usefixtures("uncompiled")
def test_a_line_search_over_accumulated_batches_evaluates_graphs() -> None:
    assert_agree(
        small_rosenbrock(),
        weft.Data(parameter_rows(36), batch_size=10),
        rel=1e-9,
        optimizer=lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4),
        accumulate=2,
        epochs=4,
        precision="64-true",
    )


# ---- resume, shapes, second fits
# ---------------------------------------------------------------------------------------


def resumed(
    compile: Any, folder: Path, stop_at: int, **options: Any
) -> tuple[weft.FitResult, weft.FitResult, weft.Trainer]:
    """An uninterrupted fit, and one that was stopped after `stop_at` steps and resumed from its checkpoint."""
    given = weft.Data(parameter_rows(43), parameter_rows(10, 2), batch_size=10)
    is_armed = False

    def stop(trainer: weft.Trainer, batch: Any, loss: Tensor) -> None:
        if is_armed and trainer.global_step == stop_at:
            raise InterruptedError

    options |= {"clip": 1.0, "epochs": 4, "hooks": {"on_step_end": stop}}
    whole, _ = fit_copy(small_rosenbrock(), given, compile, **options)
    options |= {"root_dir": str(folder), "run_name": "run", "checkpoint": {"every_n_steps": 1}}
    is_armed = True
    with pytest.raises(InterruptedError):
        fit_copy(small_rosenbrock(), given, compile, **options)
    is_armed = False
    rest, trainer = fit_copy(small_rosenbrock(), given, compile, resume="last", **options)
    return whole, rest, trainer


@pytest.mark.parametrize("stop_at", [2, 7, 10])
def test_a_resumed_compiled_run_ends_bitwise_where_the_uninterrupted_one_does(stop_at: int, tmp_path: Path) -> None:
    whole, rest, trainer = resumed(True, tmp_path, stop_at)
    assert_all_graphs(trainer)
    assert rest.history == whole.history
    assert same(rest.last_weights, whole.last_weights)
    eager, _, _ = resumed(False, tmp_path / "eager", stop_at)
    assert not same(eager.last_weights, whole.last_weights)  # so the path that was taken does matter


@pytest.mark.usefixtures("uncompiled")
def test_batches_of_ever_new_shapes_do_not_compile_for_ever() -> None:
    batches = [{"a": torch.rand(n, 1), "p": torch.rand(n, 1) + 0.5} for n in range(2, 14)]
    with pytest.warns(UserWarning, match="stays eager: its batches have more than 8 different shapes"):
        result, trainer = fit_copy(small_rosenbrock(), batches, True)
    assert sorted(graphs_made(trainer)) == [-1] * 4 + [1] * 8
    assert result.steps == 12 * 5


@pytest.mark.usefixtures("uncompiled")
def test_phases_begin_eagerly_and_go_on_as_graphs() -> None:
    phases = [
        weft.Phase(epochs=2),
        weft.Phase(epochs=3, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), weights={"outer": 2.0}),
    ]
    trainer = assert_agree(small_rosenbrock(), weft.Data(parameter_rows(40), batch_size=10), phases=phases)
    assert graphs_made(trainer) == [1, 1]


# ---- what stays eager, and says why
# ------------------------------------------------------------------------------------


class WithNumpy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = tanh_net(1, 1)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        shift = torch.from_numpy(batch["p"].numpy() ** 2)  # a result outside torch
        return (self.net(batch["a"]) - shift).square().mean()


class Counting(WithNumpy):
    calls = 0

    def forward(self, batch: dict[str, Any]) -> Tensor:
        self.calls += 1
        return self.net(batch["a"]).square().mean()


class Branching(WithNumpy):
    def forward(self, batch: dict[str, Any]) -> Tensor:
        loss = self.net(batch["a"]).square().mean()
        return loss if loss > 0.1 else 2 * loss


@pytest.mark.parametrize(
    ("problem", "options", "reason"),
    [
        (WithNumpy, {}, r"test_compiled.py, line \d+: shift = torch.from_numpy"),
        (Counting, {}, "sets Counting.calls anew every time"),
        (Branching, {}, r"data-dependent.*\(test_compiled.py, line \d+: return loss if loss > 0.1"),
    ],
)
def test_what_cannot_be_a_graph_runs_as_eager_and_says_why(problem: Any, options: dict[str, Any], reason: str) -> None:
    given = weft.Data(parameter_rows(40), batch_size=10)
    with pytest.warns(UserWarning, match=f"compile=True: the update stays eager: .*{reason}") as caught:
        compiled, _ = fit_copy(problem(), given, True, **options)
    assert len([w for w in caught if "stays eager" in str(w.message)]) == 1
    eager, _ = fit_copy(problem(), given, False, **options)
    assert compiled.history == eager.history
    assert same(compiled.last_weights, eager.last_weights)


def test_an_update_of_ones_own_stays_eager() -> None:
    class Own(weft.Trainer):
        def update(self, batch: Any) -> None:
            super().update(batch)

    with pytest.warns(UserWarning, match="Own has its own update"):
        Own(epochs=1, compile=True, progress=False).fit(small_rosenbrock(), rosenbrock_data())


def test_without_a_compiler_the_run_stays_eager(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path / "empty"))
    absent = inductor.patch({"cpp.cxx": ("no-such-compiler",)})  # monkeypatch would leave the setting deleted
    with absent, pytest.warns(UserWarning, match=r"stays eager: there is no working C\+\+ compiler"):
        result, trainer = fit_copy(small_rosenbrock(), weft.Data(parameter_rows(20), batch_size=10), True, epochs=2)
    assert result.steps == 4
    assert graphs_made(trainer) == [-1]


# ---- "auto", and what is left behind
# -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("true_costs")
def test_auto_leaves_a_short_fit_alone_and_takes_a_long_one() -> None:
    def stop(trainer: weft.Trainer, batch: Any, loss: Tensor) -> None:
        trainer.stop("enough")

    given = weft.Data(parameter_rows(40), batch_size=10)
    _, short = fit_copy(small_rosenbrock(), given, "auto", epochs=20)
    assert graphs_made(short) == [-1]
    _, long = fit_copy(small_rosenbrock(), given, "auto", epochs=10**6, hooks={"on_step_end": stop})
    assert graphs_made(long) == [0]


@pytest.mark.usefixtures("uncompiled")
def test_checks_leave_problem_optimizer_and_random_state_alone() -> None:
    """A graph that is compared with eager at every step trains like one that never is."""
    states = []
    for checks in (0, 10**6):
        trainer = weft.Trainer(epochs=3, seed=0, progress=False, compile=True)
        with trainer.start(Stateful(), weft.Data(parameter_rows(40), batch_size=10)) as run:
            for _ in run.epochs():
                for batch in run.batches("train"):
                    run.update(batch)
                    for graph in run.graphs.all():
                        graph.num_checks = checks
        states.append((run.state_dict()["problem"], run.optimizers["default"].state_dict(), torch.get_rng_state()))
    assert same(states[0], states[1])


def test_a_cache_folder_that_is_given_is_used(cache: Path) -> None:
    assert graphs.cache_folder() == cache
    kept = [path for path in cache.iterdir() if path.name != "torch"]  # torch's own is below it
    assert all(path.suffix in (".so", ".pt2") or path.name.startswith("kernels-") for path in kept)


def test_the_progress_line_says_when_a_graph_is_compiled(capsys: pytest.CaptureFixture[str]) -> None:
    given = weft.Data(parameter_rows(40), batch_size=10)
    fit_copy(small_rosenbrock(), given, True, epochs=2, progress="auto")
    told = capsys.readouterr().err.splitlines()
    begun = [i for i, line in enumerate(told) if line.endswith("compiling the update ...")]
    assert len(begun) == 1 and re.search(r"compiling the update: \d+ s$", told[begun[0] + 1])
    fit_copy(small_rosenbrock(), given, False, epochs=2, progress="auto")
    assert "compiling" not in capsys.readouterr().err
