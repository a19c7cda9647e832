"""Runs the examples and writes what they found into examples/README.md.

    python -m examples                    # all at full settings: figures, run times, pictures, README
    python -m examples part_3_pinn gan    # these
    python -m examples --notebooks        # the same in clean kernels, and writes the notebooks
    python -m examples --list

With the environment variable WEFT_SMALL=1 all settings are tiny and the README is left alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
NAMES = sorted(
    (
        path.stem
        for path in FOLDER.glob("*.py")
        if not path.stem.startswith("_") and path.stem not in ("notebooks", "multi_gpu")
    ),
    key=lambda name: (not name.startswith("part_"), name),
)
MARKS = "<!-- figures: written by `python -m examples` -->", "<!-- end of figures -->"


def run(name: str, picture: Path | None = None) -> dict[str, Any]:
    """Run one example in this process and return its `figures`; its last picture is written to `picture`."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    try:
        names = runpy.run_path(str(FOLDER / f"{name}.py"))
        if picture is not None and pyplot.get_fignums():
            picture.parent.mkdir(exist_ok=True)
            pyplot.figure(pyplot.get_fignums()[-1]).savefig(picture, dpi=80)
    finally:
        pyplot.close("all")
    return names["figures"]


def measure(name: str) -> dict[str, Any]:
    """Run one example in a process of its own, as a user does; figures, seconds, and seconds of processor time."""
    began, used = time.perf_counter(), used_by_children()
    code = (
        "import json; from examples.__main__ import FOLDER, run; "
        f"print(json.dumps(run({name!r}, FOLDER / 'pictures' / '{name}.png')))"
    )
    environment = {"MPLBACKEND": "agg", "NUMBA_DISABLE_JIT": "1", **os.environ}
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=FOLDER.parent, env=environment, check=False
    )
    if done.returncode:
        raise SystemExit(f"{name} failed with status {done.returncode}:\n{done.stdout[-2000:]}")
    seconds = {"seconds": time.perf_counter() - began, "processor_seconds": used_by_children() - used}
    return {"figures": json.loads(done.stdout.strip().splitlines()[-1]), **seconds}


def used_by_children() -> float:
    """Processor time in seconds of all processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def table(found: dict[str, dict[str, Any]]) -> str:
    """The measured figures in Markdown."""
    rows = ["| example | run time | processor time | figures |", "|---|---|---|---|"]
    for name, one in found.items():
        shown = ", ".join(f"{key.replace('_', ' ')} {_short(value)}" for key, value in one["figures"].items())
        rows.append(f"| [{name}]({name}.py) | {one['seconds']:.0f} s | {one['processor_seconds']:.0f} s | {shown} |")
    total, used = (sum(one[key] for one in found.values()) for key in ("seconds", "processor_seconds"))
    rows.append(f"| all, one after the other | {total:.0f} s | {used:.0f} s | |")
    return "\n".join(rows)


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} names" if value and isinstance(value[0], str) else "/".join(map(_short, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def hardware() -> str:
    """The machine and the versions in one line."""
    import torch

    versions = f"Python {platform.python_version()}, PyTorch {torch.__version__}"
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), {versions}"


def write_readme(found: dict[str, dict[str, Any]]) -> None:
    """Put the figures between the marks of examples/README.md; those of examples that were not run now are kept."""
    kept = FOLDER / "figures.json"
    known = json.loads(kept.read_text()) if kept.is_file() else {}
    known = {name: {**known, **found}[name] for name in NAMES if name in {**known, **found}}
    kept.write_text(json.dumps(known, indent=1) + "\n")
    readme = FOLDER / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    body = f"\n{table(known)}\n\nMeasured on {hardware()}.\n"
    readme.write_text(f"{before}{MARKS[0]}{body}{MARKS[1]}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples", description="Run the examples.")
    parser.add_argument("names", nargs="*", help="which (all, if none is named)")
    parser.add_argument("--notebooks", action="store_true", help="execute them as notebooks, and write these")
    parser.add_argument("--list", action="store_true", help="print the names")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in NAMES]:
        parser.error(f"there is no example {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if options.list:
        print("\n".join(NAMES))
        return
    found = {}
    for name in options.names or NAMES:
        print(f"{name} ...", flush=True)
        if options.notebooks:
            from examples.notebooks import write_notebook

            os.environ.pop("MPLBACKEND", None)  # the kernel's own draws into the notebook
            found[name] = write_notebook(name)
        else:
            found[name] = measure(name)
        print(f"  {found[name]['seconds']:.0f} s: {json.dumps(found[name]['figures'])}", flush=True)
        if not os.environ.get("WEFT_SMALL"):
            write_readme(found)


if __name__ == "__main__":
    main()
