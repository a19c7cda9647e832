"""What a run survives, counted: `python -m benchmarks.reliability` writes results/reliability-<date>-<hardware>.md.

The tests say yes or no; this says of how many. It uses their tools (tests/helpers), with more kills.
`--readme` puts a short table between the marks in README.md. What takes an hour is measured by `--long` (or
`--long --only double`), kept in results/reliability-long.json, and stands in the table with its date.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_DISABLE_JIT", "1")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("WEFT_TRACEBACK", "full")

import argparse
import contextlib
import datetime
import errno
import importlib.metadata
import io
import json
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import weft
from weft import demo
from weft.checkpoint import archive
from weft.checkpoint import folder as checkpoints

START, END = "<!-- reliability -->", "<!-- /reliability -->"


class Row(NamedTuple):
    """What was done, what came of it, and whether the README shows it."""

    what: str
    found: str
    in_readme: bool = True


def main(arguments: list[str] | None = None) -> None:
    """Run everything and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability", description=__doc__)
    parser.add_argument("--kills", type=int, default=300, help="kills in all (default 300)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--readme", action="store_true", help="also put the short table into README.md")
    parser.add_argument("--only", default="", help="only the parts whose names hold this text; no table is written")
    parser.add_argument("--long", action="store_true", help="measure what takes an hour, for the next tables")
    given = parser.parse_args(arguments)
    if given.long:
        measure_long(given.only)
        return
    rows: list[Row] = []
    for part in PARTS:
        if given.only not in part.__name__:
            continue
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for row in part(given.kills):
                rows.append(row)
                print(f"{row.what}: {row.found}", file=sys.stderr, flush=True)
    if given.only:
        return
    rows += long_rows()
    date = datetime.date.today().isoformat()
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"reliability-{date}-{re.sub(r'[^a-z0-9]+', '-', cpu().lower()).strip('-')}.md"
    path.write_text(
        f"# Reliability, {date}\n\n{surroundings()}\n\n`python -m benchmarks.reliability --kills {given.kills}`\n\n"
        f"{table(rows)}\n"
    )
    if given.readme:
        fill(ROOT / "README.md", table([row for row in rows if row.in_readme]), f"benchmarks/results/{path.name}")
    print(path)


def measure_long(only: str) -> None:
    """Measure the parts that take long and keep what came of each, with the date."""
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for part, size in LONG.items():
        if only in part.__name__:
            with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                rows = list(part(size))
            date = datetime.date.today().isoformat()
            kept[part.__name__] = [[row.what, f"{row.found} ({date})"] for row in rows]
            print(*kept[part.__name__], sep="\n", flush=True)
            KEPT.write_text(json.dumps(kept, indent=1) + "\n")


def long_rows() -> list[Row]:
    """What was measured by `--long`, at its dates."""
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    return [Row(*row) for part in LONG for row in kept.get(part.__name__, [])]


def table(rows: list[Row]) -> str:
    """Of Markdown."""
    lines = [f"| {row.what} | {row.found} |" for row in rows]
    return "\n".join(["| what was done | what came of it |", "|---|---|", *lines])


def fill(path: Path, text: str, source: str) -> None:
    """Put `text` between the marks in the file at `path`."""
    before, start, rest = path.read_text().partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"{path} has no place for the table: expected the lines {START} and {END}.")
    path.write_text(f"{before}{START}\n{text}\n\n{surroundings()}; all figures: `{source}`.\n{END}{after}")


def cpu() -> str:
    """The name of the processor, and how many cores are seen."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    name = found.group(1) if found else platform.processor() or platform.machine()
    return f"{name.replace('(R)', '').replace('(TM)', '')}, {os.cpu_count()} cores"


def surroundings() -> str:
    """Hardware and versions."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "lightning", "numpy"))
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    made_by = (
        subprocess.run([compiler, "-dumpfullversion"], capture_output=True, text=True, check=False).stdout.strip()
        if compiler
        else ""
    )
    return (
        f"{cpu()} seen, one used; {platform.system()} {platform.release()}; weft {weft.__version__}, {versions}, "
        f"python {platform.python_version()}, {f'g++ {made_by}' if made_by else 'no C++ compiler'}"
    )


