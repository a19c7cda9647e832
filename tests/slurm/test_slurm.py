"""On a real SLURM: what a cluster does to a job costs time, and nothing else."""

from __future__ import annotations

import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

import weft
from tests.helpers import cluster as one_node
from tests.helpers.cluster import digest_of, digest_undisturbed, stepped, until
from tests.helpers.patience import patience
from weft.slurm import events

pytestmark = pytest.mark.skipif(bool(one_node.missing_programs()), reason=f"needs SLURM: {one_node.missing_programs()}")


@pytest.mark.parametrize(
    ("workers", "to"),
    [(0, []), *(pytest.param(w, to, marks=pytest.mark.long) for w, to in [(2, []), (0, ["--batch"]), (2, ["--full"])])],
)
def test_a_job_that_is_signalled_comes_back_and_ends_with_the_same_bits(
    workers: int, to: list[str], project: Path, cluster: one_node.Cluster
) -> None:
    """`to`: the run alone, as --signal=USR1@300 does before the time limit; the batch shell alone; all processes."""
    job = weft.submit(one_node.write_config(project, workers), name="a", slurm={"time": 10})
    assert job.state == "queued" or job.state == "running"
    (project / "module.py").write_text("raise RuntimeError('edited after it was submitted')")
    until(lambda: stepped(job))
    cluster.call("scancel", *to, "--signal=USR1", job.job)
    until(lambda: events.state(job.folder) == "queued")
    assert job.result(patience()).epochs == 5 and job.state == "finished"
    assert digest_of(job.folder) == digest_undisturbed(workers) != digest_undisturbed(workers, seed=1)
    happened = [e["event"] for e in events.events(job.folder)]
    assert happened == ["submitted", "started", "requeued", "started", "finished"]
    assert cluster.job(job.job)["Restarts"] == "1" and "epoch" in job.log()


@pytest.mark.long
@pytest.mark.parametrize("grace", [0, 20])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_job_that_is_preempted_comes_back_and_ends_with_the_same_bits(
    workers: int, grace: int, project: Path, cluster: one_node.Cluster
) -> None:
    cluster.call("scontrol", "update", "PartitionName=main", f"GraceTime={grace}")
    job = weft.submit(one_node.write_config(project, workers), name="p", slurm={"exclusive": True})
    until(lambda: stepped(job))
    cluster.call("sbatch", "-p", "urgent", "-n", str(cluster.cpus), "--output=/dev/null", "--wrap", "sleep 1")
    until(lambda: events.state(job.folder) in ("preempted", "queued"))
    assert job.result(patience()).epochs == 5
    assert digest_of(job.folder) == digest_undisturbed(workers) and int(cluster.job(job.job)["Restarts"]) >= 1


@pytest.mark.long
def test_a_job_that_comes_to_its_time_limit_comes_back_and_ends_with_the_same_bits(
    project: Path, cluster: one_node.Cluster
) -> None:
    module = textwrap.dedent(one_node.MODULE).replace("pause=0.05", "pause=2.5")  # 60 steps: more than two minutes
    (project / "module.py").write_text(module)
    job = weft.submit("run.yaml", name="t", slurm={"time": 3}, grace=60)
    assert job.result(patience()).epochs == 5
    assert digest_of(job.folder) == digest_undisturbed(0)
    (left,) = [e for e in events.events(job.folder) if e["event"] == "requeued"]
    assert 0 < left["step"] < 60 and cluster.job(job.job)["Restarts"] == "1"


@pytest.mark.long
def test_a_signal_before_training_begins_costs_nothing(project: Path, cluster: one_node.Cluster) -> None:
    (project / "module.py").write_text("import time; time.sleep(4)\n" + textwrap.dedent(one_node.MODULE))
    job = weft.submit("run.yaml", name="early")
    until(lambda: events.state(job.folder) == "running")
    time.sleep(1.0)
    cluster.call("scancel", "-s", "USR1", job.job)
    job.result(patience())
    assert digest_of(job.folder) == digest_undisturbed(0) and cluster.job(job.job)["Restarts"] == "1"


