"""The benchmarks run, and what they compare is the same training. No time is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


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


def test_targets_are_told_whether_they_were_met_or_missed() -> None:
    from benchmarks.claims import BASE_NAME, claims, table
    from benchmarks.measure import Timing

    results = {
        "closed-loop rollout": {
            BASE_NAME: Timing([1e-3]),
            "weft, eager": Timing([1.02e-3]),
            "weft, compiled": Timing([0.8e-3]),
        },
        "one batch an epoch": {BASE_NAME: Timing([1e-3]), "weft, eager": Timing([1.1e-3])},
    }
    second = "compiled, second process: lost"
    seconds = {f"{second} in the first epoch": 0.4, f"{second} until steady": 0.6}
    extras = {"us by samples": {10**3: 9.0, 10**4: 1.0, 10**7: 1.2}, "seconds": seconds}
    told = {claim.what: (round(claim.measured, 6), claim.verdict) for claim in claims(results, extras)}
    assert told == {
        f"weft, eager / {BASE_NAME}: closed-loop rollout": (1.02, "met"),
        f"weft, compiled / {BASE_NAME}: closed-loop rollout": (0.8, "missed"),
        "ms an epoch of one batch beyond 1.05 of hand-written": (0.05, "met"),
        "us per sample, 10^4 to 10^7 samples: largest / smallest": (1.2, "missed"),
        "s lost in the first epoch of a second process, compiled": (0.4, "met"),
        "s lost in all by a second process, compiled (dev set and short batch, too)": (0.6, "missed"),
    }
    assert "| 0.7 | 0.8 | missed |" in table(claims(results, extras))


def test_the_readme_shows_the_newest_results_and_nothing_around_them_changes(tmp_path: Path) -> None:
    from benchmarks import report
    from benchmarks.measure import Timing

    results = {"toy": {report.BASE_NAME: Timing([1e-4]), "weft, compiled": Timing([4e-5])}}
    readme = tmp_path / "README.md"
    readme.write_text("above\n<!-- benchmarks -->\nold\n<!-- /benchmarks -->\nbelow\n")
    for _ in range(2):
        report.put_between(readme, "benchmarks", report.in_short(results, "results/new.md"))
    text = readme.read_text()
    assert text.startswith("above\n<!-- benchmarks -->\nTime per") and text.endswith("\n<!-- /benchmarks -->\nbelow\n")
    assert "old" not in text and text.count("| toy |  |  | 0.40 |") == 1
    with pytest.raises(ValueError, match="'speed'"):
        report.put_between(readme, "speed", "")
