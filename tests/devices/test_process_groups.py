"""Signals that reach a whole group of processes: the state is saved, the exit status right, and nothing is lost."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import weft
from tests.helpers import grouped
from tests.helpers.notebooks import run_notebook
from tests.helpers.patience import patience
from weft.checkpoint import folder as checkpoints

SCRIPT = Path(grouped.__file__)
# A KeyboardInterrupt that leaves a script ends it by SIGINT, or with 1 once torch._dynamo was imported (torch 2.13).
STATUS = {"SIGINT": {-signal.SIGINT, 1}, "SIGTERM": {143}, "SIGUSR1": {138}, "SIGHUP": {129}, "SIGXCPU": {152}}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]


def group_environment() -> dict[str, str]:
    source, repo = Path(weft.__file__).parents[1], SCRIPT.parents[2]
    return {**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{repo}", "OMP_NUM_THREADS": "1"}


def run_group(folder: Path, kind: str, name: str = "", step: int = 0, before: Any = ()) -> tuple[int, str]:
    """The exit status of a group of its own, and what it wrote to stderr."""
    command = [sys.executable, *before, str(SCRIPT), str(folder), kind, name, str(step)]
    job = subprocess.Popen(command, env=group_environment(), start_new_session=True, stderr=subprocess.PIPE, text=True)
    try:
        _, errors = job.communicate(timeout=patience())  # also what torchrun leaves behind holds the pipe
    finally:
        try:
            os.killpg(job.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    return job.returncode, errors


@pytest.fixture(scope="module")
def undisturbed_group(tmp_path_factory: pytest.TempPathFactory) -> Any:
    found: dict[tuple[str, ...], str] = {}

    def digest(kind: str, before: Any = ()) -> str:
        if (key := (kind, *before)) not in found:
            folder = tmp_path_factory.mktemp(kind)
            status, errors = run_group(folder, kind, before=before)
            assert status == 0, errors
            found[key] = (folder / "digest").read_text()
        return found[key]

    return digest


def check_group(folder: Path, kind: str, name: str, step: int, digest: str) -> None:
    status, errors = run_group(folder, kind, name, step)
    assert status in STATUS[name.removeprefix("PARENT_")], errors
    assert "RuntimeError" not in errors and ("KeyboardInterrupt" in errors) == name.endswith("SIGINT")
    later = kind.startswith("ddp")  # several processes tell each other at the next update
    assert checkpoints.load(folder / "run")[0]["progress"]["step"] == step + later
    assert weft.load_result(folder / "run").stop_reason == "interrupted"
    status, errors = run_group(folder, kind)
    assert status == 0, errors
    assert (folder / "digest").read_text() == digest


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("fork", "SIGTERM"),
        ("persistent", "SIGINT"),
        pytest.param("spawn", "SIGUSR1", marks=pytest.mark.long),
        pytest.param("none", "SIGHUP", marks=pytest.mark.long),
        pytest.param("forkserver", "SIGXCPU", marks=pytest.mark.long),
        pytest.param("ddp", "SIGTERM", marks=pytest.mark.long),
        pytest.param("ddp_fork", "SIGUSR1", marks=pytest.mark.long),
        pytest.param("ddp_fork", "SIGINT", marks=pytest.mark.long),
        pytest.param("ddp_fork", "PARENT_SIGINT", marks=pytest.mark.long),  # as an editor's stop button
        pytest.param("ddp_spawn", "PARENT_SIGINT", marks=pytest.mark.long),
    ],
)
def test_a_signal_to_the_group_is_saved_and_resumed_to_the_same_bits(
    kind: str, name: str, tmp_path: Path, undisturbed_group: Any
) -> None:
    check_group(tmp_path, kind, name, 8, undisturbed_group(kind))


MOMENTS_OF_TRIES = {1: (2, 5, 6, 7, 10), 2: (1, 2, 3, 4, 5)}  # of 12 steps of one process, of 6 of each of two
PROCESSES = {"none": 2, "fork": 1, "spawn": 1, "persistent": 1}  # that torchrun starts
ALL = [("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"), ("none", "fork", "spawn", "persistent")]


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["script", "torchrun"])
@pytest.mark.parametrize(("name", "kind"), [*itertools.product(*ALL)])
def test_all_signals_to_all_kinds_of_groups(
    kind: str, name: str, launcher: str, tmp_path: Path, undisturbed_group: Any
) -> None:
    """Five tries in one life, which ends where the undisturbed one does."""
    world = PROCESSES[kind] if launcher == "torchrun" else 1
    before = [*TORCHRUN[:-1], f"--nproc-per-node={world}"] if launcher == "torchrun" else []
    for step in MOMENTS_OF_TRIES[world]:
        status, errors = run_group(tmp_path, kind, name, step, before)
        # torchrun ends with a status of its own
        assert status in STATUS[name] if launcher == "script" else status != 0, errors
        assert ("KeyboardInterrupt" in errors) == (name == "SIGINT") and "DataLoader worker" not in errors, errors
        assert checkpoints.load(tmp_path / "run")[0]["progress"]["step"] == step + (world > 1), errors
        assert weft.load_result(tmp_path / "run").stop_reason == "interrupted"
    status, errors = run_group(tmp_path, kind, before=before)
    assert status == 0, errors
    assert (tmp_path / "digest").read_text() == undisturbed_group(kind, before)


CELL = """
from tests.helpers.grouped import train_in_group
try:
    train_in_group({folder!r}, {kind!r}, {name!r}, {step!r})
    left = 0
