"""The command line as it is used: words in, files and exit codes out; a terminal and Ctrl-C where they matter."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import weft
from tests.helpers.patience import patience
from weft import cli, yamlfile
from weft.cli.help import completions
from weft.data.data import as_data
from weft.devices import signals
from weft.loggers.csv import read_rows

PDE = '''
import torch, time, weft
from torch import nn

def make_problem(width: int = 8, blow_up: bool = False):
    """A parabola.

    Args:
        width: hidden neurons
    """
    net = weft.Node(nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1)), ["p"], ["x"], name="net")
    factor = float("nan") if blow_up else 1.0
    return weft.Problem([net], objectives=[weft.objective(lambda x, p: factor * (x - p**2) ** 2, name="f")])

def data_setup(nsim: int = 60, scale: float = 1.0):
    """Points on a line.

    Args:
        nsim: how many points
        scale: of the interval
    """
    p = scale * torch.linspace(-1, 1, nsim)[:, None]
    return weft.DictDataset({"p": p}), weft.DictDataset({"p": p[::3]}), weft.DictDataset({"p": p[::5]}), 16

class Slow:
    def __init__(self, seconds: float = 0.05): self.seconds = seconds
    def on_step_end(self, trainer, batch, loss): time.sleep(self.seconds)

def double_loss(trainer, batch):
    return 2 * trainer.problem(batch)["train_loss"]

def size(p):
    return p.abs().mean()
'''
RUN = """
problem: pde_cli.py:make_problem
data: {class_path: "pde_cli.py:data_setup", init_args: {nsim: 60}}
optimizer: {class_path: AdamW, init_args: {lr: 1e-2}}
trainer: {epochs: 3, seed: 1, accelerator: cpu, progress: false, run_name: a}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "pde_cli.py").write_text(PDE)
    (tmp_path / "run.yaml").write_text(RUN)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path  # type: ignore[misc]
    for name in [n for n in sys.modules if n.startswith("pde_cli")]:
        del sys.modules[name]


def weft_of(*words: str) -> list[str]:
    return [sys.executable, "-m", "weft.cli", *words]


# ------------------------------------------------------------------------------------------------ fit and its folder


def test_fit_trains_what_the_file_and_the_options_say(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(
        [
            "fit",
            "--config",
            "run.yaml",
            "--trainer.epochs",
            "2",
            "--data.nsim=90",
            "--optimizer.lr",
            "1e-3",
            "--problem.width",
            "5",
        ]
    )
    assert code == cli.OK
    assert "FitResult(2 epochs, 12 steps" in capsys.readouterr().out  # ceil(90 / 16) batches twice
    folder = here / "runs" / "a"
    names = {p.name for p in folder.iterdir()}
    assert names >= {"config.yaml", "environment.yaml", "metrics.csv", "result.json", "report.html", "weights.pt"}
    assert yamlfile.load_file(folder / "config.yaml") == {
        "problem": {"class_path": f"{here}/pde_cli.py:make_problem", "init_args": {"width": 5}},
        "data": {"class_path": f"{here}/pde_cli.py:data_setup", "init_args": {"nsim": 90}},
        "optimizer": {"class_path": "AdamW", "init_args": {"lr": 1e-3}},
        "trainer": {
            "epochs": 2,
            "seed": 1,
            "accelerator": "cpu",
            "progress": False,
            "run_name": "a",
            "root_dir": "runs",
        },
    }
    (session,) = yamlfile.load_file(folder / "environment.yaml")["sessions"]
    assert session["seed"] == 1 and session["versions"]["torch"] == torch.__version__
    assert session["host"] and session["devices"] and session["git"] is None  # the folder is in no git tree
    result = weft.load_result(folder)
    assert result.epochs == 2 and len(result.history["dev_loss"]) == 2


def test_fit_equals_the_same_run_written_in_python(here: Path) -> None:
    assert cli.main(["fit", "--config", "run.yaml"]) == cli.OK
    sys.path.insert(0, str(here))
    import pde_cli  # type: ignore[import-not-found]

    def by_hand(seed: int) -> weft.FitResult:
        torch.manual_seed(seed)
        trainer = weft.Trainer(
            epochs=3, seed=seed, accelerator="cpu", progress=False, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2)
        )
        return trainer.fit(pde_cli.make_problem(), pde_cli.data_setup, nsim=60)

    assert weft.load_result(here / "runs" / "a").history == by_hand(1).history
    assert weft.load_result(here / "runs" / "a").history != by_hand(2).history


