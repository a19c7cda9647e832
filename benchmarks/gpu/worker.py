"""The process that does checks, one after the other, and tells what it finds as lines of JSON.

    python -m benchmarks.gpu.worker cuda full FOLDER ends,waits,...

It is one process, because starting torch costs seconds; after an error that leaves the device unusable it ends, and
whoever reads the lines starts another for the rest.
"""

from __future__ import annotations

import os
import sys

TOLD = os.fdopen(os.dup(1), "w", buffering=1)  # the lines; whatever else is printed goes where errors go
os.dup2(2, 1)
os.environ.setdefault("OMP_NUM_THREADS", "4")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic=True asks for it
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import contextlib
import json
import platform
import shutil
import traceback
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import weft
from benchmarks import report
from benchmarks.gpu.checks import Check, chosen
from benchmarks.gpu.rows import Bench


def main(device: str, size: str, folder: str, names: str) -> None:
    """Do the checks and tell them."""
    os.environ.setdefault("WEFT_CACHE", str(Path(folder) / "cache"))  # nobody's graphs of an earlier time
    bench = Bench(device, size == "small", Path(folder))
    if bench.on_gpu:
        torch.cuda.init()
    tell(about=surroundings(bench))
    for check in chosen(names):
        tell(begin=check.name)
        error = do(check, bench)
        tell(end=check.name, error=error and f"{type(error).__name__}: {error}")
        if error is not None and bench.on_gpu and not is_usable():
            sys.exit(3)


def do(check: Check, bench: Bench) -> Exception | None:
    """Tell the rows of a check; the error that ended it early, if one did."""
    own = bench.folder / check.name
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    before = os.getcwd()
    try:
        with contextlib.chdir(own), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for row in check.load()(Bench(bench.device, bench.small, own)):
                tell(row=row._asdict())
    except Exception as error:  # noqa: BLE001, one check that fails stops no other
        traceback.print_exc()
        return error
    finally:
        os.chdir(before)
        if bench.on_gpu:
            with contextlib.suppress(RuntimeError):
                torch.cuda.set_sync_debug_mode("default")
                torch.cuda.empty_cache()
    return None


def is_usable() -> bool:
    """Whether the device still computes: some errors stay until the process ends."""
    try:
        return bool(torch.ones(2, device="cuda").sum().item() == 2)
    except RuntimeError:
        return False


def surroundings(bench: Bench) -> dict[str, str]:
    """Hardware and versions."""
    found = {"device": "cpu (a rehearsal)", **report.hardware(), "system": f"{platform.system()} {platform.release()}"}
    if bench.on_gpu:
        properties: Any = torch.cuda.get_device_properties(0)
        found["device"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        found["cuda"] = str(torch.version.cuda)  # type: ignore[attr-defined]
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    found["weft"] = weft.__version__
    for name in ("triton", "jax"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return {name: value for name, value in found.items() if value != "not installed"}


def tell(**what: Any) -> None:
    """One line."""
    print(json.dumps(what), file=TOLD, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
