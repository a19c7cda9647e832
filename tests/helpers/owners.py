"""The script that the tests of run folders start: `python owners.py ROOT SEED [trainer options as JSON]`.

It trains slowly enough that another one may come in between.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

import weft
from tests.helpers.grouped import NoisyLine


def train_slowly(root: str, seed: str, options: str = "{}") -> None:
    given: dict[str, Any] = json.loads(options)
    seconds, until = given.pop("sleep", 0.05), given.pop("until", None)

    def dawdle(trainer: Any, batch: Any, loss: Any) -> None:
        time.sleep(seconds)
        while until and trainer.global_step == 5 and not Path(until).exists():
            time.sleep(0.02)

    trainer = weft.Trainer(
        **{"epochs": 20, "seed": int(seed), "root_dir": root, "run_name": "a", "checkpoint": True, **given},
        progress=False,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.01 * int(seed)),
        hooks={"on_step_end": dawdle},
    )
    result = trainer.fit(NoisyLine(), {"x": torch.ones(4, 2)})
    print(result.run_dir, result.epochs)


if __name__ == "__main__":
    train_slowly(*sys.argv[1:])
