"""Precision: which dtype what has, and numbers that are not finite where nobody waits for the device."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import weft
from weft.step.doubts import Doubts

TIMES = torch.tensor([[1000.3], [2.0], [3.5], [0.25]])  # 1000.3 is 1000 in bfloat16


class DtypeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
        self.dtypes: dict[str, torch.dtype] = {}
        self.seen = torch.zeros(())

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        y = self.net(batch["t"] / 1000)
        loss = (y - batch["t"] / 500).square().mean()
        self.seen = batch["t"]
        self.dtypes = {"t": batch["t"].dtype, "y": y.dtype, "loss": loss.dtype, "weight": self.net[0].weight.dtype}  # type: ignore[union-attr]
        return {f"{batch['name']}_loss": loss, "y": y}


def trained_in(precision: Any, problem: nn.Module | None = None, **options: Any) -> tuple[DtypeNet, weft.FitResult]:
    problem = DtypeNet() if problem is None else problem
    trainer = weft.Trainer(
        **{"epochs": 3, "precision": precision, "progress": False, "accelerator": "cpu", "seed": 0} | options
    )
    result = trainer.fit(problem, weft.Data({"t": TIMES}, {"t": TIMES}, shuffle=False))
    assert isinstance(problem, DtypeNet)
    return problem, result


@pytest.mark.parametrize(
    ("precision", "t", "y", "loss", "weight"),
    [
        ("32-true", "float32", "float32", "float32", "float32"),
        (32, "float32", "float32", "float32", "float32"),
        ("64-true", "float64", "float64", "float64", "float64"),
        ("bf16-mixed", "float32", "bfloat16", "float32", "float32"),
        ("bf16-true", "float32", "bfloat16", "float32", "bfloat16"),
    ],
)
def test_each_precision_computes_in_its_dtype_and_leaves_inputs_alone(
    precision: Any, t: str, y: str, loss: str, weight: str
) -> None:
    problem, result = trained_in(precision)
    names = {name: str(dtype).removeprefix("torch.") for name, dtype in problem.dtypes.items()}
    assert names == {"t": t, "y": y, "loss": loss, "weight": weight}
    assert torch.equal(problem.seen.float(), TIMES)
    assert result.history["train_loss"][-1] < result.history["train_loss"][0]


def test_the_inputs_of_bf16_are_not_rounded_and_would_be_by_a_cast() -> None:
    assert not torch.equal(TIMES.bfloat16().float(), TIMES)


@pytest.mark.parametrize("precision", ["16-mixed", "16-true", 16])
def test_float16_on_a_cpu_is_an_error_that_says_what_to_use(precision: Any) -> None:
    with pytest.raises(ValueError, match="needs a GPU.*use 'bf16-mixed'"):
        trained_in(precision)


def test_a_precision_plugin_of_fabric_is_used() -> None:
    from lightning.fabric.plugins import DoublePrecision

    problem, _ = trained_in("32-true", plugins=[DoublePrecision()])
    assert problem.dtypes["loss"] == problem.dtypes["weight"] == torch.float64


# ---- numbers that are not finite, where looking at each would wait for the device


class Breaks(DtypeNet):
    """Its loss is NaN in step `bad` (counted from 0)."""

    def __init__(self, bad: int | None, inside: bool = False) -> None:
        super().__init__()
        self.bad, self.inside, self.step = bad, inside, 0

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        out = super().forward(batch)
        if self.training:
            if self.step == self.bad:
                factor = float("nan")
                # a square root at 0 has a finite value and no finite derivative
                bad = (out["y"] * 0).sum().sqrt() if self.inside else out["train_loss"] * factor
                out["train_loss"] = out["train_loss"] + bad
            self.step += 1
        return out


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU counts as a device where reading a number waits for what was queued."""
    monkeypatch.setattr("weft.step.optimizer_step.READS_ARE_FREE", ())


