"""Sweeps: exactly as many trials as asked for, whoever dies; the best is the best; what was killed goes on."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import weft
from tests.helpers.patience import patience
from tests.helpers.running import processes
from weft import cli, yamlfile
from weft.recipes.schema import ConfigError
from weft.sweeps.settings import SweepConfig
from weft.sweeps.study import Study
from weft.sweeps.sweep import sweep_from_file

optuna = pytest.importorskip("optuna", reason="needs Optuna (weft[sweep])")
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

LINE = {"x": {"low": -2.0, "high": 2.0}}


def parabola(trial: Any) -> float:
    """Lowest at 0.5; imports nothing slow."""
    return (trial["x"] - 0.5) ** 2


def test_a_sweep_completes_exactly_its_trials_and_finds_the_best(tmp_path: Path) -> None:
    found = weft.sweep(parabola, LINE, trials=9, workers=2, seed=0, root_dir=str(tmp_path))
    assert [t["state"] for t in found.trials] == ["complete"] * 9
    assert found.best_value == min(t["value"] for t in found.trials) == (found.best_params["x"] - 0.5) ** 2
    assert found.trials[found.best_trial]["params"] == found.best_params
    assert "9 complete" in repr(found) and len(found.to_dataframe()) == 9
    largest = weft.sweep(parabola, LINE, trials=3, seed=0, mode="max", name="up", root_dir=str(tmp_path))
    assert largest.best_value == max(t["value"] for t in largest.trials)


def test_the_same_seed_proposes_the_same_settings(tmp_path: Path) -> None:
    def tried(name: str, seed: int) -> list[Any]:
        found = weft.sweep(parabola, LINE, trials=3, seed=seed, sampler="random", name=name, root_dir=str(tmp_path))
        return [t["params"] for t in found.trials]

    first = tried("a", 0)
    assert first == tried("b", 0) and first != tried("c", 1)
    more = weft.sweep(parabola, LINE, trials=6, seed=0, sampler="random", name="a", root_dir=str(tmp_path))
    values = [t["params"]["x"] for t in more.trials]
    assert len(set(values)) == 6  # going on does not propose the first ones again


def test_a_trial_that_nobody_holds_has_the_settings_of_its_number(tmp_path: Path) -> None:
    """Its worker may have died, or not yet come to hold it, when another one takes it over."""
    (tmp_path / "s").mkdir()
    study = Study(SweepConfig(trials=3, seed=0, sampler="random"), LINE, tmp_path / "s")
    first = study.take()
    study.study.ask()
    taken = study.take()
    assert first is not None and taken is not None
    for one in (first, taken):
        study.tell(one, "done", 0.0, {})
    found = weft.sweep(parabola, LINE, trials=3, seed=0, sampler="random", root_dir=str(tmp_path))
    assert taken.trial.number == 1 and taken.params == found.trials[1]["params"] != found.trials[0]["params"]


def test_a_database_by_its_url_holds_the_trials(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/trials.db"
    found = weft.sweep(parabola, LINE, trials=4, workers=2, seed=0, root_dir=str(tmp_path), storage=url)
    read = optuna.load_study(study_name="sweep", storage=url).get_trials(states=[optuna.trial.TrialState.COMPLETE])
    assert [t.value for t in read] == [t["value"] for t in found.trials] and len(read) == 4
    assert not list(tmp_path.rglob("*.journal"))


def test_a_grid_tries_everything_once(tmp_path: Path) -> None:
    space = {"x": [0.0, 0.5, 1.0], "n": {"low": 1, "high": 5, "step": 2}}
    some = weft.sweep(parabola, space, sampler="grid", trials=4, name="g", root_dir=str(tmp_path))
    assert len(some.trials) == 4
    found = weft.sweep(parabola, space, sampler="grid", workers=2, name="g", root_dir=str(tmp_path))
    tried = sorted((t["params"]["x"], t["params"]["n"]) for t in found.trials)
    assert tried == sorted(itertools.product([0.0, 0.5, 1.0], [1, 3, 5])) and found.best_params["x"] == 0.5
    again = weft.sweep(parabola, space, sampler="grid", name="g", root_dir=str(tmp_path))
    assert len(again.trials) == 9


def kill_some(folder: Path, deaths: int, dice: random.Random) -> subprocess.Popen[bytes]:
    """A process that kills `deaths` workers, one after the other, at random moments, until the file `over` is there."""
    code = f"""
import os, random, signal, sys, time
sys.path[:0] = [{str(Path(__file__).parents[2])!r}]
from tests.helpers.running import processes
from pathlib import Path
dice, left = random.Random({dice.random()}), {deaths}
print("ready", flush=True)
while left and not Path({str(folder / "over")!r}).exists():
    time.sleep(dice.uniform(0.05, 0.35))
    found = processes(Path({str(folder)!r}))
    if found:
        os.kill(dice.choice(found), signal.SIGKILL)
        left -= 1
