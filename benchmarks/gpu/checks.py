"""The list of checks, most important first."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from benchmarks.gpu.rows import Bench, Row


class Check(NamedTuple):
    """What is asked, the bar, the function that asks, the seconds it should take on an H100, and those it may take."""

    name: str
    what: str
    bar: str
    function: str
    expected: int
    limit: int

    def load(self) -> Callable[[Bench], Iterator[Row]]:
        """The function, whose module is imported here."""
        module, name = self.function.split(":")
        return getattr(importlib.import_module(f"benchmarks.gpu.{module}"), name)


CHECKS = (
    Check("ends", "ends where the CPU does after 100 steps; TF32 off", "1e-10; 1e-4", "numbers:ends", 15, 60),
    Check("waits", "1,000 eager steps: waits for the device", "0", "numbers:waits", 20, 60),
    Check("graph-speed", "a step as a CUDA graph", "<= 60 us, <= 0.2 of eager", "speed:graph", 40, 90),
    Check("eager-speed", "eager step / hand-written, four problems", "<= 1.05", "speed:eager", 45, 90),
    Check("graph-agrees", "graph = eager, nine kinds of update", "bit-equal, one graph", "agreement:agrees", 75, 120),
    Check("constants", "closed-over tensors: trained, moved, saved", "yes", "numbers:constants", 5, 30),
    Check("wide", "wide MLP, batch 4096: throughput / hand-written", ">= 0.98", "speed:wide_ratio", 10, 40),
    Check("kill", "kill -9 in the middle, eager and graph: sha256", "equal", "survival:kill", 60, 110),
    Check("memory", "memory after 10,000 steps; peak / hand-written", "+0 bytes; <= 1.05", "survival:memory", 20, 60),
    Check("background", "a checkpoint of 1 GiB: longest stall", "<= 50 ms", "survival:background", 20, 60),
    Check("mixed", "bf16-mixed, 16-mixed: inputs kept, losses of float32", "1 %", "numbers:mixed", 10, 40),
    Check("nccl", "one NCCL process: FSDP2 saved, loaded; a timeout", "within 60 s", "survival:nccl", 60, 100),
    Check("jax", "weft's step / JAX's, the whole loop in lax.scan", "told", "speed:jax_ratio", 30, 60),
)


def chosen(names: str) -> list[Check]:
    """The checks of these names, by commas; all for "". Raises ValueError for a name that is none."""
    asked = [name for name in names.split(",") if name]
    if unknown := set(asked) - {check.name for check in CHECKS}:
        raise ValueError(f"There is no check {sorted(unknown)}; there are {[check.name for check in CHECKS]}.")
    return [check for check in CHECKS if not asked or check.name in asked]
