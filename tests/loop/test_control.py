"""The four ways to take control: a step, hooks, a subclass, a loop of one's own. Each against its logic by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from tests.helpers.bitwise import same
from tests.helpers.byhand import BATCH, EPOCHS, OPTIMIZERS, ROWS, by_hand, data, problem, slices, tensors, trained

ADAM = OPTIMIZERS["adam"]


# ---------------------------------------------------------------- 1. a step


def test_a_step_that_keeps_its_past_loss_on_the_trainer_trains_as_by_hand() -> None:
    def custom_training_step(model: Any, batch: dict[str, Any]) -> Tensor:  # as for NeuroMANCER's LitTrainer
        output = model.problem(batch)
        loss = output[model.train_metric]
        if hasattr(model, "past_loss"):
            loss = loss + 0.1 * (loss - model.past_loss) ** 2
        model.past_loss = loss.detach()
        return loss

    ours, theirs, plain = problem(), problem(), problem()
    result = trained(ours, optimizer=ADAM, training_step=custom_training_step)
    optimizer, past = ADAM(theirs.parameters()), None
    for _ in range(EPOCHS):
        for batch in slices():
            optimizer.zero_grad()
            loss = theirs(batch)["train_loss"]
            if past is not None:
                loss = loss + 0.1 * (loss - past) ** 2
            past = loss.detach()
            loss.backward()
            optimizer.step()
    by_hand(plain, ADAM(plain.parameters()))
    assert same(result.last_weights, dict(theirs.state_dict()))
    assert not same(result.last_weights, dict(plain.state_dict()))


def test_a_step_may_use_the_epoch_the_state_and_the_log_and_return_a_dict() -> None:
    def step(trainer: weft.Trainer, batch: dict[str, Any]) -> dict[str, Any]:
        trainer.state["seen"] = trainer.state.get("seen", 0) + len(batch["x"])
        trainer.log("epoch_number", trainer.current_epoch)
        out = trainer.problem(batch)
        return {"loss": out["train_loss"] * (1 + trainer.current_epoch), "largest": out["y"].abs().max(), "note": "x"}

    ours, theirs = problem(), problem()
    trainer = weft.Trainer(epochs=3, progress=False, optimizer=ADAM, training_step=step)
    result = trainer.fit(ours, data())
    optimizer = ADAM(theirs.parameters())
    for epoch in range(3):
        for batch in slices():
            optimizer.zero_grad()
            (theirs(batch)["train_loss"] * (1 + epoch)).backward()
            optimizer.step()
    assert same(result.last_weights, dict(theirs.state_dict()))
    assert trainer.state == {"seen": 3 * ROWS}
    assert result.history["epoch_number"] == [0.0, 1.0, 2.0]
    assert sorted(result.history) == ["epoch_number", "train_largest", "train_loss"]


def test_evaluation_steps_replace_what_is_measured_and_predicted() -> None:
    def mean_error(trainer: weft.Trainer, batch: dict[str, Any]) -> Tensor:
        assert not trainer.problem.training
        assert not torch.is_grad_enabled()
        return (trainer.problem.net(batch["x"]) - batch["t"]).abs().mean()  # pyright: ignore[reportCallIssue]

    module, dev = problem(), tensors(20)
    trainer = weft.Trainer(
        epochs=2,
        progress=False,
        validation_step=mean_error,
        test_step=lambda t, b: {"loss": mean_error(t, b) * 2},
        predict_step=lambda trainer, batch: {"twice": 2 * trainer.problem.net(batch["x"])},
    )
    result = trainer.fit(module, weft.Data(tensors(), dev, dev, batch_size=BATCH))
    with torch.no_grad():
        y = module.net(dev["x"])
        exact = (y - dev["t"]).abs().mean().item()
    assert result.best_metric == min(result.history["dev_loss"])
    assert trainer.validate() == {"dev_loss": pytest.approx(exact, rel=1e-6)}
    assert trainer.test() == {"test_loss": pytest.approx(2 * exact, rel=1e-6)}
    assert torch.allclose(trainer.predict(dev)["twice"], 2 * y)
    assert list(trainer.predict(dev)) == ["twice"]


# ---------------------------------------------------------------- 2. hooks


def weighted(weight: float = 1.0) -> weft.Problem:
    return weft.Problem(
        [weft.Node(problem().net, ["x"], ["y"], name="net")],
        [
            weft.objective(lambda y, t: (y - t) ** 2, name="fit"),
            weft.objective(lambda y: y**2, weight=weight, name="size"),
        ],
    )


def test_a_hook_that_changes_the_weight_of_a_term_after_an_epoch_trains_as_by_hand() -> None:
    def on_epoch_end(trainer: Any, metrics: dict[str, float]) -> None:
        if trainer.current_epoch == 1:
            trainer.problem.terms["size"].weight.fill_(5.0)

    ours, net, unchanged = weighted(), problem().net, weighted()
    result = trained(ours, optimizer=ADAM, hooks={"on_epoch_end": on_epoch_end})
    fixed = trained(unchanged, optimizer=ADAM)
    optimizer = ADAM(net.parameters())
    for epoch in range(EPOCHS):
        for batch in slices():
            optimizer.zero_grad()
            y = net(batch["x"])
            fit, size = ((y - batch["t"]) ** 2).mean(), (5.0 if epoch > 1 else 1.0) * (y**2).mean()
            (fit + size).backward()
            optimizer.step()
    weights = {key.removeprefix("nodes.0.fn."): v for key, v in result.last_weights.items() if "nodes" in key}
    assert same(weights, dict(net.state_dict()))
    assert not same(result.last_weights, fixed.last_weights)
    assert result.history["train_size"][2] > 2 * result.history["train_size"][1]


def test_a_hook_may_change_gradients_and_learning_rates_before_the_step() -> None:
    class Halve(weft.Hook):
        def on_before_optimizer_step(self, trainer: Any, optimizer: torch.optim.Optimizer) -> None:
            for p in trainer.problem.parameters():
                p.grad.mul_(0.5)

        def on_epoch_start(self, trainer: Any) -> None:
            trainer.optimizer.param_groups[0]["lr"] = 0.1 / (1 + trainer.current_epoch)

    sgd = OPTIMIZERS["sgd"]
    ours, theirs = problem(), problem()
    result = trained(ours, optimizer=sgd, hooks=[Halve()])
    optimizer = sgd(theirs.parameters())
    optimizer.param_groups[0]["lr"] = 0.1
    epochs = iter(range(2, 99))

    def halve() -> None:
        for p in theirs.parameters():
            assert p.grad is not None
            p.grad.mul_(0.5)

    def slower(loss: float) -> None:
        optimizer.param_groups[0]["lr"] = 0.1 / next(epochs)

    by_hand(theirs, optimizer, before_step=halve, after_epoch=slower)
    assert same(result.last_weights, dict(theirs.state_dict()))


# ---------------------------------------------------------------- 3. a subclass


def test_a_subclass_may_override_steps_and_optimizers() -> None:
    class Mine(weft.Trainer):
        def training_step(self, batch: Any) -> Any:
            return super().training_step(batch)["train_loss"] * 2

        def configure_optimizers(self) -> Any:
            return OPTIMIZERS["momentum"](self.problem.parameters())

    ours, theirs = problem(), problem()
    result = Mine(epochs=EPOCHS, progress=False).fit(ours, data())
    optimizer = OPTIMIZERS["momentum"](theirs.parameters())
    for _ in range(EPOCHS):
        for batch in slices():
            optimizer.zero_grad()
            (2 * theirs(batch)["train_loss"]).backward()
            optimizer.step()
    assert same(result.last_weights, dict(theirs.state_dict()))


def test_an_update_of_ones_own_uses_backward_and_step_and_counts_once_a_batch() -> None:
    class TwoSteps(weft.Trainer):
        def update(self, batch: Any) -> Any:
            for _ in range(2):
                loss = self.problem(batch)[self.train_metric]
                self.backward(loss)
                self.step()
            return loss

    steps: list[float] = []
    ours, theirs = problem(), problem()
    hooks = {"on_step_end": lambda trainer, batch, loss: steps.append(loss.item())}
    result = TwoSteps(epochs=EPOCHS, progress=False, optimizer=ADAM, clip=0.05, hooks=hooks).fit(ours, data())
    optimizer, losses = ADAM(theirs.parameters()), []
    for _ in range(EPOCHS):
        for batch in slices():
            for _ in range(2):
                optimizer.zero_grad()
                loss = theirs(batch)["train_loss"]
                loss.backward()
                nn.utils.clip_grad_norm_(theirs.parameters(), 0.05)
                optimizer.step()
            losses.append(loss.item())
    assert same(result.last_weights, dict(theirs.state_dict()))
    assert steps == losses
    assert result.steps == len(losses)


@pytest.mark.parametrize("returned", ["tensor", "detached", "dict", "number", "nothing", "built-in"])
def test_what_an_update_returns_is_logged(returned: str) -> None:
    class Mine(weft.Trainer):
        def update(self, batch: Any) -> Any:
            if returned == "built-in":
                return super().update(batch)
            loss = self.problem(batch)[self.train_metric]
            self.backward(loss)
            self.step()
            kinds = {"tensor": loss, "detached": loss.detach(), "number": {"train_loss": loss.item()}, "nothing": None}
            return kinds.get(returned, {"loss": loss, "extra": 1.0})

    module = problem()
    with pytest.warns(UserWarning, match="does not appear") if returned == "nothing" else nullcontext():
        result = Mine(epochs=EPOCHS, progress=False, optimizer=ADAM).fit(module, data())
    theirs = problem()
    curve = by_hand(theirs, ADAM(theirs.parameters()))
    assert same(result.last_weights, dict(theirs.state_dict()))
    if returned != "nothing":
        assert result.history["train_loss"] == pytest.approx(curve, rel=1e-6)
    assert set(result.history) == {"nothing": set(), "dict": {"train_loss", "train_extra"}}.get(
        returned, {"train_loss"}
    )


# ---------------------------------------------------------------- several optimizers


class Game(nn.Module):
    """A generator that maps noise to numbers and a critic that tells them from the data."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
        self.critic = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        fake = self.generator(batch["x"])
        real, guess = self.critic(batch["t"]), self.critic(fake)
        return {
            "generator": nn.functional.softplus(-guess).mean(),
            "critic": (nn.functional.softplus(-real) + nn.functional.softplus(guess)).mean(),
        }

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return self.losses(batch)