def fused_adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-2, fused=True)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("inside", [False, True], ids=["loss", "gradient"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_fused_optimizer_leaves_a_bad_step_out_and_the_epoch_ends_with_the_error(
    inside: bool, clip: float | None
) -> None:
    torch.manual_seed(0)
    problem = Breaks(1, inside)
    expected = copy.deepcopy(problem)
    with pytest.raises(FloatingPointError, match="in step 1 "):
        trained_in("32-true", problem, optimizer=fused_adam, clip=clip)
    expected.bad = None
    trained_in("32-true", expected, optimizer=fused_adam, clip=clip, max_steps=1)
    assert all(torch.equal(a, b) for a, b in zip(problem.parameters(), expected.parameters(), strict=True))


@pytest.mark.usefixtures("as_on_a_gpu")
def test_steps_that_are_looked_at_later_train_as_those_that_are_looked_at_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    later = DtypeNet()
    now = copy.deepcopy(later)
    trained_in("32-true", later, optimizer=fused_adam, clip=0.5)
    monkeypatch.setattr("weft.step.optimizer_step.READS_ARE_FREE", ("cpu",))
    trained_in("32-true", now, optimizer=fused_adam, clip=0.5)
    assert all(torch.equal(a, b) for a, b in zip(later.parameters(), now.parameters(), strict=True))


@pytest.mark.usefixtures("as_on_a_gpu")
def test_training_stops_after_the_epoch_in_which_a_step_was_left_out() -> None:
    with pytest.warns(UserWarning, match="in step 1 .*training stops"):
        _, result = trained_in("32-true", Breaks(1), optimizer=fused_adam, on_nonfinite="stop")
    assert (result.stop_reason, result.epochs) == ("nonfinite", 2)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(
    "options", [{"optimizer": lambda params: torch.optim.Adam(params, fused=False)}, {"on_nonfinite": "skip"}]
)
def test_where_each_step_must_be_looked_at_it_is_said_once(options: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="waits for the GPU in each step") as caught:
        trained_in("32-true", **options)
    assert len(caught) == 1


def test_a_note_of_a_step_costs_a_gpu_two_operations() -> None:
    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    net, doubts, names = nn.Linear(2, 2), Doubts(torch.device("cpu")), list[str]()
    loss = net(torch.ones(3, 2)).square().mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer, before = fused_adam(net.parameters()), loss._version
    with Counted():
        doubts.guard(7, loss.detach(), [norm], net.parameters(), [optimizer])
        doubts.note(8, torch.tensor(True))
    assert [name for name in names if name not in ("detach", "alias")] == [
        "zeros_like",
        "_amp_foreach_non_finite_check_and_unscale_",
        "lift_fresh",  # of the flag that this test makes
    ]
    assert loss._version == before and doubts.look() is None


@pytest.mark.parametrize("bad", ["loss", "norm", "gradient", "flag"])
def test_the_first_of_many_noted_steps_that_was_not_finite_is_found(bad: str) -> None:
    net, doubts = nn.Linear(1, 1), Doubts(torch.device("cpu"))
    for step in range(100):
        is_bad = step in (41, 70)
        value = torch.tensor(float("inf") if is_bad else 1.0)
        for p in net.parameters():
            p.grad = torch.full_like(p, value.item() if bad == "gradient" else 1.0)
        fine = torch.tensor(1.0)
        if bad == "flag":
            doubts.note(step, torch.tensor(not is_bad))
        else:
            doubts.guard(
                step,
                value if bad == "loss" else fine,
                [value if bad == "norm" else fine],
                net.parameters(),
                [fused_adam(net.parameters())],
            )
    assert doubts.look() == 41 and doubts.look() is None


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_step_on_a_gpu_reads_nothing_and_queues_four_operations_more_than_one_by_hand(clip: float | None) -> None:
    """Small steps take as long there as it takes to queue them. The four: the loss among the means, and the check."""

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    def by_hand(batch: dict[str, Any]) -> None:
        optimizer.zero_grad()
        problem(batch)["train_loss"].backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(problem.parameters(), clip)
        optimizer.step()

    def counted(act: Any, batch: Any) -> Counter[str]:
        names.clear()
        with Counted():
            act(batch)
        found = Counter(name for name in names if not name.startswith("_record_function"))
        return Counter({name: n for name, n in found.items() if name not in ("detach", "alias", "view")})

    problem, names = DtypeNet(), list[str]()
    optimizer, batch = fused_adam(problem.parameters()), {"t": TIMES, "name": "train"}
    by_hand(batch)
    hand = counted(by_hand, batch)
    trainer = weft.Trainer(epochs=1, optimizer=fused_adam, clip=clip, progress=False, accelerator="cpu")
    data = weft.Data({"t": TIMES.repeat(100, 1)}, batch_size=4, shuffle=False)
    with trainer.start(DtypeNet(), data) as run:
        for _ in run.epochs():
            batches = run.batches("train")
            run.update(next(batches))
            first = counted(run.update, next(batches))
            others = sum((counted(run.update, batch) for batch in batches), Counter[str]())
    assert first - hand == Counter(
        ["stack", "zeros_like", "_amp_foreach_non_finite_check_and_unscale_", "_foreach_sub_"]
    )
    assert "_local_scalar_dense" not in others and others["mm"] == 98 * hand["mm"]
