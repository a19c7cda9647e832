"""Real jobs of two processes: by script, torchrun, SLURM's variables and ddp_spawn, and what happens when one fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import weft
from tests.helpers import job as job_script
from tests.helpers.patience import patience, timed
from tests.helpers.slurm_variables import free_port, variables_of_two_tasks
from weft.checkpoint.folder import load as load_checkpoint

JOB = Path(job_script.__file__)
DDP = {"devices": 2, "strategy": "ddp"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def environment(**more: str) -> dict[str, str]:
    source = str(Path(weft.__file__).parents[1])
    return {
        **os.environ,
        "PYTHONPATH": source,
        "OMP_NUM_THREADS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        **more,
    }


def start_job(
    command: list[str], task: str, folder: Path, options: dict[str, Any], **more: str
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*command, str(JOB), task, str(folder), json.dumps(options)],
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_job(command: list[str], task: str, folder: Path, options: dict[str, Any], **more: str) -> tuple[int, str]:
    """The exit status and what was written to stderr. No process may be left."""
    job = start_job(command, task, folder, options, **more)
    _, errors = job.communicate(timeout=patience())
    no_process_is_left(folder)
    return job.returncode, errors


def no_process_is_left(folder: Path) -> None:
    pids = [int(path.name.rsplit("-", 1)[1]) for path in folder.glob("pid-*")]
    assert pids
    deadline = time.monotonic() + patience()
    while alive := [pid for pid in pids if Path(f"/proc/{pid}").exists() and not _is_zombie(pid)]:
        assert time.monotonic() < deadline, f"still running: {alive}"
        time.sleep(0.1)


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def told(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "told.json").read_text())


@pytest.fixture(scope="module")
def undisturbed_job(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], float]:
    """What the job finds when the plain script starts its second process, and the seconds of all that."""
    folder = tmp_path_factory.mktemp("script")
    (status, errors), seconds = timed(lambda: run_job([sys.executable], "all", folder, DDP))
    assert status == 0, errors
    assert errors == ""  # not a word of Fabric's
    return told(folder), seconds


@pytest.fixture(scope="module")
def by_script(undisturbed_job: tuple[dict[str, Any], float]) -> dict[str, Any]:
    """What the job finds when the plain script starts its second process."""
    return undisturbed_job[0]


def test_a_plain_script_starts_its_processes_itself(by_script: dict[str, Any]) -> None:
    assert len(by_script["history"]["train_loss"]) == 4 and by_script["stop_reason"] == "epochs"
    assert by_script["validated"]["dev_loss"] == pytest.approx(min(by_script["history"]["dev_loss"]), rel=1e-12)
    assert len(by_script["predicted"]) == 3 and by_script["again"] == 8


def test_torchrun_ends_at_the_same_bits_as_the_script(tmp_path: Path, by_script: dict[str, Any]) -> None:
    status, errors = run_job([*TORCHRUN, "--standalone", "--nproc-per-node", "2"], "all", tmp_path, {"devices": 2})
    assert status == 0, errors
    assert told(tmp_path) == by_script


def test_processes_started_by_slurm_end_at_the_same_bits(tmp_path: Path, by_script: dict[str, Any]) -> None:
    jobs = [start_job([sys.executable], "all", tmp_path, DDP, **variables) for variables in variables_of_two_tasks()]
    errors = [job.communicate(timeout=patience())[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], errors
    no_process_is_left(tmp_path)
    assert told(tmp_path) == by_script


def test_the_example_runs_unchanged_on_one_device_and_on_two(repo: Path) -> None:
    def example(*arguments: str) -> dict[str, float]:
        command = [
            sys.executable,
            str(repo / "examples/multi_gpu.py"),
            "--accelerator",
            "cpu",
            "--epochs",
            "2",
            *arguments,
        ]
        lines = subprocess.run(
            command, env=environment(), check=True, capture_output=True, text=True
        ).stdout.splitlines()
        return {name: float(value) for name, value in (line.split() for line in lines if line.startswith("test_"))}

    one = example("--devices", "1", "--batch-size", "100")
    two = example("--devices", "2", "--batch-size", "50", "--strategy", "ddp")
    assert two == pytest.approx(one, rel=1e-3) and "test_return_violation" in one


@pytest.mark.long
def test_ddp_spawn_ends_at_the_same_bits(tmp_path: Path, by_script: dict[str, Any]) -> None:
    status, errors = run_job([sys.executable], "fit", tmp_path, {"devices": 2, "strategy": "ddp_spawn"})
    assert (status, errors) == (0, "")
    assert told(tmp_path) == {name: by_script[name] for name in ("weights", "history", "stop_reason")}


@pytest.mark.long
def test_two_agents_of_torchrun_end_at_the_same_bits(tmp_path: Path, by_script: dict[str, Any]) -> None:
    port = free_port()
    agents = [
        start_job(
            [
                *TORCHRUN,
                "--nnodes",
                "2",
                "--nproc-per-node",
                "1",
                "--node-rank",
                str(node),
                "--rdzv-backend",
                "c10d",
                "--rdzv-endpoint",
                f"127.0.0.1:{port}",
                "--rdzv-id",
                "weft",
                "--local-addr",
                "127.0.0.1",
            ],
            "all",
            tmp_path,
            {"devices": 1, "num_nodes": 2},
        )
        for node in range(2)
    ]
    errors = [agent.communicate(timeout=patience())[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], errors
    assert told(tmp_path) == by_script


@pytest.mark.long
@pytest.mark.parametrize("kind", ["raise", "kill"])
def test_a_job_that_lost_a_process_is_restarted_and_ends_at_the_bits_of_the_undisturbed_one(
    tmp_path: Path, kind: str
) -> None:
    ends = []
    for name, trouble in (("whole", None), ("broken", [kind, 1, 12, True])):
        folder = tmp_path / name
        folder.mkdir()
        options = {
            "devices": 2,
            "root_dir": str(folder),
            "run_name": "run",
            "checkpoint": {"every_n_steps": 5},
            "resume": "auto",
        }
        options |= {"trouble": trouble} if trouble else {}
        elastic = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "3", "--monitor-interval", "0.2"]
        status, errors = run_job([*TORCHRUN, *elastic], "fit", folder, options)
        assert status == 0, errors
        ends.append(told(folder))
    assert (tmp_path / "broken/once").exists()
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    ("kind", "of"),
    [
        ("raise", 1),
        pytest.param("raise", 0, marks=pytest.mark.long),
        pytest.param("exit", 1, marks=pytest.mark.long),
        pytest.param("kill", 0, marks=pytest.mark.long),
        pytest.param("kill", 1, marks=pytest.mark.long),
        pytest.param("term", 1, marks=pytest.mark.long),
        pytest.param("hang", 0, marks=pytest.mark.long),
        pytest.param("hang", 1, marks=pytest.mark.long),
    ],
)
def test_a_job_ends_when_one_of_its_processes_does(
    tmp_path: Path, kind: str, of: int, undisturbed_job: tuple[dict[str, Any], float]
) -> None:
    folder = {"root_dir": str(tmp_path), "run_name": "run", "checkpoint": {"every_n_steps": 1}}
    timeout = max(5.0, undisturbed_job[1])  # no process that is well waits for the other as long as that
    options = {**DDP, **folder, "timeout": timeout, "trouble": [kind, of, 3, False]}
    status, errors = run_job([sys.executable], "fit", tmp_path, options)
    took = time.time() - (tmp_path / "trouble").stat().st_mtime
    assert status != 0 and took < timeout + max(15.0, 2 * undisturbed_job[1])
    if kind == "raise":  # the first traceback is that of the cause
        first = errors.split("Traceback (most recent call last):")[1]
        assert "ValueError: this is the cause" in first, errors
    if kind == "hang":  # the other names it, and all have written down where they are
        line = next(n for n, text in enumerate(JOB.read_text().splitlines(), 1) if "time.sleep(1000)" in text)
        assert f"Process {of} was at {JOB}, line {line}, in on_step_end, in or after step" in errors, errors
        stacks = [(tmp_path / f"run/hang/rank-{rank}.txt").read_text() for rank in (0, 1)]
        assert all("last collective" in stack and "most recent call first" in stack for stack in stacks)
    if kind == "term":  # of one process: all leave after the same step
        assert status == 143 and "Traceback" not in errors, errors
    state, _ = load_checkpoint(tmp_path / "run")
    assert state["progress"]["step"] in ((2, 3) if kind != "term" else (4,))


def test_a_second_machine_that_nobody_starts_is_an_error_at_once() -> None:
    with pytest.raises(ValueError, match="num_nodes=2.*torchrun or srun"):
        weft.Trainer(num_nodes=2, accelerator="cpu").start(
            weft.Problem([], [weft.objective(lambda x: x)]), {"x": [1.0]}
        )


def test_torchrun_with_one_device_asked_for_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="each of them would train alone.*devices=2 and num_nodes=2"):
        weft.Trainer(accelerator="cpu").start(weft.Problem([], [weft.objective(lambda x: x)]), {"x": [1.0]})


NOTEBOOK = """
import torch, weft
class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
    def forward(self, batch):
        return {f"{batch['name']}_loss": (self.layer(batch["x"]) - 1).square().mean()}
