"""What only a CUDA device can show."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import weft
from tests.helpers.bitwise import flat_weights
from tests.helpers.waits import no_waits

# A warning of a library that only shows on a GPU is told in the summary, and fails no test.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
A = torch.tensor([[1.2, 1.0], [0.0, 1.0]])


class WatchedFit(nn.Module):
    def __init__(self, dropout: float = 0.0, factor: float = 1.0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 32), nn.GELU(), nn.Dropout(dropout), nn.Linear(32, 1))
        self.factor, self.seen = factor, dict[str, torch.dtype]()

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        x = batch["x"]
        y = self.net(x)
        self.seen = {"x": x.dtype, "y": y.dtype}
        return {f"{batch['name']}_loss": (y - x.prod(1, keepdim=True)).square().mean() * self.factor, "y": y}


def points_float32(rows: int, seed: int = 0) -> dict[str, Tensor]:
    return {"x": torch.rand(rows, 2, generator=torch.Generator().manual_seed(seed))}


def fit_on_gpu(
    problem: nn.Module, rows: int = 256, batch: int = 32, **options: Any
) -> tuple[weft.FitResult, weft.Trainer]:
    trainer = weft.Trainer(**{"epochs": 3, "seed": 0, "progress": False, "accelerator": "gpu"} | options)
    return trainer.fit(problem, weft.Data(points_float32(rows), points_float32(64, 1), batch_size=batch)), trainer


def pair(**options: Any) -> tuple[WatchedFit, WatchedFit]:
    torch.manual_seed(0)
    one = WatchedFit(**options)
    return one, copy.deepcopy(one)


@pytest.mark.parametrize(
    "optimizer",
    [None, lambda params: torch.optim.LBFGS(params, line_search_fn="strong_wolfe", max_iter=5)],
    ids=["adam", "lbfgs"],
)
def test_float64_on_the_gpu_ends_where_the_cpu_does(optimizer: Any) -> None:
    on_gpu, on_cpu = pair()
    for problem, accelerator in ((on_gpu, "gpu"), (on_cpu, "cpu")):
        fit_on_gpu(problem, precision="64-true", accelerator=accelerator, optimizer=optimizer)
    assert next(on_gpu.parameters()).is_cuda and next(on_gpu.parameters()).dtype == torch.float64
    torch.testing.assert_close(flat_weights(on_gpu), flat_weights(on_cpu), rtol=0, atol=1e-7)
    assert not torch.allclose(flat_weights(on_gpu), flat_weights(pair()[0]).double(), atol=1e-3)  # it trained


@pytest.mark.parametrize(
    ("precision", "inside", "kept"),
    [
        ("bf16-mixed", torch.bfloat16, torch.float32),
        ("16-mixed", torch.float16, torch.float32),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
    ],
)
def test_half_precision_trains_and_leaves_inputs_alone(precision: str, inside: torch.dtype, kept: torch.dtype) -> None:
    problem, _ = pair()
    result, _ = fit_on_gpu(problem, precision=precision, epochs=20, clip=1.0)
    assert problem.seen == {"x": torch.float32, "y": inside} and next(problem.parameters()).dtype == kept
    assert result.history["train_loss"][-1] < result.history["train_loss"][0]


def test_an_overflow_in_16_mixed_skips_the_step_and_training_goes_on(tmp_path: Path) -> None:
    problem, _ = pair(factor=1e4)  # times the first scale of 65,536: too large for float16
    before = flat_weights(problem)
    scales: list[float] = []
    look = {"on_epoch_end": lambda trainer, metrics: scales.append(trainer.run.fabric._precision.scaler.get_scale())}
    fit_on_gpu(problem, precision="16-mixed", hooks=look, root_dir=str(tmp_path), run_name="run", checkpoint=True)
    assert (
        scales[0] < 65536 and not torch.equal(flat_weights(problem), before) and flat_weights(problem).isfinite().all()
    )
    state = torch.load(tmp_path / "run/checkpoints/step-000000024.ckpt", weights_only=True)
    assert state["scaler"]["scale"] == scales[-1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip": 0.1},
        {"accumulate": 2},
        {"precision": "bf16-mixed"},
        {"precision": "16-mixed"},
        {"precision": "64-true"},
    ],
    ids=str,
)
def test_no_step_waits_for_the_gpu(options: dict[str, Any]) -> None:
    problem, _ = pair()
    schedule = weft.Schedule(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 10), interval="step")
    data = weft.Data(points_float32(4096), points_float32(64, 1), batch_size=16)
    trainer = weft.Trainer(epochs=2, progress=False, accelerator="gpu", scheduler=schedule, **options)
    with trainer.start(problem, data) as run:
        for _ in run.epochs():
            batches = run.batches("train")
            run.update(next(batches))  # the order of the rows goes to the GPU, optimizers make their state
            with no_waits():
                for batch in batches:
                    run.update(batch)
            run.evaluate("dev")
    assert run.progress.step == 512 // options.get("accumulate", 1)


def test_the_check_for_syncs_can_fail() -> None:
    with pytest.raises(RuntimeError, match="synchronizing"), no_waits():
        torch.ones((), device="cuda").item()


def test_an_optimizer_that_is_not_fused_says_that_it_waits() -> None:
    with pytest.warns(UserWarning, match="waits for the GPU in each step, as SGD is not fused"):
        fit_on_gpu(pair()[0], optimizer=lambda params: torch.optim.SGD(params, lr=0.1))


def test_a_step_that_is_not_finite_is_left_out_and_raises_at_the_end_of_the_epoch() -> None:
    class Breaks(WatchedFit):
        steps = 0

        def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
            out = super().forward(batch)
            self.steps += self.training
            return (
                {**out, "train_loss": out["train_loss"] * (float("nan") if self.steps == 3 else 1.0)}
                if self.training
                else out
            )

    torch.manual_seed(0)
    problem = Breaks()
    good = copy.deepcopy(problem)
    good.steps = -1000
    with pytest.raises(FloatingPointError, match="train_loss is nan in step 2 "):
        fit_on_gpu(problem, batch=64, epochs=1)
    kept: list[Tensor] = []
    keep = {"on_step_end": lambda trainer, batch, loss: kept.append(flat_weights(good))}
    fit_on_gpu(good, batch=64, epochs=1, hooks=keep)
    assert flat_weights(problem).isfinite().all() and not torch.equal(flat_weights(problem), kept[-1])


def test_a_resumed_run_with_dropout_on_the_gpu_ends_at_the_same_bits(tmp_path: Path) -> None:
    whole, resumed = pair(dropout=0.5)
    options = {"root_dir": str(tmp_path), "checkpoint": {"every_n_steps": 5, "keep": 50}}
    first, _ = fit_on_gpu(whole, run_name="whole", **options)
    torch.cuda.manual_seed(1234)  # what is resumed must not depend on this
    second, _ = fit_on_gpu(
        resumed, run_name="again", resume=str(tmp_path / "whole/checkpoints/step-000000010.ckpt"), **options
    )
    assert all(torch.equal(first.last_weights[k], second.last_weights[k]) for k in first.last_weights)
    assert first.history == second.history
    state = torch.load(tmp_path / "whole/checkpoints/step-000000010.ckpt", weights_only=True)
    assert len(state["random"]["cuda"]) == torch.cuda.device_count()


def test_hard_coded_matrices_of_plain_functions_work_on_the_gpu_and_come_back() -> None:
    policy = weft.Node(nn.Linear(2, 1), ["x"], ["u"], name="policy")
    B = torch.tensor([[1.0], [0.5]])
    plant = weft.Node(lambda x, u: x @ A.T + u @ B.T, ["x", "u"], ["x"], name="plant")
    problem = weft.Problem(
        [weft.Rollout([policy, plant], steps=5)], [weft.objective(lambda x: x.square(), name="cost")]
    )
    trainer = weft.Trainer(epochs=20, progress=False, accelerator="gpu", seed=0)
    result = trainer.fit(problem, {"x": torch.rand(64, 1, 2)})
    assert result.history["train_loss"][-1] < result.history["train_loss"][0]
    assert trainer.predict({"x": torch.rand(3, 1, 2)})["x"].shape == (3, 6, 2)
    assert A.device.type == B.device.type == "cpu"


def test_one_gpu_through_ddp_ends_where_one_gpu_does() -> None:
    alone, through = pair()
    fit_on_gpu(alone)
    with mock.patch.dict(os.environ):  # Fabric writes down there where the processes meet
        fit_on_gpu(through, strategy="ddp", devices=1)
    torch.distributed.destroy_process_group()
    torch.testing.assert_close(flat_weights(through), flat_weights(alone), rtol=0, atol=1e-6)


def test_a_loader_with_workers_feeds_the_gpu() -> None:
    loader = torch.utils.data.DataLoader(
        [{"x": x} for x in points_float32(64)["x"]],
        batch_size=16,
        num_workers=2,
        pin_memory=True,  # type: ignore[arg-type]
    )
    trainer = weft.Trainer(epochs=2, progress=False, accelerator="gpu")
    assert trainer.fit(pair()[0], loader).steps == 8


def test_more_gpus_than_there_are_is_an_error_that_says_how_many_there_are() -> None:
    count = torch.cuda.device_count()
    with pytest.raises(ValueError, match=f"This machine has {count} CUDA device"):
        fit_on_gpu(pair()[0], devices=count + 1)