@pytest.mark.long
def test_a_job_that_is_cancelled_does_not_come_back(project: Path, cluster: one_node.Cluster) -> None:
    job = weft.submit("run.yaml", name="c")
    with pytest.raises(FileExistsError, match="is the run of job"):
        weft.submit("run.yaml", name="c")
    until(lambda: stepped(job))
    job.cancel()
    until(lambda: cluster.job(job.job)["JobState"] == "CANCELLED")
    assert cluster.job(job.job)["Restarts"] == "0" and job.state == "cancelled"
    with pytest.raises(RuntimeError, match="the end of its log"):
        job.result(5)


@pytest.mark.long
def test_restarts_that_make_no_step_end(project: Path, cluster: one_node.Cluster) -> None:
    (project / "module.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGUSR1)\n" + textwrap.dedent(one_node.MODULE)
    )
    job = weft.submit("run.yaml", name="stuck")
    with pytest.raises(RuntimeError, match="is stuck"):
        job.result(patience())
    assert events.events(job.folder)[-1]["restart"] == 2


@pytest.mark.long
def test_a_function_is_submitted_and_what_it_returns_comes_back(project: Path) -> None:
    def train(job: Any) -> dict[str, float]:
        import torch

        import weft

        torch.manual_seed(0)
        step = lambda trainer, batch: trainer.problem(batch["x"]).square().mean()
        trainer = weft.Trainer(epochs=2, training_step=step, **job.options)
        result = trainer.fit(torch.nn.Linear(2, 1), weft.DictDataset({"x": torch.ones(8, 2)}))
        return {"loss": result.history["train_loss"][-1]}

    job = weft.submit(train, name="f", slurm={"time": 10})
    assert 0 < job.result(patience())["loss"] < 10
    assert weft.load_result(job.folder).epochs == 2


@pytest.mark.long
def test_devices_and_tasks_that_do_not_agree_are_put_right_or_refused(project: Path, cluster: one_node.Cluster) -> None:
    (project / "fit.py").write_text(
        textwrap.dedent("""
        import os, sys, torch, weft, torch.distributed as dist
        devices = int(sys.argv[1])
        step = lambda t, b: t.problem(b["x"]).square().mean()
        t = weft.Trainer(epochs=1, devices=devices, strategy="ddp" if devices > 1 else "auto", accelerator="cpu",
                         progress=False, training_step=step, root_dir="runs", run_name="r")
        try:
            t.fit(torch.nn.Linear(2, 1), weft.Data({"x": torch.rand(16, 2)}, batch_size=4))
            print("world", dist.get_world_size() if dist.is_initialized() else 1, "steps", t.global_step, flush=True)
        except ValueError as error:
            print(error, flush=True)
        """)
    )

    def said(tasks: int, devices: int, srun: str = "srun") -> str:
        import sys

        command = f"{srun} {sys.executable} fit.py {devices}"
        cluster.call("sbatch", "--wait", f"-n{tasks}", f"--ntasks-per-node={tasks}", "-oout.txt", "--wrap", command)
        return (project / "out.txt").read_text()

    assert said(tasks=1, devices=2).count("world 2 steps 2") == 2  # weft starts the other process itself
    assert said(tasks=2, devices=2).count("world 2 steps 2") == 2
    assert said(tasks=2, devices=2, srun="").count("world 2 steps 2") == 2  # python in the batch script
    told = said(tasks=2, devices=1)
    assert told.count("SLURM started 2 tasks of this script, but devices=1") == 2 and "world" not in told
    assert said(tasks=2, devices=1, srun="").count("world 1 steps 4") == 1  # -n 2 for two cores


def sent(cluster: one_node.Cluster, *options: str, command: str) -> str:
    """The number of a job with a batch script of one's own."""
    kept = ["--parsable", "--requeue", "--open-mode=append", "--output=out-%a.txt", *options]
    return cluster.call("sbatch", *kept, "--wrap", command.replace("weft", f"{sys.executable} -m weft")).strip()