print({deaths} - left)
"""
    killer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert killer.stdout is not None and killer.stdout.readline() == b"ready\n"
    return killer


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the workers in /proc")
def test_three_workers_killed_at_random_moments_complete_exactly_the_asked_trials(tmp_path: Path) -> None:
    def slowly(trial: Any) -> float:
        time.sleep(0.15)
        return (trial["x"] - 0.5) ** 2

    killer = kill_some(tmp_path / "sweep", deaths=4, dice=random.Random(0))
    found = weft.sweep(slowly, LINE, trials=20, workers=3, seed=0, root_dir=str(tmp_path))
    (tmp_path / "sweep" / "over").touch()
    out, _ = killer.communicate(timeout=patience())
    assert int(out) >= 1
    assert [t["state"] for t in found.trials] == ["complete"] * 20  # each that was lost was taken over, none twice
    assert not processes(tmp_path / "sweep")


SCRIPT = """
import os, sys, time, weft
def slowly(trial):
    time.sleep(0.05)
    calls = sys.argv[1] + "/calls.txt"
    while os.path.exists(sys.argv[1] + "/hold") and os.path.exists(calls) and os.path.getsize(calls) >= 5:
        time.sleep(0.01)  # until the sweep was killed
    with open(calls, "a") as file:
        file.write("x")
    return (trial["x"] - 0.5) ** 2
