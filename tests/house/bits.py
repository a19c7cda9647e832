"""What the tests that guard a rebuilding share: digests of what a run computed, and where they may be compared.

Only public names of weft and of torch, so that all of this still runs when weft's own files have moved.
"""

from __future__ import annotations

import hashlib
import os

# Before anything imports numba, OpenMP or matplotlib: the same as tests/conftest.py, for use without pytest.
os.environ.setdefault("NUMBA_DISABLE_JIT", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("WANDB_MODE", "disabled")

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.fabric  # noqa: F401 (its first import draws from the random numbers of python)
import torch
from torch import Tensor

torch.set_num_threads(1)
REPO = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())


def sha256(value: Any) -> str:
    """A digest of every bit of tensors and plain values. The order of a dict's entries does not matter."""
    digest = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, Tensor):
            digest.update(f"tensor {item.dtype} {tuple(item.shape)}".encode())
            digest.update(item.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(item, Mapping):
            digest.update(f"dict {len(item)}".encode())
            for key in sorted(item, key=repr):
                digest.update(repr(key).encode())
                add(item[key])
        elif isinstance(item, list | tuple):
            digest.update(f"list {len(item)}".encode())
            for entry in item:
                add(entry)
        elif item is None or isinstance(item, bool | int | float | str):
            digest.update(f"{type(item).__name__} {item!r}".encode())  # repr of a float is exact
        else:
            raise TypeError(f"{type(item).__name__}: only tensors and plain values have a digest here.")

    add(value)
    return digest.hexdigest()


def machine() -> dict[str, str]:
    """What decides about the last bits: torch and the processor."""
    fields: dict[str, str] = {}
    if (info := Path("/proc/cpuinfo")).is_file():
        for line in info.read_text(errors="replace").split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
    number = f"family {fields.get('cpu family', '?')}, model {fields.get('model', '?')}"
    cpu = f"{fields.get('model name', 'unknown')} ({number}, {torch.backends.cpu.get_cpu_capability()})"
    return {"torch": str(torch.__version__), "cpu": cpu}


def compiler() -> str:
    """The first line of what the C++ compiler says about itself; "none" without one."""
    try:
        asked = [os.environ.get("CXX", "g++"), "--version"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError):
        return "none"


def elsewhere(recorded: Mapping[str, str], here: Mapping[str, str]) -> str:
    """Why digests made there cannot be compared here, "" if they can."""
    different = [
        f"{name}: {there} there, {here.get(name)} here" for name, there in recorded.items() if there != here.get(name)
    ]
    return f"the digests were made with {'; '.join(different)}" if different else ""


@contextmanager
def own_folder() -> Iterator[Path]:
    """An empty working folder, and a cache of graphs in it."""
    before = os.getcwd()
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        patch.dict(os.environ, WEFT_CACHE=f"{folder}/cache"),
    ):
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


@contextmanager
def graphs_run_themselves() -> Iterator[list[str]]:
    """Where torch would compile a traced graph with a C++ compiler, the graph itself is run: quick, and on any machine.

    Gives a list that gets an entry each time a graph has run.
    """
    import torch._inductor
    from torch._inductor.package import package

    graphs: dict[str, Any] = {}
    ran: list[str] = []

    def aot_compile(graph: Any, *args: Any, **kwargs: Any) -> str:
        graphs[name := str(len(graphs))] = graph
        return name

    def package_aoti(path: Any, files: str) -> Any:
        Path(path).write_text(files)
        return path

    class Loader:
        def __init__(self, path: str, *args: Any) -> None:
            self.name = Path(path).read_text()

        def run(self, given: Any) -> list[Tensor]:
            ran.append(self.name)
            with torch.no_grad():
                return list(graphs[self.name](*given))

    with (
        tempfile.TemporaryDirectory(
            ignore_cleanup_errors=True
        ) as cache,  # what is in another one are graphs of somebody else
        patch.dict(os.environ, WEFT_CACHE=cache),
        patch.object(torch._inductor, "aot_compile", aot_compile),
        patch.object(package, "package_aoti", package_aoti),
        patch.object(torch._C._aoti, "AOTIModelPackageLoader", Loader),  # type: ignore[attr-defined]
    ):
        yield ran


def workloads() -> Any:
    """The module `benchmarks.workloads`, which is no installed package."""
    sys.path.insert(0, str(REPO))
    try:
        from benchmarks import workloads
    finally:
        sys.path.remove(str(REPO))
    return workloads
