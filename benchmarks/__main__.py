"""Run the benchmarks: `make bench`, or `python -m benchmarks --help`."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")  # a workload sets how many it uses
os.environ.setdefault("NUMBA_DISABLE_JIT", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

import argparse
import datetime
import re
import sys
from pathlib import Path

from benchmarks import extra, report, scaling
from benchmarks.measure import CLOCKS, measure
from benchmarks.peers import PEERS
from benchmarks.workloads import WORKLOADS


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, write results/<date>-<hardware>.{json,md,png}."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often each peer trains each workload (default 5)")
    parser.add_argument("--workloads", default="", help="only those whose function name holds this text")
    parser.add_argument("--peers", default="", help="only those whose name holds one of these texts, by commas")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="process: CPU time, on a machine that is shared"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: by hand and weft only, no extras"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test: one round of 4 short epochs, nothing written"
    )
    parser.add_argument("--readme", action="store_true", help="show the results in the README, too")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args(arguments)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    asked = [part for part in given.peers.split(",") if part]
    peers = [n for n in PEERS if n == report.BASE_NAME or not asked or any(part in n for part in asked)]
    results: report.Results = {}
    for make in WORKLOADS:
        if given.workloads in make.__name__:
            workload = make()
            if given.quick:
                workload.epochs = 4
                workload.train = {k: v[: 3 * workload.batch_size] for k, v in workload.train.items()}
            workload.to(given.device)
            results[workload.name] = measure(
                workload, peers, 1 if given.quick else given.rounds, CLOCKS[given.clock], say
            )
    if given.quick or given.workloads or asked or given.device != "cpu":
        print(report.table(results))
        return
    found = {}
    for title, run in (
        ("seconds to import", lambda: extra.imports(given.rounds)),
        ("seconds at the start of a fit (Rosenbrock)", extra.first_step),
        ("microseconds per sample, by samples", lambda: extra.samples([10**3, 10**4, 10**5, 10**6, 10**7])),
        ("peak memory of the wide MLP, MiB", extra.memory),
        ("examples per second, one and two processes", scaling.main),
    ):
        say(title)
        found[title] = run()
    cpu = re.sub(r"\W+", "-", report.hardware()["cpu"].replace("(R)", "").replace("(TM)", "")).strip("-").lower()
    stem = f"{datetime.date.today():%Y-%m-%d}-{cpu}"
    how = {"rounds": given.rounds, "clock": given.clock}
    path = report.write(given.out, stem, results, found, how)
    if given.readme:
        root = Path(__file__).parents[1]
        report.put_between(
            root / "README.md", "benchmarks", report.in_short(results, path.relative_to(root).as_posix())
        )
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