torch.manual_seed(0)
problem = Line()
before = problem.layer.weight.clone()
trainer = weft.Trainer(epochs=3, devices=2, accelerator="cpu", strategy=STRATEGY, progress=False, timeout=600)
result = trainer.fit(problem, lambda: ({"x": torch.rand(16, 2)}, {"x": torch.rand(6, 2)}, None, 4))
assert not torch.equal(problem.layer.weight, before) and problem.layer.weight.grad is None
assert trainer.validate()["dev_loss"] == result.best_metric, result
assert trainer.fit(problem, lambda: ({"x": torch.rand(16, 2)}, None, None, 4)).epochs == 6
print(result.epochs, "epochs,", result.steps, "steps")
"""


@pytest.mark.parametrize("strategy", ["ddp_notebook", pytest.param("auto", marks=pytest.mark.long)])
def test_a_notebook_trains_in_two_processes_and_has_everything_back(strategy: str) -> None:
    pytest.importorskip("nbclient")
    from tests.helpers.notebooks import run_notebook

    notebook = run_notebook(NOTEBOOK.replace("STRATEGY", repr(strategy)))
    assert notebook.cells[0].outputs[-1].text.splitlines()[-1] == "3 epochs, 6 steps"


@pytest.mark.long
def test_the_stop_button_ends_processes_of_a_notebook_after_the_step_and_they_go_on() -> None:
    pytest.importorskip("nbclient")
    from tests.helpers.notebooks import run_notebook

    press = """
import multiprocessing, os, signal, threading
steps_begin = multiprocessing.Event()
def press():
    assert steps_begin.wait(600)
    os.killpg(os.getpgid(0), signal.SIGINT)  # as Jupyter does
threading.Thread(target=press).start()
trainer = weft.Trainer(
    epochs=10**6, devices=2, accelerator="cpu", strategy="ddp_notebook", progress=False, timeout=600,
    hooks={"on_step_end": lambda trainer, *_: trainer.run.progress.step == 20 and steps_begin.set()},
)
result = trainer.fit(problem, weft.Data({"x": torch.rand(64, 2)}, batch_size=4))
assert result.stop_reason == "interrupted" and 0 < result.steps, result
steps = result.steps
trainer.config = weft.TrainerConfig(**{**trainer.config.to_dict(), "epochs": 1, "max_steps": 5})
print("stopped")
"""
    notebook = run_notebook(NOTEBOOK.replace("STRATEGY", "'ddp_notebook'"), press)
    assert notebook.cells[1].outputs[-1].text == "stopped\n"