def two(game: Game | None = None) -> dict[str, Any]:
    made: dict[str, Callable[[Any], Any]] = {
        "generator": lambda p: torch.optim.Adam(p, lr=1e-2),
        "critic": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5),
    }
    return made if game is None else {k: fn(getattr(game, k).parameters()) for k, fn in made.items()}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_returns_a_loss_for_each_optimizer_takes_all_gradients_before_any_step(accumulate: int) -> None:
    ours, theirs, in_turn = Game(), Game(), Game()
    with pytest.warns(
        UserWarning, match=r"smallest sum of the losses of \['generator', 'critic'\].*monitor_metric=False"
    ) as told:
        result = trained(ours, optimizer=two(), accumulate=accumulate)
    assert len(told) == 1

    optimizers, batches = two(theirs), list(slices())
    for _ in range(EPOCHS):
        for first in range(0, len(batches), accumulate):
            group = batches[first : first + accumulate]
            rows = sum(len(batch["x"]) for batch in group)
            for batch in group:
                share = len(batch["x"]) / rows
                for name, loss in theirs.losses(batch).items():
                    loss = loss if share == 1 else loss * share
                    params = list(getattr(theirs, name).parameters())
                    for p, grad in zip(params, torch.autograd.grad(loss, params, retain_graph=True), strict=True):
                        p.grad = grad if p.grad is None else p.grad + grad
            for optimizer in optimizers.values():
                optimizer.step()
                optimizer.zero_grad()
    assert same(result.last_weights, dict(theirs.state_dict()))
    if accumulate == 1:
        train_alternating(in_turn)
        assert not same(result.last_weights, dict(in_turn.state_dict()))
    assert {"train_generator", "train_critic", "train_loss"} <= set(result.history)
    total = [g + c for g, c in zip(result.history["train_generator"], result.history["train_critic"], strict=True)]
    assert result.history["train_loss"] == pytest.approx(total, rel=1e-6)


