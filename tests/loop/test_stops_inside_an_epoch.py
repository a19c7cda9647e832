"""A run that stops inside an epoch: what fit returns is closed as ever, the checkpoint goes on with the epoch open."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import weft
from weft.loggers.csv import read_rows

Options = dict[str, Any]
CONTEXT = ("seconds", "steps_per_second", "examples_per_second", "wait_seconds")


class Fit(torch.nn.Module):
    """Dropout draws, batch norm remembers: whatever is trained twice or not at all shows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        parts = (torch.nn.Linear(1, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.2), torch.nn.Linear(4, 1))
        self.net = torch.nn.Sequential(*parts)

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {f"{batch['name']}_loss": (self.net(batch["x"]) - 2 * batch["x"]).square().mean()}


X = torch.linspace(-1, 1, 60)[:, None]


class Rows(Dataset):
    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"x": X[i] + 0.01 * torch.rand(1)}


def tensors() -> weft.Data:
    return weft.Data({"x": X}, {"x": X[::7]}, batch_size=10)


def trained(root: Path, make_data: Callable[[], Any] = tensors, **options: Any) -> tuple[weft.FitResult, Fit]:
    problem = Fit()
    given: Options = {"epochs": 4, "seed": 0, "progress": False, "checkpoint": True, "root_dir": str(root)}
    given |= {"optimizer": lambda p: torch.optim.Adam(p, lr=0.05), "run_name": "run", "patience": 3}
    given |= {"scheduler": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.7)}
    ACT["now"] = options.pop("act", lambda *_: None)
    return weft.Trainer(**{"hooks": HOOKS} | given | options).fit(problem, make_data()), problem


def told(root: Path, result: weft.FitResult, problem: Fit) -> Options:
    rows = read_rows(root / "run" / "metrics.csv")
    return {
        "last": {name: value.tolist() for name, value in result.last_weights.items()},
        "held": {name: value.tolist() for name, value in problem.state_dict().items()},
        "history": result.history,
        "best": (result.best_epoch, result.best_metric, result.steps, result.epochs),
        "rows": [row[:4] for row in rows if row.name.split("/")[0] not in CONTEXT],
        "read back": weft.load_result(root / "run").history,
    }


ACT: Options = {}


def at_step_end(trainer: weft.Trainer, batch: Any, loss: Any) -> None:
    ACT.get("now", lambda *_: None)(trainer, batch, loss)


HOOKS = {"on_step_end": at_step_end}  # the same by name in every run


def stopped_by_time(trainer: weft.Trainer, batch: Any, loss: Any) -> None:
    if trainer.global_step == 9:
        trainer.run.state.control.clock -= 1e6  # type: ignore[union-attr]


def stopped_by_hook(trainer: weft.Trainer, batch: Any, loss: Any) -> None:
    if trainer.global_step == 9:
        trainer.stop("enough")


DATA = {"tensors": tensors, "a dataset": lambda: weft.Data(Rows(), Rows(), batch_size=10)}
DATA["a loader"] = lambda: weft.Data(DataLoader(Rows(), batch_size=10, shuffle=True), {"x": X[::7]}, batch_size=10)
STOPS: dict[str, Options] = {
    "max_steps": {"max_steps": 9},
    "max_time": {"max_time": 1e5, "act": stopped_by_time},
    "enough": {"act": stopped_by_hook},
}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("reason", STOPS)
def test_a_run_that_stopped_inside_an_epoch_ends_where_the_undisturbed_one_does(
    reason: str, data: str, tmp_path: Path
) -> None:
    expected = told(tmp_path / "whole", *trained(tmp_path / "whole", DATA[data]))
    root = tmp_path / "cut"
    first, _ = trained(root, DATA[data], **dict(STOPS[reason]))
    assert (first.stop_reason, first.steps, first.epochs) == (reason, 9, 2)
    assert len(first.history["dev_loss"]) == len(first.history["train_loss"]) == 2  # closed as ever
    assert told(root, *trained(root, DATA[data], resume="auto")) == expected
    assert expected["best"][2:] == (24, 4)


