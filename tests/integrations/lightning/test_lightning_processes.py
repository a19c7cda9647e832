"""Scripts that change one import, in two processes, however these are started."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.patience import patience
from tests.helpers.slurm_variables import variables_of_two_tasks
from tests.helpers.twins import contents, differing

ROOT = Path(__file__).parents[3]
PYTHONPATH = os.pathsep.join([str(ROOT), str(ROOT / "src")])
Start = Callable[[list[str], Path], None]
"""Runs `tests.helpers.twin_processes` with these arguments; there is a folder for what is beside."""


def from_a_script(arguments: list[str], aside: Path, launcher: tuple[str, ...] = ()) -> None:
    command = [sys.executable, *launcher, "-m", "tests.helpers.twin_processes", *arguments]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=patience())
    assert done.returncode == 0, done.stderr[-3000:]


def by_torchrun(arguments: list[str], aside: Path) -> None:
    from_a_script(arguments, aside, ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"))


def by_slurm(arguments: list[str], aside: Path) -> None:
    """Each process as srun starts it; what a cluster would set is here set by hand."""
    command = [sys.executable, "-m", "tests.helpers.twin_processes", *arguments]
    tasks = [
        subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": PYTHONPATH, **variables}, stderr=subprocess.PIPE, text=True
        )
        for variables in variables_of_two_tasks()
    ]
    errors = [task.communicate(timeout=patience())[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], errors


def from_a_notebook(arguments: list[str], aside: Path) -> None:
    pytest.importorskip("nbclient")
    from tests.helpers.notebooks import run_notebook

    path = f"import sys; sys.path[:0] = {PYTHONPATH.split(os.pathsep)}"
    run_notebook(path, f"from tests.helpers.twin_processes import *; train_in_processes(*{arguments})")


STARTS: dict[str, tuple[Start, str, str]] = {
    "script": (from_a_script, "ddp", "plain"),
    "manual optimization": (from_a_script, "ddp", "manual"),
    "torchrun": (by_torchrun, "ddp", "accumulated"),
    "SLURM": (by_slurm, "ddp", "synchronised"),
    "notebook": (from_a_notebook, "ddp_notebook", "plain"),
    "spawn": (from_a_script, "ddp_spawn", "to a step"),
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
