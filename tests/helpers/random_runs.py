"""Random configurations of a run, for harnesses that kill it: optimizers, schedules, data, hooks, options."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch.optim import lr_scheduler as schedules

import weft
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


def random_setting(seed: int) -> tuple[str, Setting]:
    """A configuration by its number, and what it is in words."""
    draw = random.Random(seed)
    optimizer, schedule = draw.choice(sorted(OPTIMIZERS)), draw.choice(sorted(SCHEDULES))
    data = draw.choice([None, *sorted(name for name, setting in SETTINGS.items() if "data" in setting)])
    setting: dict[str, Any] = {"optimizer": given(OPTIMIZERS[optimizer])}
    if SCHEDULES[schedule] is not None:
        setting["scheduler"] = given(SCHEDULES[schedule])
    if data is not None:
        setting |= {k: v for k, v in SETTINGS[data].items() if k not in ("optimizer", "scheduler", "phases")}
    chosen = [f"seed {seed}", optimizer, schedule, str(data)]
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
    return ", ".join(chosen), setting