def test_the_folder_of_a_run_starts_the_same_run_again(here: Path) -> None:
    assert cli.main(["fit", "--config", "run.yaml", "--problem.width", "3"]) == cli.OK
    assert cli.main(["fit", "--config", "runs/a/config.yaml", "--trainer.run_name", "b"]) == cli.OK
    first, again = (weft.load_result(here / "runs" / name).history for name in "ab")
    assert first == again


def test_the_commit_is_recorded_and_whether_the_tree_was_clean(here: Path) -> None:
    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.run(["git", *who, *words], check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (here / ".gitignore").write_text("runs/\n__pycache__/\n")
    git("add", ".")
    git("commit", "-qm", "x")
    assert cli.main(["fit", "--config", "run.yaml", "--epochs", "1"]) == cli.OK
    with (here / "run.yaml").open("a") as file:
        file.write("# changed\n")
    assert cli.main(["fit", "--config", "run.yaml", "--epochs", "1"]) == cli.OK
    runs = (here / "runs" / "a" / "old" / "1", here / "runs" / "a")  # a new run moves the files of the one before
    first, second = (yamlfile.load_file(folder / "environment.yaml")["sessions"][0] for folder in runs)
    assert first["git"] == {"commit": git("rev-parse", "HEAD"), "clean": True}
    assert second["git"]["clean"] is False and "run.yaml" in second["git"]["changed"][0]


def test_steps_metrics_hooks_loggers_and_schedulers_are_named_too(here: Path) -> None:
    extra = {
        "training_step": "pde_cli.py:double_loss",
        "metrics": {"size": "pde_cli.py:size"},
        "loggers": ["tensorboard"],
        "hooks": [{"class_path": "pde_cli.py:Slow", "init_args": {"seconds": 0.0}}],
        "scheduler": {"class_path": "StepLR", "init_args": {"step_size": 1, "gamma": 0.5}},
        "batches": {"batch_size": {"train": 30, "dev": 5}},
    }
    (here / "more.yaml").write_text(yamlfile.dump(extra))
    assert cli.main(["fit", "--config", "run.yaml", "--config", "more.yaml", "--epochs", "2"]) == cli.OK
    result = weft.load_result(here / "runs" / "a")
    assert result.steps == 4 and "dev_size" in result.history
    assert [row.value for row in read_rows(here / "runs" / "a" / "metrics.csv") if row.name == "lr"] == [1e-2, 5e-3]
    assert list((here / "runs" / "a").glob("events.out.tfevents*"))


def test_a_run_started_from_python_describes_itself_too(tmp_path: Path) -> None:
    from weft.demo import data_setup, make_problem

    trainer = weft.Trainer(
        epochs=1,
        accelerator="cpu",
        progress=False,
        root_dir=str(tmp_path),
        run_name="p",
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    )
    trainer.fit(make_problem(), data_setup, nsim=30)
    config = yamlfile.load_file(tmp_path / "p" / "config.yaml")
    assert config["trainer"] == {
        "epochs": 1,
        "accelerator": "cpu",
        "progress": False,
        "root_dir": str(tmp_path),
        "run_name": "p",
    }
    assert config["objects"]["problem"] == "weft.problem.problem.Problem 'rosenbrock'"
    assert "<lambda> (test_cli.py, line" in config["objects"]["optimizer"]


# ------------------------------------------------------------------------------------------------ the other commands


@pytest.mark.parametrize("command", ["resume", "validate", "test", "predict"])
def test_a_run_started_from_python_goes_on_by_its_script(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from weft.demo import data_setup, make_problem

    trainer = weft.Trainer(epochs=1, progress=False, root_dir=str(tmp_path), run_name="p", checkpoint=True)
    trainer.fit(make_problem(), data_setup, nsim=30)
    assert cli.main([command, str(tmp_path / "p")]) == cli.BAD_USAGE
    told = capsys.readouterr().err
    assert told.startswith("weft: objects: this run was started from Python; run its script again, with fit(..., ")
    assert "problem: missing" not in told


def test_python_m_weft_is_the_command(here: Path) -> None:
    done = [
        subprocess.run([sys.executable, "-m", name, "fit", "--no"], capture_output=True, text=True, check=False)
        for name in ("weft", "weft.cli")
    ]
    assert done[0].stderr == done[1].stderr != "" and done[0].returncode == done[1].returncode == cli.BAD_USAGE


def test_validate_test_and_predict_use_the_best_weights_of_a_run(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["fit", "--config", "run.yaml"]) == cli.OK
    best = weft.load_result(here / "runs" / "a").best_metric
    capsys.readouterr()
    assert cli.main(["validate", "runs/a"]) == cli.OK
    assert json.loads(capsys.readouterr().out)["dev_loss"] == best
    assert cli.main(["test", "runs/a", "--data.nsim", "90"]) == cli.OK
    found = json.loads(capsys.readouterr().out)["test_loss"]
    import pde_cli  # type: ignore[import-not-found]

    problem = weft.load_weights(pde_cli.make_problem(), here / "runs" / "a" / "weights.pt")
    test = as_data(pde_cli.data_setup, setup_kwargs={"nsim": 90}).test.datadict
    with torch.no_grad():
        assert found == pytest.approx(float(problem({**test, "name": "test"})["test_loss"]), rel=1e-6)
    assert cli.main(["predict", "runs/a", "--split", "test", "--output", "x.npz"]) == cli.OK
    small = as_data(pde_cli.data_setup).test.datadict
    with torch.no_grad():
        expected = problem.step(dict(small))["x"].numpy()
    np.testing.assert_allclose(np.load("x.npz")["x"], expected, rtol=1e-5, atol=1e-6)
    assert cli.main(["predict", "runs/a", "--split", "tets", "--output", "y.npz"]) == cli.BAD_USAGE
    assert cli.main(["test", "--config", "run.yaml"]) == cli.BAD_USAGE  # without weights
    assert "weights: missing" in capsys.readouterr().err


def test_resume_goes_on_from_the_last_checkpoint(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (here / "pde_cli.py").open("a") as file:
        file.write("\n\nclass PowerCut:\n    def on_step_end(self, trainer, batch, loss):\n")
        file.write("        if trainer.global_step == 7 and __import__('os').path.exists('cut'):\n")
        file.write("            raise RuntimeError('the power went')\n")
    words = ["fit", "--config", "run.yaml", "--trainer.checkpoint.every_n_steps", "2", "--hooks", "pde_cli.py:PowerCut"]
    assert cli.main([*words, "--trainer.run_name", "whole"]) == cli.OK
    (here / "cut").touch()
    assert cli.main(words) == cli.FAILED
    assert "RuntimeError: the power went (pde_cli.py" in capsys.readouterr().err
    (here / "cut").unlink()
    assert cli.main(["resume", "runs/a"]) == cli.OK
    whole, resumed = (weft.load_result(here / "runs" / name) for name in ("whole", "a"))
    assert resumed.history == whole.history
    first, second = yamlfile.load_file(here / "runs" / "a" / "environment.yaml")["sessions"]
    assert first["resumed_at_step"] is None and second["resumed_at_step"] in (6, 7)  # 7: saved at the error, too
    assert cli.main(["resume", "runs/nothing"]) == cli.BAD_USAGE


def test_config_prints_what_starts_the_same_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "other.yaml").write_text(
        "name: pde_cli.py:make_problem\ndata: pde_cli.py:data_setup\nconfig: {width: 3, trainer: {max_epochs: 2}}\n"
    )
    assert cli.main(["config", "--config", "other.yaml", "--seed", "4"]) == cli.OK
    printed = capsys.readouterr().out
    found = yamlfile.load(printed)
    assert (
        found["trainer"]["epochs"] == 2
        and found["trainer"]["seed"] == 4
        and found["problem"]["init_args"] == {"width": 3}
    )
    (here / "printed.yaml").write_text(printed)
    assert cli.main(["fit", "--config", "printed.yaml", "--print_config", "--trainer.root_dir", "training"]) == cli.OK
    assert yamlfile.load(capsys.readouterr().out) == found
    assert not (here / "training").exists()


@pytest.mark.filterwarnings("default")  # on_nonfinite="stop" warns
def test_numbers_that_are_not_finite_exit_with_3(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", "--config", "run.yaml", "--problem.blow_up", "true"]) == cli.NOT_FINITE
    assert (
        cli.main(["fit", "--config", "run.yaml", "--problem.blow_up", "true", "--trainer.on_nonfinite", "stop"])
        == cli.NOT_FINITE
    )
    assert "Traceback" not in capsys.readouterr().err


def test_fast_dev_run_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", "--config", "run.yaml", "--fast_dev_run"]) == cli.OK
    assert "1 epochs, 1 steps" in capsys.readouterr().out and not (here / "runs").exists()


def test_runs_and_compare_tell_what_there_is(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, rate in (("a", "1e-2"), ("b", "1e-3")):
        assert cli.main(["fit", "--config", "run.yaml", "--trainer.run_name", name, "--optimizer.lr", rate]) == cli.OK
    best = {name: weft.load_result(here / "runs" / name).best_metric for name in "ab"}
    capsys.readouterr()
    assert cli.main(["runs"]) == cli.OK
    listed = capsys.readouterr().out
    assert all(re.search(rf"^{name} .*dev_loss {value:.6g}", listed, re.MULTILINE) for name, value in best.items())
    assert cli.main(["compare", "runs/a", "runs/b", "--html", "both.html"]) == cli.OK
    told = capsys.readouterr().out
    assert re.search(r"optimizer\.init_args\.lr +0\.01 +0\.001", told) and "trainer.seed" not in told
    assert re.search(r"dev_loss .* 0$", told, re.MULTILINE)  # they differ from epoch 0 on
    assert 'class="curve"' in (here / "both.html").read_text()
    assert cli.main(["compare", "runs/a", "runs/a"]) == cli.OK
    assert "Settings: the same" in capsys.readouterr().out
    assert cli.main(["compare", "runs/a", "runs/c"]) == cli.BAD_USAGE
    assert cli.main(["runs", "nowhere"]) == cli.OK


# ------------------------------------------------------------------------------------------------ help, completion


def test_help_shows_the_parameters_of_what_is_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", "--config", "run.yaml", "--help"]) == cli.OK
    text = " ".join(capsys.readouterr().out.split())
    assert "--problem.width hidden neurons (a whole number; default: 8)" in text
    assert "--data.scale of the interval (a number; default: 1.0)" in text
    assert "--optimizer.weight_decay" in text and "--optimizer.params" not in text
    assert "--trainer.patience Stop after so many validations without improvement (>= 1)" in text
    assert "--batches.batch_size Rows per batch" in text


def test_every_option_of_the_trainer_has_a_text(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["fit", "--help"])
    text = capsys.readouterr().out
    for name in weft.TrainerConfig.__dataclass_fields__:
        assert re.search(rf"^  --trainer\.{name}\n        [A-Z\"]", text, re.MULTILINE), name


def test_help_comes_without_torch() -> None:
    look = "print([m for m in ('torch', 'numpy', 'optuna') if m in sys.modules])"
    code = f"import sys; from weft.cli import main; main(['--help']); {look}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and "usage: weft" in done.stdout


def test_options_are_never_abbreviated(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", "--config", "run.yaml", "--trainer.epo", "3"]) == cli.BAD_USAGE
    assert cli.main(["fit", "--conf", "run.yaml"]) == cli.BAD_USAGE
    assert cli.main(["runs", "--roots", "x"]) == cli.BAD_USAGE
    assert cli.main(["fi"]) == cli.BAD_USAGE
    assert "did you mean 'fit'?" in capsys.readouterr().err


def test_a_shell_completes_commands_and_options(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert completions("weft re") == ["resume"]
    assert "--trainer.patience" in completions("weft fit --trainer.pa")
    assert completions("weft fit --config run.yaml --problem.") == ["--problem.blow_up", "--problem.width"]
    assert completions("weft sweep x.yaml --tri") == ["--trials"]
    assert completions("weft fit run") == []  # a file: the shell's own completion
    assert cli.main(["completion", "bash"]) == cli.OK
    script = capsys.readouterr().out
    shell = subprocess.run(["bash", "-c", script + "\ncomplete -p weft"], capture_output=True, text=True, check=True)
    assert "weft __complete" in shell.stdout
    assert cli.main(["completion", "fish"]) == cli.BAD_USAGE


# ------------------------------------------------------------------------------------------------ looking runs nothing

PLANTED = """
open("it-ran", "w").close()

def make(width: int = 3, inner: dict | None = None):
    \"\"\"A problem.

    Args:
        width: of something
    \"\"\"
"""
FOREIGN = """
problem: {class_path: "planted.py:make", init_args: {width: 4, inner: {class_path: "planted_too:make", init_args: {}}}}
data: planted_too:make
optimizer: planted_too.make
hooks: [{class_path: "planted_package.inner:make"}]
"""


def run_in_foreign_folder(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a folder that somebody sent: what its config names leaves a file when it is imported."""
    (folder / "e" / "planted_package").mkdir(parents=True, exist_ok=True)
    (folder / "planted_package").mkdir(exist_ok=True)
    (folder / "e" / "config.yaml").write_text(FOREIGN)
    places = ("e/planted", "planted_too", "planted_package/__init__", "planted_package/inner")
    for name in (*places, "torch", "docstring_parser", "jsonargparse"):  # also in the way of what weft imports later
        (folder / f"{name}.py").write_text(PLANTED)
    command = [sys.executable, "-P", "-m", "weft.cli", *words]  # -P: as `weft` does, without the working folder
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=env)


LOOKS = {
    "config": ["config", "--config", "e/config.yaml", "--problem.width", "5"],
    "print_config": ["fit", "--config", "e/config.yaml", "--problem.width", "5", "--print_config"],
    "print_config of a run": ["test", "e", "--problem.width", "5", "--print_config"],
    "help": ["fit", "--config", "e/config.yaml", "--help"],
    "help of a run": ["resume", "e", "--help"],
}


@pytest.mark.parametrize("words", LOOKS.values(), ids=LOOKS)
def test_a_look_at_a_config_runs_nothing_that_it_names(words: list[str], tmp_path: Path) -> None:
    done = run_in_foreign_folder(tmp_path, *words)
    assert done.returncode == 0 and not (tmp_path / "it-ran").exists(), done.stderr
    assert ("of something (a whole number; default: 3)" if "--help" in words else "width: 5") in done.stdout


@pytest.mark.parametrize("line", ["weft resume e --pro", "weft fit --config e/config.yaml --pro"])
def test_the_tab_key_runs_nothing_that_a_config_names(line: str, tmp_path: Path) -> None:
    done = run_in_foreign_folder(tmp_path, "__complete", COMP_LINE=line, COMP_POINT=str(len(line)))
    assert "--problem.width" in done.stdout.split() and not (tmp_path / "it-ran").exists()


def test_training_what_a_config_names_runs_it(tmp_path: Path) -> None:
    done = run_in_foreign_folder(tmp_path, "fit", "--config", "e/config.yaml")
    assert done.returncode != 0 and (tmp_path / "it-ran").exists(), done.stderr


def test_a_look_at_a_config_tells_what_its_source_can_tell(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--problem.widht", "3", "--data.nsim", "few", "--optimizer.lr", "0.1", "--hooks", "pde_cli.py:Slwo"]
    assert cli.main(["config", "--config", "run.yaml", *words]) == cli.BAD_USAGE
    assert "has no 'Slwo'; did you mean 'Slow'?" in capsys.readouterr().err
    words = [*words[:-2], "--scheduler", "StepLR", "--scheduler.gama", "2"]
    assert cli.main(["config", "--config", "run.yaml", *words]) == cli.BAD_USAGE
    told = capsys.readouterr().err
    for expected in (
        "problem.widht=3: make_problem has no such parameter; did you mean 'width'?",
        "data.nsim='few': expected a whole number",
        "scheduler.gama=2: StepLR has no such parameter; did you mean 'gamma'?",
        "scheduler.step_size: missing; StepLR needs it (a whole number)",
    ):
        assert expected in told
    assert "4 problems" in told and "pde_cli" not in sys.modules


# ------------------------------------------------------------------------------------------------ real processes


def test_as_a_process_it_exits_with_0_and_2(here: Path) -> None:
    done = subprocess.run(weft_of("fit", "--config", "run.yaml"), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and "runs/a" in done.stdout
    done = subprocess.run(
        weft_of("fit", "--config", "run.yaml", "--trainer.epochs", "-3"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stderr == "weft: trainer.epochs=-3: must be at least 0\n"


def read_terminal(master: int, until: str) -> str:
    """What a program wrote to its terminal until `until` appears in it, or the program ends."""
    text, deadline = "", time.monotonic() + patience()
    while until not in text and time.monotonic() < deadline:
        if select.select([master], [], [], 0.5)[0]:
            try:
                text += os.read(master, 65536).decode(errors="replace")
            except OSError:  # the program ended
                break
    return text


def start_in_terminal(*words: str) -> tuple[int, int]:
    """(process, terminal) of a command that runs in a terminal of its own."""
    process, master = pty.fork()
    if process == 0:
        termios.tcsetwinsize(0, (24, 200))
        environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        os.execve(sys.executable, weft_of(*words), environment)
    return process, master


def test_ctrl_c_in_a_terminal_keeps_the_best_weights_and_exits_with_130(here: Path) -> None:
    process, master = start_in_terminal(
        "fit", "--config", "run.yaml", "--epochs", "100000", "--hooks", "pde_cli.py:Slow", "--trainer.progress", "auto"
    )
    shown = read_terminal(master, "epoch 2/100000")
    assert "train_loss" in shown and "steps/s" in shown
    os.write(master, b"\x03")  # what the key sends; the terminal makes it SIGINT
    rest = read_terminal(master, "\0")
    _, status = os.waitpid(process, 0)
    os.close(master)
    assert os.waitstatus_to_exitcode(status) == 130
    assert "stopped: interrupted" in rest and "Traceback" not in rest
    assert rest.count("\n") < 12  # the line was rewritten, not repeated
    result = weft.load_result(here / "runs" / "a")
    assert result.stop_reason == "interrupted" and (here / "runs" / "a" / "weights.pt").is_file()
    assert (here / "runs" / "a" / "report.html").is_file()


@pytest.mark.skipif(not hasattr(signals, "SignalExit"), reason="this build's fit does not handle SIGTERM")
def test_sigterm_exits_with_143_and_leaves_a_checkpoint(here: Path) -> None:
    words = (
        "fit",
        "--config",
        "run.yaml",
        "--epochs",
        "100000",
        "--hooks",
        "pde_cli.py:Slow",
        "--trainer.checkpoint.every_n_steps",
        "1000000",
    )
    process = subprocess.Popen(weft_of(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics, deadline = here / "runs" / "a" / "metrics.csv", time.monotonic() + patience()
    while not metrics.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=patience())
    assert process.returncode == 143 and "Traceback" not in told
    assert list((here / "runs" / "a" / "checkpoints").glob("step-*.ckpt"))


# ------------------------------------------------------------------------------------------------ shipped configs


@pytest.mark.parametrize("name", ["oscillator", "rosenbrock", "rosenbrock_physicsml", "two_phases"])
def test_shipped_configs_train(name: str, repo: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    small = {
        "oscillator": ["--epochs", "3"],
        "rosenbrock": ["--epochs", "2", "--data.nsim", "2000"],
        "rosenbrock_physicsml": ["--epochs", "2", "--data.nsim", "2000"],
        "two_phases": ["--phases.0.epochs", "2", "--phases.1.epochs", "2"],
    }[name]
    path = repo / "examples" / "configs" / f"{name}.yaml"
    assert (
        cli.main(
            [
                "fit",
                "--config",
                str(path),
                *small,
                "--trainer.root_dir",
                str(tmp_path),
                "--trainer.run_name",
                "x",
                "--trainer.progress",
                "false",
            ]
        )
        == cli.OK
    )
    history = weft.load_result(tmp_path / "x").history["train_loss"]
    assert history[-1] < history[0]


@pytest.mark.long
def test_the_oscillator_is_identified(repo: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = repo / "examples" / "configs" / "two_phases.yaml"
    assert (
        cli.main(["fit", "--config", str(path), "--trainer.root_dir", str(tmp_path), "--trainer.progress", "false"])
        == cli.OK
    )
    weights = torch.load(tmp_path / "two_phases" / "weights.pt", weights_only=True)
    found = (
        sorted(float(v) for v in weights.values())
        if "state_dict" not in weights
        else sorted(float(v) for v in weights["state_dict"].values())
    )
    assert found == pytest.approx([0.3, 4.0], abs=0.05)  # the damping and the stiffness of the data
