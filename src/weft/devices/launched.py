"""Processes that torchrun, SLURM or a cluster started. Loaded where one did, or for several machines."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weft.config import TrainerConfig


def slurm_tasks() -> int:
    """How many processes SLURM started of this script; 0 outside of a job, and in a shell that it gave to a user.

    Python in the batch script itself, without srun, is one, whatever was asked for.
    """
    if "SLURM_NTASKS" not in os.environ or os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return 0
    if "SLURM_GTIDS" in os.environ and "SLURM_STEP_ID" not in os.environ:
        return 1
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ["SLURM_NTASKS"]
    return int(tasks) if tasks.isdigit() else 0


def check_launch(config: TrainerConfig, alone: bool) -> None:
    """Processes that were started outside must be those that are asked for; else each would train alone, or wait.

    `alone`: the options ask for one process. Raises ValueError.
    """
    world = int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1
    if world > 1 and alone:
        here = os.environ.get("LOCAL_WORLD_SIZE", "1")
        raise ValueError(
            f"torchrun started {world} processes, but devices=1: each of them would train alone. "
            f"Set devices={here} and num_nodes={world // int(here)}, or start one process."
        )
    tasks = slurm_tasks()
    is_told_apart = "SLURM_STEP_ID" in os.environ or os.environ.get("SLURM_PROCID", "0") != "0"
    if alone and tasks > 1 and is_told_apart:
        raise ValueError(
            f"SLURM started {tasks} tasks of this script, but devices=1: each would train alone, in one folder. "
            f"Set devices and num_nodes to the tasks a node and the nodes (strategy='ddp'), or start one task "
            "(srun --ntasks=1)."
        )
    if tasks == 1 and config.num_nodes > 1:
        raise ValueError(
            f"num_nodes={config.num_nodes}, but SLURM started one process. Start the script with srun, and give sbatch "
            f"--nodes={config.num_nodes} --ntasks-per-node={config.devices}."
        )
    if config.num_nodes > 1 and world == 1 and "SLURM_NTASKS" not in os.environ and "NODE_RANK" not in os.environ:
        raise ValueError(
            f"num_nodes={config.num_nodes}, but nothing says which node this is. Start the script with torchrun or "
            "srun, or set MASTER_ADDR, MASTER_PORT and NODE_RANK on each node."
        )
