"""The faces of weft: its public names, each written once, imported when first used, and known to type checkers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import weft


def test_a_face_has_its_names_and_a_slip_of_the_pen_is_met_with_the_closest() -> None:
    assert {"Trainer", "Problem", "hooks", "plot", "integrations", "__version__"} <= set(dir(weft))
    assert {"EMA", "Curriculum", "freeze"} <= set(weft.hooks.__all__) <= set(dir(weft.hooks))
    assert weft.plot.__name__ == "weft.plots" and weft.integrations.neuromancer.Trainer is not weft.Trainer
    for face, name, near in ((weft, "Trianer", "Trainer"), (weft.hooks, "EMAA", "EMA"), (weft, "hoks", "hooks")):
        with pytest.raises(AttributeError, match=f"has no attribute {name!r}; did you mean {near!r}"):
            getattr(face, name)


def test_every_public_name_can_be_had_with_a_star() -> None:
    names: dict[str, object] = {}
    exec("from weft import *; from weft.hooks import *", names)  # noqa: S102
    assert {*weft.__all__, *weft.hooks.__all__} <= set(names) and "hooks" not in names


def test_a_type_checker_knows_the_names_and_finds_a_wrong_one(tmp_path: Path) -> None:
    text = "import weft\nfrom weft.hooks import EMA\n\nweft.Trainer(epochs=3)\nEMA(0.9)\nweft.plot.curves\n"
    (tmp_path / "right.py").write_text(text)
    (tmp_path / "wrong.py").write_text("import weft\n\nweft.Trianer()\nweft.hooks.EMAA()\n")
    check = [sys.executable, "-m", "basedpyright", "--level", "error", "--pythonpath", sys.executable, str(tmp_path)]
    told = subprocess.run(check, capture_output=True, text=True, check=False).stdout
    assert "2 errors" in told and "right.py" not in told, told
    assert '"Trianer" is not a known attribute' in told and '"EMAA" is not a known attribute' in told


def test_importing_weft_loads_nothing_slow_and_a_plain_fit_no_recipes_and_no_command_line() -> None:
    code = """
import sys, weft
print([m for m in ("torch", "jsonargparse", "yaml", "difflib") if m in sys.modules])
import torch
net = weft.Node(torch.nn.Linear(1, 1), ["p"], ["x"])
problem = weft.Problem([net], objectives=[weft.objective(lambda x: x**2, name="f")])
weft.Trainer(epochs=1, progress=False, accelerator="cpu").fit(problem, weft.DictDataset({"p": torch.ones(2, 1)}))
print([m for m in sys.modules if m.startswith(("weft.cli", "weft.recipes", "jsonargparse"))])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]
