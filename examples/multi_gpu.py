"""One keyword from one device to many: a portfolio for every demanded return.

    python multi_gpu.py                                             # one device
    python multi_gpu.py --devices 2 --accelerator cpu               # two processes on a CPU
    python multi_gpu.py --devices -1 --accelerator gpu              # all GPUs of this machine
    torchrun --nproc-per-node 4 multi_gpu.py --devices 4            # started by torchrun (or srun)

Five assets with expected returns r and covariance S. For a demanded return p, minimise the variance x^T S x of a
portfolio x that is fully invested (sum x = 1) and returns enough (r^T x >= p). A network learns x(p) from objective and
penalties alone. Nothing here says where anything is computed: there is no `.to(device)`.
"""

from __future__ import annotations

import argparse
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
    train, dev, test = (low + (high - low) * torch.rand(rows, 1)).split([rows * 8 // 10, rows // 10, rows - rows * 9 // 10])
    return weft.Data({"p": train}, {"p": dev}, {"p": test}, batch_size=batch_size)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train and report; returns the means over the test set."""
    parser = argparse.ArgumentParser(description="A portfolio for every demanded return, on one device or many.")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=100, help="rows per process")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    problem = make_problem()
    trainer = weft.Trainer(
        epochs=args.epochs, devices=args.devices, accelerator=args.accelerator, strategy=args.strategy, seed=0,
        optimizer=lambda params: torch.optim.AdamW(params, lr=3e-3),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs),
    )  # fmt: skip
    result = trainer.fit(problem, data_setup, batch_size=args.batch_size)
    tested = trainer.test()
    assert trainer.run is not None
    if trainer.run.is_global_zero:
        print(result)
        for name, value in tested.items():
            print(f"{name:28} {value:.6g}")
    return tested


if __name__ == "__main__":
    main()
