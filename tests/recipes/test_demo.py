"""The demo writes what the README says, and its true optimum is the optimum."""

import csv

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from weft import demo


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    return demo.main(epochs=80, root_dir=str(root), progress=False, nsim=1800, batch_size=32), root / "demo"


def test_the_demo_writes_pictures_metrics_and_event_files(demo_run):
    _, folder = demo_run
    for name in ("curves.png", "solutions.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG") and (folder / name).stat().st_size > 8_000
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    epochs = [int(row["epoch"]) for row in rows if row["name"] == "dev_loss"]
    assert epochs == list(range(80))
    events = EventAccumulator(str(folder)).Reload()
    assert any("loss" in tag for tag in events.Tags()["scalars"])


def test_the_network_comes_close_to_the_true_optimum_and_is_feasible(demo_run):
    found, _ = demo_run
    assert found["f"].shape == (200,) and found["x"].shape == (200, 2)
    assert found["f"].mean() < found["f_true"].mean() + 0.05  # at these small settings
    assert found["violation"].mean() < 5e-3
    assert (found["violation_true"] < 1e-5).all()


def test_an_untrained_network_does_not():
    torch.manual_seed(0)
    problem = demo.make_problem()
    a, p = torch.rand(100, 1) + 0.2, torch.rand(100, 1) + 0.5
    x = problem.step({"a": a, "p": p})["x"]
    assert demo.violation(x, p).mean() > 0.1


@pytest.mark.parametrize(("a", "p"), [(0.2, 0.5), (1.2, 0.5), (0.7, 1.1), (0.2, 2.0), (1.2, 1.4)])
def test_no_point_of_a_fine_grid_beats_the_true_optimum(a, p):
    best = demo.true_optimum(a, p)

    def objective(x, y):
        return (1 - x) ** 2 + a * (y - x**2) ** 2

    x, y = np.meshgrid(np.linspace(-2, 2, 801), np.linspace(-2, 2, 801))
    feasible = (x >= y) & (x**2 + y**2 >= (p / 2) ** 2) & (x**2 + y**2 <= p**2)
    assert objective(*best) <= objective(x, y)[feasible].min() + 1e-6
    assert objective(*best) >= objective(x, y)[feasible].min() - 0.02  # and it is not far below: it is feasible
