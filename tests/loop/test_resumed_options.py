"""A resumed run, or a second fit, does what it says: what changed is named, with the side that is in force."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

import weft

X = torch.linspace(0, 1, 16)[:, None]


class Fit(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(1, 1)

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {f"{batch['name']}_loss": (self.net(batch["x"]) - 3 * batch["x"]).square().mean()}


def sgd_of(lr: float, **options: Any) -> Any:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, **options)


def cosine_rates(steps: int) -> Any:
    return lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, steps)


def fit(
    root: Path, epochs: int, optimizer: Any, scheduler: Any = None, renew: Any = (), **options: Any
) -> tuple[list[float], str, weft.Trainer]:
    """The rates by epoch, what was warned of, and the trainer."""
    rates: list[float] = []
    hooks = {"on_epoch_start": lambda trainer: rates.append(round(trainer.optimizer.param_groups[0]["lr"], 4))}
    options = {"epochs": epochs, "seed": 0, "progress": False, "checkpoint": True, "hooks": hooks} | options
    trainer = weft.Trainer(root_dir=str(root), run_name="a", optimizer=optimizer, scheduler=scheduler, **options)
    resume = "auto" if (root / "a").is_dir() else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Fit(), {"x": X}, resume=resume, renew=renew if resume else ())
    return rates, " ".join(str(one.message) for one in caught), trainer


def test_a_changed_schedule_is_named_and_can_be_made_to_win(tmp_path: Path) -> None:
    for root in (tmp_path / "old", tmp_path / "new"):
        assert fit(root, 4, sgd_of(0.01), cosine_rates(4))[:2] == ([0.01, 0.0085, 0.005, 0.0015], "")
    rates, told, _ = fit(tmp_path / "old", 8, sgd_of(0.01), cosine_rates(8))
    assert rates == [0.0, 0.0015, 0.005, 0.0085]
    assert "scheduler default: CosineAnnealingLR(T_max=4, eta_min=0.0) -> CosineAnnealingLR(T_max=8" in told
    assert "In force is the checkpoint's scheduler default." in told and "renew=('scheduler',)" in told
    assert "(CosineAnnealingLR, T_max=4) is used up" in told
    rates, told, _ = fit(tmp_path / "new", 8, sgd_of(0.01), cosine_rates(8), renew=("optimizer", "scheduler"))
    assert rates == [0.005, 0.0031, 0.0015, 0.0004] == fit(tmp_path / "whole", 8, sgd_of(0.01), cosine_rates(8))[0][4:]
    assert "In force is what stands here now." in told and "used up" not in told


CHANGES = {
    "a rate": (sgd_of(0.01), sgd_of(0.0001), 0.01, 0.0001, "lr"),
    "a decay": (sgd_of(0.01), sgd_of(0.01, weight_decay=0.1), 0, 0.1, "weight_decay"),
    "betas": (torch.optim.Adam, partial(torch.optim.Adam, betas=(0.5, 0.9)), (0.9, 0.999), (0.5, 0.9), "betas"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_option_of_an_optimizer_is_named_and_can_be_made_to_win(what: str, tmp_path: Path) -> None:
    first, second, before, after, option = CHANGES[what]
    for renew, expected, side in (((), before, "the checkpoint's"), ("optimizer", after, "what stands here now")):
        root = tmp_path / str(expected)
        fit(root, 2, first)
        _, told, trainer = fit(root, 4, second, renew=renew)
        assert trainer.optimizer.param_groups[0][option] == expected
        assert "Changed since: optimizer" in told and f"In force is {side}" in told


def test_moments_stay_where_options_are_renewed(tmp_path: Path) -> None:
    _, _, trainer = fit(tmp_path, 3, torch.optim.Adam)
    kept = {k: v.clone() for k, v in trainer.optimizer.state[trainer.problem.net.weight].items()}
    seen: list[Any] = []
    look = {
        "on_fit_start": lambda t: None,
        "on_epoch_start": lambda t: seen.append(dict(t.optimizer.state.values())) or 0,
    }
    look["on_epoch_start"] = lambda t: seen.append([v.clone() for s in t.optimizer.state.values() for v in s.values()])
    fit(tmp_path, 4, partial(torch.optim.Adam, lr=1e-5), renew="optimizer", hooks=look)
    assert all(any(torch.equal(value, now) for now in seen[0]) for value in kept.values())


def test_groups_of_an_optimizer_are_compared_one_by_one(tmp_path: Path) -> None:
    class Grouped(weft.Trainer):
        rate = 0.1

        def configure_optimizers(self) -> Any:
            net = self.problem.net
            return torch.optim.SGD([{"params": [net.weight], "lr": self.rate}, {"params": [net.bias]}], lr=0.01)

    options: dict[str, Any] = {"epochs": 1, "progress": False, "checkpoint": True, "root_dir": str(tmp_path)}
    Grouped(run_name="a", **options).fit(Fit(), {"x": X})
    Grouped.rate = 0.2
    with pytest.warns(UserWarning, match=r"groups of optimizer default: .*lr: 0.1.* -> .*lr: 0.2"):
        Grouped(run_name="a", **options | {"epochs": 2}).fit(Fit(), {"x": X}, resume="auto")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (lambda o: lr_scheduler.StepLR(o, 1, 0.5), lambda o: lr_scheduler.StepLR(o, 100, 0.5)),
        (lambda o: lr_scheduler.LambdaLR(o, lambda e: 0.5**e), lambda o: lr_scheduler.LambdaLR(o, lambda e: 0.9**e)),
        (lambda o: lr_scheduler.OneCycleLR(o, 0.1, 99), lambda o: lr_scheduler.OneCycleLR(o, 0.2, 99)),
        (
            lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.ConstantLR(o), lr_scheduler.StepLR(o, 1)], [1]),
            lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.ConstantLR(o), lr_scheduler.StepLR(o, 2)], [1]),
        ),
        (lr_scheduler.ReduceLROnPlateau, lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=3)),
    ],
)
def test_any_argument_of_a_schedule_is_compared(before: Any, after: Any, tmp_path: Path) -> None:
    fit(tmp_path, 2, sgd_of(0.01), before)
    assert fit(tmp_path, 3, sgd_of(0.01), before)[1] == ""  # negative control
    assert "scheduler default: " in fit(tmp_path, 4, sgd_of(0.01), after)[1]


class Decay:
    """A user's object, of whose methods torch saves nothing."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def rate(self, epoch: int) -> float:
        return self.factor**epoch


