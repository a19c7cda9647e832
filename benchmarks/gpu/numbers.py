"""Checks of what is computed: ends, waits, constants, precisions."""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import weft
from benchmarks.gpu.rows import Bench, Row, at_most, holds
from benchmarks.workloads import ROSENBROCK, rosenbrock_weft


def flat(problem: nn.Module) -> Tensor:
    """All weights as one vector on the CPU, in float64."""
    return torch.cat([p.detach().double().flatten().cpu() for p in problem.parameters()])


def start() -> nn.Module:
    """The parametric Rosenbrock problem with the weights of one seed."""
    torch.manual_seed(0)
    return rosenbrock_weft().make()


def trained(problem: nn.Module, bench: Bench, *, on: str | None = None, data: Any = None, **options: Any) -> nn.Module:
    """A copy of `problem`, trained on a device with the order of batches of seed 0."""
    own = copy.deepcopy(problem)
    settings: dict[str, Any] = {"progress": False, "seed": 0, "accelerator": on or bench.device, "devices": 1}
    weft.Trainer(**{**settings, **options}).fit(own, data or weft.Data(ROSENBROCK["train"], batch_size=64))
    return own


# ---- ends ------------------------------------------------------------------------------------------------------------


def ends(bench: Bench) -> Iterator[Row]:
    """100 steps of AdamW on both devices, in both dtypes."""
    problem, steps = start(), bench.count(100, 20)
    options: dict[str, Any] = {"max_steps": steps, "epochs": 9, "clip": 100.0}
    options["optimizer"] = lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True)
    for precision, bar in (("64-true", 1e-10), ("32-true", 1e-4)):
        here, there = (flat(trained(problem, bench, on=on, precision=precision, **options)) for on in ("cpu", None))
        yield at_most(f"{precision}: weights after {steps} steps, GPU - CPU", float((here - there).abs().max()), bar)
        if precision == "64-true":
            moved = float((here - flat(problem)).abs().max())
            yield holds("the comparison can fail: the weights have moved", moved > 1e-4, f"by {moved:.2g}")
    yield from tf32(bench)


def tf32(bench: Bench) -> Iterator[Row]:
    """Products in a step are those of float32, and would not be under TF32."""
    seen: list[str] = []
    look = {"on_step_end": lambda *_: seen.append(torch.get_float32_matmul_precision())}
    trained(start(), bench, max_steps=1, epochs=1, hooks=look)
    x = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)).to(bench.device)
    exact = x.double() @ x.double()

    def error() -> float:
        return float(((x @ x).double() - exact).norm() / exact.norm())

    yield at_most(f"TF32 is off in a step (precision {seen[-1]!r}): error of a product", error(), 2e-6)
    if bench.on_gpu:
        torch.set_float32_matmul_precision("high")
        try:
            wrong = error()
        finally:
            torch.set_float32_matmul_precision("highest")
        yield holds("with TF32 asked for the error is larger", wrong > 1e-4, f"{wrong:.2g}")


# ---- waits -----------------------------------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Counts the operations that wait for a device because the CPU wants a number or a shape from it."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.NAMES:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def waits_in(bench: Bench) -> Iterator[list[str]]:
    """A list that holds, after the block, each wait for the device in it, by where it was."""
    found: list[str] = []
    if not bench.on_gpu:
        with Reads() as reads:
            yield found
        found += reads.found
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        caught.clear()  # of its being a prototype
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]


def waits(bench: Bench) -> Iterator[Row]:
    """Steps one by one, and the end of an epoch."""
    step = weft.Schedule(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 10), interval="step")
    kinds: dict[str, dict[str, Any]] = {
        "as it is": {},
        "clip, a schedule by steps": {"clip": 1.0, "scheduler": step},
        "accumulate=2": {"accumulate": 2},
        "64-true": {"precision": "64-true"},
        "bf16-mixed": {"precision": "bf16-mixed"},
        "a step that returns numbers beside tensors": {"training_step": lambda t, b: {**t.problem(b), "half": 0.5}},
        "logged numbers, EMA": {
            "hooks": [{"on_step_end": lambda trainer, *_: trainer.log({"one": 1.0})}, weft.hooks.EMA(0.99)]
        },
    }
    if bench.on_gpu:
        kinds["16-mixed"] = {"precision": "16-mixed"}
    one = torch.ones((), device=bench.device)
    with waits_in(bench) as found:
        one.item()
    yield holds("a wait is noticed", len(found) == 1, f"{len(found)} of 1")
    for name, options in kinds.items():
        with as_on_a_gpu(bench):
            yield from _waits(bench, name, options, bench.count(1000 if name == "as it is" else 200, 40))


def _waits(bench: Bench, name: str, options: dict[str, Any], steps: int) -> Iterator[Row]:
    data = weft.Data(_rows(16 * (steps + 1)), _rows(64), batch_size=16)
    trainer = weft.Trainer(epochs=1, progress=False, accelerator=bench.device, devices=1, seed=0, **options)
    with trainer.start(start(), data) as run:
        for _ in run.epochs():
            batches = run.batches("train")
            run.update(next(batches))  # where optimizers make their state and libraries their workspaces
            with waits_in(bench) as found:
                for batch in batches:
                    run.update(batch)
            yield at_most(f"waits in {steps:,} steps, {name}{_where(found)}", len(found), 0)
            with waits_in(bench) as found:
                run.evaluate("dev")
    if name == "as it is":
        yield Row("waits to evaluate and read a dev set", f"{len(found)}{_where(found)}")


