"""Profilers: what they report is what happened, they change nothing, and off is off."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import weft
from weft.hooks import timing
from weft.hooks.profiling import PyTorchProfiler
from weft.step.instrument import watched

PAUSE = 0.01  # seconds; 30 of them are more than what the other node loses to a busy machine


class Slow(nn.Module):
    """Hands x on after a while."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(PAUSE)
        return x


def slow_problem(slow: bool = True) -> weft.Problem:
    torch.manual_seed(0)
    nodes = [weft.Node(nn.Linear(2, 2), ["p"], ["x"], name="net")]
    nodes.append(weft.Node(Slow() if slow else nn.Identity(), ["x"], ["y"], name="filter"))
    return weft.Problem(nodes, [weft.objective(lambda y, p: (y - p) ** 2, name="f")])


def forty_rows() -> weft.Data:
    rows = weft.DictDataset({"p": torch.rand(40, 2, generator=torch.Generator().manual_seed(1))})
    return weft.Data(rows, rows, batch_size=8)


def fit_slow(problem: nn.Module | None = None, **options: Any) -> weft.FitResult:
    trainer = weft.Trainer(**{"epochs": 3, "progress": False, "seed": 0, **options})
    return trainer.fit(problem if problem is not None else slow_problem(), forty_rows())


def test_the_simple_profile_adds_up_and_names_the_slowest_node() -> None:
    profile = fit_slow(profiler="simple").profile
    found = profile.to_dict()
    assert found["epochs"] == 3 and found["steps"] == 15 and found["slowest_node"] == "filter"
    assert sum(part["seconds"] for part in found["parts"].values()) == pytest.approx(found["seconds"], rel=1e-9)
    calls = {name: part["calls"] for name, part in found["parts"].items()}
    assert calls["forward"] == calls["backward"] == calls["optimizer"] == 15  # counted from the sizes
    assert calls["evaluation"] == 3 and calls["data"] == 18  # a wait for each batch, one to learn that none is left
    assert found["nodes"]["filter"]["calls"] == found["nodes"]["net"]["calls"] == 30
    assert found["nodes"]["filter"]["seconds"] >= 30 * PAUSE
    for word in (
        "node filter",
        "forward",
        "backward",
        "optimizer",
        "evaluation",
        "ms/step",
        "slowest node is 'filter'",
    ):
        assert word in str(profile)


def test_a_clock_that_is_read_gives_each_part_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])  # start, forward begins, node begins, node ends, forward ends, stop
    monkeypatch.setattr(timing, "perf_counter", lambda: next(now))
    profiler = weft.hooks.SimpleProfiler()
    node = profiler.watch("node a", lambda: None)
    forward = profiler.watch("forward", node)
    profiler.start()
    forward()
    profiler.stop()
    parts = profiler.profile.parts
    assert (parts["loop"].seconds, parts["forward"].seconds, parts["forward"].own_seconds) == (6.0, 9.0, 6.0)
    assert profiler.profile.nodes["a"].seconds == 3.0 and profiler.profile.seconds == 15.0


@pytest.mark.parametrize("profiler", ["simple", "pytorch", "advanced"])
def test_a_profiled_run_ends_bitwise_where_the_other_does(profiler: str, tmp_path: Path) -> None:
    plain, profiled, other = slow_problem(False), slow_problem(False), slow_problem(False)
    fit_slow(plain)
    fit_slow(profiled, profiler=profiler, root_dir=str(tmp_path))
    fit_slow(other, profiler=profiler, root_dir=str(tmp_path / "b"), seed=1)
    same = [torch.equal(a, b) for a, b in zip(plain.parameters(), profiled.parameters(), strict=True)]
    assert all(same)
    assert not all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))


def test_nodes_are_left_as_they_were_even_when_training_fails() -> None:
    problem = slow_problem(False)

    def fail(trainer: Any, batch: Any, loss: Any) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        fit_slow(problem, profiler="simple", hooks={"on_step_end": fail})
    assert not [name for name, module in problem.named_modules() if "forward" in vars(module)]


