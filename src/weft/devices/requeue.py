"""Whether a job that a signal ended is put back into SLURM's queue. Loaded where one has."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import warnings

BY_SCRIPT = "WEFT_REQUEUED_BY_SCRIPT"
"""Set in a job whose batch script requeues it at exit status 138, after it wrote down how it left."""


def comes_back(number: int) -> bool:
    """Whether the job that the signal `number` ends is to be put back into SLURM's queue."""
    job, name = os.environ.get("SLURM_JOB_ID"), signal.Signals(number).name
    return job is not None and (name == "SIGUSR1" or (name == "SIGTERM" and _is_preempted(told_of(job))))


def requeue(number: int, is_saved: bool) -> None:
    """Ask SLURM to put this job back into its queue: what SIGUSR1 (`sbatch --signal=USR1@60`) means there.

    So does SIGTERM where the job is preempted with a time of grace: SLURM takes one that leaves within it for done.
    Nothing for other signals, outside SLURM, and where the batch script does it (`BY_SCRIPT`). Warns if nothing was
    saved (it would start over again and again), and with SLURM's own words if it refuses.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or BY_SCRIPT in os.environ or not comes_back(number):
        return
    if "SLURM_ARRAY_JOB_ID" in os.environ and "SLURM_ARRAY_TASK_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    failure = "it writes no checkpoints to go on from" if not is_saved else _scontrol_requeue(job)
    if failure:
        warnings.warn(f"SLURM job {job} was not requeued: {failure}.", stacklevel=2)


def told_of(job: str) -> dict[str, str]:
    """What SLURM says of a job: JobState, EndTime, ...; {} where it does not answer."""
    try:
        done = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return {key: value for key, _, value in (word.partition("=") for word in done.stdout.split())}


def _is_preempted(said: dict[str, str]) -> bool:
    """Whether the job still counts as running, and is to make room for another one. After scancel it is completing."""
    return said.get("JobState") == "RUNNING" and said.get("PreemptTime", "None") not in ("None", "")


def _scontrol_requeue(job: str) -> str:
    """Requeue the job; returns why it failed, "" if it did not."""
    if not re.fullmatch(r"[0-9_]+", job):
        return "its number is none"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if done.returncode == 0 else done.stderr.strip() or f"scontrol ended with {done.returncode}"