def train_alternating(game: Game) -> None:
    optimizers = two(game)
    for _ in range(EPOCHS):
        for batch in slices():
            for name in ("critic", "generator"):
                loss = game.losses(batch)[name]
                game.zero_grad()
                loss.backward()
                optimizers[name].step()


def test_alternating_updates_as_a_gan_wants_them_go_into_update() -> None:
    class Alternating(weft.Trainer):
        def update(self, batch: Any) -> dict[str, Tensor]:
            losses = {}
            for name in ("critic", "generator"):
                losses[name] = self.problem.losses(batch)[name]  # pyright: ignore[reportCallIssue]
                self.problem.zero_grad()
                self.backward(losses[name])
                self.step(name)
            return losses

    ours, theirs = Game(), Game()
    result = Alternating(epochs=EPOCHS, progress=False, optimizer=two(), monitor_metric="train_critic").fit(
        ours, data()
    )
    train_alternating(theirs)
    assert same(result.last_weights, dict(theirs.state_dict()))
    assert result.steps == 5 * EPOCHS
    assert set(result.history) == {"train_critic", "train_generator"}


def test_if_one_of_several_gradients_is_not_finite_no_optimizer_steps() -> None:
    class Broken(Game):
        def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
            losses = self.losses(batch)
            return {**losses, "critic": losses["critic"] * torch.inf}

    game = Broken()
    before = {k: v.clone() for k, v in game.state_dict().items()}
    with pytest.raises(FloatingPointError, match="train_critic is inf in step 0"):
        trained(game, optimizer=two(), monitor_metric=False)
    assert same(before, dict(game.state_dict()))


