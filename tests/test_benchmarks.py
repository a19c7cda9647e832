"""The benchmarks run, and what they compare is the same training. No time is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def importable(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repo))


def test_a_quick_run_prints_the_table_of_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.__main__ import main

    main(["--quick", "--workloads", "one_batch", "--peers", "DataLoader,weft, eager,products"])
    out = capsys.readouterr().out
    assert "| hand-written, in memory | " in out and "| 1.00 | (1.00) |" in out
    assert "| weft, eager | " in out and "Error" not in out and "off by" not in out


def test_peers_end_at_the_same_loss_on_every_workload() -> None:
    from benchmarks.measure import AGREE, measure
    from benchmarks.peers import PEERS
    from benchmarks.workloads import WORKLOADS

    names = ["hand-written, in memory", "hand-written, DataLoader", "weft, eager"]
    for make in WORKLOADS:
        if make.__name__ in ("wide", "rosenbrock_neuromancer"):  # one takes long, one needs NeuroMANCER
            continue
        workload = make()
        workload.epochs, workload.train = 3, {k: v[: 2 * workload.batch_size] for k, v in workload.train.items()}
        timings = measure(workload, names, 1, iter(range(10**6)).__next__, lambda _: None)
        losses = [timings[name].loss for name in names]
        assert losses == pytest.approx([losses[0]] * 3, rel=AGREE), workload.name
    assert set(names) < set(PEERS)


def test_results_read_back(tmp_path: Path) -> None:
    from benchmarks import report
    from benchmarks.measure import Timing

    timings = {report.BASE_NAME: Timing([2e-4, 1e-4, 3e-4], 0.5, 1.0), "weft, compiled": Timing([4e-5], 0.6, 2.0)}
    path = report.write(tmp_path, "today", {"toy": timings}, {"seconds": {"import": 1.0}}, {"rounds": 3})
    text = path.read_text()
    assert "| weft, compiled | 40 | 0.40 | (0.20) | 0.6 (off by 2.0e-01) | 2.00 |" in text
    assert json.loads((tmp_path / "today.json").read_text())["results"]["toy"]["weft, compiled"]["seconds"] == [4e-5]
    assert (tmp_path / "today.png").stat().st_size > 1000