def _where(found: list[str]) -> str:
    return f" ({', '.join(f'{n} x {place}' for place, n in Counter(found).most_common(3))})" if found else ""


@contextmanager
def as_on_a_gpu(bench: Bench) -> Iterator[None]:
    """In a rehearsal the CPU counts as a device where a read waits."""
    from weft.step import optimizer_step

    was = optimizer_step.READS_ARE_FREE
    optimizer_step.READS_ARE_FREE = was if bench.on_gpu else ()  # type: ignore[assignment]
    try:
        yield
    finally:
        optimizer_step.READS_ARE_FREE = was


def _rows(rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"a": torch.rand(rows, 1, generator=generator), "p": 0.5 + torch.rand(rows, 1, generator=generator)}


# ---- constants -------------------------------------------------------------------------------------------------------

A = torch.tensor([[1.2, 1.0], [0.0, 1.0]])


def constants(bench: Bench) -> Iterator[Row]:
    """Tensors that plain functions reach: numbers, and such that are trained through the optimizer alone."""
    b, gain = torch.tensor([[1.0], [0.5]]), torch.full((1, 1), 0.1, requires_grad=True)

    def plant(x: Tensor, u: Tensor, c: Tensor = torch.zeros(2)) -> Tensor:  # noqa: B008
        return x @ A.T + u @ (gain * b).T + c

    torch.manual_seed(0)
    policy = nn.Linear(2, 1)
    nodes = [weft.Node(policy, ["x"], ["u"], name="policy"), weft.Node(plant, ["x", "u"], ["x"], name="plant")]
    problem = weft.Problem([weft.Rollout(nodes, steps=5)], [weft.objective(lambda x: x.square(), name="cost")])
    trainer = weft.Trainer(
        epochs=bench.count(40, 5),
        progress=False,
        accelerator=bench.device,
        devices=1,
        seed=0,
        checkpoint=True,
        root_dir="runs",
        run_name="run",
        optimizer=lambda p: torch.optim.Adam([*p, gain], lr=1e-2),
    )
    result = trainer.fit(problem, weft.Data({"x": torch.rand(64, 1, 2) - 0.5}, batch_size=32))
    curve = result.history["train_loss"]
    fell = f"{curve[0]:.3g} to {curve[-1]:.3g}"
    yield holds("a rollout through closed-over matrices learns", curve[-1] < curve[0], fell)
    here = {A.device.type, b.device.type}
    yield holds("the matrices are back where they were", here == {"cpu"}, ", ".join(sorted(here)))
    moved = abs(gain.item() - 0.1)
    yield holds("a closed-over tensor that the optimizer holds is trained", moved > 1e-4, f"moved by {moved:.2g}")
    paths = sorted(Path("runs/run/checkpoints").glob("step-*.ckpt"))
    saved = torch.load(paths[-1], weights_only=True).get("others", {})
    kept = any(torch.equal(value.cpu(), gain.detach().cpu()) for value in saved.values())
    yield holds("and it is in the checkpoint", kept, ", ".join(saved) or "nothing")
    rows = trainer.predict({"x": torch.rand(3, 1, 2)})["x"].shape
    yield holds("predict computes with them", rows == (3, 6, 2), str(tuple(rows)))


# ---- mixed -----------------------------------------------------------------------------------------------------------


class Seen(nn.Module):
    """A regression that remembers in which dtypes it was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 64), nn.GELU(), nn.Linear(64, 1))
        self.dtypes: dict[str, str] = {}

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        x = batch["x"]
        y = self.net(x)
        self.dtypes = {"x": str(x.dtype), "y": str(y.dtype)}
        return {f"{batch['name']}_loss": (y.float() - x.prod(1, keepdim=True) - 1).square().mean()}


def mixed(bench: Bench) -> Iterator[Row]:
    """The same training in three precisions: inputs, and losses."""
    torch.manual_seed(0)
    begin, x = Seen(), torch.rand(2048, 2, generator=torch.Generator().manual_seed(0))
    losses: dict[str, list[float]] = {}
    for precision in ("32-true", "bf16-mixed", *(("16-mixed",) if bench.on_gpu else ())):
        problem = copy.deepcopy(begin)
        trainer = weft.Trainer(
            epochs=bench.count(20, 4), precision=precision, progress=False, accelerator=bench.device, devices=1, seed=0
        )
        losses[precision] = trainer.fit(problem, weft.Data({"x": x}, batch_size=256)).history["train_loss"]
        if precision != "32-true":
            kept = problem.dtypes["x"] == "torch.float32" and problem.dtypes["y"] != "torch.float32"
            yield holds(f"{precision}: inputs keep their dtype", kept, str(problem.dtypes))
            pairs = list(zip(losses[precision], losses["32-true"], strict=True))
            # where the loss has fallen far, rounding is all that is left of it
            gap = max((abs(a - b) / b for a, b in pairs if b > 0.02 * pairs[0][1]), default=math.nan)
            yield at_most(f"{precision}: losses / those of float32, furthest", gap, 0.01)