FACTOR = 1.0


def by_a_global(factor: float) -> Any:
    def rate(epoch: int) -> float:
        return FACTOR**epoch

    def make(optimizer: Any) -> Any:
        globals()["FACTOR"] = factor
        return lr_scheduler.LambdaLR(optimizer, rate)

    return make


def by_nested_functions(factor: float) -> Any:
    def innermost() -> float:
        return factor

    def inner() -> float:
        return innermost()

    def one() -> float:
        return inner()

    return lambda o: lr_scheduler.LambdaLR(o, lambda e: one() ** e)


def by_a_sequence(factor: float) -> Any:
    def make(o: Any) -> Any:
        last = lr_scheduler.LambdaLR(o, lambda e: factor ** (e + 1))
        return lr_scheduler.SequentialLR(o, [lr_scheduler.ConstantLR(o, 1.0), last], [1])

    return make


FUNCTIONS: dict[str, Any] = {
    "closure": lambda f: lambda o: lr_scheduler.LambdaLR(o, lambda e: f**e),
    "global": by_a_global,
    "nested": by_nested_functions,
    "method": lambda f: lambda o: lr_scheduler.LambdaLR(o, Decay(f).rate),
    "partial": lambda f: lambda o: lr_scheduler.LambdaLR(o, partial(pow, f)),
    "sequence": by_a_sequence,
}


@pytest.mark.parametrize("way", FUNCTIONS)
def test_changed_functions_of_a_schedule_are_named_and_in_force(way: str, tmp_path: Path) -> None:
    """Torch saves none of them, so the checkpoint's cannot be."""
    make = FUNCTIONS[way]
    fit(tmp_path, 2, sgd_of(0.1), make(0.5))
    assert fit(tmp_path, 3, sgd_of(0.1), make(0.5))[1] == ""  # negative control
    rates, told, _ = fit(tmp_path, 5, sgd_of(0.1), make(0.9))
    assert "Changed since: functions of scheduler default: " in told and "In force is what stands here now" in told
    assert rates == [0.0125, round(0.1 * 0.9**4, 4)]  # that of the epoch that had begun, then the new ones


def test_a_changed_frequency_of_a_schedule_is_named_and_in_force(tmp_path: Path) -> None:
    def each(n: int) -> weft.Schedule:
        return weft.Schedule(lambda o: lr_scheduler.ExponentialLR(o, 0.5), frequency=n)

    fit(tmp_path, 2, sgd_of(0.1), each(1))
    rates, told, _ = fit(tmp_path, 6, sgd_of(0.1), each(2))
    assert "turns of scheduler default: nothing -> each 2, by None" in told
    assert "In force is what stands here now" in told and rates == [0.025, 0.025, 0.0125, 0.0125]


def test_a_schedule_of_any_class_is_renewed(tmp_path: Path) -> None:
    class Halving:
        def __init__(self, optimizer: Any, factor: float) -> None:
            self.groups, self.factor = optimizer.param_groups, factor

        def step(self) -> None:
            self.groups[0]["lr"] *= self.factor

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    whole = fit(tmp_path / "whole", 4, sgd_of(0.1), lambda o: Halving(o, 0.8))[0]
    fit(tmp_path / "cut", 2, sgd_of(0.1), lambda o: Halving(o, 0.5))
    assert (
        fit(tmp_path / "cut", 4, sgd_of(0.1), lambda o: Halving(o, 0.8), renew=("optimizer", "scheduler"))[0]
        == whole[2:]
    )


def test_a_new_schedule_is_as_far_as_one_that_was_there_from_the_beginning(tmp_path: Path) -> None:
    for number, schedule in enumerate((lambda o: lr_scheduler.StepLR(o, 3, 0.1), lr_scheduler.ReduceLROnPlateau)):
        expected = fit(tmp_path / f"whole-{number}", 6, sgd_of(0.01), schedule)[0]
        fit(tmp_path / str(number), 4, sgd_of(0.01))
        assert fit(tmp_path / str(number), 6, sgd_of(0.01), schedule, renew="scheduler")[0] == expected[4:]


def test_another_class_of_schedule_is_refused_unless_it_is_renewed(tmp_path: Path) -> None:
    fit(tmp_path, 2, sgd_of(0.01), cosine_rates(9))
    exponential = partial(lr_scheduler.ExponentialLR, gamma=0.5)
    with pytest.raises(ValueError, match=r"schedulers: .*CosineAnnealingLR.*renew='scheduler'"):
        fit(tmp_path, 4, sgd_of(0.01), exponential)
    assert fit(tmp_path, 4, sgd_of(0.01), exponential, renew="scheduler")[0] == [0.0025, 0.0013]


def test_changed_phases_are_named(tmp_path: Path) -> None:
    def phases(last: int) -> list[weft.Phase]:
        return [weft.Phase(epochs=1), weft.Phase(epochs=last, freeze=["net"] if last > 2 else [])]

    options: dict[str, Any] = {"progress": False, "checkpoint": True, "root_dir": str(tmp_path), "run_name": "a"}
    weft.Trainer(phases=phases(1), **options).fit(Fit(), {"x": X})
    with pytest.warns(UserWarning, match=r"phase 1: epochs=1.* -> epochs=2.*In force is what stands here now"):
        weft.Trainer(phases=phases(2), **options).fit(Fit(), {"x": X}, resume="auto")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"renew": "optimizer"}, "give resume as well"),
        ({"renew": ("moments",), "resume": "auto"}, "names 'moments'"),
        ({"epochs": -1}, "expected a whole number"),
    ],
)
def test_arguments_of_a_fit_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weft.Trainer(progress=False).fit(Fit(), {"x": X}, **arguments)


def test_a_fit_trains_as_many_epochs_as_it_is_asked_to() -> None:
    trainer, problem = weft.Trainer(epochs=5, progress=False), Fit()
    assert [trainer.fit(problem, {"x": X}, epochs=n).epochs for n in (2, 3, None, 0)] == [2, 5, 10, 10]
    with pytest.raises(ValueError, match="the phases last"):
        weft.Trainer(phases=[weft.Phase(epochs=1)], progress=False).fit(problem, {"x": X}, epochs=2)


@pytest.mark.parametrize("name", ["epochs", "resume", "renew"])
@pytest.mark.parametrize("kind", [weft.Trainer, partial(weft.LitTrainer, save_weights=False)])
def test_a_setup_function_cannot_have_an_argument_of_fit(kind: Any, name: str) -> None:
    def setup(n: int = 16, **more: Any) -> Any:
        return {"x": X[:n]}, None, None, 8

    named = eval(f"lambda n=16, {name}=None: setup(n)", {"setup": setup})
    with pytest.raises(TypeError, match=rf"parameter '{name}', which fit takes itself.*functools.partial"):
        kind(epochs=1, progress=False).fit(Fit(), named)
    assert kind(epochs=1, progress=False).fit(Fit(), partial(named, **{name: 3}), n=8).steps == 1


@pytest.mark.parametrize(
    ("schedule", "option"),
    [
        (cosine_rates(4), "T_max=4"),
        (weft.Schedule(lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=4), interval="step"), "total_steps=4"),
        (lambda o: lr_scheduler.PolynomialLR(o, 4), "total_iters=4"),
    ],
)
def test_a_second_fit_says_that_its_schedule_is_used_up(schedule: Any, option: str) -> None:
    trainer, problem = weft.Trainer(epochs=4, optimizer=sgd_of(0.01), scheduler=schedule, progress=False), Fit()
    trainer.fit(problem, {"x": X})
    with pytest.warns(UserWarning, match=rf"{option}\) is used up: it has made 4 steps"):
        trainer.fit(problem, {"x": X}, epochs=0)


SEVERAL: dict[str, tuple[Any, str]] = {
    "after a warm-up": (
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 2)], [2]
        ),
        r"\(CosineAnnealingLR, T_max=2\) is used up",
    ),
    "in a chain": (
        lambda o: lr_scheduler.ChainedScheduler(
            [lr_scheduler.CosineAnnealingLR(o, 4), lr_scheduler.LinearLR(o, total_iters=2)]
        ),
        r"\(CosineAnnealingLR, T_max=4\) is used up",
    ),
    "a function": (
        lambda o: lr_scheduler.LambdaLR(o, lambda e: 1 - e / 4),
        r"\(LambdaLR\) has come down to a rate of 0",
    ),
    "a line": (lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, 4), r"\(LinearLR\) has come down to a rate of 0"),
}


@pytest.mark.parametrize("what", SEVERAL)
def test_schedules_of_several_and_rates_of_nothing_are_told_in_a_second_fit(what: str) -> None:
    schedule, message = SEVERAL[what]
    trainer, problem = weft.Trainer(epochs=4, optimizer=sgd_of(0.01), scheduler=schedule, progress=False), Fit()
    trainer.fit(problem, {"x": X})
    with pytest.warns(UserWarning, match=message) as told:
        trainer.fit(problem, {"x": X}, epochs=0)
    assert len(told) == 1


@pytest.mark.parametrize(
    "schedule",
    [
        cosine_rates(4),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.CosineAnnealingLR(o, 1), lr_scheduler.ConstantLR(o, 1.0)], [1]
        ),
    ],
)
def test_a_second_fit_within_its_schedule_says_nothing(schedule: Any) -> None:
    trainer, problem = weft.Trainer(epochs=2, optimizer=sgd_of(0.01), scheduler=schedule, progress=False), Fit()
    trainer.fit(problem, {"x": X})
    trainer.fit(problem, {"x": X})


# ---- what no checkpoint holds ----------------------------------------------------------------------------------------

NOISE = torch.Generator().manual_seed(1)


