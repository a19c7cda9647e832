"""The batch script that a submitted run or sweep consists of."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weft.recipes.schema import ConfigError
from weft.types import suggest

OURS = ("job-name", "output", "error", "open-mode", "requeue", "no-requeue", "signal", "array", "wrap", "parsable")
"""Options of sbatch that the script sets itself."""
EARLY = 60
"""Seconds that SLURM's signal may come early."""


def options_of(slurm: Mapping[str, Any]) -> dict[str, str | None]:
    """`{"cpus_per_task": 4, "exclusive": True}` as sbatch's own options, None for those without a value.

    Raises ConfigError for one that the script sets itself, and for a name or value that would be another line of it.
    """
    found: dict[str, str | None] = {}
    wrong = []
    for name, value in slurm.items():
        option = str(name).replace("_", "-")
        if option in OURS:
            wrong.append(f"slurm.{name}: is set by weft (requeue, signal, logs and name of the job)")
        elif not re.fullmatch(r"[a-z][a-z0-9-]*", option):
            wrong.append(f"slurm.{name}: is no option of sbatch{suggest(option, ('partition', 'time', 'gres', 'mem'))}")
        elif value is None or value is False:
            continue
        elif "\n" in str(value):
            wrong.append(f"slurm.{name}={value!r}: expected one line")
        else:
            found[option] = None if value is True or value == "true" else str(value)
    if wrong:
        raise ConfigError(wrong)
    return found


def seconds_of(time: str | None) -> int | None:
    """A time limit as sbatch reads it (minutes, [[hours:]minutes:]seconds, days-hours[:minutes[:seconds]]) in seconds.

    None for no limit, and for what sbatch itself will refuse.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time or "")
    if match is None:
        return None
    days, first, second, third = (int(part or 0) for part in match.groups())
    if match[1] is not None or match[4] is not None:
        return ((days * 24 + first) * 60 + second) * 60 + third
    return first * 60 + second


def batch_script(
    command: Sequence[str],
    *,
    name: str,
    logs: Path,
    code: Path,
    slurm: Mapping[str, Any],
    tasks: int = 1,
    nodes: int = 1,
    array: int | None = None,
    setup: Sequence[str] = (),
    python: str | None = None,
    grace: int = 300,
) -> str:
    """The script for sbatch that runs `python *command` in `code`, once for each of `tasks` on each of `nodes`.

    `array`: so many jobs of the same script. `setup`: lines of bash before it (modules, conda). `python`: what starts
    Python; None: this one, or "python" after a `setup`. `grace`: seconds before the time limit at which the run saves
    and goes back into the queue; SLURM looks every 30 s and may come up to 60 s early. Raises ConfigError where that
    leaves no time to train.
    """
    given = options_of(slurm)
    if (limit := seconds_of(given.get("time"))) is not None and limit <= grace + EARLY:
        told = f"is {limit} s, of which the last {grace} s are for saving (grace), and SLURM may come {EARLY} s early"
        raise ConfigError([f"slurm.time={given['time']}: {told}; give more, or a smaller grace (at least 60)"])
    options: dict[str, str | None] = {
        "job-name": name,
        "output": str(logs / ("job-%A_%a.log" if array else "job-%j.log")),
        "open-mode": "append",
        "requeue": None,
        "signal": f"USR1@{grace}",
        "nodes": str(nodes),
        "ntasks-per-node": str(tasks),
    }
    if array:
        options["array"] = f"0-{array - 1}"
    options |= given
    lines = [f"#SBATCH --{key}" + ("" if value is None else f"={_quoted(value)}") for key, value in options.items()]
    interpreter = python or ("python" if setup else shlex.quote(sys.executable))
    job = "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}" if array else "$SLURM_JOB_ID"
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            "",
            f"trap 'scancel --signal=USR1 \"{job}\"' USR1  # to this shell alone (scancel --batch): hand it on",
            *setup,
            f"cd {shlex.quote(str(code))} || exit 1",
            f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
            f"srun {interpreter} -u {shlex.join(command)} &",
            "while wait $! || true; kill -0 $! 2>/dev/null; do :; done  # a signal ends one wait",
            "wait $! && status=0 || status=$?",
            "# 138: SIGUSR1, which may come before training or after it; a run that saved has asked for this by itself",
            f'[ "$status" -ne 138 ] || scontrol requeue "{job}" 2>/dev/null',
            'exit "$status"',
            "",
        ]
    )


def _quoted(value: str) -> str:
    return f'"{value}"' if re.search(r"\s", value) else value
