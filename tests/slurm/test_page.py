"""The page about clusters: its blocks do on a real SLURM what it says of them."""

from __future__ import annotations

import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import weft
from tests.helpers import cluster as one_node
from tests.helpers.patience import patience
from weft.slurm import events
from weft.slurm.submitting import Submitted

pytestmark = pytest.mark.long
PAGE = Path(__file__).parents[2] / "docs" / "cluster.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


def test_all_blocks_of_the_page_are_run_here() -> None:
    assert len(blocks("bash")) == 2 and len(blocks("python")) == 4 and PAGE.read_text().count("```") == 2 * 6


def test_the_five_commands_of_a_day(project: Path, cluster: one_node.Cluster) -> None:
    (project / "sweep.yaml").write_text("run: run.yaml\nspace: {optimizer.lr: [0.01, 0.02]}\nsampler: grid\n")
    lines = [line for line in blocks("bash")[0].splitlines() if line]
    assert len(lines) == 5
    said = []
    for line in lines:
        words = shlex.split(line, comments=True)
        assert words[0] == "weft"
        done = subprocess.run([sys.executable, "-m", "weft", *words[1:]], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
        if words[1] == "submit":
            assert Submitted(project / "runs" / "a", said[-1].split()[1]).result(patience()).epochs == 5
        if words[1] == "sweep":
            end = time.monotonic() + patience()
            while events.state(project / "runs" / "sweep") != "finished":
                assert time.monotonic() < end
                time.sleep(0.5)
    assert re.search(r"^a .*epochs", said[2], flags=re.MULTILINE)
    assert "trial-0001" in said[4] and "lr" in said[4]


def test_a_run_is_submitted_from_python(project: Path) -> None:
    names: dict[str, Any] = {"weft": weft}
    code = blocks("python")[0].replace(', "gres": "gpu:1"', "")  # there is none
    exec(compile(code, "cluster.md", "exec"), names)  # noqa: S102, our own text
    assert names["job"].state == "finished" and names["job"].result().epochs == 5


def test_two_machines_by_torchrun_are_ended_and_go_on(project: Path) -> None:
    """Two agents, each of which starts its part, on this machine; the same weights as undisturbed ones."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (project / "train.py").write_text(
        "import sys, torch, weft\nfrom module import make_problem, data_setup\n"
        f"problem, data = make_problem(float(sys.argv[1])), data_setup()\n{blocks('python')[2]}"
        "print(result.steps, torch.cat([p.detach().flatten() for p in problem.parameters()]).sum().item())\n"
    )
    (line,) = [line for line in blocks("bash")[1].splitlines() if line.startswith("torchrun")]
    words = [sys.executable, "-m", "torch.distributed.run", *shlex.split(line, comments=True)[1:]]
    words = [word.replace("first-machine:29500", f"127.0.0.1:{port}") for word in words]

    def agents(folder: str, pause: str) -> list[subprocess.Popen[str]]:
        (project / folder).mkdir(exist_ok=True)
        for name in ("train.py", "module.py"):
            (project / folder / name).write_text((project / name).read_text())
        options: dict[str, Any] = {"cwd": project / folder, "stdout": subprocess.PIPE, "text": True}
        return [subprocess.Popen([*words, pause], **options) for _ in range(2)]

    def ends(started: list[subprocess.Popen[str]]) -> tuple[list[int], set[str]]:
        told = [process.communicate(timeout=patience())[0] for process in started]
        return [process.returncode for process in started], {line for out in told for line in out.splitlines()}

    codes, (undisturbed,) = ends(agents("whole", "0"))
    assert codes == [0, 0]
    started = agents("ended", "0.2")
    end = time.monotonic() + patience()
    while not events.last_step(project / "ended" / "runs" / "two"):
        assert time.monotonic() < end and all(process.poll() is None for process in started)
        time.sleep(0.05)
    for process in started:
        process.send_signal(signal.SIGTERM)
    codes, _ = ends(started)
    assert 0 not in codes and events.last_step(project / "ended" / "runs" / "two") < 30
    codes, (resumed,) = ends(agents("ended", "0"))
    assert codes == [0, 0] and resumed == undisturbed


def test_submitit_around_weft_is_requeued_and_goes_on(
    project: Path, cluster: one_node.Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit", reason="needs submitit")
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "")  # is put back after the block has set it
    (project / "submitting.py").write_text(
        "from module import make_problem, data_setup\n"
        + blocks("python")[3].replace('"gpu"', '"main"')
        + "print(job.job_id, flush=True)\nprint(job.result())\n"
    )
    process = subprocess.Popen([sys.executable, "submitting.py"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    number = process.stdout.readline().strip()
    end = time.monotonic() + patience()
    while not events.last_step(project / "runs" / "a"):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    cluster.call("scancel", "-s", "USR1", number)
    rest = process.communicate(timeout=patience())[0]
    assert process.returncode == 0 and cluster.job(number)["Restarts"] == "1"
    found = weft.load_result(project / "runs" / "a")
    assert float(rest.split()[-1]) == found.best_metric and found.epochs == 5


def test_a_trainer_of_ones_own_in_a_sweep(project: Path) -> None:
    (project / "sweeping.py").write_text(
        "import torch, weft\nfrom module import make_problem, data_setup\n"
        + blocks("python")[1]
        + "print(len(found.trials), found.best_value == min(t['value'] for t in found.trials))\n"
    )
    done = subprocess.run([sys.executable, "sweeping.py"], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["4", "True"], done.stderr
