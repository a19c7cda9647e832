"""`make gpu` works before there is a GPU: its list, its time limits, its files, and a rehearsal of every check."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

MISSING_THERE = ("neuromancer", "optuna", "pandas", "cvxpy", "cvxpylayers", "wandb", "mlflow", "sklearn", "nbformat")


def test_the_dry_list_fits_into_eight_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.gpu.__main__ import main
    from benchmarks.gpu.checks import CHECKS

    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:-2]] == [check.name for check in CHECKS]
    assert int(lines[-1].split()[-1]) <= 8 * 60
    assert all(check.expected < check.limit and callable(check.load()) for check in CHECKS)
    assert main(["--list", "--only", "kill,ends"]) == 0
    with pytest.raises(ValueError, match="no check .'kil'."):
        main(["--list", "--only", "kil"])


def test_a_check_that_crashes_hangs_or_dies_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.gpu import running
    from benchmarks.gpu.checks import Check

    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "fakes.py").write_text(
        "import json, os, sys, time\n"
        "def tell(**what): print(json.dumps(what), flush=True)\n"
        "row = dict(what='w', found='1', bar='<= 2', verdict='met', value=1.0)\n"
        "tell(about={'device': 'none'})\n"
        "for name in sys.argv[-1].split(','):\n"
        "    tell(begin=name)\n"
        "    if name == 'dies': os._exit(7)\n"
        "    tell(row=row)\n"
        "    if name == 'hangs': time.sleep(1000)\n"
        "    tell(end=name, error='ValueError: no\\nmore' if name == 'crashes' else None)\n"
    )
    monkeypatch.setattr(running, "MODULE", "fakes")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    names = ("good", "crashes", "dies", "hangs", "last")
    checks = [Check(name, name, "a bar", "", 1, 1 if name == "hangs" else 60) for name in names]
    said: list[str] = []
    found = running.Found(tmp_path / "out", said.append)
    running.run(checks, found, "cpu", "small", tmp_path, 5.0)
    told = [(row["check"], row["verdict"], row["found"]) for row in found.rows]
    assert told == [
        ("good", "met", "1"),
        ("crashes", "met", "1"),
        ("crashes", "failed", "ValueError: no"),
        ("dies", "failed", "the process ended with status 7"),
        ("hangs", "met", "1"),
        ("hangs", "failed", "the time was up"),
        ("last", "met", "1"),
    ]
    assert not found.is_accepted and len(said) == len(told)
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["rows"] == found.rows and content["about"] == {"device": "none"}
    assert "| w | 1 | <= 2 | met |" in (tmp_path / "out.md").read_text()
    assert not [t for t in threading.enumerate() if t.name.startswith("weft-gpu")]

    found = running.Found(None, said.append)
    running.run(checks, found, "cpu", "small", tmp_path, 0.0)
    assert {row["verdict"] for row in found.rows} == {"not run"} and not found.is_accepted


def test_without_a_gpu_the_command_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from benchmarks.gpu.__main__ import main

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2 and "no CUDA device" in capsys.readouterr().err


def test_the_results_go_between_the_marks_of_the_readme(tmp_path: Path) -> None:
    from benchmarks.gpu.__main__ import fill

    row = {"what": "a|b", "found": "1", "bar": "<= 2", "verdict": "met"}
    content = {"about": {"device": "a card", "torch": "2.11"}, "seconds": {}, "rows": [row]}
    (tmp_path / "found.json").write_text(json.dumps(content))
    readme = tmp_path / "README.md"
    readme.write_text("above\n<!-- gpu -->\nnothing yet\n<!-- /gpu -->\nbelow\n")
    fill(readme, tmp_path / "found.json")
    text = readme.read_text()
    assert "nothing yet" not in text and "| a\\|b | 1 | <= 2 | met |" in text and "a card" in text


def rehearse(tmp_path: Path, names: str, capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    from benchmarks.gpu.__main__ import main

    main(["--device", "cpu", "--small", "--only", names, "--out", str(tmp_path), "--minutes", "20"])
    (path,) = tmp_path.glob("gpu-*.json")
    rows = json.loads(path.read_text())["rows"]
    broken = [row for row in rows if row["verdict"] in ("failed", "not run")]
    assert not broken, (broken, capsys.readouterr().err[-3000:])
    return rows


def test_checks_of_numbers_are_met_in_a_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rehearse(tmp_path, "ends,waits,constants,mixed", capsys)
    assert {row["check"] for row in rows} == {"ends", "waits", "constants", "mixed"}
    assert not [row for row in rows if row["verdict"] == "missed"]


@pytest.mark.long
def test_every_check_runs_to_its_end_in_a_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.gpu.checks import CHECKS

    rows = rehearse(tmp_path, ",".join(c.name for c in CHECKS if c.name not in ("eager-speed", "wide")), capsys)
    asked = {"kill", "memory", "nccl"}  # the others are about speed, or to the last bit, which nobody asks of a CPU
    assert asked <= {row["check"] for row in rows}
    assert not [row for row in rows if row["check"] in asked and row["verdict"] == "missed"]


@pytest.mark.long
def test_tests_that_need_a_gpu_need_nothing_that_is_missing_there(repo: Path, tmp_path: Path) -> None:
    missing = "".join(f"sys.modules[{name!r}] = None\n" for name in MISSING_THERE)
    (tmp_path / "sitecustomize.py").write_text(f"import sys\n{missing}")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]
    path = os.pathsep.join([str(tmp_path), str(repo / "src")])
    done = subprocess.run(
        command, cwd=repo, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:]
    found = [line for line in done.stdout.splitlines() if "::" in line]
    assert len(found) > 30 and {line.split("/")[1] for line in found} >= {"devices", "compile", "checkpoint"}
