"""Sweeps on a real SLURM: trials are neither lost nor finished twice, and are worth what undisturbed ones are."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import optuna
import pytest

import weft
from tests.helpers import cluster as one_node
from tests.helpers.cluster import until
from tests.helpers.patience import patience

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(bool(one_node.missing_programs()), reason=f"needs SLURM: {one_node.missing_programs()}"),
]
SPACE = {"x": {"low": 0.0, "high": 3.0}}
RANDOM: dict[str, Any] = {"seed": 0, "sampler": "random"}


def trials_of(epochs: int, pause: float) -> Callable[[Any], Any]:
    """What a sweep runs: 8 steps an epoch, slow ones in a sweep called "sweep".

    In the trial's folder, the file "said" tells where each life of it began, where its newest checkpoint was, and in
    which job; and where it was over.
    """

    def train(trial: Any) -> Any:
        import os
        import time

        import torch

        import weft

        def write(line: str) -> None:
            with (trial.folder / "said").open("a") as file:
                file.write(line + "\n")

        def step(trainer: Any, batch: Any) -> Any:
            time.sleep(pause if trial.folder.parent.name == "sweep" else 0.0)
            return (trainer.problem(batch["x"]) - trial["x"]).square().mean()

        kept = [int(p.stem.rpartition("-")[2]) for p in (trial.folder / "checkpoints").glob("step-*.ckpt")]
        place = f"{os.environ.get('SLURM_JOB_ID')}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
        begun = lambda trainer: write(f"begun {trainer.global_step} {max(kept, default=0)} {place}")
        torch.manual_seed(0)
        adam = lambda params: torch.optim.Adam(params, 0.05)
        options = {**trial.options, "hooks": [*trial.options["hooks"], {"on_fit_start": begun}]}
        trainer = weft.Trainer(epochs=epochs, seed=0, optimizer=adam, training_step=step, **options)
        result = trainer.fit(torch.nn.Linear(2, 1), weft.Data({"x": torch.rand(32, 2)}, batch_size=4))
        write(f"over {result.steps}")
        return result

    return train


def lives(folder: Path, number: int) -> list[int]:
    """The step at which each life of a trial began; each began at its newest checkpoint."""
    path = folder / f"trial-{number:04d}" / "said"
    begun = [line.split() for line in path.read_text().splitlines() if line.startswith("begun")]
    assert [line[1] for line in begun] == [line[2] for line in begun]
    return [int(line[1]) for line in begun]


def have_saved(folder: Path, *numbers: int) -> bool:
    return all(list((folder / f"trial-{n:04d}" / "checkpoints").glob("step-*.ckpt")) for n in numbers)


def worth(found: Any) -> list[Any]:
    return [(t["state"], t["params"], t["value"]) for t in found.trials]


def test_a_sweep_by_jobs_completes_its_trials_whatever_happens_to_them(
    project: Path, cluster: one_node.Cluster
) -> None:
    train = trials_of(epochs=8, pause=0.02)
    sweep = weft.sweep(train, SPACE, trials=5, workers=2, on="slurm", slurm={"time": 10}, **RANDOM)
    until(lambda: have_saved(sweep.folder, 1))
    cluster.call("scancel", "-s", "USR1", f"{sweep.job}_0")
    cluster.call("scontrol", "requeue", f"{sweep.job}_1")
    found = sweep.result(patience() * 2)
    assert [t["state"] for t in found.trials] == ["complete"] * 5 and sweep.state == "finished"
    here = weft.sweep(train, SPACE, trials=5, name="here", **RANDOM)
    assert (
        worth(here) == worth(found) != worth(weft.sweep(train, SPACE, trials=5, name="other", **{**RANDOM, "seed": 9}))
    )


@pytest.mark.parametrize("how", ["scancel", "kill"])
def test_the_trial_of_a_worker_that_is_lost_is_gone_on_with_by_another(
    how: str, project: Path, cluster: one_node.Cluster
) -> None:
    train = trials_of(epochs=6, pause=0.1)
    sweep = weft.sweep(train, SPACE, trials=3, workers=2, on="slurm", **RANDOM)
    until(lambda: have_saved(sweep.folder, 0, 1))
    if how == "scancel":
        cluster.call("scancel", f"{sweep.job}_1")
    else:
        os.kill(workers_of(sweep.folder)[0], signal.SIGKILL)
    found = sweep.result(patience())
    assert worth(found) == worth(weft.sweep(train, SPACE, trials=3, name="here", **RANDOM))
    begun = [lives(sweep.folder, number) for number in range(3)]
    (lost,) = [steps for steps in begun if len(steps) == 2]
    assert lost[0] == 0 < lost[1] and len([steps for steps in begun if steps == [0]]) == 2
    jobs = [
        line.split()[3]
        for line in (sweep.folder / f"trial-{begun.index(lost):04d}" / "said").read_text().splitlines()
        if line.startswith("begun")
    ]
    assert len(set(jobs)) == 2


def test_bad_trials_are_pruned_by_jobs_too(project: Path, cluster: one_node.Cluster) -> None:
    train = trials_of(epochs=6, pause=0.02)
    sweep = weft.sweep(train, SPACE, trials=8, pruner="median", on="slurm", **RANDOM)
    until(lambda: have_saved(sweep.folder, 4))
    cluster.call("scancel", "-s", "USR1", sweep.job)
    found = sweep.result(patience())
    here = weft.sweep(train, SPACE, trials=8, pruner="median", name="here", **RANDOM)
    assert worth(found) == worth(here) and {t["state"] for t in found.trials} == {"complete", "pruned"}
    assert cluster.job(f"{sweep.job}_0")["Restarts"] == "1"
    whole = weft.sweep(train, SPACE, trials=8, name="whole", **RANDOM)
    assert {t["state"] for t in whole.trials} == {"complete"}


def test_jobs_share_a_database_that_is_named(project: Path, cluster: one_node.Cluster) -> None:
    train, url = trials_of(epochs=6, pause=0.05), f"sqlite:///{project}/trials.db"
    sweep = weft.sweep(train, SPACE, trials=4, workers=2, on="slurm", storage=url, **RANDOM)
    until(lambda: have_saved(sweep.folder, 1))
    cluster.call("scancel", "-s", "USR1", f"{sweep.job}_0")
    found = sweep.result(patience())
    assert worth(found) == worth(weft.sweep(train, SPACE, trials=4, name="here", **RANDOM))
    read = optuna.load_study(study_name="sweep", storage=url).get_trials(states=[optuna.trial.TrialState.COMPLETE])
    assert [t.value for t in read] == [t["value"] for t in found.trials] and not list(sweep.folder.glob("*.journal"))


def test_a_sweep_within_a_job_is_requeued_once_and_goes_on(project: Path, cluster: one_node.Cluster) -> None:
    """Its workers are processes of the job: SLURM signals them all, and one requeue is enough."""
    train = trials_of(epochs=6, pause=0.1)
    (project / "train.pkl").write_bytes(cloudpickle.dumps(train))
    (project / "sweeping.py").write_text(
        "import json, pickle, weft\ntrain = pickle.load(open('train.pkl', 'rb'))\n"
        f"found = weft.sweep(train, {SPACE}, trials=4, workers=2, **{RANDOM})\n"
        "open('found.json', 'w').write(json.dumps([[t['state'], t['params'], t['value']] for t in found.trials]))\n"
    )
    options = ["--parsable", "--requeue", "--open-mode=append", "-oout.txt", "-c2"]
    job = cluster.call("sbatch", *options, "--wrap", f"srun {sys.executable} -u sweeping.py").strip()
    folder = project / "runs" / "sweep"
    until(lambda: have_saved(folder, 0, 1))
    cluster.call("scancel", "-s", "USR1", job)
    until(lambda: cluster.job(job)["JobState"] not in ("RUNNING", "PENDING", "COMPLETING"))
    told = (project / "out.txt").read_text()
    assert cluster.job(job)["JobState"] == "COMPLETED" and cluster.job(job)["Restarts"] == "1", told
    found = [tuple(t) for t in json.loads((project / "found.json").read_text())]
    assert found == worth(weft.sweep(train, SPACE, trials=4, name="here", **RANDOM))
    assert [len(lives(folder, n)) for n in range(4)] == [2, 2, 1, 1] and "was not requeued" not in told


TRIALS, WORKERS = 200, 3


def test_random_interruptions_lose_no_trial_and_finish_none_twice(project: Path, cluster: one_node.Cluster) -> None:
    train = trials_of(epochs=6, pause=0.02)
    options: dict[str, Any] = {"trials": TRIALS, **RANDOM}
    slurm: dict[str, Any] = {"on": "slurm", "slurm": {"time": 3}, "grace": 60}
    sweep = weft.sweep(train, SPACE, workers=WORKERS, **slurm, **options)
    began, kinds = time.monotonic(), interrupt(sweep, cluster, lambda: weft.sweep(train, SPACE, **slurm, **options))
    found, seconds = sweep.result(patience()), time.monotonic() - began

    assert [t["state"] for t in found.trials] == ["complete"] * TRIALS  # none lost
    here = weft.sweep(train, SPACE, name="here", workers=WORKERS, **options)
    assert worth(here) == worth(found)
    told = Counter(e["trial_id"] for e in journal_of(sweep.folder) if e["op_code"] == 6 and e["state"] == 1)
    assert sorted(told.values()) == [1] * TRIALS
    resumed = interrupted = begins = 0
    for number in range(TRIALS):
        said = [line.split() for line in (sweep.folder / f"trial-{number:04d}" / "said").read_text().splitlines()]
        begun = lives(sweep.folder, number)
        after = said[[line[0] for line in said].index("over") + 1 :]  # killed before it was told: no step again
        assert all(line[1] == str(6 * 8) for line in after)
        interrupted, begins = interrupted + (len(begun) > 1), begins + len(begun)
        resumed += sum(step > 0 for step in begun)
    assert set(kinds) == set(KINDS) and interrupted > 5 and resumed > 5
    print(
        f"{TRIALS} trials in {seconds:.0f} s, {dict(kinds)}: {interrupted} interrupted, {begins - TRIALS} times, "
        f"{resumed} of these after their first checkpoint; jobs begun {len(jobs_of(sweep.folder))} times"
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


def jobs_of(folder: Path) -> set[str]:
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
