"""Scripts that change one import, in two processes, however these are started."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import cluster
from tests.helpers.notebooks import run_notebook
from tests.helpers.patience import patience
from tests.helpers.twins import contents, differing

ROOT = Path(__file__).parents[3]
PYTHONPATH = os.pathsep.join([str(ROOT), str(ROOT / "src")])
Start = Callable[[list[str], Path], None]
"""Runs `tests.helpers.twin_processes` with these arguments; there is a folder for what is beside."""


def by_script(arguments: list[str], aside: Path, launcher: tuple[str, ...] = ()) -> None:
    command = [sys.executable, *launcher, "-m", "tests.helpers.twin_processes", *arguments]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=patience())
    assert done.returncode == 0, done.stderr[-3000:]


def by_torchrun(arguments: list[str], aside: Path) -> None:
    by_script(arguments, aside, ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"))


def in_a_notebook(arguments: list[str], aside: Path) -> None:
    cells = "from tests.helpers.twin_processes import train_in_processes", f"train_in_processes(*{arguments!r})"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PYTHONPATH)
        run_notebook(*cells)


def by_slurm(arguments: list[str], aside: Path) -> None:
    if missing := cluster.missing_programs():
        pytest.skip(f"needs SLURM: {missing}")
    aside.mkdir()
    node = cluster.Cluster(aside)
    node.start()
    try:
        told, command = aside / "told", [sys.executable, "-m", "tests.helpers.twin_processes", *arguments]
        job = aside / "job.sh"
        job.write_text(f"#!/bin/bash\nexport PYTHONPATH={PYTHONPATH}\nsrun {' '.join(command)}\n")
        number = node.call("sbatch", "--parsable", "--ntasks=2", f"--output={told}", str(job)).strip()
        end = time.monotonic() + patience()
        while (state := node.job(number)["JobState"]) in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
            assert time.monotonic() < end, told.read_text()[-3000:]
            time.sleep(0.1)
        assert state == "COMPLETED", told.read_text()[-3000:]
    finally:
        node.stop()


STARTS: dict[str, tuple[Start, str, str]] = {
    "script": (by_script, "ddp", "plain"),
    "manual optimization": (by_script, "ddp", "manual"),
    "torchrun": (by_torchrun, "ddp", "accumulated"),
    "spawn": (by_script, "ddp_spawn", "to a step"),
    "notebook": (in_a_notebook, "ddp_notebook", "plain"),
    "slurm": (by_slurm, "ddp", "synchronised"),
}


def left_by(who: str, start: str, folder: Path) -> dict[str, Any]:
    """What two processes of the script have left in `folder`."""
    folder.mkdir()
    run, strategy, way = STARTS[start]
    run([who, strategy, way, str(folder)], folder.with_name(f"{who}-aside"))
    written = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "out.pt"]
    files = {str(p.relative_to(folder)): contents(p) for p in written}
    for name, file in files.items():
        if name.endswith(".ckpt"):
            file.pop("callbacks")  # they name the folder
    return {"out": contents(folder / "out.pt"), "files": files}


@pytest.mark.long
@pytest.mark.parametrize("start", STARTS)
def test_two_processes_end_where_those_of_lightnings_trainer_end(start: str, tmp_path: Path) -> None:
    theirs, ours = left_by("lightning", start, tmp_path / "lightning"), left_by("weft", start, tmp_path / "weft")
    assert len(ours["files"]) >= 3 and "prepared" in ours["files"]
    assert ours["out"]["processes"] == 2
    assert not differing(theirs, ours)