def crash_points(_: int) -> Iterator[Row]:
    """A process dies at every moment of a save."""
    from tests.helpers.crashes import die_at_every_moment, state_of_step

    template = Path("template").resolve()
    for step in (1, 2, 3):
        checkpoints.save(template, step, state_of_step(step), best=step == 1)
    seen = Counter[int]()

    def whole(folder: Path) -> bool:
        checkpoints.clean(folder)
        step = checkpoints.load(folder)[0]["step"]
        seen[step] += 1
        return checkpoints.load(folder, "best")[0]["step"] in (1, 4) and step in (3, 4)

    results = die_at_every_moment(
        template, lambda f: checkpoints.save(f, 4, state_of_step(4), best=True) and None, whole
    )
    yield Row(
        "die before and after every I/O call of a save (torn writes)",
        f"{sum(results)} of {len(results)} load: {seen[3]} the old, {seen[4]} the new state",
    )


def kills(wanted: int) -> Iterator[Row]:
    """SIGKILL at random moments, in chains, of several kinds of runs; compiled ones with the real compiler."""
    from tests.helpers.killing import PROBES, Count, kill_until

    everything = Count(0, 0, 0, 0)
    for name in PROBES:
        share = max(5, -(-wanted // len(PROBES)))
        started, folder = time.monotonic(), Path(name.replace(" ", "-")).resolve()
        folder.mkdir()
        if PROBES[name].get("compile"):
            os.environ["WEFT_CACHE"] = str(folder / "cache")
            warnings.filterwarnings("error", message=".*stays eager")  # then it would not be what the row says
        found = kill_until(folder, name, share, seed=1)
        everything = Count(*(a + b for a, b in zip(everything, found, strict=True)))
        seconds = (time.monotonic() - started) / found.kills
        yield Row(f"kill -9 at random moments: {name}", f"{_counted(found)} ({seconds:.2f} s a kill)", False)
    yield Row("kill -9 at random moments, eager and compiled: sha256 of all state", f"**{_counted(everything)}**")


def _counted(count: tuple[int, int, int, int]) -> str:
    return "{} kills, {} lost, {} runs, {} different".format(*count)


def full_disk(_: int) -> Iterator[Row]:
    """A limit on file sizes, and where it is allowed a small file system."""
    import resource

    from tests.helpers.crashes import in_child, state_of_step

    def outcome(folder: Path, limited: Callable[[], None]) -> str:
        checkpoints.save(folder, 1, state_of_step(1))

        def body() -> None:
            limited()
            try:
                checkpoints.save(folder, 2, state_of_step(2, 1_000_000))
            except OSError as error:
                named = str(folder) in str(error) and "bytes needed" in str(error)
                os._exit(10 if named and error.errno in (errno.EFBIG, errno.ENOSPC) else 11)

        code, state = in_child(body), checkpoints.load(folder)[0]
        return (
            "error names the disk, the previous checkpoint loads"
            if (code, state["step"]) == (10, 1)
            else f"FAILED ({code})"
        )

    yield Row(
        "disk full (RLIMIT_FSIZE)",
        outcome(Path("limit"), lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000,) * 2)),
    )
    small = Path("small")
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        yield Row("disk full (tmpfs of 2 MiB)", "not tried: mounting is not allowed here", False)
        return
    try:
        yield Row("disk full (tmpfs of 2 MiB)", outcome(small / "run", lambda: None), False)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def damage(_: int) -> Iterator[Row]:
    """Flipped bits, zeroed pages, truncations."""
    import random

    from tests.helpers.bitwise import same

    from weft.checkpoint.archive import CheckpointError

    state = {"x": torch.randn(200, 1100), "many": [torch.randn(3) for _ in range(10)], "step": 7}
    path, chance = Path("a.ckpt"), random.Random(0)
    archive.write(path, state)
    data = path.read_bytes()

    def flipped() -> bytes:
        at = chance.randrange(len(data))
        return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]

    def zeroed() -> bytes:
        at = chance.randrange(len(data) // 4096) * 4096
        return data[:at] + bytes(4096) + data[at + 4096 :]

    for what, make, count in (
        ("bit flips", flipped, 500),
        ("zeroed pages of 4 KiB", zeroed, 200),
        ("truncations", lambda: data[: chance.randrange(len(data))], 200),
    ):
        seen = Counter[str]()
        for _ in range(count):
            path.write_bytes(make())
            try:
                seen["same" if same(archive.read(path), state) else "WRONG"] += 1
            except CheckpointError:
                seen["refused"] += 1
        yield Row(
            f"{count} {what}",
            f"{seen['WRONG']} loaded wrong, {seen['refused']} refused"
            + (f", {seen['same']} without effect" if seen["same"] else ""),
        )
    yield Row(
        "files that are no checkpoints; flips in zip headers",
        _pytest("checkpoint/test_checkpoint_files.py", "no_checkpoint or outside"),
        False,
    )


def hostile_files(_: int) -> Iterator[Row]:
    """Files that run code when they are loaded without care."""
    yield Row(
        "malicious pickles on every load path, unsafe loading forced by the environment",
        _pytest("checkpoint/test_checkpoint_contents.py", "runs_code or payloads_do_run"),
    )


def signals(_: int) -> Iterator[Row]:
    """Signals, also over and over during a save; SLURM."""
    yield Row(
        "SIGTERM, SIGUSR1, SIGINT, SIGINT over and over inside a save, SLURM's requeue",
        _pytest(
            "devices/test_signals.py loop/test_resume_edges.py",
            "signal or ctrl_c or sigterm or slurm or 143 or handler or fork or worker or fit_within",
        ),
    )


def process_groups(_: int) -> Iterator[Row]:
    """Signals to groups of processes, each five times."""
    told = _pytest("devices/test_process_groups.py", "all_signals", "long")
    cells = int(found.group(1)) if (found := re.match(r"(\d+) passed \(tests\)", told)) else 0
    yield Row(
        "SIGINT, SIGTERM, SIGUSR1, SIGHUP to process groups (no workers, fork, spawn, persistent ones) of scripts, "
        "torchrun and notebooks, 5 times each",
        f"{5 * cells} of {5 * cells} saved, {cells} of {cells} runs end at the undisturbed sha256" if cells else told,
    )


def double_starts(count: int) -> Iterator[Row]:
    """Two processes in one run folder."""
    import random

    from tests.helpers.twice import start_twice

    draw = random.Random(3)
    wrong = [told for number in range(count) if (told := start_twice(Path(str(number)).resolve(), draw))]
    print(*wrong, sep="\n", file=sys.stderr)
    yield Row(f"{count} double starts (same name, auto, while it runs, owner killed)", f"{len(wrong)} lost or mixed")


def random_configurations(count: int) -> Iterator[Row]:
    """Configurations drawn at random, killed again and again."""
    from tests.helpers.random_runs import kill_random

    os.environ["WEFT_CACHE"] = str(Path("cache").resolve())
    found, wrong = kill_random(Path.cwd(), range(count))
    print(*wrong, sep="\n", file=sys.stderr)
    yield Row(f"{count} random configurations, own loops, compiled, two processes too", _counted(found))


def odd_folders(_: int) -> Iterator[Row]:
    """What somebody else put into the folder of a run, against each command that only looks."""
    from tests.helpers import odd

    from weft import cli

    folders, answers = odd.answers_to_looks(Path.cwd(), cli.main)
    wrong, ran = sum(map(odd.misbehaves, answers)), len(list(Path.cwd().rglob("PWNED")))
    seconds, mib = max(one.seconds for one in answers), max(one.mib for one in answers)
    yield Row(
        f"{folders} odd and hostile run folders, {len(answers)} commands that only look",
        f"{ran} ran code, {wrong} tracebacks; slowest {seconds:.1f} s, most memory {mib:.0f} MiB",
    )


def random_values(count: int) -> Iterator[Row]:
    """Values of any kind for options, data and what steps return."""
    from tests.helpers.wrong_values import raw_errors

    found = raw_errors(seed=7, size=count)
    print(*found.items(), sep="\n", file=sys.stderr)
    accepted = len(found.pop("accepted", []))
    raw = sum(map(len, found.values()))
    yield Row(f"{count:,} random values for options and data", f"{raw} raw errors, {accepted} wrongly accepted")


def not_finite(_: int) -> Iterator[Row]:
    """NaN and infinities in loss, terms, gradients and metrics."""
    yield Row(
        "NaN and Inf in loss, term, gradient, metric; 9 ways of updating; raise, skip, stop",
        _pytest("step/test_nonfinite.py"),
    )
    yield Row("NaN in one process of two", _pytest("devices/test_ddp.py", "not_finite_in_one_process"), False)


def controls(_: int) -> Iterator[Row]:
    """Whether the comparisons can fail at all, and the files of earlier formats."""
    yield Row(
        "negative controls: random state, position, schedule, order, ... left out of a checkpoint",
        f"noticed: {_pytest('loop/test_resume.py loop/test_kill.py', 'noticed or forgot or counts_as_lost')}",
        False,
    )
    yield Row(
        "a checkpoint of every released format",
        f"goes on: {_pytest('loop/test_checkpointing.py', 'released_format')}",
        False,
    )


def memory(_: int) -> Iterator[Row]:
    """Ten thousand steps."""
    from tests.step.test_memory import STEPS, Measure, train_measured

    measure = Measure(500, 500 + STEPS)
    train_measured(measure, 500 + STEPS, log_every=100, root_dir="runs", loggers="csv", patience=10**6)
    yield Row(
        f"{STEPS:,} steps with logging and validation",
        f"{measure.new_tensors} new live tensors, RSS grows {measure.new_mib:.2f} MiB",
    )


def machine(_: int) -> Iterator[Row]:
    """The state machine, with many more examples."""
    os.environ["WEFT_EXAMPLES"] = "150"
    yield Row(
        "150 random lives (train, save, crash, load, evaluate) against a plain loop",
        _pytest("loop/test_resume_machine.py"),
    )


def write_times(_: int) -> Iterator[Row]:
    """What a checkpoint of the demo problem costs the training thread."""
    for background in (True, False):
        seconds: list[float] = []
        busy: list[float] = []
        how = {"every_n_epochs": 1000, "best": False, "background": background}
        trainer = weft.Trainer(epochs=3, progress=False, root_dir="runs", run_name=str(background), checkpoint=how)
        with contextlib.redirect_stdout(io.StringIO()), trainer.start(demo.make_problem(), demo.data_setup) as run:
            for _ in run.epochs():
                for batch in run.batches("train"):
                    run.update(batch)
                    if writer := run.state.kept.writer:
                        writer.wait()
                    started, thread = time.perf_counter(), time.thread_time()
                    path = run.save()
                    seconds.append(time.perf_counter() - started)
                    busy.append(time.thread_time() - thread)
                    assert background or path.exists()
        result = run.result
        assert result is not None
        assert result.run_dir is not None
        size = checkpoints.find(result.run_dir).stat().st_size / 1024
        median, slowest = statistics.median(seconds) * 1e3, max(seconds) * 1e3
        cpu_time = statistics.median(busy) * 1e3
        times = f"median {median:.1f} ms, slowest of {len(seconds)} {slowest:.1f} ms; CPU time {cpu_time:.1f} ms"
        where = "in the background" if background else "in the training thread"
        yield Row(
            f"a checkpoint of the demo problem ({size:.0f} KiB) written {where}: time of the training thread",
            times,
            background,
        )


def _pytest(files: str, select: str = "", marked: str = "not long") -> str:
    """The counts that pytest reports for some files of tests."""
    paths = [str(ROOT / "tests" / file) for file in files.split()]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *paths,
        *(["-k", select] if select else []),
    ]
    done = subprocess.run([*command, "-m", marked], capture_output=True, text=True, cwd=ROOT, check=False)
    lines = done.stdout.strip().splitlines() or ["no output"]
    return re.sub(r" in .*| *=+ *|, \d+ deselected", "", lines[-1]) + " (tests)"


PARTS: list[Callable[[int], Iterator[Row]]] = [
    crash_points,
    kills,
    full_disk,
    damage,
    hostile_files,
    odd_folders,
    signals,
    not_finite,
    memory,
    machine,
    write_times,
    controls,
]
LONG: dict[Callable[[int], Iterator[Row]], int] = {
    process_groups: 48,
    double_starts: 200,
    random_configurations: 100,
    random_values: 20_000,
}
KEPT = Path(__file__).parent / "results/reliability-long.json"

if __name__ == "__main__":
    main()
