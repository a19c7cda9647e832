"""The results as a table of ratios, as JSON, and as a plot."""

from __future__ import annotations

import json
import math
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks import claims
from benchmarks.claims import BASE_NAME
from benchmarks.measure import AGREE, Timing
from benchmarks.peers import PEERS

IN_README = (
    "hand-written, DataLoader",
    "weft, eager",
    "weft, compiled",
    "Lightning, default",
    "Lightning, barebones",
    "NeuroMANCER Trainer",
    "NeuroMANCER LitTrainer",
    "accelerate",
)
Results = dict[str, dict[str, Timing]]


def hardware() -> dict[str, str]:
    """What it ran on, without the machine's name."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = f"{len(names)} x {names[0]}" if names else cpu
    found = {"cpu": cpu, "capability": torch.backends.cpu.get_cpu_capability(), "python": platform.python_version()}
    for package in ("torch", "lightning", "neuromancer", "accelerate", "keras"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def table(results: Results) -> str:
    """Microseconds per step, and ratios to the base (of minima, and of medians in brackets); end losses beside."""
    lines = []
    for workload, timings in results.items():
        base = timings[BASE_NAME]
        lines += [
            "",
            f"**{workload}**",
            "",
            "| peer | us a step | / hand-written | (median) | end loss | first epoch, s |",
        ]
        lines += ["|---|---|---|---|---|---|"]
        for name, t in timings.items():
            if t.error:
                lines.append(f"| {name} | {t.error} | | | | |")
                continue
            off = abs(t.loss - base.loss) / max(abs(base.loss), 1e-12)
            loss = "" if math.isnan(t.loss) else f"{t.loss:.6g}" + ("" if off < AGREE else f" (off by {off:.1e})")
            lines.append(
                f"| {name} | {1e6 * t.best:.0f} | {t.best / base.best:.2f} | ({t.median / base.median:.2f}) "
                f"| {loss} | {t.first:.2f} |"
            )
    return "\n".join(lines[1:])


def extras(found: dict[str, Any]) -> str:
    """The measurements that are no loops, as lists."""
    lines = []
    for title, values in found.items():
        lines += ["", f"**{title}**", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {value:.3g} |" for name, value in values.items()]
    return "\n".join(lines)


def in_short(results: Results, path: str) -> str:
    """Time per step over that of hand-written PyTorch: what the README shows. `path` is that of the whole report."""
    about = hardware()
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "lightning", "neuromancer"))
    head = (
        "Time per training step (its share of the dev set included) over that of a loop written by hand over tensors "
        "in memory; "
        "one thread (the wide MLP: two), the smallest of interleaved rounds. All end at the same loss but "
        "LitTrainer, which "
        "shuffles and brings its own optimizer (the report gives the losses). "
        f"{about['cpu']}, {versions}. [The whole report]({path}) has the targets, too, those that were missed included."
    )
    lines = [
        head,
        "",
        f"| | {' | '.join(IN_README)} |",
        "|---|" + "---|" * len(IN_README),
    ]
    for workload, timings in results.items():
        base = timings[BASE_NAME].best
        ratios = [f"{timings[n].best / base:.2f}" if n in timings and timings[n].seconds else "" for n in IN_README]
        lines.append(f"| {workload} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def put_between(path: Path, mark: str, text: str) -> None:
    """Put `text` between `<!-- mark -->` and `<!-- /mark -->` of a file. Raises ValueError where they are missing."""
    before, begin, rest = path.read_text(encoding="utf-8").partition(f"<!-- {mark} -->\n")
    _, end, after = rest.partition(f"<!-- /{mark} -->")
    if not (begin and end):
        raise ValueError(
            f"{path} has no place for {mark!r}: expected <!-- {mark} --> and <!-- /{mark} --> on lines of their own."
        )
    path.write_text(f"{before}{begin}{text}\n{end}{after}", encoding="utf-8")


def write(folder: Path, stem: str, results: Results, found: dict[str, Any], how: dict[str, Any]) -> Path:
    """Write `stem`.json, .md and .png into `folder`; returns the path of the .md file."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {w: {n: vars(t) for n, t in timings.items()} for w, timings in results.items()}
    everything = {"hardware": hardware(), "how": how, "results": plain, "extras": found}
    (folder / f"{stem}.json").write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    about = "\n".join(f"- {k}: {v}" for k, v in {**hardware(), **how}.items())
    head = (
        f"# Benchmarks, {stem}\n\n{about}\n\nTime per training step, its share of the dev set included: the median "
        "epoch of a "
        "fit after two; the smallest of all rounds (ratio of medians in brackets). All start from the same weights "
        "and see the "
        "same batches in the same order, but LitTrainer: it shuffles, and trains with Adam(1e-3) whatever "
        "`custom_optimizer` is. Not measured: CUDA.\n\n"
    )
    (folder / f"{stem}.md").write_text(
        f"{head}![]({stem}.png)\n\n## Targets\n\n{claims.table(claims.claims(results, found))}\n\n"
        f"## All figures\n\n{table(results)}\n{extras(found)}\n",
        encoding="utf-8",
    )
    _plot(folder / f"{stem}.png", results)
    return folder / f"{stem}.md"


def _plot(path: Path, results: Results) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, all_axes = plt.subplots(1, len(results), figsize=(3.2 * len(results), 4), sharey=True, squeeze=False)
    names = list(PEERS)[::-1]
    for axes, (workload, timings) in zip(all_axes[0], results.items(), strict=True):
        base = timings[BASE_NAME].best
        ratios = [timings[n].best / base if n in timings and timings[n].seconds else 0.0 for n in names]
        colours = ["tab:orange" if n.startswith("weft") else "tab:grey" for n in names]
        bars = axes.barh(names, ratios, color=colours)
        axes.bar_label(bars, [f"{r:.2f}" if r else "-" for r in ratios], padding=2, fontsize=8)
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set(title=workload, xlim=(0, 1.25 * max(ratios)))
        axes.title.set_fontsize(9)
    figure.supxlabel("time per step / hand-written PyTorch in memory")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
