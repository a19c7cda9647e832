"""What is submitted, without a cluster: the batch script, the copy of the code, and the states that files tell."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import weft
from weft import cli
from weft.recipes.schema import ConfigError
from weft.slurm import events
from weft.slurm.freezing import freeze
from weft.slurm.script import batch_script

CODE = "def make_problem():\n    raise SystemExit('imported')\n\n\ndef data_setup():\n    pass\n"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "module.py").write_text(CODE)
    (tmp_path / "run.yaml").write_text("problem: module.py:make_problem\ndata: module.py:data_setup\n")
    return tmp_path


def test_a_dry_run_shows_a_script_that_bash_reads_and_leaves_nothing(project: Path) -> None:
    before = sorted(project.rglob("*"))
    job = weft.submit("run.yaml", name="a", devices=2, slurm={"partition": "gpu", "exclusive": True}, dry_run=True)
    lines = job.script.splitlines()
    assert {"#SBATCH --ntasks-per-node=2", "#SBATCH --partition=gpu", "#SBATCH --exclusive"} <= set(lines)
    assert {"#SBATCH --requeue", "#SBATCH --open-mode=append", "#SBATCH --signal=USR1@300"} <= set(lines)
    assert subprocess.run(["bash", "-n"], input=job.script, text=True, check=False).returncode == 0
    assert subprocess.run(["bash", "-n"], input=job.script + "if", text=True, check=False).returncode != 0
    assert job.job == "" and sorted(project.rglob("*")) == before


def test_the_command_line_prints_it_too(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["submit", "--config", "run.yaml", "--slurm.time", "4:00:00", "--name", "a", "--dry_run"]
    assert cli.main(words) == 0
    assert "#SBATCH --time=4:00:00" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("slurm", "message"),
    [
        ({"signal": "TERM"}, "is set by weft"),
        ({"Partition x": 1}, "no option"),
        ({"mem": "1G\n#SBATCH -p x"}, "one line"),
    ],
)
def test_options_that_would_change_the_script_are_refused(slurm: dict[str, str], message: str, project: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        weft.submit("run.yaml", name="a", slurm=slurm, dry_run=True)


def test_folders_with_blanks_and_quotes_stay_one_word(tmp_path: Path) -> None:
    code = tmp_path / "it's mine"
    code.mkdir()
    text = batch_script(["-c", "pass"], name="a", logs=code, code=code, slurm={}, python="echo ran in $PWD;:")
    text = text.replace("srun ", "")
    done = subprocess.run(["bash"], input=text, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"ran in {code}"


def test_code_is_copied_and_all_else_is_linked_to(project: Path) -> None:
    (project / "runs").mkdir()
    (project / "data").mkdir()
    (project / "data" / "big.bin").write_bytes(b"x")
    (project / "pack" / "inner").mkdir(parents=True)
    (project / "pack" / "inner" / "code.py").write_text("x = 1")
    target = project / "runs" / "a" / "submit" / "code"
    assert freeze(project, target, leave_out=project / "runs") == ["module.py", "pack/inner/code.py", "run.yaml"]
    (project / "module.py").write_text("changed")
    assert (target / "module.py").read_text() == CODE and (target / "data" / "big.bin").read_bytes() == b"x"
    assert (target / "data").is_symlink() and not (target / "pack").is_symlink() and not (target / "runs").exists()


def test_states_are_read_from_lines_of_which_some_may_be_torn(tmp_path: Path) -> None:
    assert events.state(tmp_path) is None
    for event, state in [("submitted", "queued"), ("started", "running"), ("preempted", "preempted")]:
        events.note(tmp_path, event, job="7")
        assert events.state(tmp_path) == state
    with (tmp_path / "submit" / "events.jsonl").open("a") as file:
        file.write('{"event": 3}\n[1]\n{"eve')
    assert events.state(tmp_path) == "preempted" and events.jobs_of(tmp_path) == ["7"]
    events.note(tmp_path, "cancelled")
    events.note(tmp_path, "failed")
    assert events.state(tmp_path) == "cancelled"
    events.note(tmp_path, "submitted", job="8")
    assert events.state(tmp_path) == "queued" and events.jobs_of(tmp_path) == ["7", "8"]
