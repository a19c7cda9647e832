"""What a hook changes of modules, parameters, hooks and optimizer within an epoch arrives at the next step."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.compile.watching import Watch

X = torch.rand(32, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
DATA = {"x": X, "y": X.sum(1, keepdim=True).sin()}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = (nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.0), nn.Linear(8, 1))
        self.net = nn.Sequential(*layers).double()

    def factor(self) -> float:
        return 1.0

    def forward(self, batch: Any) -> dict[str, Tensor]:
        return {f"{batch['name']}_loss": self.factor() * (self.net(batch["x"]) - batch["y"]).square().mean()}


Change = Callable[[Net, torch.optim.Optimizer], Any]


def other_method(problem: Net, _: Any) -> None:
    type(problem).factor = lambda self: 3.0  # type: ignore[method-assign]


def doubled_output(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return 2 * output


def other_forward(problem: Net, _: Any) -> None:
    forward = problem.net[4].forward
    problem.net[4].forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]


def no_moments(_: Net, optimizer: torch.optim.Optimizer) -> None:
    for state in optimizer.state.values():
        state["exp_avg"] = torch.zeros_like(state["exp_avg"])


CHANGES: dict[str, Change] = {
    "another layer": lambda p, _: p.net.__setitem__(2, nn.ReLU()),
    "a layer taken out": lambda p, _: p.net.__delitem__(2),
    "the mode of a layer": lambda p, _: p.net[1].eval(),
    "an attribute of torch's layer": lambda p, _: setattr(p.net[1], "momentum", 0.9),
    "dropout": lambda p, _: setattr(p.net[3], "p", 0.5),
    "frozen": lambda p, _: p.net[0].requires_grad_(False),
    "a buffer in another's place": lambda p, _: setattr(p.net[1], "running_mean", torch.ones(8).double()),
    "a forward hook": lambda p, _: p.net[0].register_forward_hook(doubled_output),
    "a hook before forward": lambda p, _: p.net[4].register_forward_pre_hook(lambda m, x: (2 * x[0],)),
    "a hook of backward": lambda p, _: p.net[4].register_full_backward_hook(lambda m, g, _: (2 * g[0],)),
    "a hook of a parameter": lambda p, _: p.net[0].weight.register_hook(lambda g: -g),
    "another forward": other_forward,
    "another method": other_method,
    "no optimizer state": lambda _, o: o.state.clear(),
    "other moments": no_moments,
    "another group's setting": lambda _, o: o.param_groups[0].update(weight_decay=0.5),
}


def fitted(change: Change | None, compile: bool, at: int = 13) -> Tensor:
    """The last weights and buffers of a fit in which `change` happens after step `at`, the first of an epoch's four."""
    problem = Net()

    def late(trainer: weft.Trainer, *_: Any) -> None:
        if trainer.global_step == at and change is not None:
            change(problem, trainer.optimizer)

    trainer = weft.Trainer(
        epochs=4,
        precision="64-true",
        progress=False,
        compile=compile,
        seed=0,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.02),
        hooks={"on_step_end": late},
    )
    method = Net.factor
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that an update stays eager is one of two right ways
            result = trainer.fit(problem, weft.Data(DATA, batch_size=8))
    finally:
        Net.factor = method  # type: ignore[method-assign]
    return torch.cat([t.double().flatten() for t in result.last_weights.values()])


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_within_an_epoch_arrives_at_the_next_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fitted(CHANGES[name], False)
    torch.testing.assert_close(fitted(CHANGES[name], True), expected, rtol=1e-6, atol=1e-7)
    if name in ("another layer", "frozen", "a forward hook"):  # the control: where nobody looks, the steps are others
        monkeypatch.setattr(Watch, "glance", lambda _: True)
        assert not torch.allclose(fitted(CHANGES[name], True), expected, rtol=1e-4)


def test_every_change_changes_the_end() -> None:
    undisturbed = fitted(None, False)
    for name, change in CHANGES.items():
        found = fitted(change, False)
        assert found.shape != undisturbed.shape or not torch.allclose(found, undisturbed, rtol=1e-5), name


@pytest.mark.usefixtures("uncompiled")
def test_what_nobody_can_watch_is_found_by_the_comparisons_and_the_last_step_that_agreed_is_named(
    tmp_path: os.PathLike[str],
) -> None:
    file = os.path.join(tmp_path, "factor")

    def write(factor: float) -> None:
        with open(file, "w") as out:
            out.write(str(factor))

    def step(trainer: Any, batch: Any) -> Tensor:
        with open(file) as read:
            return float(read.read()) * trainer.problem(batch)["train_loss"]

    def late(trainer: weft.Trainer, *_: Any) -> None:
        if trainer.global_step == 13:
            write(3.0)

    write(1.0)
    trainer = weft.Trainer(
        epochs=8, progress=False, compile=True, precision="64-true", training_step=step, hooks={"on_step_end": late}
    )
    with pytest.warns(UserWarning, match=r"does not agree with the eager step \(it last did at step 8\)"):
        trainer.fit(Net(), weft.Data(DATA, batch_size=8))


@pytest.mark.usefixtures("uncompiled")
def test_a_sparse_gradient_keeps_the_update_eager() -> None:
    ends = []
    for compile in (False, True):
        torch.manual_seed(0)
        table = nn.Embedding(5, 1, sparse=True)

        def step(trainer: Any, batch: Any, table: nn.Embedding = table) -> Tensor:
            return (table((batch["x"][:, 0] * 5).long()) - batch["y"]).square().mean()

        trainer = weft.Trainer(
            epochs=4,
            progress=False,
            compile=compile,
            training_step=step,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        )
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            trainer.fit(table, weft.Data({k: v.float() for k, v in DATA.items()}, batch_size=8, shuffle=False))
        assert compile == any("a gradient is sparse" in str(w.message) for w in told)
        ends.append(table.weight.detach().clone())
    assert torch.equal(*ends)
