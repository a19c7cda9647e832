"""What is submitted, without a cluster: the batch script, the copy of the code, and the states that files tell."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from weft import cli
from weft.devices.signals import SignalExit
from weft.loop import default_hooks
from weft.recipes.schema import ConfigError
from weft.slurm import events
from weft.slurm.freezing import freeze
from weft.slurm.leaving import LeaveInTime
from weft.slurm.script import batch_script, seconds_of

CODE = "def make_problem():\n    raise SystemExit('imported')\n\n\ndef data_setup():\n    pass\n"


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    (tmp_path / "module.py").write_text(CODE)
    (tmp_path / "run.yaml").write_text("problem: module.py:make_problem\ndata: module.py:data_setup\n")
    return tmp_path


def test_a_dry_run_shows_a_script_that_bash_reads_and_leaves_nothing(sources: Path) -> None:
    before = sorted(sources.rglob("*"))
    job = weft.submit("run.yaml", name="a", devices=2, slurm={"partition": "gpu", "exclusive": True}, dry_run=True)
    lines = job.script.splitlines()
    assert {"#SBATCH --ntasks-per-node=2", "#SBATCH --partition=gpu", "#SBATCH --exclusive"} <= set(lines)
    assert {"#SBATCH --requeue", "#SBATCH --open-mode=append", "#SBATCH --signal=USR1@300"} <= set(lines)
    assert subprocess.run(["bash", "-n"], input=job.script, text=True, check=False).returncode == 0
    assert subprocess.run(["bash", "-n"], input=job.script + "if", text=True, check=False).returncode != 0
    assert job.job == "" and sorted(sources.rglob("*")) == before


def test_the_command_line_prints_it_too(sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
def test_options_that_would_change_the_script_are_refused(slurm: dict[str, str], message: str, sources: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        weft.submit("run.yaml", name="a", slurm=slurm, dry_run=True)


def test_folders_with_blanks_and_quotes_stay_one_word(tmp_path: Path) -> None:
    code = tmp_path / "it's mine"
    code.mkdir()
    text = batch_script(["-c", "pass"], name="a", logs=code, code=code, slurm={}, python="echo ran in $PWD;:")
    text = text.replace("srun ", "")
    done = subprocess.run(["bash"], input=text, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"ran in {code}"


def test_code_is_copied_and_all_else_is_linked_to(sources: Path) -> None:
    (sources / "runs").mkdir()
    (sources / "data").mkdir()
    (sources / "data" / "big.bin").write_bytes(b"x")
    (sources / "pack" / "inner").mkdir(parents=True)
    (sources / "pack" / "inner" / "code.py").write_text("x = 1")
    target = sources / "runs" / "a" / "submit" / "code"
    assert freeze(sources, target, leave_out=sources / "runs") == [
        "module.py",
        "pack/inner/code.py",
        "run.yaml",
    ]
    (sources / "module.py").write_text("changed")
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


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("4:30", 270),
        ("4:00:00", 14400),
        ("1-2", 93600),
        ("1-2:30", 95400),
        ("1-2:30:10", 95410),
        ("UNLIMITED", None),
        (None, None),
    ],
)
def test_time_limits_are_read_as_sbatch_does(text: str | None, seconds: int | None) -> None:
    assert seconds_of(text) == seconds


def test_a_time_limit_that_leaves_no_time_to_train_is_refused(sources: Path) -> None:
    with pytest.raises(ConfigError, match="the last 300 s are for saving"):
        weft.submit("run.yaml", name="a", slurm={"time": 5}, dry_run=True)
    assert "USR1@60" in weft.submit("run.yaml", name="a", slurm={"time": 5}, grace=60, dry_run=True).script


def test_a_run_whose_steps_are_long_leaves_before_the_signal_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    def ended_at(leave_by: float) -> int:
        now[0] = 0.0
        hook = LeaveInTime(leave_by, clock=lambda: now[0])
        monkeypatch.setattr(default_hooks, "OF_THIS_PROCESS", [lambda: hook])
        step = lambda trainer, batch: trainer.problem(batch["x"]).square().mean()
        late = {"on_step_end": lambda trainer, batch, loss: now.__setitem__(0, now[0] + 40.0)}
        options: Any = {"root_dir": str(tmp_path), "run_name": f"{leave_by}", "checkpoint": True, "progress": False}
        trainer = weft.Trainer(epochs=3, training_step=step, hooks=late, **options)
        try:
            trainer.fit(torch.nn.Linear(2, 1), weft.Data({"x": torch.ones(8, 2)}, batch_size=4))
        except SignalExit as left:
            assert left.number == signal.SIGUSR1
        return events.last_step(tmp_path / f"{leave_by}")

    assert ended_at(100.0) == 2  # at 80 s: a third step would end at 120
    assert ended_at(121.0) == 3
    assert ended_at(1000.0) == 6


def test_hidden_files_and_what_git_ignores_are_no_code_and_repositories_within_are(sources: Path) -> None:
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    inner = sources / "library"
    inner.mkdir()
    (inner / "inner.py").write_text("x = 1")
    (sources / ".env").write_text("TOKEN=secret")
    (sources / "ignored.py").write_text("x = 1")
    (sources / ".gitignore").write_text("ignored.py\n")
    for folder in (sources, inner):
        subprocess.run([*git, "init", "-q"], cwd=folder, check=True)
    target = sources / "runs" / "a" / "code"
    assert freeze(sources, target, leave_out=sources / "runs") == [
        "library/inner.py",
        "module.py",
        "run.yaml",
    ]
    assert (target / ".env").is_symlink() and (target / "ignored.py").is_symlink()  # there, and no copies
    (sources / ".gitignore").write_text("*\n")  # a home folder kept in git
    everything = freeze(sources, sources / "runs" / "b", leave_out=sources / "runs")
    assert everything == ["ignored.py", "library/inner.py", "module.py", "run.yaml"]


def test_what_is_not_submitted_leaves_nothing(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (sources / "here").mkdir()
    monkeypatch.setenv("PATH", f"{sources / 'here'}")
    with pytest.raises(RuntimeError, match="no sbatch on this machine; submit from a login node"):
        weft.submit("run.yaml", name="a")
    assert not (sources / "runs" / "a").exists()
    (sources / "here" / "sbatch").write_text("#!/bin/sh\necho 7\n")
    (sources / "here" / "sbatch").chmod(0o755)
    job = weft.submit("run.yaml", name="a")
    assert job.job == "7" and job.state == "queued"
    with pytest.raises(FileExistsError, match="is the run of job 7, which is not over"):
        weft.submit("run.yaml", name="a")
    events.note(job.folder, "failed")
    (sources / "here" / "sbatch").write_text("#!/bin/sh\necho 'invalid partition specified: x' >&2\nexit 1\n")
    with pytest.raises(RuntimeError, match="invalid partition specified: x"):
        weft.submit("run.yaml", name="a", slurm={"partition": "x"})
    assert [path.name for path in job.folder.iterdir()] == ["submit"] and job.state == "failed"


def test_runs_that_were_submitted_are_listed_beside_the_others(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = lambda trainer, batch: trainer.problem(batch["x"]).square().mean()
    trainer = weft.Trainer(epochs=1, training_step=step, root_dir="runs", run_name="here", progress=False)
    trainer.fit(torch.nn.Linear(2, 1), weft.Data({"x": torch.ones(8, 2)}, batch_size=4))
    for name in [name for name in sys.modules if name.startswith("weft.slurm")]:
        monkeypatch.delitem(sys.modules, name)
    assert "epochs" in repr(weft.runs()) and not any(name.startswith("weft.slurm") for name in sys.modules)
    monkeypatch.setenv("PATH", "")  # nobody to ask
    told = {"q": [], "r": ["started"], "p": ["started", "preempted"], "f": ["started", "finished"], "x": ["failed"]}
    for name, said in told.items():
        for event in ["submitted", *said]:
            events.note(sources / "runs" / name, event, job="1")
        (sources / "runs" / name / "submit" / "config.yaml").write_text("trainer: {epochs: 3}\n")
    lines = {line.split()[0]: line for line in repr(weft.runs()).splitlines()}
    states = {"q": "queued", "r": "running", "p": "preempted", "f": "finished", "x": "failed", "here": "epochs"}
    assert {name: state in lines[name] for name, state in states.items()} == dict.fromkeys(states, True)
    assert {run.folder.name for run in weft.runs(where="trainer.epochs=3")} == set(told)
    assert len(weft.runs()) == len(states)
    (sources / "runs" / "x" / "result.json").write_text('{"stop_reason": "gone on with by hand"}')
    assert "gone on with by hand" in repr(weft.runs())


def test_what_became_of_jobs_that_slurm_does_not_know_any_more(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, job in {"a": "7", "b": "8", "c": "9", "d": "; rm -r x", "e": "10", "f": "11"}.items():
        events.note(sources / name, "submitted", job=job)
    events.note(sources / "c", "finished")
    (sources / "e" / "submit" / "job-10.log").write_text("conda: command not found")
    events.note(sources / "f", "started")
    (sources / "squeue").write_text(f"#!/bin/sh\necho $* >>{sources}/asked\necho 7\n")
    (sources / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(sources))
    said = events.states([sources / name for name in "abcdefg"])
    assert list(said.values()) == ["queued", "cancelled", "finished", "cancelled", "failed", "lost"]
    assert (sources / "asked").read_text().split()[-2:] == ["-j", "10,11,7,8"]  # once, and about no end
