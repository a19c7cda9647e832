"""The optimizers of this wing as optimizers of a fit: counted, told, resumed, refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from tests.helpers.bitwise import flat_weights, same
from tests.helpers.problems import tanh_net, tanh_points

ALL = pytest.mark.parametrize("name", ["SSBFGS", "SSBroyden", "LevenbergMarquardt", "NaturalGradient"])
BEHIND_THE_LOSS = ("LevenbergMarquardt", "NaturalGradient")


def sum_of_squares(**terms: Any) -> weft.Problem:
    torch.manual_seed(0)
    node = weft.Node(tanh_net(2, 1), ["x"], ["u"], name="net")
    fit = weft.residual(lambda u, y: u - y, weight=2.0, name="fit")
    small = weft.residual(lambda u: 0.1 * u, name="small")
    cap = weft.less_equal("u", 0.3, norm=2, weight=5.0, name="cap")
    return weft.Problem([node], **({"objectives": [fit, small], "constraints": [cap]} | terms))


def fit_by(name: str, p: weft.Problem | None = None, epochs: int = 4, resume: Any = None, **options: Any) -> Any:
    trainer = weft.Trainer(
        **{
            "epochs": epochs,
            "optimizer": lambda params: getattr(weft.optim, name)(params, max_iter=2),
            "precision": "64-true",
            "progress": False,
        }
        | options
    )
    p = sum_of_squares() if p is None else p
    result = trainer.fit(p, weft.Data(weft.DictDataset(tanh_points(20)), shuffle=False), resume=resume)
    return result, p, trainer


@ALL
def test_a_fit_goes_where_steps_by_hand_go(name: str) -> None:
    result, p, trainer = fit_by(name)
    by_hand = sum_of_squares().double()
    batch = {k: v.double() for k, v in tanh_points(20).items()}
    optimizer = getattr(weft.optim, name)(list(by_hand.parameters()), max_iter=2)
    closure = weft.optim.LeastSquares(by_hand, batch)
    losses, evaluations = [], []
    for _ in range(4):
        calls: list[int] = []

        def counted(calls: list[int] = calls) -> Any:
            calls.append(1)
            by_hand.zero_grad()
            loss = by_hand(batch)["train_loss"]
            loss.backward()
            return loss

        closure = weft.optim.LeastSquares(by_hand, batch, evaluate=counted, rows=getattr(optimizer, "rows", None))
        optimizer.step(closure)
        losses.append(float(by_hand(batch)["train_loss"].detach()))
        evaluations.append(len(calls) + optimizer.evaluations)
    assert same(flat_weights(p), flat_weights(by_hand))
    assert result.history["train_loss"] == pytest.approx(losses, rel=1e-14) and losses == sorted(losses, reverse=True)
    assert result.history[f"{name.lower()}_evaluations"] == evaluations
    assert result.search_stop == "max_iter" and trainer.run.progress.evaluations == sum(evaluations)
    assert not same(flat_weights(fit_by(name, epochs=3)[1]), flat_weights(p))


@ALL
def test_a_resumed_run_ends_bitwise_where_the_uninterrupted_one_does(name: str, tmp_path: Path) -> None:
    _, want, _ = fit_by(name, epochs=6)
    files = {"root_dir": str(tmp_path), "run_name": "run", "checkpoint": True}
    fit_by(name, epochs=3, **files)
    torch.manual_seed(7)
    result, found, _ = fit_by(name, p=curve_elsewhere(), epochs=6, resume="last", **files)
    assert result.epochs == 6 and same(flat_weights(found), flat_weights(want))
    assert not same(flat_weights(fit_by(name, epochs=5)[1]), flat_weights(want))


@ALL
def test_a_resumed_run_may_have_other_options(name: str, tmp_path: Path) -> None:
    files = {"root_dir": str(tmp_path), "run_name": "run", "checkpoint": True}
    fit_by(name, epochs=2, **files)
    trainer = weft.Trainer(
        epochs=4,
        optimizer=lambda params: getattr(weft.optim, name)(params, max_iter=3),
        precision="64-true",
        progress=False,
        **files,
    )
    data = weft.Data(weft.DictDataset(tanh_points(20)), shuffle=False)
    with pytest.warns(UserWarning, match="In force is what stands here now"):
        trainer.fit(sum_of_squares(), data, resume="last", renew=("optimizer",))
    assert trainer.optimizer.param_groups[0]["max_iter"] == 3


def curve_elsewhere() -> weft.Problem:
    p = sum_of_squares()
    with torch.no_grad():
        for q in p.parameters():
            q.add_(1.0)
    return p


@ALL
def test_a_later_phase_freezes_and_weighs_terms_anew(name: str) -> None:
    p = sum_of_squares()
    layer = next(m for n, m in p.named_modules() if n.endswith("0") and isinstance(m, torch.nn.Linear))
    path = next(n for n, m in p.named_modules() if m is layer)
    seen = []
    second = weft.Phase(epochs=2, freeze=[path], weights={"small": 30.0})
    phases = [weft.Phase(epochs=2, optimizer=getattr(weft.optim, name)), second]
    hooks = {"on_epoch_end": lambda trainer, metrics: seen.append((layer.weight.detach().clone(), flat_weights(p)))}
    result, _, _ = fit_by(name, p=p, phases=phases, hooks=[hooks])
    assert not same(seen[0][0], seen[1][0]) and same(seen[1][0], seen[3][0])
    assert not same(seen[1][1], seen[3][1])
    assert result.history["train_loss"][3] < result.history["train_loss"][2]
    assert result.history["train_small"][2] > 10 * result.history["train_small"][1]


@pytest.mark.parametrize("name", BEHIND_THE_LOSS)
def test_what_cannot_be_seen_into_is_refused_before_anything_moves(name: str) -> None:
    p = sum_of_squares(constraints=[weft.less_equal("u", 0.3, name="cap")])
    before = flat_weights(p)
    with pytest.raises(TypeError, match=r"constraint 'cap'.*norm=2"):
        fit_by(name, p=p)
    assert same(flat_weights(p), before.double()) or same(flat_weights(p), before)
    with pytest.raises(ValueError, match=r"residuals of a step together.*accumulate=2"):
        fit_by(name, accumulate=2)
    with pytest.raises(ValueError, match="bf16-mixed"):
        fit_by(name, precision="bf16-mixed")

    def step(trainer: Any, batch: Any) -> Any:
        return trainer.problem(batch)["train_loss"] * 2

    with pytest.raises(ValueError, match=r"The loss must be what `residuals\(batch\)` says"):
        fit_by(name, training_step=step)


@ALL
def test_minibatches_and_clipping_are_said(name: str) -> None:
    trainer = weft.Trainer(epochs=1, optimizer=getattr(weft.optim, name), precision="64-true", progress=False)
    with pytest.warns(UserWarning, match=f"{name} uses what it learned of one batch for the next.*5 batches"):
        trainer.fit(sum_of_squares(), weft.Data(tanh_points(20), batch_size=4))
    with pytest.warns(UserWarning, match=f"clip=1.0 has no effect with {name}"):
        fit_by(name, clip=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_by(name, epochs=1)


@pytest.mark.long
@ALL
def test_where_float32_ends_the_search_float64_is_recommended(name: str) -> None:
    with pytest.warns(UserWarning, match=f"{name} no longer finds a lower loss.*precision='64-true'"):
        fit_by(name, epochs=80, precision="32-true", optimizer=getattr(weft.optim, name))


@ALL
def test_a_loss_that_is_not_finite_leaves_the_weights_and_what_was_learned(name: str) -> None:
    def broken(u: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (u - y) * (torch.nan if len(kept) == 2 else 1.0)

    kept: list[torch.Tensor] = []
    p = sum_of_squares(objectives=[weft.residual(broken, name="fit")], constraints=[])
    hooks = {"on_epoch_end": lambda trainer, metrics: kept.append(flat_weights(p))}
    with pytest.raises(FloatingPointError):
        fit_by(name, p=p, hooks=[hooks])
    assert len(kept) == 2 and same(flat_weights(p), kept[1])