except SystemExit as leave:
    left = leave.code
print(left)
"""


def text_of_output(output: Any) -> str:
    return output.get("text", "") or output["data"]["text/plain"]


@pytest.mark.long
@pytest.mark.parametrize(("name", "kind"), [*itertools.product(*ALL)])
def test_all_signals_to_the_kernel_of_a_notebook_and_its_workers(
    kind: str, name: str, tmp_path: Path, undisturbed_group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel outlives them: Ctrl-C gives a result, the others leave the cell."""
    for variable in ("PYTHONPATH", "OMP_NUM_THREADS"):
        monkeypatch.setenv(variable, group_environment()[variable])
    tries = [(name, str(step)) for step in MOMENTS_OF_TRIES[1]]
    cells = [CELL.format(folder=str(tmp_path), kind=kind, name=n, step=s) for n, s in [*tries, ("", "0")]]
    look = f"import weft; weft.load_result({str(tmp_path / 'run')!r}).steps"
    found = run_notebook(*itertools.chain(*((cell, look) for cell in cells)))
    outputs = ["".join(map(text_of_output, cell.outputs)) for cell in found.cells]
    left = "0" if name == "SIGINT" else str(*STATUS[name])
    assert [int(text) for text in outputs[1::2]] == [*MOMENTS_OF_TRIES[1], 12]
    assert [text.strip() for text in outputs[::2]] == [*[left] * 5, "0"]
    assert (tmp_path / "digest").read_text() == undisturbed_group(kind)


WAITING = """
import os, signal, sys, threading, time, torch, weft
from tests.helpers.grouped import NoisyLine
def hit():
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGTERM)
weft.devices.signals.PATIENCE = 0.5
options = {"root_dir": sys.argv[1], "run_name": "run", "progress": False}
trainer = weft.Trainer(epochs=9, **options, checkpoint={"every_n_epochs": 1000, "best": False})
with trainer.start(NoisyLine(), weft.Data({"x": torch.ones(8, 2)}, batch_size=4)) as run:
    for epoch in run.epochs():
        for batch in run.batches():
            run.update(batch)
            if sys.argv[2] == "in a step" and run.progress.step == 3:
                threading.Thread(target=hit).start()
                time.sleep(600)
        if sys.argv[2] == "between" and run.progress.step == 4:
            threading.Thread(target=hit).start()
            time.sleep(600)
"""


@pytest.mark.parametrize(("where", "saved"), [("between", [4]), ("in a step", [])])
def test_a_loop_that_waits_does_not_swallow_sigterm(where: str, saved: list[int], tmp_path: Path) -> None:
    """Between steps the state is whole, and saved; in the middle of one it is not: the last regular save holds."""
    command = [sys.executable, "-c", "import weft.devices.signals\n" + WAITING, str(tmp_path), where]
    done = subprocess.run(
        command, env=group_environment(), capture_output=True, text=True, timeout=patience(), check=False
    )
    assert done.returncode == 143, done.stderr
    found = (tmp_path / "run/checkpoints").glob("step-*.ckpt")
    assert [int(path.stem.removeprefix("step-")) for path in found] == saved


MOMENTS = """
import os, signal, sys, torch, weft
from tests.helpers.grouped import NoisyLine
hit = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
def setup():
    if sys.argv[2] == "data":
        hit()
    return weft.Data({"x": torch.ones(8, 2)}, batch_size=4)
hooks = {sys.argv[2]: hit} if sys.argv[2].startswith("on_") else None
trainer = weft.Trainer(epochs=2, root_dir=sys.argv[1], run_name="run", checkpoint=True, progress=False, hooks=hooks)
try:
    trainer.fit(NoisyLine(), setup)
finally:
    print(trainer.run and trainer.run.progress.step)
print("went on")
"""


@pytest.mark.parametrize(("moment", "steps"), [("data", "None"), ("on_fit_start", "0"), ("on_fit_end", "4")])
def test_a_signal_before_the_first_step_or_after_the_last_ends_the_process(
    moment: str, steps: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", MOMENTS, str(tmp_path), moment]
    done = subprocess.run(
        command, env=group_environment(), capture_output=True, text=True, timeout=patience(), check=False
    )
    assert done.returncode == 143, done.stderr
    assert done.stdout.split() == [steps]
    if moment == "on_fit_end":
        assert weft.load_result(tmp_path / "run").stop_reason == "epochs"
