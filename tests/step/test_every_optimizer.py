"""Every optimizer of torch, and those that users pick from elsewhere: trained, clipped, resumed, best weights kept.

What is asked of each is the same, whatever it is: a fit goes where a loop by hand goes, to the last bit; a resumed run
ends where the undisturbed one does; and the best weights are those that were evaluated.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import weft
from tests.helpers.bitwise import flat_weights, same
from tests.helpers.problems import tanh_net, tanh_points

Factory = Callable[[Any], Optimizer]
OF_TORCH = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, Optimizer) and kind is not Optimizer
)
ELSEWHERE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "schedule-free AdamW": ("schedulefree", "AdamWScheduleFree", {"lr": 1e-2, "warmup_steps": 2}),
    "schedule-free RAdam": ("schedulefree", "RAdamScheduleFree", {"lr": 1e-2}),
    "schedule-free SGD": ("schedulefree", "SGDScheduleFree", {"lr": 1e-1}),
    "Prodigy": ("prodigyopt", "Prodigy", {"lr": 1.0}),
    "SOAP": ("pytorch_optimizer", "SOAP", {"lr": 1e-2, "precondition_frequency": 2}),
    "Kron": ("pytorch_optimizer", "Kron", {"lr": 1e-3}),
    "Lion": ("pytorch_optimizer", "Lion", {"lr": 1e-3}),
    "Lamb": ("pytorch_optimizer", "Lamb", {"lr": 1e-2}),
    "Adan": ("pytorch_optimizer", "Adan", {"lr": 1e-2}),
    "AdEMAMix": ("pytorch_optimizer", "AdEMAMix", {"lr": 1e-2}),
    "Tiger": ("pytorch_optimizer", "Tiger", {"lr": 1e-3}),
    "DAdaptAdam": ("pytorch_optimizer", "DAdaptAdam", {"lr": 1.0}),
    "MARS": ("pytorch_optimizer", "MARS", {"lr": 1e-2}),
    "SAM": ("pytorch_optimizer", "SAM", {"base_optimizer": torch.optim.SGD, "lr": 1e-1}),
    "heavyball's SOAP": ("heavyball", "SOAP", {"lr": 1e-2}),
    "heavyball's Kron": ("heavyball", "PSGDKron", {"lr": 1e-3}),
}
SEARCHING = {"LBFGS", "SAM"}
"""Those that evaluate the loss themselves, and are not clipped."""
WITHOUT_DENSE_GRADIENTS = {"SparseAdam"}
EACH = pytest.mark.parametrize("name", [n for n in OF_TORCH if n not in WITHOUT_DENSE_GRADIENTS] + list(ELSEWHERE))
DATA = tanh_points(16)


def factory(name: str) -> Factory:
    """What makes the optimizer of a net; those that take matrices alone get the matrices."""
    if name in ELSEWHERE:
        module, kind, options = ELSEWHERE[name]
        package = pytest.importorskip(module)
        if module == "heavyball":
            package.utils.compile_mode = None  # its own step as it is: else each of its functions calls a compiler
        made = getattr(package, kind)
        if name == "SAM":
            made = evaluated_twice(made)
        return lambda params: made(list(params), **options)
    kind = getattr(torch.optim, name)
    if name == "Muon":
        return lambda params: kind([p for p in params if p.ndim == 2], lr=1e-2)
    return lambda params: kind(params, lr=1e-2)


def evaluated_twice(kind: Any) -> Any:
    """SAM, which expects gradients before its step, as an optimizer that is only given a closure."""

    class Twice(kind):
        needs_closure = True

        def step(self, closure: Any) -> Any:  # type: ignore[override]
            with torch.enable_grad():
                loss = closure()
            super().step(closure)
            return loss

    return Twice


class Net(nn.Module):
    """A loss by batch, and the losses that evaluations saw, with the weights that they saw."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = tanh_net(2, 1)
        self.seen: list[tuple[float, Tensor]] = []

    def forward(self, batch: Any) -> dict[str, Tensor]:
        loss = (self.net(batch["x"]) - batch["y"]).square().mean()
        if batch["name"] == "dev":
            self.seen.append((float(loss.detach()), flat_weights(self)))
        return {f"{batch['name']}_loss": loss}


