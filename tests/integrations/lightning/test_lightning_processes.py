"""Scripts that change one import, in two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.twins import contents, differing

ROOT = Path(__file__).parents[3]
STARTS = [("ddp", "plain"), ("ddp", "manual"), ("torchrun", "accumulated"), ("ddp_spawn", "to a step")]


def left_by(who: str, strategy: str, way: str, folder: Path) -> dict[str, Any]:
    """What two processes of the script have left in `folder`."""
    folder.mkdir()
    launcher, strategy = [sys.executable], "ddp" if strategy == "torchrun" else strategy
    if way == "accumulated":
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command = [*launcher, "-m", "tests.helpers.twin_processes", who, strategy, way, str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    written = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "out.pt"]
    files = {str(p.relative_to(folder)): contents(p) for p in written}
    for name, file in files.items():
        if name.endswith(".ckpt"):
            file.pop("callbacks")  # they name the folder
    return {"out": contents(folder / "out.pt"), "files": files}


@pytest.mark.long
@pytest.mark.parametrize(("strategy", "way"), STARTS)
def test_two_processes_end_where_those_of_lightnings_trainer_end(strategy: str, way: str, tmp_path: Path) -> None:
    theirs = left_by("lightning", strategy, way, tmp_path / "lightning")
    ours = left_by("weft", strategy, way, tmp_path / "weft")
    assert len(ours["files"]) >= 3 and "prepared" in ours["files"]
    assert not differing(theirs, ours)