@pytest.mark.parametrize("options", [{"background": True}, {"every_n_steps": 2}, {"every_n_epochs": 2, "best": False}])
def test_so_it_is_however_checkpoints_are_written(options: Options, tmp_path: Path) -> None:
    expected = told(tmp_path / "whole", *trained(tmp_path / "whole"))
    trained(tmp_path / "cut", checkpoint=options, max_steps=9)
    assert told(tmp_path / "cut", *trained(tmp_path / "cut", checkpoint=options, resume="auto")) == expected


def test_with_gradients_of_several_batches_too(tmp_path: Path) -> None:
    expected = told(tmp_path / "whole", *trained(tmp_path / "whole", accumulate=4))
    trained(tmp_path / "cut", accumulate=4, max_steps=3)
    assert told(tmp_path / "cut", *trained(tmp_path / "cut", accumulate=4, resume="auto")) == expected


def test_stopping_again_and_again_changes_nothing(tmp_path: Path) -> None:
    expected = told(tmp_path / "whole", *trained(tmp_path / "whole"))
    for steps in (1, 2, 7, 7, 12, 23):
        trained(tmp_path / "cut", max_steps=steps, resume="auto")
    assert told(tmp_path / "cut", *trained(tmp_path / "cut", resume="auto")) == expected


def test_a_stop_at_the_end_of_an_epoch_is_saved_closed(tmp_path: Path) -> None:
    result, _ = trained(tmp_path, max_steps=12)
    saved = weft.checkpoint.folder.load(tmp_path / "run")[0]
    assert (saved["progress"]["epoch"], saved["progress"]["batch"], result.epochs) == (2, 0, 2)


def test_a_process_that_dies_while_its_last_epoch_closes_stops_there_again(tmp_path: Path) -> None:
    may_die = [True]

    def die(trainer: weft.Trainer) -> None:
        if may_die and trainer.global_step == 9 and trainer.run.state.control.left_open:  # type: ignore[union-attr]
            os._exit(9)

    hooks = [HOOKS, {"on_validation_start": die}]
    if (child := os.fork()) == 0:
        trained(tmp_path, hooks=hooks, act=stopped_by_hook)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    may_die.clear()
    again, _ = trained(tmp_path, resume="auto", hooks=hooks)
    assert (again.stop_reason, again.steps) == ("enough", 9)


def own_loop(root: Path, leave: int, resume: str | None = None) -> list[int]:
    """Batches used in each epoch; the loop breaks after `leave` steps in all."""
    trainer = weft.Trainer(epochs=2, seed=0, progress=False, checkpoint=True, root_dir=str(root), run_name="run")
    used = []
    with trainer.start(Fit(), tensors(), resume=resume) as run:
        for _ in run.epochs():
            used.append(0)
            for batch in run.batches():
                run.update(batch)
                used[-1] += 1
                if run.progress.step == leave:
                    break
    return used


def test_a_break_in_a_loop_of_ones_own_closes_the_epoch(tmp_path: Path) -> None:
    assert own_loop(tmp_path / "a", leave=2) == [2, 6]
    saved = weft.checkpoint.folder.load(tmp_path / "a" / "run")[0]
    assert (saved["progress"]["epoch"], saved["progress"]["batch"]) == (2, 0)


def test_what_a_loop_logs_after_the_step_at_which_a_hook_saved_is_in_the_checkpoint(tmp_path: Path) -> None:
    def history(root: Path, kill: int, resume: str | None = None) -> dict[str, list[float]]:
        def save(trainer: weft.Trainer, batch: Any, loss: Any) -> None:
            if trainer.global_step == 3:
                trainer.run.save()  # type: ignore[union-attr]

        options: Options = {"epochs": 1, "seed": 0, "progress": False, "checkpoint": {"every_n_epochs": 50}}
        trainer = weft.Trainer(**options, root_dir=str(root), run_name="run", hooks={"on_step_end": save})
        with trainer.start(problem := Fit(), tensors(), resume=resume) as run:
            for _ in run.epochs():
                for batch in run.batches():
                    run.backward(loss := problem(batch)["train_loss"])
                    run.step()
                    run.log({"twice": 2 * loss.detach()})
                    if run.progress.step == kill:
                        os._exit(9)
        assert run.result is not None
        return run.result.history

    expected = history(tmp_path / "whole", kill=-1)
    if (child := os.fork()) == 0:
        history(tmp_path / "cut", kill=4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert history(tmp_path / "cut", kill=-1, resume="auto") == expected
