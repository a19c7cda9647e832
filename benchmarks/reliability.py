"""What a run survives, counted: `python -m benchmarks.reliability` writes results/reliability-<date>.md.

The tests say yes or no; this says of how many. It uses their tools (tests/resuming.py and others), with more kills.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_DISABLE_JIT", "1")
os.environ.setdefault("MPLBACKEND", "agg")

import argparse
import contextlib
import datetime
import errno
import io
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import weft
from weft import checkpoint, demo

Row = tuple[str, str]


def main(arguments: list[str] | None = None) -> None:
    """Run everything and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability", description=__doc__)
    parser.add_argument("--kills", type=int, default=300, help="kills in all (default 300)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args(arguments)
    rows: list[Row] = []
    parts: list[Callable[[], Iterator[Row]]] = [
        crash_points, lambda: kills(given.kills), full_disk, damage, hostile_files, signals, not_finite, memory, machine,
        write_times,
    ]  # fmt: skip
    for part in parts:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for row in part():
                rows.append(row)
                print(f"{row[0]}: {row[1]}", file=sys.stderr, flush=True)
    date = datetime.date.today().isoformat()
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"reliability-{date}.md"
    table = "\n".join(f"| {what} | {found} |" for what, found in rows)
    path.write_text(
        f"# Reliability, {date}\n\n{surroundings()}\n\n`python -m benchmarks.reliability --kills {given.kills}`\n\n"
        f"| what was done | what came of it |\n|---|---|\n{table}\n"
    )
    print(path)


def surroundings() -> str:
    """Hardware and versions."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    cpu = found.group(1) if found else platform.processor() or platform.machine()
    return (
        f"{cpu}, {os.cpu_count()} cores seen, one thread, {platform.system()} {platform.release()}; "
        f"weft {weft.__version__}, torch {torch.__version__}, python {platform.python_version()}"
    )


def crash_points() -> Iterator[Row]:
    """A process dies at every moment of a save."""
    from test_checkpoint_files import die_at_every_moment, state_of_step

    template = Path("template").resolve()
    for step in (1, 2, 3):
        checkpoint.save(template, step, state_of_step(step), best=step == 1)
    seen = Counter[int]()

    def whole(folder: Path) -> bool:
        checkpoint.clean(folder)
        step = checkpoint.load(folder)[0]["step"]
        seen[step] += 1
        return checkpoint.load(folder, "best")[0]["step"] in (1, 4) and step in (3, 4)

    results = die_at_every_moment(template, lambda f: checkpoint.save(f, 4, state_of_step(4), best=True) and None, whole)
    yield (
        "die before and after every I/O call of a save (torn writes)",
        f"{sum(results)} of {len(results)} load: {seen[3]} the old, {seen[4]} the new state",
    )


def kills(wanted: int) -> Iterator[Row]:
    """SIGKILL at random moments, in chains, of several kinds of runs."""
    from test_kill import PROBES, kill_until

    everything = [0, 0, 0]
    for name in PROBES:
        share = max(5, wanted // len(PROBES))
        started, folder = time.monotonic(), Path(name.replace(" ", "-")).resolve()
        folder.mkdir()
        done, runs, different = kill_until(folder, name, share, seed=1)
        everything = [a + b for a, b in zip(everything, (done, runs, different), strict=True)]
        seconds = (time.monotonic() - started) / done
        yield f"kill -9 at random moments: {name}", f"{done} kills, {runs} runs, {different} different ({seconds:.2f} s a kill)"
    done, runs, different = everything
    yield "kill -9, all together", f"**{done} kills, 0 lost, {different} of {runs} runs different** (sha256 of all state)"


def full_disk() -> Iterator[Row]:
    """A limit on file sizes, and where it is allowed a small file system."""
    import resource

    from test_checkpoint_files import in_child, state_of_step

    def outcome(folder: Path, limited: Callable[[], None]) -> str:
        checkpoint.save(folder, 1, state_of_step(1))

        def body() -> None:
            limited()
            try:
                checkpoint.save(folder, 2, state_of_step(2, 1_000_000))
            except OSError as error:
                named = str(folder) in str(error) and "bytes needed" in str(error)
                os._exit(10 if named and error.errno in (errno.EFBIG, errno.ENOSPC) else 11)

        code, state = in_child(body), checkpoint.load(folder)[0]
        return "error names the disk, the previous checkpoint loads" if (code, state["step"]) == (10, 1) else f"FAILED ({code})"

    yield "disk full (RLIMIT_FSIZE)", outcome(Path("limit"), lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000,) * 2))
    small = Path("small")
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        yield "disk full (tmpfs of 2 MiB)", "not tried: mounting is not allowed here"
        return
    try:
        yield "disk full (tmpfs of 2 MiB)", outcome(small / "run", lambda: None)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def damage() -> Iterator[Row]:
    """Flipped bits, zeroed pages, truncations."""
    import random

    from bitwise import same
    from weft.checkpoint import CheckpointError

    state = {"x": torch.randn(200, 1100), "many": [torch.randn(3) for _ in range(10)], "step": 7}
    path, chance = Path("a.ckpt"), random.Random(0)
    checkpoint.write(path, state)
    data = path.read_bytes()

    def flipped() -> bytes:
        at = chance.randrange(len(data))
        return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]

    def zeroed() -> bytes:
        at = chance.randrange(len(data) // 4096) * 4096
        return data[:at] + bytes(4096) + data[at + 4096 :]

    for what, make, count in (
        ("bit flips", flipped, 500), ("zeroed pages of 4 KiB", zeroed, 200),
        ("truncations", lambda: data[: chance.randrange(len(data))], 200),
    ):  # fmt: skip
        seen = Counter[str]()
        for _ in range(count):
            path.write_bytes(make())
            try:
                seen["same" if same(checkpoint.read(path), state) else "WRONG"] += 1
            except CheckpointError:
                seen["refused"] += 1
        yield f"{count} {what}", f"{seen['WRONG']} loaded wrong, {seen['refused']} refused" + (
            f", {seen['same']} without effect" if seen["same"] else ""
        )


def hostile_files() -> Iterator[Row]:
    """Files that run code when they are loaded without care."""
    yield "malicious pickles on every load path, unsafe loading forced by the environment", _pytest(
        "test_checkpoint_contents.py", "runs_code or payloads_do_run"
    )


def signals() -> Iterator[Row]:
    """Signals, also twice and during a save; SLURM."""
    yield "SIGTERM, SIGUSR1, SIGINT, double SIGINT inside a save, SLURM's requeue", _pytest("test_signals.py")


def not_finite() -> Iterator[Row]:
    """NaN and infinities in loss, terms, gradients and metrics."""
    yield "NaN and Inf in loss, term, gradient, metric; 9 ways of updating; raise, skip, stop", _pytest("test_nonfinite.py")


def memory() -> Iterator[Row]:
    """Ten thousand steps."""
    from test_memory import STEPS, Measure, train

    measure = Measure(500, 500 + STEPS)
    train(measure, 500 + STEPS, log_every=100, root_dir="runs", loggers="csv", patience=10**6)
    yield f"{STEPS:,} steps with logging and validation", f"{measure.new_tensors} new live tensors, RSS grows {measure.new_mib:.2f} MiB"


def machine() -> Iterator[Row]:
    """The state machine, with many more examples."""
    os.environ["WEFT_EXAMPLES"] = "150"
    yield "150 random lives (train, save, crash, load, evaluate) against a plain loop", _pytest("test_resume_machine.py")


def write_times() -> Iterator[Row]:
    """What a checkpoint of the demo problem costs the training thread."""
    for background in (True, False):
        seconds: list[float] = []

        def save(trainer: weft.Trainer, batch: object, loss: object, seconds: list[float] = seconds) -> None:
            assert trainer.run is not None
            if writer := trainer.run.kept.writer:
                writer.wait()
            started = time.perf_counter()
            trainer.run.save()
            seconds.append(time.perf_counter() - started)

        how = {"every_n_epochs": 1000, "best": False, "background": background}
        trainer = weft.Trainer(
            epochs=3, progress=False, root_dir="runs", run_name=str(background), checkpoint=how, hooks={"on_step_end": save}
        )
        with contextlib.redirect_stdout(io.StringIO()):
            result = trainer.fit(demo.make_problem(), demo.data_setup)
        assert result.run_dir is not None
        size = checkpoint.find(result.run_dir).stat().st_size / 1024
        times = f"median {statistics.median(seconds) * 1e3:.1f} ms, slowest of {len(seconds)} {max(seconds) * 1e3:.1f} ms"
        where = "in the background" if background else "in the training thread"
        yield f"a checkpoint of the demo problem ({size:.0f} KiB) written {where}: time of the training thread", times


def _pytest(file: str, select: str = "") -> str:
    """The counts that pytest reports for one file of tests."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / file), *(["-k", select] if select else [])]
    done = subprocess.run([*command, "-m", "not long"], capture_output=True, text=True, cwd=ROOT, check=False)
    lines = done.stdout.strip().splitlines() or ["no output"]
    return re.sub(r" in .*| *=+ *|, \d+ deselected", "", lines[-1]) + " (tests)"


if __name__ == "__main__":
    main()
