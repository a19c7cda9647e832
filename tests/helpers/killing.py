"""Runs that are killed at random moments until they reach their end, and what that cost."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

import weft
from tests.helpers.resuming import (
    FUSE,
    SETTINGS,
    Setting,
    cosine,
    disturb,
    fingerprint,
    fit,
    given,
    rows,
    start_alike,
    summary,
)
from weft.checkpoint import folder as checkpoints


def plain_problem() -> weft.Problem:
    """One that can be compiled: no module counts its calls."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(2, 6), torch.nn.Tanh(), torch.nn.Dropout(0.2), torch.nn.Linear(6, 1))
    return weft.Problem([weft.Node(net, ["p"], ["x"])], [weft.objective(lambda x, p: (x - p[:, :1]) ** 2, name="f")])


def plain_data() -> weft.Data:
    """Batches of one size: each other one is another graph."""
    return weft.Data({"p": rows(24)}, {"p": rows(4, 2)}, batch_size=4)


PROBES: dict[str, Setting] = {
    "resident data": SETTINGS["hooks with state, logged steps"] | {"patience": given(3)},
    "a loader": SETTINGS["loader, global random state"] | {"scheduler": cosine},
    "phases": SETTINGS["phases"],
    "resampled data": SETTINGS["refresh"] | {"scheduler": SETTINGS["plateau"]["scheduler"]},
    "in the background": SETTINGS["in the background"] | {"accumulate": given(2)},
    "compiled": {"compile": given(True), "scheduler": cosine, "problem": plain_problem, "data": plain_data},
}


def train_to_the_end(root: Path, setting: Setting) -> None:
    """The body of a process: go on from what is there, to the end; then write down the hash of everything."""
    FUSE.set(0)
    disturb() if list(root.glob("run/checkpoints/step-*")) else start_alike()
    result, problem = fit(root, setting, every=1)
    (root / "hash").write_text(fingerprint(summary(root, result, problem)))


def process(body: Callable[[], None]) -> int:
    """The id of a forked process that runs `body`."""
    child = os.fork()
    with suppress(OSError):  # whichever comes first; a group, so that what it starts is killed with it
        os.setpgid(child, 0)
    if child:
        return child
    try:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, the process ends
        body()
        os._exit(0)
    except BaseException:  # noqa: BLE001, reported by the exit code
        traceback.print_exc(file=sys.__stderr__)
        os._exit(99)


def hash_of(root: Path) -> str:
    return (root / "hash").read_text()


def undisturbed_seconds(root: Path, setting: Setting) -> float:
    """Runs to the end in one process. Returns the seconds it took."""
    root.mkdir()
    started = time.monotonic()
    child = process(lambda: train_to_the_end(root, setting))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return time.monotonic() - started


def last_of(root: Path) -> str:
    """The name of the newest checkpoint; "" without one."""
    last = root / "run/checkpoints/last"
    return last.read_text() if last.exists() else ""


def is_whole(root: Path, at_least: str) -> bool:
    """Whether what `last` names loads, and is not older than what it named before; True where nothing was saved yet."""
    name = last_of(root)
    if not name:
        return not at_least
    with warnings.catch_warnings(record=True) as passed_over:
        warnings.simplefilter("always")
        found = checkpoints.find(root / "run").name
    return found == name.strip() and name >= at_least and not passed_over


def killed(
    root: Path, setting: Setting, seconds: float, chance: random.Random, tamper: Any = None, in_training: bool = False
) -> tuple[int, int]:
    """Kills it at random moments until it reaches its end. Returns the number of kills, and of those that cost
    something: after which the newest checkpoint was not the one that `last` names, or not whole, or older than one
    before.

    The moments lie between a start and a part of the time that a whole run takes, so that one run dies several times;
    `in_training`: between the first save of each life and so many seconds later (a start may take longer than the run).
    """
    root.mkdir()
    kills = lost = 0
    while True:
        found, waits = last_of(root), in_training
        child = process(lambda: train_to_the_end(root, setting))
        span = chance.uniform(0.0, seconds) if in_training else chance.uniform(0.005, 0.6 * seconds * (1 + kills / 10))
        deadline = time.monotonic() + span  # later and later, for slow machines
        while waits or time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                assert os.waitstatus_to_exitcode(status) == 0, "a resumed run failed"
                return kills, lost
            time.sleep(0.001)
            if waits and last_of(root) != found:
                waits, deadline = False, time.monotonic() + span
        os.killpg(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if os.waitstatus_to_exitcode(status) == 0:
            return kills, lost
        kills += 1
        lost += not is_whole(root, at_least=found)
        if tamper is not None and list(root.glob("run/checkpoints/step-*")):
            tamper(root)


class Count(NamedTuple):
    """Kills, kills that cost a checkpoint, runs, and runs that ended elsewhere than the undisturbed one."""

    kills: int
    lost: int
    runs: int
    different: int


def kill_until(folder: Path, name: str, kills: int, seed: int = 0) -> Count:
    """What came of one probe, killed so many times or more.

    Compiled runs are killed while they train: a start, with its look at the compiler and its cache, takes longer.
    """
    chance, setting, done, lost, runs, different = random.Random(seed), PROBES[name], 0, 0, 0, 0
    compiled = bool(setting.get("compile"))
    undisturbed_seconds(folder / "whole", setting)
    seconds = undisturbed_seconds(
        folder / "again", setting
    )  # timed here: the first one may have filled a compiler's cache
    assert hash_of(folder / "again") == hash_of(folder / "whole")
    while done < kills:
        root = folder / f"run-{runs}"
        now, gone = killed(root, setting, 0.2 if compiled else seconds, chance, in_training=compiled)
        done, lost = done + now, lost + gone
        runs, different = runs + 1, different + (hash_of(root) != hash_of(folder / "whole"))
        assert not list((root / "run/checkpoints").glob(".*")), "a temporary file of a killed process is left"
    return Count(done, lost, runs, different)
