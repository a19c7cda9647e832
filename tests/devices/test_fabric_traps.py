"""What Lightning Fabric does on one device that a user would not expect, and that must not happen here.

Each test shows, where it can, that Fabric really does it (the control), and that training with weft does not.
"""

from __future__ import annotations

import pickle
import sys
import warnings
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

import weft


class WatchedLine(nn.Module):
    """y = w t + b, fitted to 3 t; remembers the dtypes and the tensors that its last forward saw."""

    def __init__(self, grad_inference: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.grad_inference = grad_inference
        self.seen: dict[str, Any] = {}

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        y = self.layer(batch["t"])
        loss = (y.to(batch["t"].dtype) - 3 * batch["t"]).square().mean()
        self.seen = {"t": batch["t"], "y": y, "loss": loss, "grad": torch.is_grad_enabled()}
        return {f"{batch['name']}_loss": loss, "y": y}


def times(rows: int = 16, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {"t": torch.linspace(0, 1000.3, rows, dtype=dtype)[:, None] / 1000}


def trained_line(problem: nn.Module | None = None, data: Any = None, **options: Any) -> tuple[nn.Module, weft.Trainer]:
    problem = WatchedLine() if problem is None else problem
    trainer = weft.Trainer(**{"epochs": 2, "progress": False, "seed": 0} | options)
    trainer.fit(problem, data if data is not None else weft.Data(times(), batch_size=8))
    return problem, trainer


# ---- precision


def test_in_64_true_the_loss_stays_float64_from_the_step_to_the_optimizer() -> None:
    losses: list[Tensor] = []
    problem, _ = trained_line(
        precision="64-true", hooks={"on_step_end": lambda trainer, batch, loss: losses.append(loss)}
    )
    assert isinstance(problem, WatchedLine)
    assert {loss.dtype for loss in losses} == {torch.float64}
    assert [problem.seen[k].dtype for k in ("t", "y", "loss")] == [torch.float64] * 3
    assert problem.layer.weight.dtype == torch.float64
    assert torch.get_default_dtype() == torch.float32


def test_fabric_itself_hands_back_a_float32_loss_in_64_true() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="64-true")
    out = fabric.setup(WatchedLine())({**times(), "name": "train"})
    assert out["train_loss"].dtype == torch.float32  # if this fails, Fabric was repaired and our care can go


def test_lbfgs_in_64_true_ends_where_the_same_search_in_raw_float64_does() -> None:
    torch.manual_seed(0)
    problem = WatchedLine()
    weights = {k: v.double() for k, v in problem.state_dict().items()}
    problem, _ = trained_line(
        problem,
        weft.Data(times(), shuffle=False),
        precision="64-true",
        epochs=3,
        seed=None,
        monitor_metric="train_loss",
        monitor_mode="max",
        optimizer=lambda params: torch.optim.LBFGS(params, line_search_fn="strong_wolfe"),
        max_steps=1,
    )
    raw = WatchedLine().double()
    raw.load_state_dict(weights)
    optimizer = torch.optim.LBFGS(raw.parameters(), line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = raw({**times(dtype=torch.float32), "t": times()["t"].double(), "name": "train"})["train_loss"]
        loss.backward()
        return loss

    optimizer.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(problem.parameters(), raw.parameters(), strict=True))
    assert not torch.equal(weights["layer.weight"], raw.layer.weight)


def test_in_mixed_precision_inputs_keep_their_dtype_and_layers_run_in_bfloat16() -> None:
    problem, _ = trained_line(precision="bf16-mixed", data=weft.Data(times(), shuffle=False))
    assert isinstance(problem, WatchedLine)
    assert torch.equal(problem.seen["t"], times()["t"])
    assert problem.seen["y"].dtype == torch.bfloat16
    assert problem.layer.weight.dtype == torch.float32


def test_fabric_itself_rounds_inputs_in_mixed_precision() -> None:
    fabric, problem = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed"), WatchedLine()
    fabric.setup(problem)({**times(), "name": "train"})
    assert problem.seen["t"].dtype == torch.bfloat16


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_evaluation_and_prediction_run_in_the_precision_of_training(precision: str) -> None:
    data = weft.Data(times(), times(), times(), times(), batch_size=8)
    problem, trainer = trained_line(data=data, precision=precision)
    assert isinstance(problem, WatchedLine)
    for run in (trainer.validate, trainer.test):
        run()
        assert problem.seen["y"].dtype == (torch.float64 if precision == "64-true" else torch.bfloat16)
        assert problem.seen["t"].dtype == (torch.float64 if precision == "64-true" else torch.float32)


def test_16_mixed_without_a_gpu_is_refused_instead_of_becoming_something_else() -> None:
    with pytest.raises(ValueError, match="16-mixed.*bf16-mixed"):
        trained_line(precision="16-mixed", accelerator="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert Fabric(accelerator="cpu", precision="16-mixed")._precision.precision == "bf16-mixed"  # the control


# ---- the wrapper


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
def test_no_tensor_that_the_problem_returns_gets_a_backward_hook(precision: str) -> None:
    kept: list[dict[str, Tensor]] = []

    def step(trainer: weft.Trainer, batch: dict[str, Any]) -> dict[str, Tensor]:
        kept.append(trainer.problem(batch))
        return kept[-1]

    problem, trainer = trained_line(training_step=step, precision=precision)
    assert kept and all(tensor._backward_hooks is None for out in kept for tensor in out.values())
    assert trainer.problem is problem and type(trainer.problem) is WatchedLine


def test_fabric_itself_hooks_every_output() -> None:
    out = Fabric(accelerator="cpu", devices=1).setup(WatchedLine())({**times(), "name": "train"})
    assert all(tensor._backward_hooks for tensor in out.values())


def test_the_optimizer_is_the_plain_one_and_can_be_pickled() -> None:
    _, trainer = trained_line(optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    assert type(trainer.optimizer) is torch.optim.SGD
    assert pickle.loads(pickle.dumps(trainer.optimizer)).param_groups[0]["lr"] == 0.1


def test_hooks_are_not_handed_to_fabric_which_would_call_some_names_itself() -> None:
    _, trainer = trained_line(hooks={"on_epoch_end": lambda trainer, metrics: None})
    assert trainer.run is not None and trainer.run.fabric._callbacks == []
    with pytest.raises(TypeError, match="on_after_setup"):
        weft.Trainer(hooks={"on_after_setup": lambda fabric, module: None})


def test_a_second_fit_does_not_wrap_the_problem_again() -> None:
    problem, trainer = trained_line()
    trainer.fit(problem, weft.Data(times(), batch_size=8))
    assert [type(m) for m in trainer.problem.modules()] == [WatchedLine, nn.Linear]
    assert list(problem.state_dict()) == ["layer.weight", "layer.bias"]


def test_evaluation_keeps_autograd_on_for_a_problem_that_asks_for_it() -> None:
    for asks in (True, False):
        problem, _ = trained_line(WatchedLine(grad_inference=asks), weft.Data(times(), times(), batch_size=8))
        assert isinstance(problem, WatchedLine) and problem.seen["grad"] is asks
        assert not problem.seen["t"].is_inference()


def test_a_loader_that_is_passed_in_is_left_as_it_is() -> None:
    rows = [{"t": t} for t in times()["t"]]
    loader = torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3))  # type: ignore[arg-type]
    before = dict(vars(loader))
    trained_line(data=loader)
    assert all(value is before[name] for name, value in vars(loader).items() if name in before and name != "_iterator")
    assert loader.worker_init_fn is None and isinstance(loader.sampler, torch.utils.data.RandomSampler)


# ---- the environment


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("LT_ACCELERATOR", "cuda"),
        ("LT_DEVICES", "2"),
        ("LT_STRATEGY", "ddp"),
        ("LT_PRECISION", "64-true"),
        ("LT_NUM_NODES", "2"),
    ],
)
def test_variables_of_fabric_do_not_override_arguments_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.warns(UserWarning, match=f"{variable}.*ignored"):
        problem, trainer = trained_line()
    run = trainer.run
    assert run is not None and run.fabric.world_size == 1 and isinstance(problem, WatchedLine)
    assert problem.layer.weight.dtype == torch.float32


def test_fabric_itself_lets_them_override_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LT_PRECISION", "64-true")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert Fabric(accelerator="cpu", precision="32-true")._precision.precision == "64-true"


SLURM = {
    "SLURM_NTASKS": "2",
    "SLURM_JOB_NAME": "train",
    "SLURM_JOB_ID": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NNODES": "1",
    "SLURM_JOB_NODELIST": "node",
}


def test_slurm_variables_do_not_break_a_run_on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match="not supported"):  # the control
        Fabric(accelerator="cpu", devices=1)
    _, trainer = trained_line(devices=1)
    assert trainer.run is not None and trainer.run.fabric.world_size == 1


def test_one_device_is_the_default_and_works_in_an_interactive_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    _, trainer = trained_line()
    assert trainer.config.devices == 1 and trainer.run is not None and trainer.run.fabric.world_size == 1


def test_random_numbers_and_switches_are_where_they_were_after_devices_were_set_up() -> None:
    problem = WatchedLine()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    weft.Trainer(progress=False).start(problem, weft.Data(times()))
    assert torch.equal(torch.rand(3), expected)
