"""A SLURM of one machine for tests: its daemons as ordinary processes below one folder, listening on loopback alone."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.helpers.patience import patience
from weft.slurm import events

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel")
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
"""What somebody submits: every kind of random numbers is in it."""
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def write_config(folder: Path, workers: int = 0, devices: int = 1) -> str:
    path = folder / "run.yaml"
    text = textwrap.dedent(CONFIG).replace("WORKERS", str(workers))
    path.write_text(text if devices == 1 else text.replace("{epochs", f"{{devices: {devices}, strategy: ddp, epochs"))
    return str(path)


def missing_programs() -> str:
    """Why there can be no cluster here, "" if there can."""
    gone = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if gone:
        return f"no {', '.join(gone)} (apt-get install -y --no-install-recommends slurm-wlm munge)"
    try:
        addresses = socket.gethostbyname_ex(platform.node().split(".")[0])[2]
    except OSError:
        addresses = []
    return (
        "" if any(a.startswith("127.") for a in addresses) else f"the name {platform.node()} is not this machine's own"
    )


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _settings(folder: Path, cpus: int) -> dict[str, str]:
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    scheduling = "sched_interval=1,bf_interval=1,batch_sched_delay=0"
    return {
        "ClusterName": "test",
        "SlurmctldHost": f"{platform.node().split('.')[0]}(127.0.0.1)",
        "SlurmctldPort": str(_free_port()),
        "SlurmdPort": str(_free_port()),
        "CommunicationParameters": "NoInAddrAny,NoCtldInAddrAny",
        "SlurmUser": user,
        "SlurmdUser": user,
        "AuthInfo": f"socket={folder}/munge.socket,cred_expire=5",  # how long a job that is requeued waits
        "StateSaveLocation": str(folder / "state"),
        "SlurmdSpoolDir": str(folder / "spool"),
        "SlurmctldPidFile": str(folder / "slurmctld.pid"),
        "SlurmdPidFile": str(folder / "slurmd.pid"),
        "SlurmctldLogFile": str(folder / "slurmctld.log"),
        "SlurmdLogFile": str(folder / "slurmd.log"),
        "ProctrackType": "proctrack/linuxproc",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU",
        "SlurmdParameters": "config_overrides",  # more CPUs than there are
        "SchedulerType": "sched/backfill",
        "SchedulerParameters": scheduling,
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "KillWait": "5",
        "MinJobAge": "3600",
        "ReturnToService": "2",
        "MailProg": "/bin/true",
    }


class Cluster:
    """One node with partitions "main" and "urgent", whose jobs push those of "main" back into the queue."""

    def __init__(self, folder: Path, cpus: int = 4) -> None:
        self.folder, self.cpus = folder, cpus
        self.processes: list[subprocess.Popen[bytes]] = []
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}
        for name in ("state", "spool"):
            (folder / name).mkdir()
        node = platform.node().split(".")[0]
        lines = [f"{key}={value}" for key, value in _settings(folder, cpus).items()]
        lines += [f"NodeName={node} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=2000 State=UNKNOWN"]
        lines += [f"PartitionName=main Nodes={node} Default=YES PriorityTier=1"]
        lines += [f"PartitionName=gpu Nodes={node} PriorityTier=1"]
        lines += [f"PartitionName=urgent Nodes={node} PriorityTier=10"]
        (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        key = folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))

    def start(self) -> None:
        """Until the node is idle. Raises RuntimeError with the daemons' logs if it never is."""
        f = self.folder
        names = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        files = [f"--{option}={f}/munge.{end}" for option, end in names.items()]
        self._run("munged", "--foreground", "--force", "--num-threads=2", *files)
        for _ in range(100):
            if (f / "munge.socket").exists():
                break
            time.sleep(0.1)
        self._run("slurmctld", "-D", "-i")
        self._run("slurmd", "-D")
        for _ in range(600):
            if self.call("sinfo", "-h", "-o", "%T", "-p", "main", check=False).strip() == "idle":
                return
            if any(p.poll() is not None for p in self.processes):
                break
            time.sleep(0.1)
        logs = "\n".join(path.read_text(errors="replace")[-1000:] for path in f.glob("*.log"))
        self.stop()
        raise RuntimeError(f"SLURM did not start:\n{logs}")

    def _run(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("wb") as out:
            self.processes.append(
                subprocess.Popen(
                    command,
                    env={**os.environ, **self.environment},
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
            )

    def call(self, *command: str, check: bool = True) -> str:
        """What a command of SLURM prints."""
        done = subprocess.run(
            command,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            check=check,
            timeout=patience(),
        )
        return done.stdout

    def stop(self) -> None:
        """Cancel all jobs and end the daemons."""
        self.call("scancel", "--user", str(os.getuid()), check=False)
        for _ in range(100):
            if not self.call("squeue", "-h", check=False).strip():
                break
            time.sleep(0.1)
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def job(self, number: str) -> dict[str, str]:
        """What SLURM says of a job: JobState, Restarts, ..."""
        said = self.call("scontrol", "show", "job", number, check=False)
        return {key: value for key, _, value in (word.partition("=") for word in said.split())}


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
def digest_undisturbed(workers: int, seed: int = 0, devices: int = 1) -> str:
    """The digest of the weights of a run that nobody disturbs."""
    words = ["--trainer.run_name", "u", "--trainer.progress", "false", "--trainer.seed", str(seed)]
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "module.py").write_text(textwrap.dedent(MODULE))
        config = write_config(Path(place), workers, devices)
        command = [sys.executable, "-m", "weft", "fit", "--config", config, "--problem.pause", "0", *words]
        subprocess.run(command, cwd=place, check=True)
        return digest_of(Path(place) / "runs" / "u")


def stepped(job: Any) -> bool:
    return events.last_step(job.folder) >= 7  # see CONFIG
