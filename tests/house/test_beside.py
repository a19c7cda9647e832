"""The same tasks written for other libraries and for weft: weft's are never longer, and solve them as well."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.helpers.source import REPO, code_lines

BESIDE = REPO / "examples" / "beside"
TASKS = {"first_fit": "keras", "pinn": "deepxde", "ode": "neuromancer"}
BOUNDS = {"first_fit": ("1 - accuracy", 0.03), "pinn": ("error", 5e-3), "ode": ("error", 1e-5)}


def lines_of(task: str, library: str) -> int:
    return code_lines((BESIDE / f"{task}_{library}.py").read_text(encoding="utf-8"))


@pytest.mark.parametrize("task", TASKS)
def test_wefts_script_is_not_longer_than_the_other_librarys(task: str) -> None:
    ours, theirs = lines_of(task, "weft"), lines_of(task, TASKS[task])
    assert ours <= theirs
    told = (REPO / "examples" / "README.md").read_text(encoding="utf-8")
    assert f"(beside/{task}_weft.py): {ours}" in told and f", {theirs}" in told


def test_every_script_has_its_counterpart() -> None:
    names = {f"{task}_{library}" for task, other in TASKS.items() for library in ("weft", other)}
    assert {path.stem for path in BESIDE.glob("*.py")} == names


@pytest.mark.long
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", ["weft", "other"])
def test_both_scripts_solve_their_task(task: str, kind: str) -> None:
    library = TASKS[task] if kind == "other" else "weft"
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    expression, bound = BOUNDS[task]
    script = str(BESIDE / f"{task}_{library}.py")
    code = f"import runpy; names = runpy.run_path({script!r}); print(eval({expression!r}, names))"
    environment = {**os.environ, "KERAS_BACKEND": "torch", "DDE_BACKEND": "pytorch", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.strip().splitlines()[-1]) < bound
