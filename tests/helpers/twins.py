"""One script run by Lightning's Trainer and by weft's, and everything that either of them leaves behind."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from weft.devices.seeding import seed_everything
from weft.integrations.lightning import Trainer

Script = Callable[[Any], Any]
"""(The class of the trainer) -> (trainer, module, whatever else it found out)."""


def twins(script: Script, folder: Path, seed: int = 5) -> tuple[dict[str, Any], dict[str, Any]]:
    """What Lightning's Trainer left, and what weft's did, after `script` from the same seed in the same folder."""
    left, here = [], folder / "here"
    for name, kind in (("lightning", pl.Trainer), ("weft", Trainer)):
        here.mkdir()
        before, environment = os.getcwd(), dict(os.environ)
        os.chdir(here)
        try:
            seed_everything(seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                left.append(remains(*script(kind)))
        finally:
            os.chdir(before)
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            os.environ.clear()
            os.environ.update(environment)
            torch.use_deterministic_algorithms(False)  # Lightning leaves it on
            here.rename(folder / name)
    return left[0], left[1]


def remains(trainer: Any, module: Any, *found: Any) -> dict[str, Any]:
    """Weights, counters, metrics, random state and files (with their contents), in the current folder."""
    files = {str(p): contents(p) for p in sorted(Path().rglob("*")) if p.is_file() and "tfevents" not in p.name}
    return {
        "weights": module.state_dict(),
        "modes": [part.training for part in module.modules()],
        "counters": (trainer.current_epoch, trainer.global_step, trainer.should_stop, str(trainer.state)),
        "metrics": (trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics),
        "random": (torch.get_rng_state(), np.random.get_state(legacy=False)["state"], random.getstate()),
        "files": files,
        "found": found,
    }


def contents(path: Path) -> Any:
    """A checkpoint as what is in it, another file as its bytes."""
    return torch.load(path, weights_only=False) if path.suffix in (".ckpt", ".pt") else path.read_bytes()


def differing(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two nested values differ; tensors are compared bit for bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [k for k in one if k not in other] + [k for k in other if k not in one]
        found = [f"{where}: only one has {keys}"] if keys else []
        return found + [d for k in one if k in other for d in differing(one[k], other[k], f"{where}.{k}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return [f"{where}: {len(one)} and {len(other)} entries: {one!r:.300} | {other!r:.300}"]
        return [d for i, pair in enumerate(zip(one, other, strict=True)) for d in differing(*pair, f"{where}[{i}]")]
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.dtype == other.dtype and torch.equal(one.nan_to_num(7.5), other.nan_to_num(7.5))
    elif isinstance(one, np.ndarray):
        same = np.array_equal(one, other)
    else:
        same = one == other or (one != one and other != other)  # noqa: PLR0124 (nan)
    return [] if same else [f"{where}: {one!r:.200} | {other!r:.200}"]
