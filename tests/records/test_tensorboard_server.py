"""TensorBoard itself, on loopback: what it lists is what was trained, and its pages show it in a browser."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from tests.helpers.browser import CHROMIUM, Browser
from tests.helpers.patience import patience

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium (Debian's package chromium), which is not installed"
)


def train_line(root: Path, name: str, **options: Any) -> weft.FitResult:
    torch.manual_seed(0)
    problem = weft.Problem(
        [weft.Node(torch.nn.Linear(1, 1), ["x"], ["y"], name="line")],
        [weft.objective(lambda x, y: (y - 2 * x) ** 2, name="fit")],
        [weft.less_equal("y", 1.0, weight=10.0, name="limit")],
    )
    data = weft.DictDataset({"x": torch.linspace(0, 1, 40)[:, None]})
    settings = {
        "epochs": 4,
        "seed": 0,
        "progress": False,
        "root_dir": str(root),
        "run_name": name,
        "loggers": "tensorboard",
    }
    return weft.Trainer(**{**settings, **options}).fit(problem, weft.Data(data, data, batch_size=10))


def picture(trainer: Any) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2, 2))
    figure.add_subplot().plot([0, 1])
    return figure


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, weft.FitResult]]:
    """Two runs with everything that TensorBoard can show, one of them profiled."""
    root = tmp_path_factory.mktemp("runs")
    extras = [
        weft.hooks.Figures({"line": picture}, every=2),
        weft.hooks.WeightHistograms(gradients=True),
        weft.hooks.GradientNorms(),
    ]
    profiler = weft.hooks.PyTorchProfiler(wait=1, warmup=1, active=2)
    return root, {"a": train_line(root, "a", hooks=extras), "b": train_line(root, "b", clip=1.0, profiler=profiler)}


@pytest.fixture(scope="module")
def server(runs: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a TensorBoard over both runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(runs[0]),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*command, "--load_fast", "false", "--reload_interval", "1"], stdout=stream, stderr=stream
        )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: get(address + "/data/plugin/scalars/tags").keys() >= {"a", "b"}, process, log)
        wait_for(lambda: "b" in str(get(address + "/data/plugin/pytorch_profiler/runs").get("runs")), process, log)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=patience())


def wait_for(condition: Any, process: subprocess.Popen, log: Path) -> None:
    """Until the server answers as it should; its log is the error's text if it does not."""
    end = time.monotonic() + patience()
    while time.monotonic() < end and process.poll() is None:
        try:
            if condition():
                return
        except (OSError, ValueError):
            pass
        time.sleep(0.2)
    pytest.fail(f"TensorBoard did not get ready:\n{log.read_text()[-3000:]}")


def get(address: str, **query: str) -> Any:
    with urllib.request.urlopen(
        f"{address}?{urllib.parse.urlencode(query)}" if query else address, timeout=patience()
    ) as answer:
        return json.loads(answer.read())


def test_the_server_lists_runs_tags_and_the_values_of_the_history(
    runs: tuple[Path, dict[str, Any]], server: str
) -> None:
    tags = get(server + "/data/plugin/scalars/tags")
    expected = {"loss/train", "loss/dev", "fit/train", "limit_violation/dev", "lr", "steps_per_second", "epoch"}
    assert (
        set(tags) == {"a", "b"}
        and expected <= set(tags["a"])
        and "grad_norm" in tags["a"]
        and "grad_norm" not in tags["b"]
    )
    for run, result in runs[1].items():
        points = get(server + "/data/plugin/scalars/scalars", run=run, tag="loss/dev")
        assert [step for _, step, _ in points] == [4, 8, 12, 16]
        shown = torch.tensor([value for _, _, value in points])
        assert torch.equal(shown, torch.tensor(result.history["dev_loss"], dtype=torch.float32))
        assert not torch.equal(shown, torch.tensor(result.history["train_loss"], dtype=torch.float32))


def test_figures_histograms_and_the_graph_are_there(server: str) -> None:
    assert "line" in get(server + "/data/plugin/images/tags")["a"]
    assert len(get(server + "/data/plugin/images/images", run="a", tag="line", sample="0")) == 2
    histograms = get(server + "/data/plugin/histograms/tags")["a"]
    assert {"weights/nodes.0.fn.weight", "gradients/nodes.0.fn.bias"} <= set(histograms)
    with urllib.request.urlopen(f"{server}/data/plugin/graphs/graph?run=a", timeout=patience()) as answer:
        graph = answer.read().decode()
    assert re.findall(r'name: "(.*?)"', graph) == ["data", "line", "fit", "limit"]
    assert '"data"' in graph and 'input: "line"' in graph
    assert "problem/text_summary" in get(server + "/data/plugin/text/tags")["a"]


def hparams(server: str) -> dict[str, Any]:
    request = urllib.request.Request(
        server + "/data/plugin/hparams/session_groups",
        json.dumps(
            {
                "experimentName": "",
                "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"],
                "colParams": [
                    {"hparam": "epochs", "includeInResult": True},
                    {"hparam": "clip", "includeInResult": True},
                    {"metric": {"group": "", "tag": "final/best_metric"}, "includeInResult": True},
                ],
                "startIndex": 0,
                "sliceSize": 10,
            }
        ).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=patience()) as answer:
        groups = json.loads(answer.read())["sessionGroups"]
    return {group["sessions"][0]["name"]: group for group in groups}


def test_the_hparams_tab_has_settings_and_the_final_metric(runs: tuple[Path, dict[str, Any]], server: str) -> None:
    groups = hparams(server)
    assert set(groups) == {"a", "b"}
    for name, group in groups.items():
        values = {m["name"]["tag"]: m["value"] for m in group["metricValues"]}
        assert values["final/best_metric"] == pytest.approx(runs[1][name].best_metric, rel=1e-6)
        assert group["hparams"].get("epochs") == 4, group["hparams"]
    assert groups["b"]["hparams"]["clip"] == 1.0 != groups["a"]["hparams"].get("clip")


def test_the_profiler_page_has_the_profiled_run_with_its_views(server: str) -> None:
    base = server + "/data/plugin/pytorch_profiler"
    found = [run for run in get(base + "/runs")["runs"] if run.startswith("b")]
    assert len(found) == 1
    views = get(base + "/views", run=found[0])
    assert {"Overview", "Operator", "Trace"} <= set(views)
    worker = get(base + "/workers", run=found[0], view="Operator")[0]
    span = get(base + "/spans", run=found[0], worker=worker)[0]
    rows = get(base + "/operation/table", run=found[0], worker=worker, span=str(span), group_by="Operation")["data"]
    assert "aten::addmm" in {row["name"] for row in rows}


@needs_chromium
@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("?tagFilter=loss|violation#timeseries", ["limit_violation", "loss", "/dev", "smoothed"]),
        ("#hparams", ["final/best_metric", "clip", "table view"]),
        ("#pytorch_profiler", ["b/profile", "views", "overview"]),
        ("#graphs", ["search nodes", "limit"]),
    ],
)
def test_a_browser_opens_the_page(page: str, words: list[str], server: str, tmp_path: Path) -> None:
    with Browser(tmp_path) as browser:
        browser.open(f"{server}/{page}")
        text = browser.text_with(words).lower()
        shown = browser.picture(tmp_path / "page.png")
    assert [word for word in words if word not in text] == [], text[:3000]
    assert shown.stat().st_size > 10_000  # not a blank page
