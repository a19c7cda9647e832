"""One keyword from one device to many: a portfolio for every demanded return.

    python multi_gpu.py                                             # one device
    python multi_gpu.py --devices 2 --accelerator cpu               # two processes on a CPU
    python multi_gpu.py --devices -1 --accelerator gpu              # all GPUs of this machine
    torchrun --nproc-per-node 4 multi_gpu.py --devices 4            # started by torchrun (or srun)

Five assets with expected returns r and covariance S. For a demanded return p, minimise the variance x^T S x of a
portfolio x that is fully invested (sum x = 1) and returns enough (r^T x >= p). A network learns x(p) from objective and
penalties alone. Nothing here says where anything is computed: there is no `.to(device)`. `--precision 64-true` lets the
constraints hold to more digits: a rounding error of float32, 6e-8, times the weight 100 is 2 % of the variance.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import weft

ASSETS = 5
generator = torch.Generator().manual_seed(0)
r = 0.002 + 0.008 * torch.rand(ASSETS, generator=generator)  # expected returns
A = torch.randn(ASSETS, ASSETS, generator=generator)
S = A @ A.T / 1000  # their covariance


def variance(x: Tensor) -> Tensor:
    """x^T S x for portfolios of shape (batch, assets)."""
    return ((x @ S) * x).sum(dim=1, keepdim=True)


def make_problem() -> weft.Problem:
    """The problem with an untrained network 1 -> 5x4 -> 5."""
    sizes = [1, *[ASSETS] * 4]
    hidden = [m for i, o in pairwise(sizes) for m in (nn.Linear(i, o), nn.GELU())]
    scale = weft.Node(lambda p: 500 * p - 3, ["p"], ["z"], name="scale")  # about -1 to 1
    net = weft.Node(nn.Sequential(*hidden, nn.Linear(ASSETS, ASSETS)), ["z"], ["x"], name="portfolio")
    return weft.Problem(
        [scale, net],
        objectives=[weft.objective(variance, name="variance")],
        constraints=[
            weft.equal(lambda x: x.sum(dim=1, keepdim=True), 1.0, weight=100.0, name="invested"),
            weft.greater_equal(lambda x: (x @ r)[:, None], "p", weight=100.0, name="return"),
        ],
        name="portfolio",
    )


def data_setup(rows: int = 3000, batch_size: int = 100) -> weft.Data:
    """Demanded returns between the lowest and the highest expected one; `batch_size` is that of each process."""
    low, high = max(float(r.min()), 0.0), float(r.max())
    train, dev, test = (low + (high - low) * torch.rand(rows, 1)).split(
        [rows * 8 // 10, rows // 10, rows - rows * 9 // 10]
    )
    return weft.Data({"p": train}, {"p": dev}, {"p": test}, batch_size=batch_size)


def make_trainer(epochs: int, **options: Any) -> weft.Trainer:
    """A trainer for this stiff problem: variances are of the order of 0.001, the weights of its constraints are 100.

    A penalty on the absolute violation is exact once its weight exceeds the constraint's multiplier (Nocedal and
    Wright, Numerical Optimization, theorem 17.3), so all such weights have one minimum. The multipliers are below 0.47
    (return) and 0.0025 (invested). The first phase keeps near them, where the variance is not drowned; the second has
    the problem's own weights, and its rate falls by five decades.
    """
    balanced = {"variance": 1000.0, "return": 1000.0, "invested": 10.0}
    own = {"variance": 1.0, "return": 100.0, "invested": 100.0}
    second = max(1, epochs // 4)
    first = max(1, epochs - second)

    def adam(rate: float) -> Callable[[Any], torch.optim.Optimizer]:
        return lambda params: torch.optim.Adam(params, lr=rate)

    def cosine(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, first, 1e-6)

    def falling(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 10 ** (-5 / second))

    phases = [
        weft.Phase(epochs=first, weights=balanced, optimizer=adam(1e-2), scheduler=cosine),
        weft.Phase(epochs=second, weights=own, optimizer=adam(1e-5), scheduler=falling),
    ]
    return weft.Trainer(phases=phases, seed=0, **options)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train and report; returns the means over the test set."""
    parser = argparse.ArgumentParser(description="A portfolio for every demanded return, on one device or many.")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--epochs", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=100, help="rows per process")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument(
        "--compile", action="store_true", help="one graph an update: several times faster in one process"
    )
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    problem = make_problem()
    trainer = make_trainer(
        args.epochs,
        devices=args.devices,
        accelerator=args.accelerator,
        strategy=args.strategy,
        precision=args.precision,
        compile=args.compile,
    )
    result = trainer.fit(problem, data_setup, batch_size=args.batch_size)
    tested = trainer.test()
    assert trainer.run is not None
    if trainer.run.is_global_zero:
        print(result)
        for name, value in tested.items():
            print(f"{name:28} {value:.12g}")
    return tested


if __name__ == "__main__":
    main()
