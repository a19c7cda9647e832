"""What every test stands on: a quiet machine before it, and the same machine after it.

Each test runs in its own empty folder with one thread. It fails if it leaves behind an environment variable, a default
dtype, a random-state-changing switch, a process group, a signal handler, a thread, a child process or an open figure.
"""

from __future__ import annotations

import os

# Before anything imports numba, OpenMP or matplotlib.
os.environ.setdefault("NUMBA_DISABLE_JIT", "1")  # `import neuromancer` takes 4 s instead of 20
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("WEFT_TRACEBACK", "full")  # of a test that fails all frames are wanted

import multiprocessing
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from tests.helpers.patience import patience

torch.set_num_threads(1)

# The same examples in every run, and no folder `.hypothesis` in the tree.
hypothesis.settings.register_profile("weft", deadline=None, derandomize=True, database=None, max_examples=50)
hypothesis.settings.load_profile("weft")

# Set once per process by an import or by the test runner, not by what a test does.
FOREIGN_VARIABLES = {
    "PYTEST_CURRENT_TEST",  # pytest
    "KMP_INIT_AT_FORK",  # torch, at import
    "KMP_DUPLICATE_LIB_OK",
    "CUDA_MODULE_LOADING",
    "PYTORCH_NVML_BASED_CUDA_CHECK",  # lightning, at import
    "TORCHINDUCTOR_CACHE_DIR",  # torch._inductor, at its first use
    "TRITON_CACHE_DIR",
    "QT_API",
    "COLUMNS",
    "LINES",
}
# Threads that a library starts once and keeps for the process.
FOREIGN_THREADS = ("InductorSubproc", "execnet", "tqdm", "pydevd", "IPythonHistory", "asyncio", "ThreadPoolExecutor")


@pytest.fixture(autouse=True)
def leave_no_trace(tmp_path: Path) -> Iterator[None]:
    """The machine as it was, checked and put back after each test."""
    folder = os.getcwd()  # no `monkeypatch` here: what a test patches is put back before this looks
    os.chdir(tmp_path)
    environment = dict(os.environ)
    threads = set(threading.enumerate())
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    flags = _torch_flags()

    yield

    os.chdir(folder)
    left = []
    left += _changed_variables(environment)
    left += [f"{name} is {now}, was {flags[name]}" for name, now in _torch_flags().items() if now != flags[name]]
    left += [
        f"signal handler of {number!r}" for number, handler in handlers.items() if signal.getsignal(number) != handler
    ]
    left += [f"thread {name}" for name in _remaining_threads(threads)]
    left += [f"child process {child.pid}" for child in multiprocessing.active_children()]
    left += _open_figures()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        left.append("an initialized process group")
        torch.distributed.destroy_process_group()
    _restore(environment, flags)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if left:
        pytest.fail("the test left behind: " + "; ".join(left), pytrace=False)


def _torch_flags() -> dict[str, object]:
    return {
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "number of threads": torch.get_num_threads(),
        "anomaly detection": torch.is_anomaly_enabled(),
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
    }


def _restore(environment: dict[str, str], flags: dict[str, object]) -> None:
    for name in set(os.environ) - set(environment) - FOREIGN_VARIABLES:
        del os.environ[name]
    os.environ.update({name: value for name, value in environment.items() if name != "PYTEST_CURRENT_TEST"})
    if isinstance(dtype := flags["default dtype"], torch.dtype):
        torch.set_default_dtype(dtype)
    torch.set_grad_enabled(bool(flags["grad mode"]))
    torch.use_deterministic_algorithms(bool(flags["deterministic algorithms"]))
    torch.set_num_threads(int(str(flags["number of threads"])))
    torch.autograd.set_detect_anomaly(bool(flags["anomaly detection"]))
    torch.backends.cudnn.benchmark = bool(flags["cudnn.benchmark"])


def _changed_variables(before: dict[str, str]) -> list[str]:
    names = (set(before) | set(os.environ)) - FOREIGN_VARIABLES
    return [f"environment variable {name}" for name in sorted(names) if before.get(name) != os.environ.get(name)]


def _remaining_threads(before: set[threading.Thread]) -> list[str]:
    """Names of new threads that are still alive after a grace of some seconds in all."""
    deadline = time.monotonic() + patience(30.0)
    remaining = []
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith(FOREIGN_THREADS):
            continue
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            remaining.append(thread.name)
    return sorted(remaining)


def _open_figures() -> list[str]:
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is None or not pyplot.get_fignums():
        return []
    numbers = pyplot.get_fignums()
    pyplot.close("all")
    return [f"{len(numbers)} open matplotlib figures"]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu` only the files that hold such tests are read: the others may need what is not installed there."""
    is_test = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    if config.option.markexpr == "gpu" and is_test and "pytest.mark.gpu" not in collection_path.read_text("utf-8"):
        return True
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, with the reason, where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where compiled graphs are kept while these tests run: not in the user's folder, unless KEEP names one."""
    patch = pytest.MonkeyPatch()
    folder = Path(os.environ.get("KEEP") or tmp_path_factory.mktemp("weft-cache"))
    patch.setenv("WEFT_CACHE", str(folder))
    yield folder
    patch.undo()


@pytest.fixture
def repo() -> Path:
    """The folder that holds pyproject.toml."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture
def no_warnings() -> Iterator[list[warnings.WarningMessage]]:
    """A list of the warnings of the test so far; the test may check that it is empty."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught
