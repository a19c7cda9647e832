"""A run that is cut off and resumed ends at exactly the state where the undisturbed run ends."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from tests.helpers.resuming import (
    CLOCKS,
    FUSE,
    SETTINGS,
    Average,
    Crash,
    cosine,
    differences,
    disturb,
    fit,
    forget_random,
    last_state,
    make_data,
    make_problem,
    rewrite,
    start_alike,
    summary,
)
from weft.checkpoint import folder as checkpoints
from weft.devices import seeding
from weft.loggers.csv import read_rows


def undisturbed(setting: dict[str, Any], root: Path, **changes: Any) -> dict[str, Any]:
    start_alike()
    FUSE.set(0)
    return summary(root, *fit(root, setting, resume=None, **changes))


def cut_off(
    setting: dict[str, Any],
    root: Path,
    cuts: tuple[int, ...],
    tamper: Callable[[Path], None] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """The same with a crash after so many forward passes, then after so many more of the resumed run, and so on."""
    start_alike()
    for cut in cuts:
        FUSE.set(cut)
        with suppress(Crash):  # a short run ends before
            fit(root, setting, **changes)
        disturb() if list(root.glob("run/checkpoints/step-*")) else start_alike()
        if tamper is not None:
            tamper(root)
    FUSE.set(0)
    return summary(root, *fit(root, setting, **changes))


# Crashes twice within the second epoch, and right after its end (an epoch has 6 batches).
CUTS = [(8, 3), (13,)]
MORE_CUTS = [(4,), (7,), (14, 3, 3), (2, 2, 2, 2, 2, 2)]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_resumed_run_ends_bitwise_where_the_undisturbed_one_does(name: str, tmp_path: Path) -> None:
    expected = undisturbed(SETTINGS[name], tmp_path / "whole")
    for number, cuts in enumerate(CUTS):
        found = cut_off(SETTINGS[name], tmp_path / f"cut-{number}", cuts)
        assert not differences(expected, found), (cuts, differences(expected, found)[:8])


@pytest.mark.long
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_resumed_run_ends_bitwise_where_the_undisturbed_one_does_wherever_it_was_cut(
    name: str, every: int, tmp_path: Path
) -> None:
    expected = undisturbed(SETTINGS[name], tmp_path / "whole", every=every)
    for number, cuts in enumerate(MORE_CUTS):
        found = cut_off(SETTINGS[name], tmp_path / f"cut-{number}", cuts, every=every)
        assert not differences(expected, found), (cuts, differences(expected, found)[:8])


def own_loop(root: Path, every: int = 2) -> dict[str, Any]:
    """A loop by hand that evaluates in the middle of epochs, steps itself, and ends with a break."""
    options: dict[str, Any] = {"epochs": 3, "progress": False, "loggers": "csv", "log_every": 2, "run_name": "run"}
    trainer = weft.Trainer(root_dir=str(root), checkpoint={"every_n_steps": every}, resume="auto", **options)
    problem = make_problem()
    with trainer.start(problem, make_data()) as run:
        for epoch in run.epochs():
            noise = torch.rand(1)  # drawn again when the epoch is gone on with
            for batch in run.batches("train"):
                out = problem(batch)
                run.backward(out["train_loss"] * (1 + 0 * noise.item()))
                run.step()
                run.log({"twice": 2 * out["train_loss"].detach()})
                if run.progress.step % 4 == 0:
                    run.evaluate("dev")
                if run.progress.step == 15:
                    break
            if run.progress.step == 15:
                break
    assert run.result is not None
    return summary(root, run.result, problem)


def test_a_loop_of_ones_own_is_resumed_bitwise_too(tmp_path: Path) -> None:
    start_alike()
    FUSE.set(0)
    expected = own_loop(tmp_path / "whole")
    for cuts in ((5,), (9, 3)):
        root = tmp_path / f"cut-{cuts}"
        start_alike()
        for cut in cuts:
            FUSE.set(cut)
            with pytest.raises(Crash):
                own_loop(root)
            disturb()
        FUSE.set(0)
        found = own_loop(root)
        assert not differences(expected, found), differences(expected, found)[:8]


# ---- negative controls -----------------------------------------------------------------------------------------------


def forget_position(state: dict[str, Any]) -> None:
    state["progress"]["batch"] -= 1


def forget_schedule(state: dict[str, Any]) -> None:
    state["schedules"]["default"]["scheduler"]["last_epoch"] -= 1


def forget_order(state: dict[str, Any]) -> None:
    state["random_before_epoch"] = seeding.random_state()


def forget_optimizer(state: dict[str, Any]) -> None:
    state["optimizers"]["default"]["state"][0]["exp_avg_sq"].mul_(1.001)


def forget_flag(state: dict[str, Any]) -> None:
    del state["module_state"]["nodes.0.fn.calls"]


def forget_hook(state: dict[str, Any]) -> None:
    state["hooks"]["Average"]["mean"].add_(1)


@pytest.mark.parametrize(
    "forget",
    [forget_random, forget_position, forget_schedule, forget_order, forget_optimizer, forget_flag, forget_hook],
)
def test_leaving_out_a_part_of_the_state_would_be_noticed(
    forget: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    setting = SETTINGS["loader, global random state"] | {"scheduler": cosine, "hooks": Average}
    expected = undisturbed(setting, tmp_path / "whole")
    assert not differences(expected, cut_off(setting, tmp_path / "good", (9,), tamper=rewrite(lambda state: None)))
    bad = cut_off(setting, tmp_path / "bad", (9,), tamper=rewrite(forget))
    assert any(text.startswith(".last weights") for text in differences(expected, bad))


def forget_flags(state: dict[str, Any]) -> None:
    for name in [n for n in state["module_state"] if n.endswith(".requires_grad")]:
        del state["module_state"][name]


def forget_modes(state: dict[str, Any]) -> None:
    del state["module_state"]["nodes.0.fn.layers.1.training"]


def forget_list(state: dict[str, Any]) -> None:
    del state["module_state"]["nodes.0.fn.seen"]


def forget_generator(state: dict[str, Any]) -> None:
    state["generators"]["problem.nodes.0.fn.own"] = torch.Generator().get_state()


def forget_making(state: dict[str, Any]) -> None:
    state["random_before_data"] = seeding.random_state()


def forget_averages(state: dict[str, Any]) -> None:
    next(iter(state["hooks"]["EMA"]["averages"].values())).add_(1)


@pytest.mark.parametrize(
    ("name", "forget"),
    [
        ("frozen by a hook", forget_flags),
        ("frozen by a hook", forget_modes),
        ("lists and generators of a module", forget_list),
        ("lists and generators of a module", forget_generator),
        ("kept batches", forget_making),
        ("averaged weights", forget_averages),
    ],
)
def test_leaving_out_what_only_some_runs_have_would_be_noticed_too(
    name: str, forget: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    expected = undisturbed(SETTINGS[name], tmp_path / "whole")
    bad = cut_off(SETTINGS[name], tmp_path / "bad", (9,), tamper=rewrite(forget))
    assert any(text.startswith((".last weights", ".weights")) for text in differences(expected, bad))


# ---- what a resumed fit does -----------------------------------------------------------------------------------------


def test_more_epochs_extend_a_resumed_fit_and_a_finished_one(tmp_path: Path) -> None:
    expected = undisturbed({}, tmp_path / "whole", epochs=5)
    start_alike()
    result, _ = fit(tmp_path / "part", {}, epochs=2)
    assert result.epochs == 2
    disturb()
    result, _ = fit(tmp_path / "part", {}, epochs=2)
    assert result.epochs == 2 and result.steps == 12  # nothing was left
    result, problem = fit(tmp_path / "part", {}, epochs=5)
    assert not differences(expected, summary(tmp_path / "part", result, problem))


def test_more_steps_and_more_patience_extend_a_resumed_fit(tmp_path: Path) -> None:
    assert fit(tmp_path / "a", {}, max_steps=8)[0].stop_reason == "max_steps"
    result, _ = fit(tmp_path / "a", {}, max_steps=20)
    assert result.steps == 20 and result.stop_reason == "max_steps"
    setting = SETTINGS["patience"]
    first, _ = fit(tmp_path / "b", setting)
    assert first.stop_reason == "patience"
    assert fit(tmp_path / "b", setting)[0].epochs == first.epochs
    with pytest.warns(UserWarning, match="patience: 1 -> 5"):
        longer, _ = fit(tmp_path / "b", setting | {"patience": lambda: 5})
    assert longer.epochs > first.epochs


def test_a_run_that_dies_after_it_was_told_to_stop_stops_there_again_and_a_finished_one_goes_on(tmp_path: Path) -> None:
    def stop(trainer: Any, batch: Any, loss: Any) -> None:
        if trainer.global_step == 9:
            trainer.stop("enough")

    def die(trainer: Any) -> None:
        if trainer.global_step == 9:
            FUSE.burn()

    setting = {"hooks": lambda: {"on_step_end": stop, "on_validation_start": die}}
    expected = undisturbed(setting, tmp_path / "whole", every=1)
    start_alike()
    FUSE.set(10)  # nine steps, and the evaluation after the ninth
    with pytest.raises(Crash):
        fit(tmp_path / "cut", setting, every=1)
    FUSE.set(0)
    state, _ = checkpoints.load(tmp_path / "cut/run")
    assert state["progress"]["batch"] == 3 and state["stop_reason"] == "enough"
    found = summary(tmp_path / "cut", *fit(tmp_path / "cut", setting, every=1))
    assert found["result"]["stop_reason"] == "enough" and not differences(expected, found)
    result, _ = fit(tmp_path / "cut", setting, every=1)
    assert result.stop_reason == "epochs" and result.epochs == 4


def test_resuming_the_best_trains_its_future_again(tmp_path: Path) -> None:
    FUSE.set(0)
    setting = SETTINGS["patience"]
    start_alike()
    result, _ = fit(tmp_path, setting, resume=None)
    best_epoch = result.best_epoch
    assert best_epoch is not None and best_epoch + 1 < result.epochs
    before = last_state(tmp_path)
    disturb()
    again, _ = fit(tmp_path, setting, resume="best")
    assert again.best_epoch == best_epoch and again.history == result.history
    assert not differences(before, last_state(tmp_path))


def test_going_on_from_an_older_checkpoint_gives_up_what_came_after(tmp_path: Path) -> None:
    FUSE.set(0)
    start_alike()
    keep = {"checkpoint": lambda: {"keep": 20, "best": False}}
    expected = summary(tmp_path, *fit(tmp_path, keep, resume=None, epochs=3))
    folder = tmp_path / "run/checkpoints"
    disturb()
    FUSE.set(1)
    with pytest.raises(Crash):
        fit(tmp_path, keep, resume=str(folder / "step-000000004.ckpt"), epochs=3)
    assert (folder / "last").read_text() == "step-000000004.ckpt\n"  # before anything was saved
    assert all(row.step <= 4 for row in read_rows(tmp_path / "run/metrics.csv"))
    FUSE.set(0)
    found = summary(tmp_path, *fit(tmp_path, keep, epochs=3))  # "auto" goes on from there
    assert not differences(expected, found)


def test_each_step_is_logged_once_in_tensorboard_too(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    setting: dict[str, Any] = {"log_every": lambda: 1, "loggers": lambda: ["csv", "tensorboard"]}
    whole = undisturbed(setting, tmp_path / "whole", every=5)
    cut_off(setting, tmp_path / "cut", (9, 3), every=5)

    def points(root: Path) -> list[tuple[str, int, float]]:
        events = EventAccumulator(str(root / "run"), size_guidance={"scalars": 0})
        events.Reload()
        kept = [tag for tag in events.Tags()["scalars"] if tag not in CLOCKS]
        return sorted((tag, point.step, point.value) for tag in kept for point in events.Scalars(tag))

    assert points(tmp_path / "whole") == points(tmp_path / "cut") and len(whole["rows"]) > 70


@pytest.mark.filterwarnings("ignore:To copy construct")  # NeuroMANCER's own
def test_neuromancers_augmented_lagrangian_is_resumed_bitwise(tmp_path: Path) -> None:
    """Its multipliers change size in the first step, which only a plain attribute of it knows about."""
    from neuromancer.constraint import variable
    from neuromancer.dataset import DictDataset
    from neuromancer.loss import AugmentedLagrangeLoss
    from neuromancer.problem import Problem
    from neuromancer.system import Node

    def make() -> Any:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.Dropout(0.2), torch.nn.Tanh(), torch.nn.Linear(5, 1))
        x, p = variable("x"), variable("p")
        goal = ((x - p[:, [0]]) ** 2).minimize(name="f")
        rows = torch.randn(12, 2, generator=torch.Generator().manual_seed(3))
        loader = torch.utils.data.DataLoader(DictDataset({"p": rows}, name="train"), batch_size=4)
        loss = AugmentedLagrangeLoss([goal], [x <= 0.2], loader, inner_loop=2, sigma=2.0, mu_init=0.1)
        return Problem([Node(net, ["p"], ["x"], name="net")], loss), weft.Data(
            weft.DictDataset({"p": rows}), weft.DictDataset({"p": rows[:5]})
        )  # all rows in one batch: its forward knows no other

    def train(root: Path, at: int = 0) -> dict[str, Any]:
        problem, data = make()
        start_alike()
        FUSE.set(at)
        burn = {"on_step_start": lambda trainer, batch: FUSE.burn()}
        options: dict[str, Any] = {"progress": False, "epochs": 13, "run_name": "run", "root_dir": str(root)}
        trainer = weft.Trainer(checkpoint={"every_n_steps": 2}, loggers="csv", hooks=burn, resume="auto", **options)
        return summary(root, trainer.fit(problem, data), problem)

    expected = train(tmp_path / "whole")
    for cut in (6, 4):
        with pytest.raises(Crash):
            train(tmp_path / "cut", at=cut)
    found = train(tmp_path / "cut")
    assert not differences(expected, found), differences(expected, found)[:8]
    assert found["state"]["module_state"]["loss.init"] is False and found["weights"]["loss.lm"].abs().max() > 0


def test_a_run_that_goes_on_before_the_end_of_its_first_epoch_is_not_told_that_its_schedule_steps_too_early(
    tmp_path: Path,
) -> None:
    expected = undisturbed({"scheduler": cosine}, tmp_path / "whole", every=6)
    start_alike()
    strike = {"on_validation_start": lambda trainer: FUSE.burn()}
    FUSE.set(7)
    with pytest.raises(Crash):
        fit(tmp_path / "cut", {"scheduler": cosine, "hooks": lambda: strike}, every=6)
    FUSE.set(0)
    assert checkpoints.load(tmp_path / "cut/run")[0]["progress"]["batch"] == 6
    with pytest.warns(UserWarning, match="hooks: ") as caught:
        _, problem = fit(tmp_path / "cut", {"scheduler": cosine}, every=6)
    assert len(caught) == 1 and not differences(expected["weights"], dict(problem.state_dict()))