def test_without_a_profiler_every_part_is_called_as_it_is() -> None:
    trainer = weft.Trainer(epochs=1, progress=False)
    with trainer.start(slow_problem(False), forty_rows()) as run:
        assert watched(run.state.hooks, "backward", run.fabric.backward) == run.fabric.backward
        assert not [m for m in run.problem.modules() if "forward" in vars(m)]
        for _ in run.epochs():
            for batch in run.batches("train"):
                run.update(batch)
    watching = weft.Trainer(epochs=1, progress=False, profiler="simple")
    with watching.start(slow_problem(False), forty_rows()) as run:
        assert watched(run.state.hooks, "backward", run.fabric.backward) != run.fabric.backward


def test_hooks_checkpoints_rollouts_and_line_searches_have_their_rows(tmp_path: Path) -> None:
    def slow_hook(trainer: Any, metrics: Any) -> None:
        time.sleep(0.002)

    loop = weft.Rollout(
        [
            weft.Node(nn.Linear(2, 1), ["x"], ["u"], name="policy"),
            weft.Node(lambda x, u: x + u, ["x", "u"], ["x"], name="plant"),
        ],
        4,
    )
    problem = weft.Problem([loop], [weft.objective(lambda x: x**2, name="f")])
    rows = weft.DictDataset({"x": torch.rand(8, 1, 2)})
    trainer = weft.Trainer(
        epochs=2,
        progress=False,
        profiler="simple",
        checkpoint=True,
        root_dir=str(tmp_path),
        hooks={"on_epoch_end": slow_hook},
        optimizer=lambda params: torch.optim.LBFGS(params, max_iter=3),
    )
    result = trainer.fit(problem, rows)
    found = result.profile.to_dict()
    assert found["parts"]["checkpoint"]["calls"] >= 2 and found["parts"]["optimizer"]["calls"] == 2
    assert (
        found["nodes"]["rollout.policy"]["calls"] == 4 * result.evaluations == found["nodes"]["rollout.plant"]["calls"]
    )
    assert "slow_hook" in str(result.profile) and found["parts"]["hooks"]["seconds"] >= 0.004
    assert json.loads((result.run_dir / "profile" / "profile.json").read_text()) == found  # type: ignore[operator]
    assert weft.load_result(result.run_dir).steps == 2  # type: ignore[arg-type]


