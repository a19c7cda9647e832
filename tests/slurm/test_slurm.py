"""On a real SLURM: what a cluster does to a job costs time, and nothing else."""

from __future__ import annotations

import hashlib
import os
import textwrap
import time
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

MODULE = """
    import time
    from pathlib import Path
    import torch, weft
    from torch.utils.data import DataLoader, Dataset

    class Noisy(Dataset):
        def __len__(self):
            return 48
        def __getitem__(self, i):
            return {"x": torch.full((2,), i / 48.0) + 0.01 * torch.randn(2)}

    def make_problem(pause=0.05):
        net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))
        def value(x):
            time.sleep(pause)
            return (net(x) - x.sum(1, keepdim=True)).square()
        return weft.Problem([weft.Node(net, ["x"], ["y"])], objectives=[weft.objective(
            lambda x, y: (time.sleep(pause), (y - x.sum(1, keepdim=True)).square())[1], name="fit")])

    def data_setup(workers=0):
        return weft.Data(DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=workers))
"""
CONFIG = """
    problem: module.py:make_problem
    data: {class_path: "module.py:data_setup", init_args: {workers: WORKERS}}
    optimizer: {class_path: Adam, init_args: {lr: 1e-2}}
    trainer: {epochs: 5, seed: 0, accelerator: cpu, checkpoint: {every_n_steps: 7}}
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[one_node.Cluster]:
    made = one_node.Cluster(tmp_path_factory.mktemp("s"))
    made.start()
    yield made
    made.stop()


@pytest.fixture
def project(tmp_path: Path, cluster: one_node.Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder of somebody who submits, with the cluster's commands at hand."""
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(weft.__file__).parents[1]), str(Path(__file__).parents[2])])
    )
    (tmp_path / "module.py").write_text(textwrap.dedent(MODULE))
    yield tmp_path
    cluster.call("scancel", "--user", str(os.getuid()), check=False)


def config(project: Path, workers: int = 0) -> str:
    path = project / "run.yaml"
    path.write_text(textwrap.dedent(CONFIG).replace("WORKERS", str(workers)))
    return str(path)


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


@pytest.fixture(scope="module")
def undisturbed_digests(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """The digest of the weights of a run that nobody disturbs, by its number of loader workers."""
    from weft import cli

    found, before = {}, os.getcwd()
    for workers in (0, 2):
        folder = tmp_path_factory.mktemp("undisturbed")
        (folder / "module.py").write_text(textwrap.dedent(MODULE))
        os.chdir(folder)
        try:
            words = ["--problem.pause", "0", "--trainer.run_name", "u", "--trainer.progress", "false"]
            assert cli.main(["fit", "--config", config(folder, workers), *words]) == 0
        finally:
            os.chdir(before)
        found[workers] = digest_of(folder / "runs" / "u")
    return found


def stepped(job: Any) -> bool:
    return events.last_step(job.folder) >= 7


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.long)])
def test_a_job_that_is_signalled_comes_back_and_ends_with_the_same_bits(
    workers: int, project: Path, cluster: one_node.Cluster, undisturbed_digests: dict[int, str]
) -> None:
    job = weft.submit(config(project, workers), name="a", slurm={"time": 10})
    assert job.state == "queued" or job.state == "running"
    (project / "module.py").write_text("raise RuntimeError('edited after it was submitted')")
    until(lambda: stepped(job))
    cluster.call("scancel", "-s", "USR1", job.job)  # what --signal=USR1@300 sends before the time limit
    until(lambda: events.state(job.folder) == "queued")
    assert job.result(patience()).epochs == 5 and job.state == "finished"
    assert digest_of(job.folder) == undisturbed_digests[workers] != undisturbed_digests[2 - workers]
    happened = [e["event"] for e in events.events(job.folder)]
    assert happened == ["submitted", "started", "requeued", "started", "finished"]
    assert cluster.job(job.job)["Restarts"] == "1" and "epoch" in job.log()


@pytest.mark.long
@pytest.mark.parametrize("grace", [0, 20])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_job_that_is_preempted_comes_back_and_ends_with_the_same_bits(
    workers: int, grace: int, project: Path, cluster: one_node.Cluster, undisturbed_digests: dict[int, str]
) -> None:
    cluster.call("scontrol", "update", "PartitionName=main", f"GraceTime={grace}")
    job = weft.submit(config(project, workers), name="p", slurm={"exclusive": True})
    until(lambda: stepped(job))
    cluster.call("sbatch", "-p", "urgent", "-n", str(cluster.cpus), "--output=/dev/null", "--wrap", "sleep 1")
    until(lambda: events.state(job.folder) in ("preempted", "queued"))
    assert job.result(patience()).epochs == 5
    assert digest_of(job.folder) == undisturbed_digests[workers] and int(cluster.job(job.job)["Restarts"]) >= 1


