"""Several runs: listed, sorted, filtered and compared, from Python and the command line; what was trained is known."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch

import weft
from tests.helpers.problems import tanh_net
from weft import cli, yamlfile
from weft.loggers import hyperparameters
from weft.records.repeats import repeated

X = torch.linspace(-1, 1, 24)[:, None]
UNITS = {"a": 4, "b": 8, "c": 8}
RATES = {"a": 1e-2, "b": 1e-3, "c": 3e-2}


@pytest.fixture(autouse=True)
def close_pictures(leave_no_trace: None) -> Iterator[None]:
    """Figures that pyplot made for a test are closed before the check that none is left."""
    yield
    plt.close("all")


def fit_sine(units: int, rate: float, **options: Any) -> tuple[weft.Trainer, weft.FitResult]:
    torch.manual_seed(0)
    net = weft.Node(tanh_net(1, 1, units), ["x"], ["u"], name="net")
    problem = weft.Problem([net], [weft.objective(lambda u, x: (u - x.sin()) ** 2, name="fit")])
    adam = {"optimizer": lambda p: torch.optim.AdamW(p, lr=rate, weight_decay=0.5)}
    trainer = weft.Trainer(**{"epochs": 3, "accelerator": "cpu", "progress": False, "seed": 0, **adam, **options})
    return trainer, trainer.fit(problem, weft.Data({"x": X}, {"x": X[::2]}, batch_size=8))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, units in UNITS.items():
        fit_sine(units, RATES[name], root_dir=str(folder), run_name=name, patience=9)
    return folder


def test_what_was_trained_is_in_the_folder_the_report_and_the_comparison(root: Path) -> None:
    trained = yamlfile.load_file(root / "a" / "environment.yaml")["sessions"][-1]["trained"]
    size = sum(p.numel() for p in tanh_net(1, 1, 4).parameters())
    assert trained["optimizer"] == {"class": "AdamW", "lr": 0.01, "weight_decay": 0.5}  # betas are AdamW's own
    assert (trained["parameters"], trained["rows"], trained["batch_size"]) == (size, {"train": 24, "dev": 12}, 8)
    page = (root / "a" / "report.html").read_text()
    assert "What was trained" in page and f"<th>parameters</th><td>{size}</td>" in page
    told = repr(weft.compare(root / "a", root / "b"))
    other = sum(p.numel() for p in tanh_net(1, 1, 8).parameters())
    assert re.search(rf"parameters +{size} +{other}\n", told) and re.search(r"optimizer\.lr +0\.01 +0\.001\n", told)
    assert "Trained: the same" in repr(weft.compare(root / "a", root / "a"))


def test_numbers_of_groups_and_schedules_are_those_that_they_were_made_with() -> None:
    from weft.records.made import made_of

    def groups(params: Any) -> torch.optim.Optimizer:
        first, *rest = params
        return torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": rest}], lr=0.2, momentum=0.9)

    decay = {"scheduler": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5)}
    trainer, _ = fit_sine(4, 0.1, optimizer=groups, **decay)
    made = made_of(trainer.run.state)
    assert made["optimizer"] == {"class": "SGD", "lr": [0.1, 0.2], "momentum": 0.9}
    assert made["scheduler"] == "ExponentialLR, each epoch" and trainer.optimizer.param_groups[0]["lr"] == 0.0125


def test_hyperparameters_are_what_differs_from_the_defaults_and_what_is_trained(root: Path) -> None:
    trainer, _ = fit_sine(4, 1e-2, clip=1.0)
    settings = hyperparameters(trainer)
    assert settings["clip"] == 1.0 and settings["optimizer"] == "AdamW" and settings["lr"] == 0.01
    assert settings["optimizer.weight_decay"] == 0.5 and settings["rows.train"] == 24 and settings["batch_size"] == 8
    untouched = {
        "progress",
        "loggers",
        "patience",
        "accumulate",
        "warmup",
        "strategy",
        "compile",
        "run_name",
        "monitor_mode",
        "devices",
    }
    assert not settings.keys() & untouched


def test_runs_show_the_settings_in_which_they_differ(root: Path) -> None:
    found = weft.runs(root)
    assert [run.folder.name for run in found] == ["a", "b", "c"]
    assert found.settings == ["optimizer.lr", "parameters"]  # all else is the same
    head, *rows = repr(found).splitlines()
    assert head.split()[-2:] == ["lr", "parameters"] and rows[1].split()[-2] == "0.001"
    frame = found.to_dataframe()
    assert frame["optimizer.lr"].tolist() == [RATES[name] for name in "abc"]
    assert frame["best"].tolist() == [weft.load_result(root / name).best_metric for name in "abc"]
    assert "<th>parameters</th>" in found._repr_html_()


def test_settings_without_a_value_are_none(tmp_path: Path) -> None:
    for name, optimizer in (("a", {"class_path": "SGD", "init_args": {}}), ("b", {"class_path": "Adam"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(yamlfile.dump({"optimizer": optimizer}))
    assert weft.runs(tmp_path).settings == ["optimizer.class_path"]


def names_of(found: Any) -> list[str]:
    return [run.folder.name for run in found]


def test_runs_can_be_sorted_and_filtered(root: Path) -> None:
    best = sorted("abc", key=lambda name: weft.load_result(root / name).best_metric or 0)
    assert names_of(weft.runs(root, sort="best")) == best and names_of(weft.runs(root, sort="-best")) == best[::-1]
    assert names_of(weft.runs(root, sort="-lr")) == ["c", "a", "b"]
    assert names_of(weft.runs(root, where="lr>=0.01, parameters=25")) == ["c"]
    assert names_of(weft.runs(root, where="run!=a")) == ["b", "c"] and not weft.runs(root, where="lr>1")
    assert names_of(weft.compare(weft.runs(root, sort="best")[:2]).records) == best[:2]
    with pytest.raises(ValueError, match="where: no run has 'lrr'; did you mean 'lr'"):
        weft.runs(root, where="lrr=1")
    with pytest.raises(ValueError, match="expected a name, one of"):
        weft.runs(root, where="lr")


def test_any_number_of_runs_is_compared(root: Path, tmp_path: Path) -> None:
    both = weft.compare(root / "a", root / "b", root / "c", labels=["one", "two", "three"])
    last = {name: weft.load_result(root / name).history["dev_loss"][-1] for name in "abc"}
    assert re.search(r"dev_loss +" + " +".join(f"{value:.6g}" for value in last.values()), repr(both))
    assert both.to_dataframe()["dev_loss"].tolist() == pytest.approx(list(last.values()), rel=1e-12)
    assert [line.get_label() for line in both.plot().lines] == ["one", "two", "three"]
    text = both.write(tmp_path / "c.html").read_text()
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in text and "<script" not in text
    assert text.count('class="curve"') == 3 * len(both.names) and "three" in text
    assert "<svg" in both._repr_html_()
    with pytest.raises(ValueError, match="expected two runs or more, got 1"):
        weft.compare(root / "a")
    with pytest.raises(FileNotFoundError, match="no folder of a run"):
        weft.compare(root / "a", root / "z")


def test_results_without_a_folder_are_compared(root: Path) -> None:
    (_, small), (_, large) = fit_sine(4, 1e-2), fit_sine(8, 1e-2)
    told = weft.compare(small, large, labels=["small", "large"])
    row = next(rows for rows in told.tables[-1] if rows[0] == "dev_loss")
    assert row[1:3] == (f"{small.history['dev_loss'][-1]:.6g}", f"{large.history['dev_loss'][-1]:.6g}")


def test_the_command_line_sorts_filters_and_compares_three(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs", str(root), "--where", "lr<0.02", "--sort", "-lr"]) == cli.OK
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["run", "a", "b"]
    assert cli.main(["runs", str(root), "--sort", "bset"]) == cli.BAD_USAGE
    assert "did you mean 'best'" in capsys.readouterr().err
    assert cli.main(["compare", *(str(root / name) for name in "abc")]) == cli.OK
    assert re.search(r"parameters +13 +25 +25", capsys.readouterr().out)
    assert cli.main(["compare", str(root / "a")]) == cli.BAD_USAGE


# ------------------------------------------------------------------------------------------------ repeats and labels


def test_curves_that_repeat_the_loss_are_not_shown(root: Path) -> None:
    result = weft.load_result(root / "a")
    assert result.history["train_fit"] == result.history["train_loss"]  # they are there
    same, nothing = "the same as the loss", "0 throughout"
    assert repeated(result.history) == {"fit": same, "objective_loss": same, "penalty_loss": nothing}
    html = result._repr_html_()
    assert "train_loss" in html and "train_fit" not in html and "penalty_loss: 0 throughout" in html
    assert weft.plot.terms(result) == []
    page = (root / "a" / "report.html").read_text()
    assert 'aria-label="fit"' not in page and 'aria-label="loss"' in page and "Not drawn: " in page
    assert "train_fit" not in weft.compare(root / "a", root / "b").names


def test_what_differs_from_the_loss_anywhere_is_shown() -> None:
    history = {"train_loss": [1.0, 2.0], "train_f": [1.0, 2.0], "dev_loss": [3.0, 3.0], "dev_f": [3.0, 3.5]}
    assert repeated(history) == {}
    assert repeated({**history, "dev_f": [3.0, 3.0]}) == {"f": "the same as the loss"}
    assert repeated({**history, "dev_f": [3.0, 3.0]}, history) == {}  # in one of two runs
    assert repeated({"train_loss": [1.0], "train_penalty_loss": [0.5]}) == {}
    sums = {"train_loss": [3.0], "train_f": [1.0], "train_c": [2.0], "train_objective_loss": [1.0]}
    assert repeated({**sums, "train_penalty_loss": [2.0]}) == {
        "objective_loss": "the same as f",
        "penalty_loss": "the same as c",
    }
    assert repeated({**sums, "train_objective_loss": [1.5]}) == {}


def test_two_runs_on_the_same_axes_have_their_names_and_colours(root: Path) -> None:
    first, second = (weft.load_result(root / name) for name in "ab")
    ax = second.plot(first.plot(label="small"), label="large")
    assert [line.get_label() for line in ax.lines] == ["small, train", "small, dev", "large, train", "large, dev"]
    colours = [line.get_color() for line in ax.lines]
    assert colours[0] == colours[1] != colours[2] == colours[3]
    assert [line.get_linestyle() for line in ax.lines] == ["-", "--", "-", "--"]