class ModuleOfLightning(pl.LightningModule):
    """By automatic or manual optimization, the net on two outputs of one."""

    def __init__(self, manual: bool) -> None:
        super().__init__()
        self.net, self.automatic_optimization = nn.Linear(2, 1), not manual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self(batch[0]).square().mean()
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self(batch[0]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


def fit_module(manual: bool, profiler: str | None) -> tuple[weft.FitResult, ModuleOfLightning]:
    torch.manual_seed(0)
    rows, module = (
        TensorDataset(torch.rand(40, 2, generator=torch.Generator().manual_seed(1))),
        ModuleOfLightning(manual),
    )
    loaders = {f"{split}_dataloaders": DataLoader(rows, batch_size=8) for split in ("train", "val")}
    return weft.Trainer(epochs=3, progress=False, seed=0, profiler=profiler).fit(module, **loaders), module


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.filterwarnings("ignore:.*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*")
def test_of_a_lightning_module_the_parts_are_those_of_any_problem(manual: bool) -> None:
    result, module = fit_module(manual, "simple")
    found = result.profile.to_dict()
    assert sum(part["seconds"] for part in found["parts"].values()) == pytest.approx(found["seconds"], rel=1e-9)
    calls = {name: part["calls"] for name, part in found["parts"].items()}
    assert calls["forward"] == calls["backward"] == calls["optimizer"] == found["steps"] == 15
    assert calls["evaluation"] == 3 and calls["data"] == 18
    assert found["nodes"]["net"]["calls"] == 30 and not result.profile.parts["optimizer"].parts
    _, other = fit_module(manual, None)
    assert torch.equal(module.net.weight, other.net.weight)


def test_a_loop_of_ones_own_and_an_own_update_are_timed_too() -> None:
    class Own(weft.Trainer):
        def update(self, batch: Any) -> Any:
            loss = self.problem(batch)["train_loss"]
            self.backward(loss)
            self.step()
            return loss

    trainer = Own(epochs=2, progress=False, profiler="simple")
    parts = trainer.fit(slow_problem(False), forty_rows()).profile.to_dict()["parts"]
    assert [parts[name]["calls"] for name in ("forward", "backward", "optimizer")] == [10, 10, 10]


def test_the_pytorch_trace_has_ranges_named_after_parts_and_nodes(tmp_path: Path) -> None:
    result = fit_slow(
        profiler=PyTorchProfiler(wait=1, warmup=1, active=2, shapes=True, memory=True), root_dir=str(tmp_path)
    )
    files = list((result.run_dir / "profile").glob("*.pt.trace.json"))  # type: ignore[operator]
    assert [str(f) for f in files] == result.profile.to_dict()["files"] and len(files) == 1
    events = json.loads(files[0].read_text())["traceEvents"]
    names = [e["name"] for e in events if e.get("cat") == "user_annotation"]
    for name in ("forward", "backward", "optimizer", "node net", "node filter"):
        assert names.count(name) == 2, name  # two active steps
    assert "node filter" in str(result.profile)
    assert not list(Path().glob("*.json")) and not torch.autograd.profiler._is_profiler_enabled


def test_the_pytorch_profiler_asks_for_a_folder_and_says_when_a_run_is_too_short() -> None:
    with pytest.warns(UserWarning, match="recorded nothing: it begins after 5 \\+ 2 steps, and there were 1"):
        result = fit_slow(profiler="pytorch", max_steps=1)
    assert result.run_dir is not None and result.run_dir.parent == Path("runs").resolve()
    with pytest.raises(ValueError, match="has no folder"):
        fit_slow(profiler="pytorch", fast_dev_run=True)
    with pytest.raises(ValueError, match="active=0"):
        PyTorchProfiler(active=0)


def test_the_advanced_profile_lists_functions() -> None:
    profile = fit_slow(profiler="advanced").profile
    assert profile.to_dict()["rows"][0]["function"].endswith("(<built-in method time.sleep>)")
    assert "time.sleep" in str(profile) and profile.to_dict()["rows"][0]["calls"] == 30


def test_any_object_with_start_step_stop_is_a_profiler() -> None:
    class Counting:
        def __init__(self) -> None:
            self.calls: list[str] = []

        def start(self) -> None:
            self.calls.append("start")

        def step(self) -> None:
            self.calls.append("step")

        def stop(self) -> None:
            self.calls.append("stop")

    mine = Counting()
    assert fit_slow(profiler=mine).profile is mine
    assert mine.calls == ["start", *["step"] * 15, "stop"]
    with torch.profiler.profile() as profiler:
        fit_slow(slow_problem(False))
    assert "node net" not in {e.key for e in profiler.key_averages()}
    profiler = torch.profiler.profile()
    fit_slow(profiler=profiler)
    assert {"node net", "forward", "backward"} <= {e.key for e in profiler.key_averages()}


@pytest.mark.parametrize(("profiler", "error"), [("simpel", ValueError), (3, TypeError), (object(), TypeError)])
def test_what_is_no_profiler_is_refused(profiler: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="profiler"):
        fit_slow(profiler=profiler)


def test_the_report_shows_where_the_time_went(tmp_path: Path) -> None:
    from weft.records import report

    result = fit_slow(profiler="simple", root_dir=str(tmp_path))
    assert repr(result).endswith(" s, see .profile)") and "filter" in str(result.profile)
    text = report.page(report.read_run(result.run_dir))  # type: ignore[arg-type]
    assert "Where the time goes (per step)" in text and "<th>node filter</th>" in text and "<th>backward</th>" in text
    plain = fit_slow(root_dir=str(tmp_path / "b"))
    assert repr(plain).endswith(" s)")
    assert "Where the time goes" not in report.page(report.read_run(plain.run_dir))  # type: ignore[arg-type]
    advanced = fit_slow(profiler="advanced", root_dir=str(tmp_path / "c"))
    assert "time.sleep" in report.page(report.read_run(advanced.run_dir))  # type: ignore[arg-type]
