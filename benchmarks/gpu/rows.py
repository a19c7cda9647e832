"""What a check finds: rows of the table, each with its bar."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

MET, MISSED, TOLD, FAILED, NOT_RUN = "met", "missed", "told", "failed", "not run"


class Row(NamedTuple):
    """One line of the table. `value` is the number in `found`, where there is one that a bar was held to."""

    what: str
    found: str
    bar: str = ""
    verdict: str = TOLD
    value: float | None = None


def at_most(what: str, value: float, bar: float, unit: str = "") -> Row:
    """A number that must not be above `bar`; one that is not finite misses it."""
    verdict = MET if value <= bar else MISSED
    return Row(what, f"{value:.3g}{unit}", f"<= {bar:g}{unit}", verdict, value if math.isfinite(value) else None)


def at_least(what: str, value: float, bar: float, unit: str = "") -> Row:
    """A number that must not be below `bar`."""
    verdict = MET if value >= bar else MISSED
    return Row(what, f"{value:.3g}{unit}", f">= {bar:g}{unit}", verdict, value if math.isfinite(value) else None)


def holds(what: str, is_so: bool, found: str, bar: str = "yes") -> Row:
    """Something that must be so."""
    return Row(what, found, bar, MET if is_so else MISSED)


@dataclass
class Bench:
    """Where a check runs: the device, whether it is a rehearsal with small numbers, and a folder of its own."""

    device: str
    small: bool
    folder: Path

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def count(self, full: int, small: int) -> int:
        """A number of steps, epochs or rows; in a rehearsal a small one."""
        return small if self.small else full

    def wait(self) -> None:
        """Until all that was queued is done."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, act: Callable[[], Any]) -> float:
        """What `act` takes, all that it queues included."""
        self.wait()
        began = time.perf_counter()
        act()
        self.wait()
        return time.perf_counter() - began
