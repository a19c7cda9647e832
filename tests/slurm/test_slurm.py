"""On a real SLURM: what a cluster does to a job costs time, and nothing else."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import signal
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from tests.helpers import cluster as one_node
from tests.helpers.patience import patience
from weft.slurm import events

pytestmark = pytest.mark.skipif(bool(one_node.missing_programs()), reason=f"needs SLURM: {one_node.missing_programs()}")


def until(happened: Callable[[], Any]) -> None:
    end = time.monotonic() + patience()
    while not happened():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


def digest_of(folder: Path) -> str:
    weights = torch.load(folder / "weights.pt", weights_only=True)
    tensors = {k: v for k, v in _tensors(weights)}
    assert tensors
    return hashlib.sha256(b"".join(k.encode() + tensors[k].numpy().tobytes() for k in sorted(tensors))).hexdigest()


def _tensors(thing: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(thing, torch.Tensor):
        yield name, thing
    elif isinstance(thing, dict):
        for key, value in thing.items():
            yield from _tensors(value, f"{name}.{key}")


@functools.cache
def digest_undisturbed(workers: int, seed: int = 0) -> str:
    """The digest of the weights of a run that nobody disturbs."""
    from weft import cli

    words = ["--trainer.run_name", "u", "--trainer.progress", "false", "--trainer.seed", str(seed)]
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "module.py").write_text(textwrap.dedent(one_node.MODULE))
        os.chdir(place)
        try:
            config = one_node.write_config(Path(place), workers)
            assert cli.main(["fit", "--config", config, "--problem.pause", "0", *words]) == 0
        finally:
            os.chdir(before)
        return digest_of(Path(place) / "runs" / "u")


def stepped(job: Any) -> bool:
    return events.last_step(job.folder) >= 7


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
def test_a_sweep_by_jobs_completes_its_trials_whatever_happens_to_them(
    project: Path, cluster: one_node.Cluster
) -> None:
    def train(trial: Any) -> Any:
        import time

        import torch

        import weft

        def step(trainer: Any, batch: Any) -> Any:
            time.sleep(0.02)
            return (trainer.problem(batch["x"]) - trial["x"]).square().mean()

        torch.manual_seed(0)
        adam = lambda params: torch.optim.Adam(params, 0.05)
        trainer = weft.Trainer(epochs=8, seed=0, optimizer=adam, training_step=step, **trial.options)
        return trainer.fit(torch.nn.Linear(2, 1), weft.Data({"x": torch.rand(32, 2)}, batch_size=4))

    space = {"x": {"low": 0.0, "high": 3.0}}
    sweep = weft.sweep(train, space, trials=5, workers=2, seed=0, sampler="random", on="slurm", slurm={"time": 10})
    until(lambda: (sweep.folder / "trial-0001" / "checkpoints").exists())
    cluster.call("scancel", "-s", "USR1", f"{sweep.job}_0")
    cluster.call("scontrol", "requeue", f"{sweep.job}_1")
    found = sweep.result(patience() * 2)
    assert [t["state"] for t in found.trials] == ["complete"] * 5 and sweep.state == "finished"
    here = weft.sweep(train, space, trials=5, workers=1, seed=0, sampler="random", name="here")
    assert [(t["params"], t["value"]) for t in here.trials] == [(t["params"], t["value"]) for t in found.trials]


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


TRIALS, WORKERS = 200, 3


@pytest.mark.long
def test_random_interruptions_lose_no_trial_and_finish_none_twice(project: Path, cluster: one_node.Cluster) -> None:
    def train(trial: Any) -> Any:
        import os
        import time

        import torch

        import weft

        def write(line: str) -> None:
            with (trial.folder / "said").open("a") as file:
                file.write(line + "\n")

        def step(trainer: Any, batch: Any) -> Any:
            time.sleep(0.02 if trial.folder.parent.name == "sweep" else 0.0)
            return (trainer.problem(batch["x"]) - trial["x"]).square().mean()

        kept = [int(p.stem.rpartition("-")[2]) for p in (trial.folder / "checkpoints").glob("step-*.ckpt")]
        place = f"{os.environ.get('SLURM_JOB_ID')}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
        begun = lambda trainer: write(f"begun {trainer.global_step} {max(kept, default=0)} {place}")
        torch.manual_seed(0)
        adam = lambda params: torch.optim.Adam(params, 0.05)
        options = {**trial.options, "hooks": [*trial.options["hooks"], {"on_fit_start": begun}]}
        trainer = weft.Trainer(epochs=6, seed=0, optimizer=adam, training_step=step, **options)
        result = trainer.fit(torch.nn.Linear(2, 1), weft.Data({"x": torch.rand(32, 2)}, batch_size=4))
        write(f"over {result.steps}")
        return result

    space = {"x": {"low": 0.0, "high": 3.0}}
    options: dict[str, Any] = {"trials": TRIALS, "seed": 0, "sampler": "random"}
    slurm: dict[str, Any] = {"on": "slurm", "slurm": {"time": 3}, "grace": 60}
    sweep = weft.sweep(train, space, workers=WORKERS, **slurm, **options)
    began, kinds = time.monotonic(), interrupt(sweep, cluster, lambda: weft.sweep(train, space, **slurm, **options))
    found, seconds = sweep.result(patience()), time.monotonic() - began

    assert [t["state"] for t in found.trials] == ["complete"] * TRIALS  # none lost
    here = weft.sweep(train, space, name="here", workers=WORKERS, **options)
    assert [(t["params"], t["value"]) for t in here.trials] == [(t["params"], t["value"]) for t in found.trials]
    told = Counter(e["trial_id"] for e in journal_of(sweep.folder) if e["op_code"] == 6 and e["state"] == 1)
    assert sorted(told.values()) == [1] * TRIALS
    resumed = interrupted = lives = 0
    for number in range(TRIALS):
        said = [line.split() for line in (sweep.folder / f"trial-{number:04d}" / "said").read_text().splitlines()]
        begun = [int(line[1]) for line in said if line[0] == "begun"]
        assert begun == [int(line[2]) for line in said if line[0] == "begun"]  # from the newest checkpoint
        after = said[[line[0] for line in said].index("over") + 1 :]  # killed before it was told: no step again
        assert all(line[1] == str(6 * 8) for line in after)
        interrupted, lives = interrupted + (len(begun) > 1), lives + len(begun)
        resumed += sum(step > 0 for step in begun)
    assert set(kinds) == set(KINDS) and interrupted > 5 and resumed > 5
    print(
        f"{TRIALS} trials in {seconds:.0f} s, {dict(kinds)}: {interrupted} interrupted, {lives - TRIALS} times, "
        f"{resumed} of these after their first checkpoint; jobs begun {len(lives_of(sweep.folder))} times"
    )


KINDS = ("usr1", "scancel", "requeue", "kill", "preempt", "preempt with grace")


def interrupt(sweep: Any, cluster: one_node.Cluster, join: Callable[[], Any]) -> Counter[str]:
    """Do all kinds of harm to a sweep's workers until it is over; another one joins for each that will not come back.

    The last of the first workers is only preempted, and comes to its time limit.
    """
    dice, kinds = random.Random(0), Counter[str]()
    while sweep.state not in ("finished", "failed", "lost", "cancelled"):
        goal = len(list(sweep.folder.glob("trial-*"))) + dice.randrange(1, 7)
        until(lambda: len(list(sweep.folder.glob("trial-*"))) >= goal or sweep.state == "finished")  # noqa: B023
        time.sleep(dice.uniform(0.0, 1.0))
        task = f"{sweep.job}_{dice.randrange(WORKERS - 1)}"
        kind = KINDS[sum(kinds.values())] if sum(kinds.values()) < len(KINDS) else dice.choice(KINDS[:4] * 2 + KINDS)
        if kind == "usr1":
            cluster.call("scancel", "-s", "USR1", task, check=False)
        elif kind == "requeue":
            cluster.call("scontrol", "requeue", task, check=False)
        elif kind == "kill" and (pids := workers_of(sweep.folder)):
            os.kill(dice.choice(pids), signal.SIGKILL)
        elif kind == "scancel" and (jobs := cluster.call("squeue", "-h", "-r", "-p", "main", "-o", "%i").split()):
            cluster.call("scancel", dice.choice(jobs), check=False)
        elif kind.startswith("preempt"):
            cluster.call("scontrol", "update", "PartitionName=main", f"GraceTime={20 * kind.endswith('grace')}")
            cluster.call("sbatch", "-p", "urgent", "-n", str(cluster.cpus), "-o/dev/null", "--wrap", "sleep 1")
        if kind in ("kill", "scancel"):
            assert join().folder == sweep.folder
        kinds[kind] += 1
    return kinds


def journal_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "sweep.journal").read_text().splitlines() if line.endswith("}")]


def lives_of(folder: Path) -> set[str]:
    """Each job and restart in which a trial was begun."""
    said = [line.split() for path in folder.glob("trial-*/said") for line in path.read_text().splitlines()]
    return {line[3] for line in said if line[0] == "begun"}


def workers_of(folder: Path) -> list[int]:
    """The processes of a sweep's workers, without the srun that started them."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"weft.sweeps.worker" in words and str(folder).encode() in words and b"srun" not in words[0]:
            found.append(int(process.name))
    return found
