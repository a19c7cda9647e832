"""The tutorials run, and what they measured at full settings agrees with the truths they are compared with."""

from __future__ import annotations

import importlib.util
import json
import math
import multiprocessing
import os
import runpy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
Figures = dict[str, Any]


def tool(name: str) -> ModuleType:
    """A module of the folder `examples`, which is no package."""
    spec = importlib.util.spec_from_file_location(f"examples.{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NAMES = tool("__main__").NAMES
SLOW_TO_START = {"part_6_multi_gpu"}  # it starts five processes

# What holds whatever the settings.
ALWAYS: dict[str, Callable[[Figures], bool]] = {
    "part_1_basics": lambda f: f["trainer_differs_by"] == 0 and f["littrainer_differs_by"] == 0,
    "part_2_control": lambda f: f["difference_float64"] < 1e-5,
    "part_4_koopman": lambda f: f["points_in_tensorboard"] >= 4 and f["images_in_tensorboard"] == 1,
    "part_5_cvxpy": lambda f: f["violation"] <= 1e-4 and f["projection_difference"] <= 1e-4,
    "part_6_multi_gpu": lambda f: f["two_processes_differ_by"] < 1e-3 and f["resumed_is_the_same"],
    "part_7_profiling": lambda f: f["slowest_node"] == "tension" and "node tension" in f["ranges"] and f["items_in_trace"] >= 128,
    "custom_logic": lambda f: f["subclass"] == 0 and f["loop"] == 0 and f["hook"] < 1e-3 and f["without_penalty"] > 1e-2,
    "curriculum": lambda f: f["first_and_last_length"][0] < f["first_and_last_length"][1],
    "own_loop": lambda f: f["dev_loss"] == f["best"],
}
# What holds at full settings: the tables of the issue and of examples/README.md.
FULL: dict[str, Callable[[Figures], bool]] = {
    "part_1_basics": lambda f: f["mean_distance"] < 0.05 and abs(f["objective_gap"]) < 0.01 and f["largest_violation"] < 0.1,
    "part_2_control": lambda f: f["excess_cost"] < 0.05 and f["final_distance"] < 0.05 and f["largest_control"] < 1.05,
    "part_3_pinn": lambda f: f["relative_error"] <= 2e-3 and f["viscosity_error"] <= 0.02,
    "part_4_koopman": lambda f: f["spectrum_error"] < 1e-3 and f["open_loop_error"] < 0.7 * f["open_loop_error_linear"],
    "part_5_cvxpy": lambda f: f["excess_cost"] < 0.02,
    "part_6_multi_gpu": lambda f: f["variance_gap"] < 0.1 and f["invested_to"] < 0.02,
    "part_7_profiling": lambda f: f["faster_by"] > 2 and f["loss_difference"] < 1e-3,
    "augmented_lagrangian": lambda f: f["multiplier_error"] < 0.1 and f["violation"] < 0.5 * f["violation_with_penalty"],
    "curriculum": lambda f: f["error"] < 0.2 and f["error"] <= f["error_at_once"] and f["seconds"][0] < f["seconds"][1],
    "digits": lambda f: f["accuracy"] > 0.96,
    "gan": lambda f: f["distance_after"] < 0.15 < 5 * f["distance_after"] + f["distance_before"],
    "own_loop": lambda f: f["dev_loss"] < 1e-3,
}


def _run(name: str, connection: Any) -> None:
    warnings.resetwarnings()
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", module="weft")
    os.environ["WEFT_SMALL"] = "1"
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    connection.send(runpy.run_path(str(EXAMPLES / f"{name}.py"))["figures"])
    connection.close()


def small_figures(name: str) -> Figures:
    """Run an example at small settings in a child that inherits what is already imported."""
    import lightning.fabric  # noqa: F401
    import matplotlib.pyplot  # noqa: F401

    import weft.trainer  # noqa: F401

    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_run, args=(name, theirs))
    child.start()
    theirs.close()
    try:
        figures = mine.recv()
    except EOFError:
        figures = None
    child.join()
    child.close()
    mine.close()
    assert figures is not None, f"{name} failed; its error stands above"
    return figures


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.long] if n in SLOW_TO_START else []) for n in NAMES])
def test_each_example_runs_at_small_settings(name: str) -> None:
    figures = small_figures(name)
    numbers = [value for value in figures.values() if isinstance(value, float)]
    assert numbers and all(map(math.isfinite, numbers)), figures
    assert ALWAYS.get(name, lambda f: True)(figures), figures


def measured() -> dict[str, Any]:
    """What `python -m examples` wrote at full settings."""
    return json.loads((EXAMPLES / "figures.json").read_text())


@pytest.mark.parametrize("name", sorted(FULL))
def test_the_measured_figures_hold_the_truths(name: str) -> None:
    figures = measured()[name]["figures"]
    assert FULL[name](figures) and ALWAYS.get(name, lambda f: True)(figures), figures


def test_a_figure_that_is_off_would_be_noticed() -> None:
    figures = measured()
    worse = {
        "part_3_pinn": {"relative_error": 2.1e-3}, "part_5_cvxpy": {"violation": 2e-4},
        "part_7_profiling": {"slowest_node": "rope"}, "custom_logic": {"loop": 1e-9},
    }  # fmt: skip
    for name, change in worse.items():
        changed = {**figures[name]["figures"], **change}
        assert not (FULL.get(name, lambda f: True)(changed) and ALWAYS.get(name, lambda f: True)(changed)), name


def test_the_readme_shows_the_measured_figures_of_every_example() -> None:
    main, text = tool("__main__"), (EXAMPLES / "README.md").read_text()
    assert set(measured()) == set(NAMES)
    assert main.table(measured()) in text
    for name in NAMES:
        assert (EXAMPLES / "pictures" / f"{name}.png").is_file() and f"pictures/{name}.png" in text


@pytest.mark.parametrize("name", NAMES)
def test_notebook_and_script_have_the_same_cells(name: str) -> None:
    nbformat = pytest.importorskip("nbformat")
    notebooks = tool("notebooks")
    script = (EXAMPLES / f"{name}.py").read_text()
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == notebooks.cells_of(script)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    assert (EXAMPLES / f"{name}.ipynb").stat().st_size < 400_000


def test_cells_are_those_of_the_percent_format() -> None:
    cells_of = tool("notebooks").cells_of
    script = "# %% [markdown]\n# # Title\n#\n# Text with $x$.\n\n# %%\nimport os\n\nx = 1\n\n# %% a title\nprint(x)\n\n# %%\n"
    assert cells_of(script) == [
        ("markdown", "# Title\n\nText with $x$."), ("code", "import os\n\nx = 1"), ("code", "print(x)"),
    ]  # fmt: skip
    assert cells_of(script.replace("x = 1", "x = 2")) != cells_of(script)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_notebooks_execute_in_a_clean_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nbclient")
    monkeypatch.setenv("WEFT_SMALL", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own draws into the notebook
    notebooks = tool("notebooks")
    notebook = notebooks.notebook_of((EXAMPLES / f"{name}.py").read_text(), name)
    figures = notebooks.execute(notebook, EXAMPLES)
    assert figures and ALWAYS.get(name, lambda f: True)(figures), figures
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
