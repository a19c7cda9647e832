"""The entry: `python -m benchmarks.gpu --help`."""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu import running
from benchmarks.gpu.checks import Check, chosen

RESULTS = running.ROOT / "benchmarks" / "results"


def main(arguments: list[str] | None = None) -> int:
    """Run the checks, print each line as it is known, write the table. Returns 0 if every bar was met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Accept weft on a GPU.")
    parser.add_argument("--list", action="store_true", help="only say what would run, and how long it should take")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal")
    parser.add_argument("--small", action="store_true", help="few steps, and on a CPU no compiler: for a rehearsal")
    parser.add_argument("--only", default="", help="checks by name, by commas")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no more is begun (default 8)")
    parser.add_argument("--out", type=Path, help="folder of the results (default benchmarks/results; on a CPU none)")
    parser.add_argument("--readme", type=Path, metavar="JSON", help="only put the results in this file into README.md")
    given = parser.parse_args(arguments)
    checks = chosen(given.only)
    if given.readme is not None:
        fill(running.ROOT / "README.md", given.readme)
        return 0
    if given.list:
        print(dry_list(checks))
        return 0
    if given.device == "cuda" and (reason := no_gpu()):
        print(f"{reason} `--device cpu --small` rehearses the checks without one.", file=sys.stderr)
        return 2
    folder = RESULTS if given.out is None and given.device == "cuda" else given.out
    out = None if folder is None else folder / f"gpu-{datetime.date.today():%Y-%m-%d}"
    found, began = running.Found(out, lambda line: print(line, flush=True)), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="weft-gpu-", ignore_cleanup_errors=True) as scratch:
        size = "small" if given.small else "full"
        running.run(checks, found, given.device, size, Path(scratch), given.minutes)
        if any(row["verdict"] == running.FAILED for row in found.rows):
            print((Path(scratch) / "log.txt").read_text(errors="replace")[-6000:], file=sys.stderr)
    print(f"{time.monotonic() - began:.0f} s{'' if out is None else f'; {out}.md, {out}.json'}")
    return 0 if found.is_accepted else 1


def dry_list(checks: list[Check]) -> str:
    """What would run, with the seconds it should take and may take on an H100."""
    lines = [f"{'check':<13} {'s':>4} {'limit':>5}  what (bar)"]
    lines += [f"{c.name:<13} {c.expected:>4} {c.limit:>5}  {c.what} ({c.bar})" for c in checks]
    starting = 15
    total = sum(c.expected for c in checks) + starting
    return "\n".join([*lines, f"{'start':<13} {starting:>4}", f"{'in all':<13} {total:>4}"])


def no_gpu() -> str | None:
    """Why there is no GPU to run on; None if there is one."""
    import torch

    return None if torch.cuda.is_available() else f"torch {torch.__version__} sees no CUDA device here."


def fill(readme: Path, results: Path) -> None:
    """Put the table of `results` between the marks in the README."""
    from benchmarks.report import put_between

    content = json.loads(results.read_text(encoding="utf-8"))
    about = re.sub(r"[{}']", "", str({k: content["about"].get(k) for k in ("device", "torch", "cuda", "weft")}))
    put_between(readme, "gpu", f"{running.table(content['rows'])}\n\n{about}; all of it: `{results.name}`.")


if __name__ == "__main__":
    sys.exit(main())
