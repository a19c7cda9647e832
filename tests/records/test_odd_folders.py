"""Files that somebody else wrote break nothing but themselves: no code runs, no traceback, and each is named."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest

import weft
from tests.helpers.odd import (
    CONFIGS,
    LAUGHS,
    RESULT,
    answer,
    answers_to_looks,
    misbehaves,
    odd_folders,
)
from weft import cli, yamlfile
from weft.checkpoint import archive
from weft.loggers.csv import CSVLogger, read_rows
from weft.records import report
from weft.records.environment import git_state


def asked(*words: str) -> tuple[int, str]:
    """The exit status of a command, and all that it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), warnings.catch_warnings():
        warnings.simplefilter("always")
        code = cli.main(list(words))
    return code, out.getvalue()


def test_a_list_of_runs_leaves_odd_ones_out_and_names_them(tmp_path: Path) -> None:
    folders = odd_folders(tmp_path / "runs")
    (tmp_path / "runs/good").mkdir()
    (tmp_path / "runs/good/config.yaml").write_text("problem: a")
    code, text = asked("runs", str(tmp_path / "runs"))
    assert code == 0 and "Traceback" not in text and "\x1b" not in text and "good" in text
    assert all(folder.name in text for folder in folders)
    assert not list(tmp_path.rglob("PWNED")) and not Path("PWNED").exists()


@pytest.mark.long
def test_no_odd_folder_makes_a_traceback_runs_code_or_takes_much_memory(tmp_path: Path) -> None:
    _, answers = answers_to_looks(tmp_path, cli.main)
    assert not (wrong := [found for found in answers if misbehaves(found)]), wrong[:5]
    assert max(found.mib for found in answers) < 500
    assert not list(tmp_path.rglob("PWNED")) and not Path("PWNED").exists()


def test_a_misbehaving_command_is_noticed() -> None:
    def fail(words: list[str]) -> int:
        raise KeyError(words[0])

    def grow(words: list[str]) -> int:
        return len(bytearray(80 << 20)) * 0

    assert misbehaves(answer(("x",), fail)) and misbehaves(answer(("x",), lambda words: 1))
    assert not misbehaves(answer(("x",), grow)) and answer(("x",), grow).mib > 70


@pytest.mark.parametrize("name", ["laughs", "itself", "deep", "a number of many digits", "a tag", "not text"])
def test_hostile_yaml_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match="the file.*not valid YAML"):
        yamlfile.load(CONFIGS[name], "the file")


def test_aliases_that_stand_for_little_are_fine() -> None:
    assert yamlfile.load("a: &a [1, 2]\nb: [*a, *a]") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}
    assert yamlfile.load(LAUGHS[: LAUGHS.index("a3")])["a2"][0][0] == ["x", "x"]


def test_a_result_that_no_run_wrote_is_refused_by_name(tmp_path: Path) -> None:
    for folder in odd_folders(tmp_path):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                weft.load_result(folder)
        except (ValueError, FileNotFoundError) as error:
            assert str(folder) in str(error)


def test_a_name_that_is_a_formula_is_text_in_a_spreadsheet_and_reads_back(tmp_path: Path) -> None:
    names = ["=HYPERLINK(1)", "-loss", "+a", "@b", "'=c", "'plain", "plain"]
    logger = CSVLogger(tmp_path / "metrics.csv")
    logger.log_metrics(dict.fromkeys(names, 1.0) | {"epoch": 0}, step=1)
    logger.save()
    cells = [line.split(",")[2] for line in (tmp_path / "metrics.csv").read_text().splitlines()[1:]]
    assert not [cell for cell in cells if cell[0] in "=+-@"]
    assert [row.name for row in read_rows(tmp_path / "metrics.csv")] == names
    logger.rewind(5, 5)
    assert [row.name for row in read_rows(tmp_path / "metrics.csv")] == names


def test_git_is_asked_without_running_what_a_checkout_names(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / ".gitattributes").write_text("*.txt filter=evil diff=evil\n")
    (tmp_path / "a.txt").write_text("one\n")
    git("add", "-A")
    git("-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "one")
    clean = git_state(tmp_path)
    assert clean is not None and clean["clean"]
    for name in ("core.fsmonitor", "filter.evil.clean", "filter.evil.process", "diff.evil.textconv", "diff.external"):
        git("config", name, "touch PWNED; false")
    git("config", "filter.evil.required", "true")
    (tmp_path / "a.txt").write_text("two\n")
    found = git_state(tmp_path)
    assert found is not None and found["changed"] == ["M a.txt"] and found["commit"] == clean["commit"]
    assert not (tmp_path / "PWNED").exists()
    subprocess.run(["git", "status"], cwd=tmp_path, check=False, capture_output=True)
    assert (tmp_path / "PWNED").exists()  # what it would have been


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "/tmp/x", "a/../..", "a//b", "x\0y", "\ud800", "x" * 300, "a\nb"]
)
def test_a_run_name_stays_below_its_root(name: str) -> None:
    with pytest.raises(ValueError, match="run_name="):
        weft.Trainer(run_name=name)


def test_a_run_name_may_have_folders_of_its_own() -> None:
    assert weft.Trainer(run_name="a/b c").config.run_name == "a/b c"


def test_a_file_that_inflates_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", b"\0" * (1 << 20))

    def read(*args: Any) -> None:
        raise AssertionError("inflated")

    monkeypatch.setattr(zipfile.ZipFile, "testzip", read)
    with pytest.raises(archive.CheckpointError, match="no file of torch.save"):
        archive.read(path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_resumed_only_if_it_is_trusted(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints/step-000000001.ckpt").touch()
    (folder / "config.yaml").write_text("problem: evil.py:make\ndata: evil.py:make\n")
    (folder / "evil.py").write_text("import pathlib\npathlib.Path('PWNED').touch()\ndef make(): ...\n")
    os.chown(folder / "config.yaml", 65534, 65534)
    for command in ("resume", "test", "validate", "predict"):
        code, text = asked(command, str(folder))
        assert code == 2 and "belongs to another user" in text and "--trust" in text
    assert not Path("PWNED").exists()
    code, text = asked("resume", str(folder), "--trust")
    assert "belongs to another user" not in text


def test_a_report_of_a_right_folder_is_still_read(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/result.json").write_text(json.dumps(RESULT))
    assert report.read_run(tmp_path / "a").result == RESULT
