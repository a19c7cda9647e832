"""Prediction gives one row for each row of the data, or says which key has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft

X = torch.randn(9, 2, generator=torch.Generator().manual_seed(0))


def trained_with(
    fn: Callable[[Tensor], Any], outputs: tuple[str, ...] = ("u",), batch_size: int | None = 4
) -> weft.Trainer:
    layer = nn.Linear(2, 1)
    node = weft.Node(lambda x: fn(x, layer), ["x"], list(outputs))  # type: ignore[call-arg]
    made = weft.Problem([weft.Node(layer, ["x"], ["v"], name="v"), node], [weft.objective(lambda v: v**2, name="m")])
    trainer = weft.Trainer(epochs=1, progress=False)
    trainer.fit(made, weft.Data({"x": X[:8]}, batch_size=batch_size))
    return trainer


def test_a_squeezed_output_keeps_the_last_row() -> None:
    trainer = trained_with(lambda x, layer: layer(x).squeeze())
    found = trainer.predict({"x": X})
    assert found["u"].shape == (9,) and torch.equal(found["u"], found["v"][:, 0])


@pytest.mark.parametrize(
    ("fn", "outputs", "rows", "says"),
    [
        (lambda x, layer: torch.stack([x, x, x]), ("u",), 8, r"'u' has shape \(3, 4, 2\) for a batch of 4 rows"),
        (lambda x, layer: torch.stack([x, x, x]), ("u",), 9, r"'u' has shape \(3, 4, 2\) for a batch of 4 rows"),
        (lambda x, layer: layer(x).squeeze(), ("u",), 1, r"'u' is one number for one row"),
        (lambda x, layer: x.repeat(2, 1), ("u",), 8, r"'u' has shape \(8, 2\) for a batch of 4 rows"),
        (lambda x, layer: x.flatten(), ("u",), 8, r"'u' has shape \(8,\) for a batch of 4 rows"),
        (lambda x, layer: x.T, ("u",), 8, r"'u' has shape \(2, 4\) for a batch of 4 rows"),
        (lambda x, layer: x[0], ("u",), 8, r"'u' has shape \(2,\) for a batch of 4 rows"),
        (lambda x, layer: (x, x[:3]), ("a", "b"), 8, r"'b' has shape \(3, 2\)"),
        (lambda x, layer: x[:, : len(x)], ("u",), 9, r"'u' has rows of different shape"),
        (lambda x, layer: x.squeeze(), ("u",), 9, r"'u' has shape \(2,\) for a batch of 1 rows"),
    ],
)
def test_an_output_without_a_row_for_each_row_is_named(fn: Any, outputs: Any, rows: int, says: str) -> None:
    trainer = trained_with(fn, outputs)
    with pytest.raises(ValueError, match=f"predict: {says}"):
        trainer.predict({"x": X[:rows]})


def test_two_outputs_of_which_one_is_squeezed_have_all_rows() -> None:
    found = trained_with(lambda x, layer: (layer(x), layer(x).squeeze()), ("a", "b")).predict({"x": X})
    assert found["a"].shape == (9, 1) and found["b"].shape == (9,)


def test_what_is_one_number_for_many_rows_is_left_out() -> None:
    assert trained_with(lambda x, layer: layer(x).mean()).predict({"x": X}).keys() == {"v"}


TURNED: dict[str, Callable[..., Any]] = {
    "as many times as rows": lambda x, layer: torch.stack([x, x, x, x]),
    "transposed": lambda x, layer: (x @ torch.ones(2, 4)).T,
    "times, rows, features": lambda x, layer: torch.stack([layer(x).expand(-1, 3)] * 4),
    "rows that were averaged away": lambda x, layer: (x @ torch.ones(2, 4)).mean(0).expand(4, 4),
}
STRAIGHT: dict[str, Callable[..., Any]] = {
    "rows, as many times": lambda x, layer: torch.stack([x, x, x, x], dim=1),
    "as many features": lambda x, layer: layer(x).expand(-1, 4),
    "a kernel of all rows": lambda x, layer: x @ x.T,
}


@pytest.mark.parametrize("rows", [4, 8])
@pytest.mark.parametrize("name", TURNED)
def test_an_output_with_as_many_times_as_rows_is_named(name: str, rows: int) -> None:
    trainer = trained_with(TURNED[name])
    with pytest.raises(ValueError, match=r"predict: 'u' has shape \(4, .*\) for a batch of 3 rows"):
        trainer.predict({"x": X[:rows]})


@pytest.mark.parametrize("name", STRAIGHT)
def test_an_output_with_two_dimensions_as_long_as_its_batch_is_kept(name: str) -> None:
    trainer = trained_with(STRAIGHT[name])
    found = trainer.predict({"x": X[:8]})["u"]
    layer = trainer.problem.nodes[0].fn
    with torch.no_grad():
        true = [STRAIGHT[name](x, layer) for x in (X[:4], X[4:8])]
    torch.testing.assert_close(found, torch.cat(true))


def test_features_as_many_as_rows_are_told_apart_and_the_step_is_repeated_once() -> None:
    calls = []

    def step(trainer: Any, batch: Any) -> dict[str, Tensor]:
        calls.append(len(batch["x"]))
        return {"u": batch["x"].sum(1), "v": batch["x"].sum(0)} if turned else {"u": batch["x"].sum(1)}

    turned = False
    trainer = weft.Trainer(epochs=1, progress=False, predict_step=step)
    data = weft.Data({"x": X[:8]}, batch_size=2)
    trainer.fit(weft.Problem([weft.Node(nn.Linear(2, 1), ["x"], ["v"])], [weft.objective(lambda v: v**2)]), data)
    assert torch.equal(trainer.predict({"x": X[:8]})["u"], X[:8].sum(1))
    assert calls == [2, 1, 2, 2, 2]
    turned = True
    with pytest.raises(ValueError, match=r"'v' has shape \(2,\) for a batch of 1 rows"):
        trainer.predict({"x": X[:8]})


def test_steps_of_ones_own_are_looked_at_too() -> None:
    trainer = weft.Trainer(epochs=1, progress=False, predict_step=lambda t, batch: {"u": batch["x"].sum(0)})
    trainer.fit(weft.Problem([weft.Node(nn.Linear(2, 1), ["x"], ["v"])], [weft.objective(lambda v: v**2)]), {"x": X})
    with pytest.raises(ValueError, match=r"'u' has shape \(2,\) for a batch of 9 rows"):
        trainer.predict({"x": X})


def test_parts_that_would_come_several_times_are_refused() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, batch: Any) -> dict[str, Tensor]:
            a, b = self.layer(batch["a"]["x"]), self.layer(batch["b"]["x"])
            return {"loss": a.mean() + b.mean(), "ua": a, "ub": b}

    split = {"a": weft.DictDataset({"x": torch.rand(9, 1)}), "b": weft.DictDataset({"x": torch.rand(4, 1)})}
    trainer = weft.Trainer(epochs=1, progress=False)
    trainer.fit(Both(), weft.Data(split, batch_size=2))
    with pytest.raises(ValueError, match="rows of the smaller ones would come several times"):
        trainer.predict(split)
    found = trainer.predict(weft.Data(None, predict=split))
    assert {key: value.shape for key, value in found.items()} == {"ua": (9, 1), "ub": (4, 1)}
