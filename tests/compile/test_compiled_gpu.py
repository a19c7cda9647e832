"""Compiled runs on a GPU: captured as CUDA graphs, no wait per step, the losses of eager."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import nn

import weft
from tests.helpers.waits import no_waits

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]


def rosenbrock_to_compile(*extra: nn.Module) -> weft.Problem:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 32), nn.GELU(), *extra, nn.Linear(32, 2))
    f = weft.objective(lambda x, a: (1 - x[:, :1]) ** 2 + a * (x[:, 1:] - x[:, :1] ** 2) ** 2, name="f")
    return weft.Problem(
        [weft.Node(net, ["a", "p"], ["x"])], [f], [weft.less_equal("x", 1.0, weight=10.0, name="upper")]
    )


def random_data(bad: bool = False) -> weft.Data:
    torch.manual_seed(1)
    tensors = {"a": torch.rand(200, 1), "p": torch.rand(200, 1)}
    if bad:
        tensors["a"][77] = torch.nan
    return weft.Data(
        weft.DictDataset(tensors), weft.DictDataset({k: v[:30] for k, v in tensors.items()}), batch_size=32
    )


def fit_on_cuda(
    given: weft.Data, compile: bool, start: nn.Module, **options: Any
) -> tuple[weft.FitResult, weft.Trainer]:
    settings: dict[str, Any] = {"epochs": 20, "seed": 0, "progress": False, "clip": 1.0, "accelerator": "cuda"}
    settings["optimizer"] = lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True)
    trainer = weft.Trainer(**{**settings, **options}, compile=compile)
    return trainer.fit(copy.deepcopy(start), given), trainer


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_twenty_epochs_have_the_losses_of_eager(precision: str) -> None:
    eager, _ = fit_on_cuda(random_data(), False, rosenbrock_to_compile(), precision=precision)
    compiled, trainer = fit_on_cuda(random_data(), True, rosenbrock_to_compile(), precision=precision)
    assert trainer.run is not None and min(trainer.run.graphs.made.values()) >= 1
    rel = 1e-4 if precision == "32-true" else 1e-9
    assert compiled.history["train_loss"] == pytest.approx(eager.history["train_loss"], rel=rel)
    assert compiled.history["dev_loss"] == pytest.approx(eager.history["dev_loss"], rel=rel)


def test_dropout_draws_anew_in_every_step() -> None:
    start = rosenbrock_to_compile(nn.Dropout(0.5))
    result, trainer = fit_on_cuda(random_data(), True, start, epochs=3)
    assert trainer.run is not None and min(trainer.run.graphs.made.values()) >= 1
    again, _ = fit_on_cuda(random_data(), True, start, epochs=3)
    assert result.history == again.history


def test_a_step_in_the_graph_waits_for_nothing() -> None:
    trainer = weft.Trainer(epochs=4, seed=0, progress=False, clip=1.0, accelerator="cuda", compile=True)
    with trainer.start(rosenbrock_to_compile(), random_data()) as run:
        for epoch in run.epochs():
            for number, batch in enumerate(run.batches("train")):
                # graphs are made and checked by then
                with no_waits() if epoch == 3 and number else contextlib.nullcontext():
                    run.update(batch)


def test_a_loss_that_is_not_finite_raises_with_its_step_and_keeps_the_weights() -> None:
    given, start = random_data(bad=True), rosenbrock_to_compile()
    seen: list[dict[str, Any]] = []
    hooks = {
        "on_step_end": lambda trainer, *_: seen.append({k: v.clone() for k, v in trainer.problem.state_dict().items()})
    }
    with pytest.raises(FloatingPointError, match="train_f is nan in step") as caught:
        fit_on_cuda(given, True, start, hooks=hooks)
    step = int(str(caught.value).split("in step ")[1].split()[0])
    assert step < len(seen)
    if step:
        assert all(torch.equal(seen[step][k], seen[step - 1][k]) for k in seen[step])


def test_inputs_that_require_grad_do_not_chain_the_steps() -> None:
    """Burgers-like: the batch itself requires grad, and is copied to where the graph reads it."""

    def residual(u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (torch.autograd.grad(u.sum(), x, create_graph=True)[0] - x.cos()).square()

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
    start = weft.Problem([weft.Node(net, ["x"], ["u"])], [weft.objective(residual, name="pde")], grad_inference=True)
    given = weft.Data(
        weft.DictDataset({"x": torch.linspace(0, 3, 96)[:, None]}), batch_size=32, inputs_require_grad=["x"]
    )
    eager, _ = fit_on_cuda(given, False, start)
    compiled, trainer = fit_on_cuda(given, True, start)
    assert trainer.run is not None and min(trainer.run.graphs.made.values()) >= 1
    assert compiled.history["train_loss"] == pytest.approx(eager.history["train_loss"], rel=1e-4)


def test_an_optimizer_that_counts_on_the_cpu_steps_outside_of_the_graph() -> None:
    make = lambda p: torch.optim.NAdam(p, lr=1e-3)
    eager, _ = fit_on_cuda(random_data(), False, rosenbrock_to_compile(), optimizer=make)
    compiled, trainer = fit_on_cuda(random_data(), True, rosenbrock_to_compile(), optimizer=make)
    assert trainer.run is not None and min(trainer.run.graphs.made.values()) >= 1
    assert compiled.history["train_loss"] == pytest.approx(eager.history["train_loss"], rel=1e-4)


def test_weights_that_were_moved_get_a_new_graph() -> None:
    def move(trainer: weft.Trainer) -> None:
        if trainer.current_epoch == 3:
            for p in trainer.problem.parameters():
                p.data = p.data.clone()

    eager, _ = fit_on_cuda(random_data(), False, rosenbrock_to_compile(), hooks={"on_epoch_start": move}, epochs=6)
    compiled, _ = fit_on_cuda(random_data(), True, rosenbrock_to_compile(), hooks={"on_epoch_start": move}, epochs=6)
    assert compiled.history["train_loss"] == pytest.approx(eager.history["train_loss"], rel=1e-4)
