"""The report of a run: all is on the page, the curves are the run's numbers, and nothing is asked for outside."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import weft
from tests.helpers.browser import Browser
from tests.helpers.patience import patience
from weft.demo import data_setup, make_problem
from weft.loggers.csv import read_rows
from weft.records import charts, report
from weft.records.charts import Line, chart


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run with several terms and a decaying learning rate."""
    root = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    trainer = weft.Trainer(
        epochs=12,
        patience=5,
        seed=0,
        accelerator="cpu",
        progress=False,
        root_dir=str(root),
        run_name="a",
        log_every=2,
        validate_every=2,
        optimizer=lambda p: torch.optim.Adam(p, lr=1e-2),
        scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.8),
    )
    trainer.fit(make_problem(), data_setup, nsim=300)
    return root / "a"


class Page(HTMLParser):
    """What a page holds: its text, tags, and every attribute that could make a browser ask for something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)
        self.addresses += [
            v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "action", "data", "poster")
        ]

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                raise AssertionError(f"<{tag}> is closed before what is in it")

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_report_says_how_the_run_went(run_folder: Path) -> None:
    result = weft.load_result(run_folder)
    page = Page((run_folder / "report.html").read_text())
    text = " ".join(" ".join(page.words).split())
    assert f"{result.best_metric:.6g} at epoch {result.best_epoch}" in text and result.stop_reason in text
    for title in ("loss", "f", "order", "order_violation", "learning rate", "step time (ms)", "train_loss by step"):
        assert title in page.words, title
    assert "trainer.epochs" in page.words and "versions.torch" in page.words and torch.__version__ in page.words
    assert page.open == []  # every tag is closed


def test_the_report_asks_for_nothing_outside(run_folder: Path) -> None:
    text = (run_folder / "report.html").read_text()
    page = Page(text)
    assert page.addresses == ["data:,"]
    assert "script" not in page.tags and "default-src 'none'" in text and "@import" not in text
    assert not re.search(r"url\(|https?://", text)
    assert re.search(r"https?://", "<a href='http://x'>")  # the pattern can find one


def curve_of(svg: str, name: str) -> list[tuple[float, float]]:
    """The points of a drawn curve, in pixels."""
    path = re.search(rf'<path class="curve" d="([^"]*)"[^>]*><title>{name}</title>', svg)
    assert path is not None
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path[1])]


def test_a_curve_is_drawn_where_its_values_are() -> None:
    values = {0: 1.0, 1: 0.1, 2: 0.01, 3: 0.001}
    points = curve_of(chart("loss", [Line("train", values)], "epoch"), "train")
    steps = [b[1] - a[1] for a, b in pairwise(points)]
    assert steps[0] > 0 and steps == pytest.approx([steps[0]] * 3, abs=0.2)  # a decade is a decade: logarithmic
    straight = curve_of(chart("x", [Line("a", {0: 1.0, 1: 2.0, 2: 4.0})], "epoch"), "a")
    assert straight[1][1] - straight[2][1] == pytest.approx(2 * (straight[0][1] - straight[1][1]), abs=0.2)


def test_the_curves_of_a_report_are_the_rows_of_its_metrics(run_folder: Path) -> None:
    rows = [row for row in read_rows(run_folder / "metrics.csv") if row.name == "train_loss"]
    svg = (run_folder / "report.html").read_text()
    points = curve_of(svg, "train")
    assert len(points) == len(rows) == weft.load_result(run_folder).epochs
    logs = [math.log10(row.value) for row in rows]
    slope = (points[-1][1] - points[0][1]) / (logs[-1] - logs[0])
    assert [y for _, y in points] == pytest.approx([points[0][1] + slope * (v - logs[0]) for v in logs], abs=0.2)
    assert len(curve_of(svg, "dev")) == 6  # validated every second epoch, and drawn through


def test_gaps_single_points_and_odd_names_can_be_drawn() -> None:
    svg = chart("<a&b>", [Line("x<y", {0: 1.0, 1: math.nan, 2: 2.0, 3: 3.0})], "epoch", mark=2)
    assert "&lt;a&amp;b&gt;" in svg and "<a&b>" not in svg and svg.count("M") >= 2 and "circle" in svg
    assert "no finite value" in chart("a", [Line("x", {0: math.nan, 1: math.inf})], "epoch")
    assert 'class="curve"' in chart("a", [Line("x", {5: 3.0})], "epoch")
    assert 'class="curve"' in chart("constant", [Line("x", {0: 0.0, 1: 0.0})], "epoch")
    assert 'class="curve"' in chart("negative", [Line("x", {0: -1e-9, 9: 1e12})], "epoch")


def test_long_curves_keep_their_extremes() -> None:
    points = [(i, math.sin(i / 500)) for i in range(100_000)]
    points[33_333] = (33_333, 9.0)
    kept = charts.thinned(points)
    assert len(kept) <= 1.1 * charts.MOST_POINTS and (33_333, 9.0) in kept and kept == sorted(kept)
    assert charts.thinned(points[:100]) == points[:100]


def test_a_run_that_is_still_going_can_be_looked_at(run_folder: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(run_folder, half)
    (half / "result.json").unlink()
    with (half / "metrics.csv").open("a") as file:
        file.write("99,12,train_lo")  # cut off in the middle of a row
    text = report.write(half).read_text()
    assert "still running, or killed" in text and len(curve_of(text, "train")) == 12
    assert "still running" in repr(weft.runs(tmp_path))
    with pytest.raises(FileNotFoundError, match="is no folder of a run"):
        report.write(tmp_path)


def test_a_failed_report_costs_a_warning_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = {"on_epoch_start": lambda trainer: (tmp_path / "b" / "report.html").mkdir()}  # cannot be written
    trainer = weft.Trainer(
        epochs=1, accelerator="cpu", progress=False, root_dir=str(tmp_path), run_name="b", hooks=block
    )
    with pytest.warns(UserWarning, match=r"No report.html was written"):
        assert trainer.fit(make_problem(), data_setup, nsim=30).stop_reason == "epochs"


def chromium() -> str | None:
    return next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )


@pytest.mark.skipif(chromium() is None, reason="needs Chromium; on Debian: apt-get install chromium")
def test_a_browser_draws_the_curves_without_a_complaint(run_folder: Path, tmp_path: Path, repo: Path) -> None:
    picture, log = repo / "build" / "artefacts" / "report.png", tmp_path / "net.json"  # kept, to be looked at
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.unlink(missing_ok=True)
    done = subprocess.run(
        [
            str(chromium()),
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--log-net-log={log}",
            "--enable-logging=stderr",
            "--v=0",
            "--window-size=1120,2400",
            f"--screenshot={picture}",
            f"file://{run_folder / 'report.html'}",
        ],
        capture_output=True,
        text=True,
        timeout=patience(),
        check=False,
    )
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
    urls = set(re.findall(r'"url":"((?:https?|ftp|ws)[^"]*)"', log.read_text()))
    assert not [url for url in urls if "google" not in url and "gvt1" not in url]  # the browser itself calls home
    import matplotlib.image

    pixels = matplotlib.image.imread(picture)[:, :, :3]
    for colour in charts.COLOURS[:2]:  # train and dev
        rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (abs(pixels - rgb).max(axis=2) < 0.03).sum() > 300, colour


# Of all words on a page, in cells and in pictures, the pairs whose rectangles lie on each other or touch.
TOUCHING = """(() => {
  const words = [...document.querySelectorAll('svg text, td, th')].filter((e) => e.textContent.trim()).map((e) => {
    const range = document.createRange();
    range.selectNodeContents(e);
    const r = e.tagName === 'text' ? e.getBoundingClientRect() : range.getBoundingClientRect();
    return {text: e.textContent.trim(), left: r.left, right: r.right, top: r.top, bottom: r.bottom};
  }).filter((r) => r.right > r.left);
  const found = [];
  for (const [i, a] of words.entries()) for (const b of words.slice(i + 1)) {
    const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (wide > -1 && high > 3) found.push(a.text + ' | ' + b.text);
  }
  return [words.length, found];
})()"""


@pytest.mark.skipif(chromium() is None, reason="needs Chromium; on Debian: apt-get install chromium")
def test_no_words_lie_on_others_in_a_report_and_a_comparison(run_folder: Path, tmp_path: Path) -> None:
    trainer = weft.Trainer(epochs=3, seed=0, progress=False, root_dir=str(tmp_path), run_name="b", profiler="simple")
    trainer.fit(make_problem(), data_setup, nsim=300)
    both = weft.compare(run_folder, tmp_path / "b", run_folder, labels=["one of a long name", "b", "c"])
    both.write(tmp_path / "both.html")
    crowded = '<svg width="300" height="40"><text x="5" y="20">title</text><text x="20" y="20">legend</text></svg>'
    (tmp_path / "crowded.html").write_text(f"<html><body>{crowded}</body></html>")
    with Browser(tmp_path) as browser:
        for page in (tmp_path / "b" / "report.html", run_folder / "report.html", tmp_path / "both.html"):
            browser.open(f"file://{page}")
            browser.text_with(["epoch"])
            number, touching = browser.evaluate(TOUCHING)
            assert number > 50 and touching == [], (page.name, touching[:20])
        browser.open(f"file://{tmp_path / 'crowded.html'}")
        browser.text_with(["legend"])
        assert browser.evaluate(TOUCHING) == [2, ["title | legend"]]  # the control
