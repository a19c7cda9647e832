"""How a row is shown: what the paper says, what came of five seeds here, and with which settings."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

import torch

SEEDS = range(5)


def show(title: str, settings: str, paper: dict[str, str], measure: Callable[[int], dict[str, float]]) -> None:
    """Measure once a seed and print a table: median, smallest and largest of the seeds beside the paper's value."""
    torch.set_num_threads(1)
    began = time.process_time()
    found = [measure(seed) for seed in SEEDS]
    seconds = (time.process_time() - began) / len(found)
    print(f"\n**{title}**  \n{settings} {len(found)} seeds, {seconds:.0f} CPU s each, one thread.\n")
    print("| | paper | here, median | smallest to largest |\n|---|---|---|---|")
    for name, said in paper.items():
        print(f"| {name} | {said} | {_spread(run[name] for run in found)} |", flush=True)


def _spread(values: Iterable[float]) -> str:
    values = list(values)
    return f"{statistics.median(values):.4g} | {min(values):.4g} to {max(values):.4g}"
