"""Checkpoint files survive crashes, full disks and damage, and never run code."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.helpers.bitwise import same
from tests.helpers.crashes import die_at_every_moment, in_child, interrupted_at, state_of_step
from weft.checkpoint import archive
from weft.checkpoint import folder as checkpoints
from weft.checkpoint.archive import SEALED, CheckpointError
from weft.checkpoint.background import BackgroundWriter
from weft.checkpoint.weights_files import load_weights

# ---- crashes ---------------------------------------------------------------------------------------------------------


def test_a_death_at_any_moment_of_a_save_leaves_the_old_or_the_new_checkpoint(tmp_path: Path) -> None:
    template = tmp_path / "template"
    for step in (1, 2, 3):
        checkpoints.save(template, step, state_of_step(step), keep=2, best=step == 1)
    outcomes = Counter[int]()

    def check(folder: Path) -> bool:
        checkpoints.clean(folder)
        state, path = checkpoints.load(folder)  # a warning would be an error here
        best, _ = checkpoints.load(folder, "best")
        outcomes[state["step"]] += 1
        whole = same(state, state_of_step(state["step"])) and same(best, state_of_step(best["step"]))
        assert not [name for name in os.listdir(folder) if name.endswith(".tmp")]
        return whole and state["step"] in (3, 4) and best["step"] in (1, 4) and path == checkpoints.find(folder)

    results = die_at_every_moment(template, lambda f: void(checkpoints.save(f, 4, state_of_step(4), best=True)), check)
    assert all(results) and len(results) > 60 and set(outcomes) == {3, 4}


def void(_: object) -> None:
    pass


def test_a_death_at_any_moment_leaves_the_old_or_the_new_weights_file_under_the_same_name(tmp_path: Path) -> None:
    template = tmp_path / "template"
    archive.write(template / "w.pt", state_of_step(1))

    def check(folder: Path) -> bool:
        state = archive.read(folder / "w.pt")
        return same(state, state_of_step(state["step"]))

    results = die_at_every_moment(template, lambda f: archive.write(f / "w.pt", state_of_step(2)), check)
    assert all(results) and len(results) > 15


def test_the_crash_harness_catches_a_direct_write(tmp_path: Path) -> None:
    """The negative control of the two tests above."""
    template = tmp_path / "template"
    archive.write(template / "w.pt", state_of_step(1))
    data = (template / "w.pt").read_bytes()

    def direct(folder: Path) -> None:
        with open(folder / "w.pt", "wb") as file:
            file.write(data)

    def check(folder: Path) -> bool:
        try:
            return bool(archive.read(folder / "w.pt"))
        except CheckpointError:
            return False

    assert not all(die_at_every_moment(template, direct, check))


# Between the opening of a file and its `with`, python itself leaves the closing to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_at_any_moment_of_a_save_leaves_no_temporary_file(tmp_path: Path) -> None:
    with interrupted_at(0, lambda: None) as moments:
        checkpoints.save(tmp_path, 1, state_of_step(1))

    def interrupt() -> None:
        raise KeyboardInterrupt

    for number in range(1, len(moments) + 1):
        folder = tmp_path / str(number)
        checkpoints.save(folder, 1, state_of_step(1))
        with pytest.raises(KeyboardInterrupt), interrupted_at(number, interrupt):
            checkpoints.save(folder, 2, state_of_step(2))
        assert checkpoints.load(folder)[0]["step"] in (1, 2)
        # An interrupt within the last unlink itself is left to clean().
        assert len([name for name in os.listdir(folder) if name.endswith(".tmp")]) <= ("unlink" in moments[number - 1])


@pytest.mark.parametrize("background", [False, True])
def test_kill_9_at_random_times_never_costs_the_last_checkpoint(tmp_path: Path, background: bool) -> None:
    checkpoints.save(tmp_path, 0, state_of_step(0, 50_000))
    chance = random.Random(1)
    reached = kills = 0
    while kills < 20 or reached < 5:
        first = reached + 1

        def body(first: int = first) -> None:
            writer = BackgroundWriter()
            for step in range(first, first + 1000):
                save: Callable[..., Path] = writer.save if background else checkpoints.save
                save(tmp_path, step, state_of_step(step, 50_000), best=step % 3 == 0)

        child = os.fork()
        if child == 0:
            body()
            os._exit(1)
        time.sleep(chance.uniform(0.0, 0.04 + 0.001 * kills))  # longer on a machine so slow that no save comes through
        os.kill(child, signal.SIGKILL)
        kills += 1
        os.waitpid(child, 0)
        checkpoints.clean(tmp_path)
        state, _ = checkpoints.load(tmp_path)
        assert same(state, state_of_step(state["step"], 50_000)) and state["step"] >= first - 1
        assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
        reached = state["step"]


def test_clean_spares_the_files_of_living_processes_and_removes_those_of_dead_ones(tmp_path: Path) -> None:
    host = os.uname().nodename
    dead = os.fork()
    if dead == 0:
        os._exit(0)
    os.waitpid(dead, 0)
    (tmp_path / f".a.ckpt.{dead}-1@{host}.tmp").touch()
    (tmp_path / f".b.ckpt.{os.getppid()}-1@{host}.tmp").touch()
    (tmp_path / ".c.ckpt.1-1@elsewhere.tmp").touch()
    (tmp_path / ".d.ckpt.1-1@elsewhere.tmp").touch()
    os.utime(tmp_path / ".d.ckpt.1-1@elsewhere.tmp", (0, 0))
    (tmp_path / ".mine.tmp").touch()
    assert checkpoints.clean(tmp_path) == [f".a.ckpt.{dead}-1@{host}.tmp", ".d.ckpt.1-1@elsewhere.tmp"]
    assert checkpoints.clean(tmp_path / "no such folder") == []


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_named_and_leaves_the_previous_checkpoint(tmp_path: Path, background: bool) -> None:
    checkpoints.save(tmp_path, 1, state_of_step(1), best=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def body() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        writer = BackgroundWriter()
        for _ in range(2):
            with pytest.raises(OSError) as caught:
                if background:
                    writer.save(tmp_path, 2, state_of_step(2, 100_000), best=True)
                    writer.wait()
                else:
                    checkpoints.save(tmp_path, 2, state_of_step(2, 100_000), best=True)
            assert caught.value.errno == errno.EFBIG
            for part in ("step-000000002.ckpt", "bytes needed", os.strerror(errno.EFBIG)):
                assert part in str(caught.value), str(caught.value)
        writer.save(tmp_path, 3, state_of_step(3))  # a small one still fits
        writer.wait()
        (tmp_path / "step-000000003.ckpt").unlink()
        archive.put(tmp_path / "last", b"step-000000001.ckpt\n")

    assert in_child(body) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# ---- damage ----------------------------------------------------------------------------------------------------------


def outcome(path: Path, expected: Any) -> str:
    try:
        return "same" if same(archive.read(path), expected) else "WRONG"
    except CheckpointError as error:
        assert str(path) in str(error)
        return "refused"


def damaged(data: bytes, position: int, new: bytes) -> bytes:
    return data[:position] + new + data[position + len(new) :]


def test_no_damaged_file_is_loaded_wrong(tmp_path: Path) -> None:
    state = {"x": torch.randn(200, 1100), "many": [torch.randn(3) for _ in range(10)], "step": 7}
    path = tmp_path / "a.ckpt"
    archive.write(path, state)
    data, chance, outcomes = path.read_bytes(), random.Random(0), Counter[str]()
    for _ in range(500):
        position = chance.randrange(len(data))
        path.write_bytes(damaged(data, position, bytes([data[position] ^ 1 << chance.randrange(8)])))
        outcomes[outcome(path, state)] += 1
    pages = range(0, len(data) - 4096, 4096)
    for start in chance.sample(pages, 200):
        path.write_bytes(damaged(data, start, bytes(4096)))
        outcomes[outcome(path, state)] += 1
    for _ in range(200):
        path.write_bytes(data[: chance.randrange(len(data))])
        outcomes[outcome(path, state)] += 1
    for missing in range(1, SEALED):  # the checksum itself is torn
        path.write_bytes(data[:-missing])
        outcomes[outcome(path, state)] += 1
    path.write_bytes(data + b"\0")
    outcomes[outcome(path, state)] += 1
    assert outcomes == {"refused": 900 + SEALED}
    path.write_bytes(data)
    assert outcome(path, state) == "same"


def test_flips_outside_the_checksums_of_the_zip_entries_do_no_harm_either(tmp_path: Path) -> None:
    """Every byte of the headers, in a file that torch wrote (no seal) and in ours."""
    state = {"x": torch.arange(3.0), "step": 7}
    ours, theirs = tmp_path / "ours.ckpt", tmp_path / "theirs.ckpt"
    archive.write(ours, state)
    torch.save(state, theirs)
    chance, outcomes = random.Random(0), Counter[str]()
    for path in (ours, theirs):
        data = path.read_bytes()
        covered = set[int]()
        with zipfile.ZipFile(path) as zipped:
            for entry in zipped.infolist():
                start = data.index(zipped.read(entry), entry.header_offset + 30 + len(entry.filename))
                covered |= set(range(start, start + entry.file_size))
        for position in sorted(set(range(len(data))) - covered):
            path.write_bytes(damaged(data, position, bytes([data[position] ^ 1 << chance.randrange(8)])))
            outcomes[outcome(path, state)] += 1
    assert outcomes["WRONG"] == 0 and outcomes["refused"] > 500


def test_torch_load_alone_would_load_damaged_files(tmp_path: Path) -> None:
    """The negative control: without the checksums most flips load, with wrong numbers."""
    state = {"x": torch.randn(1000)}
    archive.write(tmp_path / "a.ckpt", state)
    data = bytearray((tmp_path / "a.ckpt").read_bytes())
    data[data.index(state["x"].numpy().tobytes()) + 400] ^= 64
    assert not same(torch.load(io.BytesIO(data), weights_only=True), state)


def test_what_is_no_checkpoint_is_refused_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "page.ckpt").write_text("<!DOCTYPE html><html>404</html>")
    torch.save({"x": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save([1, 2], tmp_path / "list.pt")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as zipped:
        zipped.writestr("a/b.txt", "hello")
    reasons = {
        "empty": "is empty",
        "page.ckpt": "<!DOCTYPE html>",
        "old.pt": "begins with",
        "list.pt": "holds a list",
        "other.zip": "no file of torch.save",
        ".": "is a folder",
        "nothing": "does not exist",
    }
    for name, reason in reasons.items():
        with pytest.raises(CheckpointError, match=reason) as caught:
            archive.read(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
    for url in ("http://host/a.ckpt", "https://host/a", "s3://bucket/a", "file:///a", Path("http://host/a")):
        for call in (
            archive.read,
            checkpoints.load,
            checkpoints.find,
            partial(load_weights, nn.Linear(1, 1)),
        ):
            with pytest.raises(CheckpointError, match="is a URL"):
                call(url)


def test_damage_falls_back_to_the_newest_whole_checkpoint_with_one_warning(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoints.save(tmp_path, step, state_of_step(step), keep=3, best=step == 2)

    def flip(step: int) -> None:
        path = checkpoints.step_path(tmp_path, step)
        data = path.read_bytes()
        path.write_bytes(damaged(data, len(data) // 2, bytes([data[len(data) // 2] ^ 4])))

    flip(3)
    with pytest.warns(UserWarning, match=r"step-000000003.ckpt is damaged.*step-000000002.ckpt is used") as caught:
        state, path = checkpoints.load(tmp_path)
    assert len(caught) == 1 and path.name == "step-000000002.ckpt" and same(state, state_of_step(2))
    with pytest.raises(CheckpointError, match="step-000000003.ckpt is damaged"):  # a named path is not replaced
        checkpoints.load(tmp_path / "step-000000003.ckpt")
    flip(2)
    with pytest.warns(UserWarning, match="step-000000001.ckpt is used"):
        assert checkpoints.find(tmp_path, "best").name == "step-000000001.ckpt"
    flip(1)
    with pytest.raises(CheckpointError, match=r"step-000000003.*step-000000002.*step-000000001"):
        checkpoints.find(tmp_path)


def test_damaged_and_missing_pointers_do_not_hide_the_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoints.find(tmp_path)
    checkpoints.save(tmp_path, 1, state_of_step(1))
    with pytest.raises(CheckpointError, match="no `best`"):
        checkpoints.find(tmp_path, "best")
    with pytest.raises(ValueError, match="expected 'last' or 'best'"):
        checkpoints.find(tmp_path, "newest")
    checkpoints.save(tmp_path, 2, state_of_step(2), best=True)
    (tmp_path / "last").unlink()
    assert checkpoints.find(tmp_path).name == "step-000000002.ckpt"
    (tmp_path / "last").write_text("../../elsewhere/step-000000009.ckpt")
    (tmp_path / "best").write_bytes(b"\xff\x00")
    with pytest.warns(UserWarning, match="last is damaged"):
        assert checkpoints.load(tmp_path)[0]["step"] == 2
    with pytest.warns(UserWarning, match="best cannot be read"):
        assert checkpoints.load(tmp_path, "best")[0]["step"] == 2
    checkpoints.save(tmp_path, 3, state_of_step(3))  # repairs both
    assert checkpoints.find(tmp_path, "best") == checkpoints.find(tmp_path, "last")


# ---- pruning and pointers --------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.integers(2, 4)), min_size=1, max_size=12))
@settings(max_examples=15)
def test_the_last_the_best_and_the_kept_ones_are_never_pruned(saves: list[tuple[int, bool, int]]) -> None:
    """Steps in any order: a run may be resumed from an older checkpoint again and again."""
    folder = Path("runs") / str(time.monotonic_ns())
    best_step = -1
    for step, best, keep in saves:
        path = checkpoints.save(folder, step, state_of_step(step, 2), keep=keep, best=best)
        best_step = step if best or best_step > step else best_step
        names = sorted(item.name for item in folder.glob("step-*"))
        assert checkpoints.find(folder) == path
        assert keep >= len(names) - 1 >= 0 and path.name in names
        if best_step >= 0:
            assert checkpoints.find(folder, "best") == checkpoints.step_path(folder, best_step)


def test_a_run_resumed_from_an_older_checkpoint_replaces_the_future_it_gave_up(tmp_path: Path) -> None:
    for step in (100, 200, 300):
        checkpoints.save(tmp_path, step, state_of_step(step), keep=3, best=step == 200)
    state, _ = checkpoints.load(tmp_path / "step-000000100.ckpt")
    assert state["step"] == 100
    checkpoints.save(tmp_path, 150, state_of_step(150), keep=2)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000000100.ckpt", "step-000000150.ckpt"]
    assert checkpoints.find(tmp_path).name == checkpoints.find(tmp_path, "best").name == "step-000000150.ckpt"


def test_keeping_only_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        checkpoints.save(tmp_path, 1, {}, keep=1)
    assert list(tmp_path.iterdir()) == []


# ---- in the background -----------------------------------------------------------------------------------------------


def test_the_background_writer_saves_what_was_there_when_it_was_asked() -> None:
    writer = BackgroundWriter()
    weights, numbers = torch.arange(100_000.0), [1.0, 2.0]
    for step in range(5):
        path = writer.save("c", step, {"w": weights, "list": numbers, "step": step}, best=step == 1)
        assert path == checkpoints.step_path("c", step)
        weights += 1
        numbers.append(3.0)
    writer.wait()
    for path in Path("c").glob("step-*"):
        state = archive.read(path)
        assert same(state["w"], torch.arange(100_000.0) + state["step"]) and len(state["list"]) == 2 + state["step"]
    assert sorted(path.name for path in Path("c").iterdir()) == [
        "best",
        "last",
        "step-000000001.ckpt",
        "step-000000003.ckpt",
        "step-000000004.ckpt",
    ]


def test_an_error_of_the_background_writer_is_raised_once_in_the_training_thread() -> None:
    Path("taken").write_text("a file where the folder should be")
    writer = BackgroundWriter()
    writer.save("taken", 1, state_of_step(1))
    with pytest.raises(OSError, match="taken"):
        writer.wait()
    writer.wait()
    writer.save("taken", 1, state_of_step(1))
    with pytest.raises(OSError, match="taken"):  # or by the next save, which then is not made
        writer.save("fine", 2, state_of_step(2))
    assert not Path("fine").exists()
    with pytest.raises(TypeError, match=r"state\['p'\]"):
        writer.save("fine", 2, {"p": Path("a")})
    with pytest.raises(ValueError, match="at least 2"):
        writer.save("fine", 2, state_of_step(2), keep=1)
        writer.wait()
    writer.save("fine", 3, state_of_step(3))
    writer.wait()
    assert same(checkpoints.load("fine")[0], state_of_step(3))


def test_a_script_that_ends_without_waiting_still_finishes_its_file() -> None:
    script = (
        "import torch; from weft.checkpoint.background import BackgroundWriter\n"
        "BackgroundWriter().save('c', 1, {'x': torch.arange(3_000_000)})\n"
    )
    source = str(Path(checkpoints.__file__).parents[2])
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONPATH": source})
    assert same(checkpoints.load("c")[0], {"x": torch.arange(3_000_000)})


def test_a_checkpoint_is_summed_once_while_it_is_written_and_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, summed, sizes = {"weights": [torch.rand(50_000) for _ in range(4)]}, [0], []
    real = zlib.crc32

    def counting(data: Any, start: int = 0) -> int:
        summed[0] += len(data)
        sizes.append(len(data))
        return real(data, start)

    monkeypatch.setattr(archive.zlib, "crc32", counting)
    archive.write(tmp_path / "a.ckpt", state)
    size = (tmp_path / "a.ckpt").stat().st_size
    assert summed[0] == size - archive.SEALED and max(sizes) < 250_000  # each tensor as it comes, no whole in memory
    assert same(archive.read(tmp_path / "a.ckpt"), state) and summed[0] == 2 * (size - archive.SEALED)


def test_copies_for_a_save_in_the_background_are_written_over_by_the_next(tmp_path: Path) -> None:
    weights, copies = {"a": torch.rand(3, 4), "b": torch.rand(4, 3).t()}, {}
    first = archive.plain(weights, clone="cpu", kept=copies)
    places = {name: tensor.data_ptr() for name, tensor in first.items()}
    weights["a"] += 1
    weights["b"] = torch.rand(5)
    second = archive.plain(weights, clone="cpu", kept=copies)
    assert same(second, weights) and second["a"].data_ptr() == places["a"] and second["b"].data_ptr() != places["b"]
    weights["a"] += 1
    assert not same(second, weights)


def test_a_save_in_the_background_copies_on_the_gpu_first_and_from_there_on_a_stream_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A GPU that is none: what is asked of it, in which order, by which thread."""
    asked: list[tuple[str, bool]] = []

    class Stream:
        def note(self, what: str) -> Stream:
            asked.append((what, threading.current_thread() is threading.main_thread()))
            return self

        def record_event(self) -> Stream:
            return self.note("record")

        def wait_event(self, event: Any) -> None:
            self.note("wait")

    x, stream = torch.rand(5), Stream()
    expected = x.clone()
    for name, value in {
        "is_initialized": lambda: True,
        "current_device": lambda: 0,
        "current_stream": lambda device: stream,
        "Stream": lambda device: stream.note("stream"),
        "stream": lambda given: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    writer = BackgroundWriter()
    writer.save(tmp_path, 1, {"x": x})
    x.zero_()
    writer.wait()
    monkeypatch.undo()
    assert asked == [("record", True), ("stream", False), ("wait", False)]
    assert torch.equal(checkpoints.load(tmp_path)[0]["x"], expected)
