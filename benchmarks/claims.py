"""What is asked of weft's speed, each with what was measured: a target that was missed is told like any."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from benchmarks.measure import Timing
from benchmarks.peers import BASE, PEERS

BASE_NAME = next(name for name, peer in PEERS.items() if peer is BASE)
EAGER, COMPILED, LIT = "weft, eager", "weft, compiled", "NeuroMANCER LitTrainer"
ROSENBROCK = ("Rosenbrock (weft)", "Rosenbrock (NeuroMANCER)")
COMPUTE_BOUND, ONE_BATCH = "wide MLP", "one batch an epoch"

RATIOS: tuple[tuple[str, str, tuple[str, ...] | None, float], ...] = (
    (EAGER, BASE_NAME, None, 1.05),
    (EAGER, LIT, (*ROSENBROCK, "closed-loop rollout"), 0.45),
    (EAGER, "Lightning, default", (*ROSENBROCK, "closed-loop rollout"), 0.45),
    (COMPILED, BASE_NAME, ROSENBROCK, 0.40),
    (COMPILED, BASE_NAME, ("Rosenbrock (SGD, momentum)",), 0.50),
    (COMPILED, BASE_NAME, ("PINN (Burgers)", "closed-loop rollout"), 0.70),
    (COMPILED, BASE_NAME, (COMPUTE_BOUND,), 1.02),
    (COMPILED, LIT, ROSENBROCK, 0.15),
    (COMPILED, "matrix products alone", ROSENBROCK, 2.0),
)
"""Peer, over peer, on which workloads (None: all with more than one batch an epoch), at most."""


class Claim(NamedTuple):
    """One target: what, at most how much, and what was measured (nan: it was not)."""

    what: str
    at_most: float
    measured: float

    @property
    def verdict(self) -> str:
        """In words."""
        return "not measured" if math.isnan(self.measured) else "met" if self.measured <= self.at_most else "missed"


def claims(results: dict[str, dict[str, Timing]], extras: dict[str, Any]) -> list[Claim]:
    """All targets that these results can decide."""
    found = []
    for peer, over, workloads, at_most in RATIOS:
        for workload in workloads or [name for name in results if name != ONE_BATCH]:
            timings = results.get(workload, {})
            if peer in timings and over in timings:
                found.append(Claim(f"{peer} / {over}: {workload}", at_most, timings[peer].best / timings[over].best))
    if ONE_BATCH in results:
        base, eager = (results[ONE_BATCH][name].best for name in (BASE_NAME, EAGER))
        found.append(Claim("ms an epoch of one batch beyond 1.05 of hand-written", 0.1, 1e3 * (eager - 1.05 * base)))
    for title, values in extras.items():
        if "import torch" in values:
            name = "import weft, Trainer and Problem"
            found.append(Claim("import weft / import torch", 1.15, values[name] / values["import torch"]))
        second = "compiled, second process: lost"
        if f"{second} until steady" in values:
            first, whole = values[f"{second} in the first epoch"], values[f"{second} until steady"]
            found.append(Claim("s lost in the first epoch of a second process, compiled", 0.5, first))
            found.append(
                Claim("s lost in all by a second process, compiled (dev set and short batch, too)", 0.5, whole)
            )
        if "samples" in title:
            many = [v for n, v in values.items() if int(n) >= 10**4]
            found.append(Claim("us per sample, 10^4 to 10^7 samples: largest / smallest", 1.1, max(many) / min(many)))
        if "hand-written" in values and "weights" in values:
            kept = 2 * values["weights"]  # the best ones, and the last ones in the result
            cached = f"{COMPILED}, from the cache"
            # "steady": of the last epochs, when tracing and the first comparisons with eager are over
            pairs = ((EAGER, "hand-written"), (cached, "hand-written"), (f"{cached}, steady", "hand-written, steady"))
            for name, base in pairs:
                if name in values and base in values:
                    ratio = (values[name] - kept) / values[base]
                    found.append(
                        Claim(f"peak memory, two snapshots of the weights apart: {name} / {base}", 1.05, ratio)
                    )
        if "weft, 2" in values:
            found.append(Claim("time per example, two processes / one", 1 / 1.6, values["weft, 1"] / values["weft, 2"]))
    return found


def table(found: list[Claim]) -> str:
    """The targets as a table."""
    lines = ["| target | at most | measured | |", "|---|---|---|---|"]
    lines += [f"| {c.what} | {c.at_most:.3g} | {c.measured:.3g} | {c.verdict} |" for c in found]
    return "\n".join(lines)