class Counts(weft.Hook):
    def __init__(self) -> None:
        self.steps, self.kept = 0, torch.zeros(1)

    def on_step_end(self, trainer: Any, batch: Any, loss: Any) -> None:
        self.steps += 1
        self.kept += 1


class Saved(Counts):
    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "kept": self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.kept = state["steps"], state["kept"]


def noisy_step(trainer: Any, batch: Any) -> Any:
    return trainer.problem(batch)["train_loss"] + 0 * torch.rand(1, generator=NOISE).sum()


class NoisySteps(weft.Trainer):
    def training_step(self, batch: Any) -> Any:
        return noisy_step(self, batch)


def of_closure() -> Any:
    hidden = torch.Generator()
    return {"on_step_end": lambda trainer, batch, loss: torch.rand(1, generator=hidden)}


FORGOTTEN: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a hook's numbers": (weft.Trainer, {"hooks": [Counts()]}, r"Hook Counts\.steps, Hook Counts\.kept"),
    "of the module, in a step": (weft.Trainer, {"training_step": noisy_step}, "the random generator NOISE"),
    "of the module, in a subclass": (NoisySteps, {}, "the random generator NOISE"),
    "in a closure of a hook": (weft.Trainer, {"hooks": [of_closure()]}, "the random generator hidden"),
}


@pytest.mark.parametrize("what", FORGOTTEN)
def test_what_changes_and_is_in_no_checkpoint_gets_one_line(what: str, tmp_path: Path) -> None:
    kind, options, message = FORGOTTEN[what]
    trainer = kind(epochs=3, progress=False, checkpoint=True, root_dir=str(tmp_path), **options)
    with pytest.warns(UserWarning, match=rf"No checkpoint holds {message}") as caught:
        trainer.fit(Fit(), {"x": X})
    assert len(caught) == 1


class CountsEpochs(torch.utils.data.Sampler):
    """An order that is a function of how often it was asked for."""

    def __init__(self) -> None:
        self.epoch = 0

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Any:
        self.epoch += 1
        return iter(torch.randperm(8, generator=torch.Generator().manual_seed(self.epoch)).tolist())


class IsTold(CountsEpochs):
    """One whose epoch is told from outside, which a hook does after a resume too."""

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        return iter(range(8))


class CountsRows(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.seen = 0

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.seen += 1
        return {"x": torch.full((1,), 1.0 / self.seen)}


ROWS = [{"x": row} for row in X[:8]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: DataLoader(ROWS, batch_size=4, sampler=CountsEpochs()), "the train data's CountsEpochs.epoch"),
        (lambda: weft.Data(CountsRows(), batch_size=4), "the train data's CountsRows.seen"),
        (lambda: weft.Data({"x": X}, CountsRows(), batch_size=4), "the dev data's CountsRows.seen"),
    ],
)
def test_what_data_counts_itself_and_no_checkpoint_holds_gets_one_line(data: Any, message: str, tmp_path: Path) -> None:
    trainer = weft.Trainer(epochs=3, progress=False, checkpoint=True, root_dir=str(tmp_path))
    with pytest.warns(UserWarning, match=rf"No checkpoint holds {message}") as caught:
        trainer.fit(Fit(), data())
    assert len(caught) == 1


def test_what_is_told_to_a_sampler_from_outside_gets_none(tmp_path: Path) -> None:
    sampler = IsTold()
    hook = {"on_epoch_start": lambda trainer: sampler.set_epoch(trainer.current_epoch)}
    trainer = weft.Trainer(epochs=3, progress=False, checkpoint=True, root_dir=str(tmp_path), hooks=hook)
    trainer.fit(Fit(), DataLoader(ROWS, batch_size=4, sampler=sampler))


def test_what_is_saved_or_does_not_change_or_is_not_asked_for_gets_none(tmp_path: Path) -> None:
    weft.Trainer(epochs=2, progress=False, hooks=[Counts()]).fit(Fit(), {"x": X})
    weft.Trainer(epochs=2, progress=False, hooks=[Saved()], checkpoint=True, root_dir=str(tmp_path)).fit(
        Fit(), {"x": X}
    )