def is_over(cluster: one_node.Cluster, job: str) -> bool:
    return cluster.job(job)["JobState"] not in ("RUNNING", "PENDING", "COMPLETING", "CONFIGURING")


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["signalled", "preempted"])
def test_two_tasks_come_back_and_end_with_the_same_bits(
    how: str, workers: int, project: Path, cluster: one_node.Cluster
) -> None:
    job = weft.submit(one_node.write_config(project, workers, devices=2), name="two")
    until(lambda: stepped(job))
    if how == "signalled":
        cluster.call("scancel", "--signal=USR1", job.job)
    else:
        cluster.call("sbatch", "-p", "urgent", "-n", str(cluster.cpus), "--output=/dev/null", "--wrap", "sleep 1")
    assert job.result(patience()).epochs == 5 and cluster.job(job.job)["Restarts"] == "1"
    assert digest_of(job.folder) == digest_undisturbed(workers, devices=2) != digest_undisturbed(workers)
    assert [e["step"] for e in events.events(job.folder) if e["event"] == "started"][1] >= 7


@pytest.mark.long
def test_a_signal_after_training_costs_nothing(project: Path, cluster: one_node.Cluster) -> None:
    def train(job: Any) -> None:
        import time

        from weft import cli

        words = ["--trainer.root_dir", str(job.folder.parent), "--trainer.run_name", job.folder.name]
        assert cli.main(["fit", "--config", "run.yaml", *words, "--trainer.resume", "auto"]) == 0
        (job.folder / "over").touch()
        time.sleep(4)

    job = weft.submit(train, name="late")
    until(lambda: (job.folder / "over").exists())
    cluster.call("scancel", "--signal=USR1", job.job)
    job.result(patience())
    assert digest_of(job.folder) == digest_undisturbed(0) and cluster.job(job.job)["Restarts"] == "1"
    assert [e["step"] for e in events.events(job.folder) if e["event"] == "started"] == [0, 60]


@pytest.mark.long
@pytest.mark.parametrize(("start", "to"), [("srun ", []), ("exec ", ["--batch"]), ("srun ", None)])
def test_a_batch_script_of_ones_own_comes_back_and_ends_with_the_same_bits(
    start: str, to: list[str] | None, project: Path, cluster: one_node.Cluster
) -> None:
    """`to`: what is signalled; None: preempted with a time of grace."""
    cluster.call("scontrol", "update", "PartitionName=main", "GraceTime=20")
    one_node.write_config(project, workers=2)
    words = "weft fit --config run.yaml --trainer.run_name a --trainer.resume auto"
    job = sent(cluster, command=start + words)
    until(lambda: events.last_step(project / "runs" / "a") >= 7)
    if to is not None:
        cluster.call("scancel", *to, "--signal=USR1", job)
    else:
        cluster.call("sbatch", "-p", "urgent", "-n", str(cluster.cpus), "--output=/dev/null", "--wrap", "sleep 1")
    until(lambda: is_over(cluster, job))
    assert cluster.job(job)["JobState"] == "COMPLETED" and cluster.job(job)["Restarts"] == "1"
    assert digest_of(project / "runs" / "a") == digest_undisturbed(2)


@pytest.mark.long
def test_tasks_of_an_array_without_names_each_have_and_go_on_with_their_own_run(
    project: Path, cluster: one_node.Cluster
) -> None:
    words = "weft fit --config run.yaml --trainer.resume auto --trainer.root_dir runs"
    command = f"srun {words} --trainer.seed $SLURM_ARRAY_TASK_ID"
    job = sent(cluster, "--array=0-2", command=command)
    runs = project / "runs"
    until(lambda: len([f for f in runs.glob("*") if events.last_step(f) >= 7]) == 3)
    for task in (1, 2):
        cluster.call("scancel", "--signal=USR1", f"{job}_{task}")
    until(lambda: all(is_over(cluster, f"{job}_{task}") for task in range(3)))
    assert [cluster.job(f"{job}_{task}")["Restarts"] for task in range(3)] == ["0", "1", "1"]
    assert sorted(digest_of(f) for f in runs.iterdir()) == sorted(digest_undisturbed(0, seed) for seed in range(3))