print(weft.sweep(slowly, {"x": {"low": -2.0, "high": 2.0}}, trials=8, workers=2, seed=0, root_dir=sys.argv[1]))
"""


def test_a_sweep_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.replace("sys.argv[1]", repr(str(tmp_path))))  # no __main__ guard
    (tmp_path / "hold").touch()
    command = [sys.executable, str(tmp_path / "script.py")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    while count_of(tmp_path) < 3 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (tmp_path / "hold").unlink()
    before = count_of(tmp_path)
    assert 3 <= before < 8
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "8 complete" in done.stdout and count_of(tmp_path) == 8
    assert (tmp_path / "calls.txt").read_text().count("x") <= 8 + 2  # the two that were lost were tried again


def count_of(folder: Path) -> int:
    """How many trials are complete, read from the journal itself: lines of JSON, 6 sets a state, 1 is complete."""
    path = folder / "sweep" / "sweep.journal"
    if not path.is_file():
        return 0
    said = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return sum(entry["op_code"] == 6 and entry["state"] == 1 for entry in said)


def test_another_space_under_the_same_name_is_refused(tmp_path: Path) -> None:
    weft.sweep(parabola, LINE, trials=1, root_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="choose another name"):
        weft.sweep(parabola, {"x": [1, 2]}, trials=1, root_dir=str(tmp_path))


def test_trials_that_raise_end_the_sweep_with_the_first_error(tmp_path: Path) -> None:
    def wrong(trial: Any) -> float:
        raise KeyError("no such thing")

    with pytest.raises(RuntimeError, match=r"2 trials failed; the first said:(?s:.)*no such thing"):
        weft.sweep(wrong, LINE, trials=5, max_failures=1, root_dir=str(tmp_path))

    def nothing(trial: Any) -> None:
        return None

    with pytest.raises(RuntimeError, match="expected a FitResult"):
        weft.sweep(nothing, LINE, trials=5, max_failures=0, name="n", root_dir=str(tmp_path))


def test_a_worker_that_always_dies_is_not_started_for_ever(tmp_path: Path) -> None:
    def deadly(trial: Any) -> float:
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        return 0.0

    with pytest.raises(RuntimeError, match=r"died again and again(?s:.)*last words"):
        weft.sweep(deadly, LINE, trials=2, max_failures=0, root_dir=str(tmp_path))


def test_what_is_not_finite_counts_as_pruned(tmp_path: Path) -> None:
    def sometimes(trial: Any) -> float:
        if trial["x"] < 0:
            raise FloatingPointError("loss is nan")
        return trial["x"]

    found = weft.sweep(sometimes, {"x": [-1.0, 1.0, 2.0]}, sampler="grid", root_dir=str(tmp_path))
    assert sorted(t["state"] for t in found.trials) == ["complete", "complete", "pruned"] and found.best_value == 1.0


@pytest.mark.parametrize(
    ("space", "options", "message"),
    [
        ({}, {}, "expected a dict of choices or ranges"),
        ({"x": {"low": 2, "high": 1}}, {}, "expected numbers with low <= high"),
        ({"x": {"low": 0.0, "high": 1.0, "log": True}}, {}, "must be greater than 0 with log: true"),
        ({"x": {"low": 0.0, "hgih": 1.0}}, {}, "there is no such key; did you mean 'high'?"),
        ({"x": 3}, {}, "expected a list of choices"),
        ({"x": [[1]]}, {}, "expected a list of numbers, texts"),
        (
            {"x": (1e-4, 0.1)},
            {},
            "a tuple of two numbers; expected {'low': 0.0001, 'high': 0.1} for a range, or a list",
        ),
        ({"x": (1e-4, 0.1, "log")}, {}, "a tuple of two numbers"),
        (LINE, {"sampler": "grid"}, "a grid needs a list of choices, or a step"),
        (LINE, {"trails": 3}, "did you mean 'trials'?"),
        (LINE, {"workers": 0}, "workers=0: must be at least 1"),
        (LINE, {"sampler": "tbe"}, "did you mean 'tpe'?"),
    ],
)
def test_wrong_spaces_and_options_are_refused_before_anything_starts(
    space: Any, options: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        weft.sweep(parabola, space, root_dir=str(tmp_path), **options)
    assert message in str(caught.value) and not list(tmp_path.iterdir())


def test_a_function_written_for_optuna_is_told_where_its_ranges_go(tmp_path: Path) -> None:
    def of_optuna(trial: Any) -> float:
        return trial.suggest_float("x", -2.0, 2.0) ** 2

    with pytest.raises(RuntimeError, match=r"'suggest_float': the ranges stand in the space.*reads trial\[\"lr\"\]"):
        weft.sweep(of_optuna, LINE, trials=1, max_failures=0, root_dir=str(tmp_path))


def test_learning_rate_and_batch_size_are_tuned_from_a_file(
    tmp_path: Path, repo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    described: Any = yamlfile.load_file(repo / "examples" / "configs" / "sweep.yaml")
    run = yamlfile.load_file(repo / "examples" / "configs" / described["run"])
    run["trainer"]["epochs"] = 2
    for section in ("problem", "data"):
        run[section]["class_path"] = f"{repo}/examples/configs/{run[section]['class_path']}"
    (tmp_path / "run.yaml").write_text(yamlfile.dump(run))
    described |= {"run": "run.yaml", "root_dir": str(tmp_path), "workers": 1}
    (tmp_path / "small.yaml").write_text(yamlfile.dump(described))
    assert cli.main(["sweep", str(tmp_path / "small.yaml"), "--trials", "3", "--name", "osc"]) == cli.OK
    told = capsys.readouterr().out
    assert "SweepResult(3 complete" in told and "sweep.journal" in told
    folders = sorted((tmp_path / "osc").glob("trial-*"))
    assert len(folders) == 3
    values = {}
    for folder in folders:
        config = yamlfile.load_file(folder / "config.yaml")
        assert (
            config["batches"]["batch_size"] in (16, 32, 64) and 1e-4 <= config["optimizer"]["init_args"]["lr"] <= 1e-1
        )
        values[folder.name] = json.loads((folder / "result.json").read_text())["best_metric"]
    told = sweep_from_file(tmp_path / "small.yaml", {"trials": 3, "name": "osc"})  # nothing is left to do
    assert told.best_value == min(values.values()) and f"trial-{told.best_trial:04d}" == min(
        values, key=lambda k: values[k]
    )
    assert cli.main(["runs", str(tmp_path)]) == cli.OK
    assert "osc/trial-0000" in capsys.readouterr().out


def test_bad_trials_are_pruned_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    def train(trial: Any) -> Any:
        import torch

        import weft
        from weft.demo import data_setup, make_problem

        optimizer = {"lr": 0.01 if trial["good"] else 0.0}
        trainer = weft.Trainer(
            epochs=8,
            accelerator="cpu",
            progress=False,
            seed=0,
            optimizer=lambda p: torch.optim.Adam(p, **optimizer),
            hooks=trial.hook,
        )
        return trainer.fit(make_problem(), data_setup, nsim=60)

    space = {"good": [True, False], "n": {"low": 0, "high": 5, "step": 1}}
    found = weft.sweep(train, space, sampler="grid", pruner="median", root_dir=str(tmp_path))
    bad, good = ([t for t in found.trials if t["params"]["good"] is which] for which in (False, True))
    pruned = [t for t in found.trials if t["state"] == "pruned"]
    assert pruned and all(t["stopped"] == "pruned" and t["epochs"] < 8 for t in pruned)
    assert all(t in bad for t in pruned) and all(t["epochs"] == 8 for t in good)
    assert len(found.trials) == 12 and found.best_params["good"] is True


def test_an_unknown_option_of_the_run_is_refused_before_a_worker_starts(tmp_path: Path) -> None:
    run = {"problem": "weft.demo:make_problem", "data": "weft.demo:data_setup"}
    with pytest.raises(ConfigError, match=r"trainer.epohcs=1: there is no such option; did you mean 'epochs'"):
        weft.sweep(run, {"trainer.epohcs": [1, 2]}, root_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="a trial runs in one process"):
        weft.sweep({**run, "trainer": {"devices": 2}}, {"trainer.epochs": [1, 2]}, root_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="there is no file"):
        sweep_from_file(tmp_path / "nothing.yaml")
    (tmp_path / "ring.yaml").write_text("run: ring.yaml\nspace: {x: [1]}\n")
    with pytest.raises(ConfigError, match="there is no such section"):
        sweep_from_file(tmp_path / "ring.yaml")