def fit_with(name: str, epochs: int = 4, net: Net | None = None, **options: Any) -> tuple[weft.FitResult, Net]:
    np.random.seed(0)
    net = Net() if net is None else net
    trainer = weft.Trainer(epochs=epochs, optimizer=factory(name), progress=False, **options)
    data = weft.Data(DATA, dev=tanh_points(9, seed=5), batch_size={"train": 8, "dev": 9}, shuffle=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*clip=.*has no effect.*|.*non-contiguous.*")
        return trainer.fit(net, data), net


def by_hand(name: str, epochs: int, clip: float | None = None) -> Net:
    np.random.seed(0)
    net = Net()
    optimizer: Any = factory(name)(net.parameters())
    for _ in range(epochs):
        getattr(optimizer, "train", int)()
        for part in range(2):
            batch = {k: v[8 * part : 8 * part + 8] for k, v in DATA.items()} | {"name": "train"}

            def closure(batch: Any = batch) -> Tensor:
                net.zero_grad()
                loss = net(batch)["train_loss"]
                loss.backward()
                return loss

            if name in SEARCHING:
                optimizer.step(closure)
                continue
            closure()
            if clip is not None:
                params = [p for group in optimizer.param_groups for p in group["params"]]
                nn.utils.clip_grad_norm_(params, clip)
            optimizer.step()
        getattr(optimizer, "eval", int)()
    return net


@EACH
def test_a_fit_goes_where_a_loop_by_hand_goes(name: str) -> None:
    result, net = fit_with(name)
    torch.manual_seed(0)
    last = nn.utils.parameters_to_vector([result.last_weights[k] for k, _ in net.named_parameters()])
    assert same(last, flat_weights(by_hand(name, 4)))
    assert not same(last, flat_weights(by_hand(name, 3)))


@EACH
def test_clipping_is_that_of_torch(name: str) -> None:
    if name in SEARCHING:
        pytest.skip("a line search is not clipped, which is told (test_optimizers)")
    result, net = fit_with(name, clip=0.05)
    last = nn.utils.parameters_to_vector([result.last_weights[k] for k, _ in net.named_parameters()])
    assert same(last, flat_weights(by_hand(name, 4, clip=0.05)))


@EACH
def test_best_weights_are_the_evaluated_ones(name: str) -> None:
    result, net = fit_with(name, epochs=5)
    best = min(net.seen, key=lambda seen: seen[0])
    assert result.best_metric == pytest.approx(best[0]) and same(flat_weights(net), best[1])


@EACH
def test_a_resumed_fit_ends_at_the_same_bits(name: str, tmp_path: Path) -> None:
    files: dict[str, Any] = {"root_dir": str(tmp_path), "checkpoint": True, "seed": 3}
    whole, _ = fit_with(name, epochs=4, run_name="whole", **files)
    fit_with(name, epochs=4, run_name="torn", max_steps=5, **files)  # in the middle of an epoch
    net = Net()
    with torch.no_grad():
        next(net.parameters()).add_(1.0)
    torn, _ = fit_with(name, epochs=4, run_name="torn", net=net, resume="last", **files)
    assert same(torn.last_weights, whole.last_weights) and torn.history["dev_loss"] == whole.history["dev_loss"]


def test_the_list_is_that_of_torch_and_ten_others() -> None:
    assert {"Adam", "Muon", "Adafactor", "LBFGS"} <= set(OF_TORCH) and len(ELSEWHERE) >= 10
    for module, kind, _ in ELSEWHERE.values():
        if module == "heavyball" and importlib.util.find_spec(module) is None:
            continue  # needs numpy 2.3.4, which others here do not take
        assert issubclass(getattr(importlib.import_module(module), kind), Optimizer)
