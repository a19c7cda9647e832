"""What a mistake shows: the user's lines and what they called, not the frames of the loop."""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import weft

X = torch.rand(8, 2)
HERE = Path(__file__).name


def wrong(u: Any) -> Any:
    return u @ torch.rand(7, 7)


def reads_u(fn: Callable[..., Any] = wrong) -> weft.Problem:
    return weft.Problem([weft.Node(nn.Linear(2, 1), ["x"], ["u"])], [weft.objective(fn)])


def silent(**options: Any) -> weft.Trainer:
    return weft.Trainer(**{"epochs": 1, "progress": False} | options)


def loop_by_steps() -> None:
    with silent().start(reads_u(), {"x": X}) as run:
        for _ in run.epochs():
            for batch in run.batches():
                run.update(batch)


def gradient(u: Any, x: Any) -> Any:
    return torch.autograd.grad(u.sum(), x)[0]


def failing_hook(trainer: Any, metrics: Any) -> None:
    raise ZeroDivisionError("mine")


MISTAKES: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "in a term": (lambda: silent().fit(reads_u(), {"x": X}), ["<lambda>", "fit", "wrong"]),
    "in a loop of one's own": (loop_by_steps, ["loop_by_steps", "wrong"]),
    "in a failing_hook": (
        lambda: silent(hooks={"on_epoch_end": failing_hook}).fit(reads_u(lambda u: u), {"x": X}),
        ["<lambda>", "fit", "failing_hook"],
    ),
    "in the data": (lambda: silent().fit(reads_u(), X), ["<lambda>", "fit", "start"]),
    "in an option": (lambda: silent(optimizer=3).fit(reads_u(), {"x": X}), ["<lambda>", "fit", "__enter__"]),
    "in a prediction": (lambda: silent().predict({"y": X}, problem=reads_u()), ["<lambda>", "predict", "_evaluate"]),
    "of two shapes": (
        lambda: silent().fit(weft.Supervised(nn.Sequential(nn.Linear(3, 1)), nn.MSELoss()), (X, X)),
        ["<lambda>", "fit", "forward"],  # of torch.nn.Linear
    ),
    "explained": (lambda: silent().fit(reads_u(gradient), {"x": X}), ["<lambda>", "fit", "gradient"]),
}


def frames_of(call: Callable[[], Any]) -> tuple[list[str], BaseException]:
    """The names of the functions that an error went through, from the one that called, and the error."""
    try:
        call()
    except Exception as error:  # noqa: BLE001
        found = traceback.extract_tb(error.__traceback__)[1:]
        return [frame.name for frame in found if "autograd" not in frame.filename], error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_shows_the_users_lines_and_the_loops_frames_only_when_asked(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, names = MISTAKES[kind]
    monkeypatch.setenv("WEFT_TRACEBACK", "short")
    found, error = frames_of(call)
    assert found == names
    assert "direct cause" not in "".join(traceback.format_exception(error))
    monkeypatch.setenv("WEFT_TRACEBACK", "full")
    assert len(frames_of(call)[0]) > len(names)


def test_what_python_itself_raises_in_our_lines_keeps_all_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_TRACEBACK", "short")
    trainer = silent()
    del trainer.options["loggers"]  # as a mistake of ours would
    names, error = frames_of(lambda: trainer.fit(reads_u(lambda u: u), {"x": X}))
    assert isinstance(error, KeyError) and names[:2] == ["<lambda>", "fit"]


def test_hooks_that_listen_to_errors_see_the_whole_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_TRACEBACK", "short")
    seen: list[int] = []
    hooks = {"on_exception": lambda t, error: seen.append(len(traceback.extract_tb(error.__traceback__)))}
    names, _ = frames_of(lambda: silent(hooks=hooks).fit(reads_u(), {"x": X}))
    assert seen[0] > len(names)


def test_a_notebook_shows_as_few_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    ultratb = pytest.importorskip("IPython.core.ultratb")
    shown: dict[str, str] = {}
    for wanted in ("short", "full"):
        monkeypatch.setenv("WEFT_TRACEBACK", wanted)
        _, error = frames_of(lambda: silent().fit(reads_u(), {"x": X}))
        with warnings.catch_warnings():  # IPython's own, of its colours
            warnings.simplefilter("ignore")
            view = ultratb.VerboseTB()
        coloured = "\n".join(view.structured_traceback(type(error), error, error.__traceback__))
        shown[wanted] = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    assert "step/update.py" not in shown["short"] and "step/update.py" in shown["full"]
    assert "run.update(batch)" in shown["short"] and "u @ torch.rand(7, 7)" in shown["short"]