@pytest.mark.long
def test_a_signal_before_training_begins_costs_nothing(
    project: Path, cluster: one_node.Cluster, undisturbed_digests: dict[int, str]
) -> None:
    (project / "module.py").write_text("import time; time.sleep(4)\n" + textwrap.dedent(MODULE))
    job = weft.submit(config(project), name="early")
    until(lambda: events.state(job.folder) == "running")
    time.sleep(1.0)
    cluster.call("scancel", "-s", "USR1", job.job)
    job.result(patience())
    assert digest_of(job.folder) == undisturbed_digests[0] and cluster.job(job.job)["Restarts"] == "1"


@pytest.mark.long
def test_a_job_that_is_cancelled_does_not_come_back(project: Path, cluster: one_node.Cluster) -> None:
    job = weft.submit(config(project), name="c")
    with pytest.raises(FileExistsError, match="is the run of job"):
        weft.submit(config(project), name="c")
    until(lambda: stepped(job))
    job.cancel()
    until(lambda: cluster.job(job.job)["JobState"] == "CANCELLED")
    assert cluster.job(job.job)["Restarts"] == "0" and job.state == "cancelled"
    with pytest.raises(RuntimeError, match="the end of its log"):
        job.result(5)


@pytest.mark.long
def test_restarts_that_make_no_step_end(project: Path, cluster: one_node.Cluster) -> None:
    (project / "module.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGUSR1)\n" + textwrap.dedent(MODULE)
    )
    job = weft.submit(config(project), name="stuck")
    with pytest.raises(RuntimeError, match="is stuck"):
        job.result(patience())
    assert events.events(job.folder)[-1]["restart"] == 2


def test_a_function_is_submitted_and_what_it_returns_comes_back(project: Path) -> None:
    def train(job: Any) -> dict[str, float]:
        import torch

        import weft

        torch.manual_seed(0)
        step = lambda trainer, batch: trainer.problem(batch["x"]).square().mean()
        trainer = weft.Trainer(epochs=2, training_step=step, **job.options)
        result = trainer.fit(torch.nn.Linear(2, 1), weft.DictDataset({"x": torch.ones(8, 2)}))
        return {"loss": result.history["train_loss"][-1]}

    job = weft.submit(train, name="f", slurm={"time": 5})
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


@pytest.mark.long
def test_random_interruptions_lose_no_trial_and_finish_none_twice(project: Path, cluster: one_node.Cluster) -> None:
    import os
    import random
    import signal

    def train(trial: Any) -> Any:
        import time

        import torch

        import weft

        def step(trainer: Any, batch: Any) -> Any:
            time.sleep(0.02)
            return (trainer.problem(batch["x"]) - trial["x"]).square().mean()

        torch.manual_seed(0)
        adam = lambda params: torch.optim.Adam(params, 0.05)
        trainer = weft.Trainer(epochs=6, seed=0, optimizer=adam, training_step=step, **trial.options)
        result = trainer.fit(torch.nn.Linear(2, 1), weft.Data({"x": torch.rand(32, 2)}, batch_size=4))
        with (trial.folder / "ends").open("a") as file:
            file.write("x")
        return result

    count = int(os.environ.get("WEFT_TRIALS", "12"))
    space = {"x": {"low": 0.0, "high": 3.0}}
    options: dict[str, Any] = {"trials": count, "seed": 0, "sampler": "random"}
    sweep = weft.sweep(train, space, workers=3, on="slurm", slurm={"time": 30}, **options)
    dice = random.Random(0)
    interruptions = 0

    def files() -> set[str]:
        return {str(path) for path in sweep.folder.glob("trial-*/checkpoints/step-*")}

    while sweep.state not in ("finished", "lost", "cancelled"):
        before = files()
        until(lambda: files() != before or sweep.state == "finished")  # noqa: B023 - is asked at once
        time.sleep(dice.uniform(0.0, 0.5))
        task = f"{sweep.job}_{dice.randrange(3)}"
        kind = dice.choice(["usr1", "requeue", "kill"])
        if kind == "usr1":
            cluster.call("scancel", "-s", "USR1", task, check=False)
        elif kind == "requeue":
            cluster.call("scontrol", "requeue", task, check=False)
        elif found := [int(p.name) for p in Path("/proc").glob("[0-9]*") if str(sweep.folder).encode() in _words(p)]:
            os.kill(dice.choice(found), signal.SIGKILL)
            more = weft.sweep(train, space, workers=1, on="slurm", slurm={"time": 30}, **options)  # another one joins
            assert more.folder == sweep.folder
        interruptions += 1
    found = sweep.result(patience())
    assert [t["state"] for t in found.trials] == ["complete"] * count and interruptions >= 1
    assert all((found.folder / f"trial-{i:04d}" / "ends").read_text() == "x" for i in range(count))
    here = weft.sweep(train, space, name="here", **options)
    assert [(t["params"], t["value"]) for t in here.trials] == [(t["params"], t["value"]) for t in found.trials]


def _words(process: Path) -> bytes:
    try:
        words = (process / "cmdline").read_bytes()
    except OSError:
        return b""
    return words if b"weft.sweeps.worker" in words and b"srun" not in words.split(b"\0")[0] else b""
