"""Random configurations of a run, which is killed: optimizers, schedules, data, hooks, options, loops."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.optim import lr_scheduler as schedules

import weft
from tests.helpers.killing import Count, hash_of, killed, plain_data, plain_problem, undisturbed_seconds
from tests.helpers.resuming import SETTINGS, Average, Setting, given

optim = torch.optim
OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda p: optim.SGD(p, lr=0.01),
    "SGD, Nesterov": lambda p: optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "Adam": lambda p: optim.Adam(p, lr=0.01),
    "AMSGrad": lambda p: optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: optim.AdamW(p, lr=0.01),
    "NAdam": lambda p: optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: optim.RAdam(p, lr=0.01),
    "Adamax": lambda p: optim.Adamax(p, lr=0.01),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "Rprop": lambda p: optim.Rprop(p, lr=0.01),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.01),
    "Adadelta": lambda p: optim.Adadelta(p, lr=0.5),
    "ASGD": lambda p: optim.ASGD(p, lr=0.01),
    "LBFGS": lambda p: optim.LBFGS(p, lr=0.1, max_iter=3),
}
SCHEDULES: dict[str, Any] = {
    "none": None,
    "steps": lambda o: schedules.StepLR(o, 2, 0.5),
    "milestones": lambda o: schedules.MultiStepLR(o, [1, 3], 0.5),
    "exponential": lambda o: schedules.ExponentialLR(o, 0.9),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, 4),
    "restarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 2),
    "linear": lambda o: schedules.LinearLR(o, 0.5, total_iters=3),
    "polynomial": lambda o: schedules.PolynomialLR(o, 4),
    "each step": weft.Schedule(lambda o: schedules.ExponentialLR(o, 0.99), interval="step"),
    "a cycle": weft.Schedule(
        lambda o: schedules.CyclicLR(o, 0.001, 0.01, step_size_up=3, cycle_momentum=False), interval="step"
    ),
    "plateau": weft.Schedule(lambda o: schedules.ReduceLROnPlateau(o, patience=0), monitor="dev_loss"),
}


def by_updates(trainer: weft.Trainer, problem: Any, data: Any) -> Any:
    """A loop of one's own that leaves the update to weft."""
    with trainer.start(problem, data) as run:
        for _ in run.epochs():
            for batch in run.batches("train"):
                run.update(batch)
            if run.validation_due:
                run.evaluate("dev")
    return run.result


def steps_by_hand(trainer: weft.Trainer, problem: Any, data: Any) -> Any:
    """A loop of one's own with its own loss, backward and step."""
    with trainer.start(problem, data) as run:
        for epoch in run.epochs():
            for batch in run.batches("train"):
                run.backward(run.problem(batch)["train_loss"] * (1.0 + 0.1 * epoch))
                run.step()
            run.evaluate("dev")
    return run.result


LOOPS = {"fit": None, "own loop, updates": by_updates, "own loop, by hand": steps_by_hand}
KINDS = ["plain"] * 8 + ["compiled", "two processes"]
NOT_BY_HAND = ("accumulate", "training_step", "phases", "validate_every")
"""Options that a loop by hand would have to obey itself."""


def random_setting(seed: int) -> tuple[str, Setting]:
    """A configuration by its number, and what it is in words."""
    draw = random.Random(seed)
    optimizer, schedule = draw.choice(sorted(OPTIMIZERS)), draw.choice(sorted(SCHEDULES))
    data = draw.choice([None, *sorted(name for name, setting in SETTINGS.items() if "data" in setting)])
    kind = draw.choice(KINDS)
    setting: dict[str, Any] = {"optimizer": given(OPTIMIZERS[optimizer])}
    if kind != "plain":  # no module counts its calls, and all batches have one size
        data = None
        setting |= {"problem": plain_problem, "data": plain_data}
    if SCHEDULES[schedule] is not None:
        setting["scheduler"] = given(SCHEDULES[schedule])
    if data is not None:
        setting |= {k: v for k, v in SETTINGS[data].items() if k not in ("optimizer", "scheduler", "phases")}
    if kind == "compiled":
        setting["compile"] = given(True)
    elif kind == "two processes":
        setting |= {"devices": given(2), "strategy": given("ddp_fork"), "accelerator": given("cpu")}
    chosen = [f"seed {seed}", kind, optimizer, schedule, str(data)]
    possible: dict[str, Any] = {"accumulate": 2, "clip": 0.5, "patience": 3, "validate_every": 2, "log_every": 2}
    for name, value in possible.items():
        if name not in setting and draw.random() < 0.3:
            setting[name] = given(value)
            chosen.append(f"{name}={value}")
    if "hooks" not in setting and draw.random() < 0.3:
        setting["hooks"] = Average
        chosen.append("a hook with state")
    if "checkpoint" not in setting and draw.random() < 0.3:
        setting["checkpoint"] = lambda: {"background": True}
        chosen.append("in the background")
    loop = draw.choice(sorted(LOOPS)) if kind != "two processes" else "fit"
    is_by_weft = optimizer == "LBFGS" or kind == "compiled" or any(name in setting for name in NOT_BY_HAND)
    if loop == "own loop, by hand" and is_by_weft:
        loop = "own loop, updates"
    if LOOPS[loop] is not None:
        setting["loop"] = given(LOOPS[loop])
        chosen.append(loop)
    return ", ".join(chosen), setting


def kill_random(folder: Path, seeds: Iterable[int]) -> tuple[Count, list[str]]:
    """What came of random configurations that were killed, and which of them lost something or ended elsewhere."""
    kills = lost = runs = different = 0
    wrong: list[str] = []
    for seed in seeds:
        words, setting = random_setting(seed)
        root, chance = folder / str(seed), random.Random(seed)
        root.mkdir()
        seconds, is_compiled = undisturbed_seconds(root / "whole", setting), "compile" in setting
        # a start of a compiled run takes longer than the run
        now, gone = killed(root / "cut", setting, 0.2 if is_compiled else seconds, chance, in_training=is_compiled)
        is_other = hash_of(root / "cut") != hash_of(root / "whole")
        kills, lost, runs, different = kills + now, lost + gone, runs + 1, different + is_other
        if gone or is_other:
            wrong.append(words)
        shutil.rmtree(root)
    return Count(kills, lost, runs, different), wrong
