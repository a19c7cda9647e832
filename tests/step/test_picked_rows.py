"""A term that picks rows by a mask counts for those that it returned; where it hides them, that is told."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(20, 2, generator=G), torch.randn(20, 1, generator=G)
SEEN = torch.arange(20)[:, None] % 7 < torch.linspace(1, 7, 20)[:, None]
DATA = {"x": X, "y": Y, "m": SEEN}

PICKS: dict[str, Callable[..., Tensor]] = {
    "indexed by the mask": lambda u, y, m: ((u - y) ** 2)[m],
    "both sides indexed": lambda u, y, m: (u[m[:, 0]] - y[m[:, 0]]) ** 2,
    "masked_select": lambda u, y, m: torch.masked_select((u - y) ** 2, m),
    "nonzero": lambda u, y, m: ((u - y) ** 2)[m[:, 0].nonzero()[:, 0]],
    "not nan": lambda u, y, m: (u[~(z := torch.where(m, y, torch.nan)).isnan()] - z[~z.isnan()]) ** 2,
}


def picking(fn: Callable[..., Tensor], *more: Any, **options: Any) -> weft.Problem:
    torch.manual_seed(0)
    objectives = [weft.objective(fn, name="m"), *more]
    return weft.Problem([weft.Node(nn.Linear(2, 1), ["x"], ["u"])], objectives, **options)


def fit_picking(p: weft.Problem, size: int | None, **options: Any) -> tuple[Tensor, Any]:
    options = {"epochs": 1, "progress": False, "optimizer": lambda q: torch.optim.SGD(q, lr=0.1), **options}
    result = weft.Trainer(**options).fit(p, weft.Data(DATA, DATA, batch_size=size, shuffle=False))
    return torch.cat([q.detach().flatten() for q in p.parameters()]), result


@pytest.mark.parametrize("name", PICKS)
def test_means_and_accumulated_updates_are_those_of_the_rows_that_were_picked(
    name: str, no_warnings: list[Any]
) -> None:
    whole, one = fit_picking(picking(PICKS[name]), None)
    parts, several = fit_picking(picking(PICKS[name]), 5, accumulate=4)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    for key in ("train_m", "train_loss", "dev_loss", "dev_objective_loss"):
        assert several.history[key] == pytest.approx(one.history[key], rel=1e-5)
    assert not no_warnings


def test_a_weighted_square_in_its_place_goes_by_the_rows_of_its_batches() -> None:
    """The negative control: the same numbers, of which nobody knows how many they are."""
    hidden = lambda u, y, m: ((u - y) ** 2 * m).sum() / m.sum()
    whole, one = fit_picking(picking(hidden), None)
    parts, several = fit_picking(picking(hidden), 5, accumulate=4)
    assert not torch.allclose(parts, whole, rtol=1e-3)
    assert several.history["dev_loss"] != pytest.approx(one.history["dev_loss"], rel=1e-3)


def test_of_several_terms_each_counts_for_its_own_rows_and_the_loss_is_their_sum() -> None:
    more = [weft.objective(lambda u: u**2, name="size"), weft.objective(lambda u, m: u[~m].abs(), name="rest")]
    limits = [weft.less_equal(lambda u, m: u[m], 0.1, weight=3.0, name="limit")]
    p = picking(PICKS["indexed by the mask"], *more, constraints=limits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fit_picking(p, 3, optimizer=lambda q: torch.optim.SGD(q, lr=0.0))[1]
    with torch.no_grad():
        true = p({**DATA, "name": "dev"})
    for split in ("train", "dev"):
        for key in ("m", "size", "rest", "limit", "limit_violation", "loss", "objective_loss", "penalty_loss"):
            assert result.history[f"{split}_{key}"][0] == pytest.approx(float(true[f"dev_{key}"]), rel=1e-5), key
    with pytest.warns(UserWarning, match="accumulate=2: .*count by weights of their own"):
        fit_picking(picking(PICKS["masked_select"], *more), 3, accumulate=2)


def test_metrics_beside_it_are_means_over_the_rows_of_the_batch() -> None:
    metrics = {"mae": lambda u, y: (u - y).abs().mean()}
    p = picking(PICKS["masked_select"])
    result = fit_picking(p, 3, metrics=metrics, optimizer=lambda q: torch.optim.SGD(q, lr=0.0))[1]
    with torch.no_grad():
        true = float((p.nodes[0]({"x": X})["u"] - Y).abs().mean())
    assert result.history["dev_mae"][0] == pytest.approx(true, rel=1e-5)


@pytest.mark.parametrize("fn", [lambda u, y, m: ((u - y) ** 2)[m].mean(), lambda u, m: u.masked_select(m).abs().max()])
def test_one_number_of_picked_rows_is_told_once_where_there_are_several_batches(fn: Callable[..., Tensor]) -> None:
    with pytest.warns(UserWarning, match="objective 'm' picks rows by a mask and makes one number of them") as told:
        fit_picking(picking(fn), 5)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_picking(picking(fn), None)


def test_outputs_and_terms_called_weight_are_no_denominators() -> None:
    node = weft.Node(lambda x: x[:, :1].abs() + 1, ["x"], ["m_weight"], name="w")
    torch.manual_seed(0)
    nodes = [weft.Node(nn.Linear(2, 1), ["x"], ["u"]), node]
    p = weft.Problem(nodes, [weft.objective(lambda u, y: (u - y) ** 2, name="m")])
    still = {"optimizer": lambda q: torch.optim.SGD(q, lr=0.0)}
    rows = [fit_picking(p, size, **still)[1].history["dev_m"][0] for size in (3, None)]
    assert rows[0] == pytest.approx(rows[1], rel=1e-5)
    p = picking(lambda u, y: (u - y) ** 2, weft.objective(lambda u: u.exp(), name="m_weight"))
    rows = [fit_picking(p, size, **still)[1].history["dev_m"][0] for size in (3, None)]
    assert rows[0] == pytest.approx(rows[1], rel=1e-5)