# ---------------------------------------------------------------- 4. a loop of one's own


def test_fit_is_the_loop_that_a_user_may_write() -> None:
    def options() -> dict[str, Any]:
        return {"epochs": EPOCHS, "progress": False, "optimizer": ADAM, "patience": 2}

    ours, theirs = problem(), problem()
    given = weft.Data(tensors(), tensors(20), batch_size=BATCH)
    torch.manual_seed(7)
    fitted = weft.Trainer(**options()).fit(theirs, given)
    torch.manual_seed(7)
    with weft.Trainer(**options()).start(ours, given) as run:
        for _ in run.epochs():
            for batch in run.batches("train"):
                run.update(batch)
            run.evaluate("dev")
    assert run.result is not None
    assert same(run.result.last_weights, fitted.last_weights)
    assert same(dict(ours.state_dict()), dict(theirs.state_dict()))
    assert run.result.history == fitted.history
    assert (run.result.steps, run.result.best_epoch) == (fitted.steps, fitted.best_epoch)


def test_backward_and_step_of_a_loop_of_ones_own_equal_pytorch(tmp_path: Any) -> None:
    events: list[str] = []
    hooks = {
        name: (lambda *args, name=name: events.append(name))
        for name in ("on_step_start", "on_before_optimizer_step", "on_step_end", "on_epoch_end", "on_fit_end")
    }
    ours, theirs = problem(), problem()
    trainer = weft.Trainer(
        epochs=EPOCHS,
        progress=False,
        optimizer=ADAM,
        clip=0.05,
        hooks=hooks,
        root_dir=str(tmp_path),
        checkpoint=True,
        scheduler=weft.Schedule(lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9), interval="step"),
    )
    with trainer.start(ours, data()) as run:
        for _ in run.epochs():
            for batch in run.batches():
                loss = run.problem(batch)["train_loss"]
                run.backward(loss)
                assert run.step()
                run.log({"rows": len(batch["x"])})
    optimizer = ADAM(theirs.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    curve = by_hand(
        theirs,
        optimizer,
        before_step=lambda: nn.utils.clip_grad_norm_(theirs.parameters(), 0.05),
        after_step=scheduler.step,
    )
    assert run.result is not None
    assert same(run.result.last_weights, dict(theirs.state_dict()))
    assert run.result.history["train_loss"] == pytest.approx(curve, rel=1e-12)
    assert run.result.history["rows"] == [pytest.approx(ROWS / 5)] * EPOCHS
    counts = {name: events.count(name) for name in hooks}
    assert counts == {
        "on_step_start": 20,
        "on_before_optimizer_step": 20,
        "on_step_end": 20,
        "on_epoch_end": 4,
        "on_fit_end": 1,
    }
    assert events[:3] == ["on_step_start", "on_before_optimizer_step", "on_step_end"]
    loaded = weft.load_weights(problem(1), run.run_dir / "checkpoints" / "step-000000020.ckpt")  # pyright: ignore[reportOptionalOperand]
    assert same(dict(loaded.state_dict()), run.result.last_weights)


def test_break_closes_the_epoch_as_if_it_had_ended() -> None:
    closed: list[float] = []
    hooks = {"on_epoch_end": lambda trainer, metrics: closed.append(metrics["train_loss"])}
    ours, theirs = problem(), problem()
    with weft.Trainer(epochs=9, progress=False, optimizer=ADAM, hooks=hooks).start(ours, data()) as run:
        for epoch in run.epochs():
            for number, batch in enumerate(run.batches()):
                if number == 2:
                    break
                run.update(batch)
            if epoch == 2:
                break
    optimizer = ADAM(theirs.parameters())
    curve = []
    for _ in range(3):
        losses = []
        for batch in list(slices())[:2]:
            optimizer.zero_grad()
            loss = theirs(batch)["train_loss"]
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curve.append(sum(losses) / 2)
    assert run.result is not None
    assert same(run.result.last_weights, dict(theirs.state_dict()))
    assert closed == run.result.history["train_loss"] == pytest.approx(curve, rel=1e-12)
    assert (run.result.epochs, run.result.steps, run.result.stop_reason) == (3, 6, "epochs")


def test_a_loop_of_ones_own_may_catch_an_error_and_go_on() -> None:
    caught = 0
    module = problem()
    with weft.Trainer(epochs=2, progress=False).start(module, data()) as run:
        for _ in run.epochs():
            for number, batch in enumerate(run.batches()):
                try:
                    run.update({**batch, "x": batch["x"] * (torch.nan if number == 1 else 1.0)})
                except FloatingPointError:
                    caught += 1
    assert run.result is not None
    assert (caught, run.result.steps) == (2, 8)


def test_batches_of_any_split_and_the_best_of_evaluated_epochs_only() -> None:
    module = problem()
    with weft.Trainer(epochs=5, progress=False).start(module, weft.Data(tensors(), tensors(20), batch_size=8)) as run:
        for epoch in run.epochs():
            for batch in run.batches():
                run.update(batch)
            if epoch in (1, 3):
                metrics = run.evaluate()
                assert sum(len(batch["x"]) for batch in run.batches("dev")) == 20
    assert run.result is not None
    measured = [i for i, value in enumerate(run.result.history["dev_loss"]) if not math.isnan(value)]
    assert measured == [1, 3]
    assert run.result.best_epoch in (1, 3)
    assert metrics["dev_loss"] == run.result.history["dev_loss"][3]
