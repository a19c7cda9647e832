"""Runs that are killed at random moments, again and again, end at exactly the state of the run that never was."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from tests.helpers.killing import (
    PROBES,
    hash_of,
    is_whole,
    kill_until,
    killed,
    last_of,
    process,
    train_to_the_end,
    undisturbed_seconds,
)
from tests.helpers.random_runs import kill_random
from tests.helpers.resuming import (
    fit,
    forget_random,
    rewrite,
)


@pytest.mark.parametrize("name", PROBES)
def test_a_run_that_is_killed_again_and_again_ends_where_it_would_have(name: str, tmp_path: Path) -> None:
    """With `compile=True` in machine code: a fall back to eager steps would warn, which is an error here."""
    if PROBES[name].get("compile") and not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("no C++ compiler")
    kills, lost, runs, different = kill_until(tmp_path, name, kills=5)
    assert kills >= 5 and runs and not lost and not different
    kept = [path for path in Path(os.environ["WEFT_CACHE"]).glob("*") if path.suffix in (".so", ".pt2")]
    assert not PROBES[name].get("compile") or kept


def test_a_checkpoint_that_is_gone_or_damaged_counts_as_lost(tmp_path: Path) -> None:
    """The negative control of "0 lost"."""
    fit(tmp_path, {}, every=1, epochs=1)
    last = last_of(tmp_path)
    assert is_whole(tmp_path, last) and not is_whole(tmp_path, "step-000000007.ckpt")
    path = tmp_path / "run/checkpoints" / last.strip()
    path.write_bytes(path.read_bytes()[:-1])
    assert not is_whole(tmp_path, last)
    path.unlink()
    assert not is_whole(tmp_path, last)


@pytest.mark.long
@pytest.mark.parametrize("name", PROBES)
def test_hundreds_of_kills_lose_and_change_nothing(name: str, tmp_path: Path) -> None:
    wanted = 20 if name == "compiled" else 60  # there each process compiles its graphs, for some seconds
    kills, lost, runs, different = kill_until(tmp_path, name, kills=wanted, seed=1)
    assert kills >= wanted and runs and not lost and not different


@pytest.mark.parametrize("size", [1, pytest.param(100, marks=pytest.mark.long)])
def test_random_configurations_that_are_killed_end_where_they_would_have(size: int, tmp_path: Path) -> None:
    count, wrong = kill_random(tmp_path, range(size))
    assert count.kills and not wrong, wrong


def test_the_hash_of_a_killed_run_that_forgot_its_random_state_is_another(tmp_path: Path) -> None:
    """The negative control: the same harness, where each restart finds other random numbers than were saved."""
    setting, chance = PROBES["resident data"], random.Random(0)
    seconds = undisturbed_seconds(tmp_path / "whole", setting)
    (tmp_path / "again").mkdir()
    child = process(lambda: train_to_the_end(tmp_path / "again", setting))
    os.waitpid(child, 0)
    assert hash_of(tmp_path / "again") == hash_of(tmp_path / "whole")
    for number in range(20):
        killed(tmp_path / str(number), setting, seconds, chance, tamper=rewrite(forget_random))
        if hash_of(tmp_path / str(number)) != hash_of(tmp_path / "whole"):
            return
    pytest.fail("the hash does not see the random state")
