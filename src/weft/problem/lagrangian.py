"""The augmented Lagrangian: a loss whose multipliers are updated while training."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from weft.events import Hook
from weft.problem.constraints import Constraint
from weft.problem.losses import PenaltyLoss, add_objectives, totals
from weft.problem.terms import MissingKeyError, Objective
from weft.types import Batch


class AugmentedLagrangian(PenaltyLoss, Hook):
    """Multipliers and a quadratic penalty for each training row, so that constraints hold without huge weights.

    With v the values of a row's constraints, lambda their multipliers and mu the row's penalty parameter, it adds
        sum over entries of weight * (lambda t + mu/2 t^2),   t = v (equality) or max(v, -lambda/mu) (inequality),
    averaged over the rows. Every `every` epochs, from the last values of each row,
        lambda <- lambda + mu t    (so those of inequalities stay >= 0),
        mu <- min(growth * mu, mu_max)    where norm(t) did not shrink below eta times what it was at the last update.
    Source: Nocedal & Wright, Numerical Optimization, 2nd ed., ch. 17.3 and 17.4 (unconstrained formulation; their
    multipliers have the other sign).

    `weight * multipliers` estimates the Lagrange multipliers of each row, one column an entry in the order of the
    constraints, for an objective averaged over rows. In evaluation the loss is that of PenaltyLoss, so that epochs
    compare; `norm` matters only there. The best epoch by that loss breaks a constraint whose weight is below its
    multiplier (with norm 1; ch. 17.2), so choose weights above.

    The forward reads `batch["index"]` in training and changes nothing but `values` (the last values of the rows seen).
    `update()` does the rest; the trainer calls it through `on_epoch_end`. Several processes tell each other the values
    of the rows that each has seen, at the end of each epoch, so all hold the multipliers of all rows.

    rows: number of training rows. None: what the trainer says; outside of a trainer, as many as the largest index seen
        (finding it waits for the GPU in every step and cannot be compiled).
    Raises KeyError for a batch without "index", ValueError for a constraint without one value a row.
    """

    of_each_process = ("values", "newest")  # these are no means over processes

    multipliers: Tensor  # (rows, entries)
    mu: Tensor  # (rows, 1)
    values: Tensor  # (rows, entries); nan: not seen since the last update
    violation: Tensor  # (rows, 1), norm of t at the last update
    newest: Tensor  # (rows, 1), of several processes: 1 where this one has seen the row in this epoch
    is_equality: Tensor  # (entries,)
    num_epochs: Tensor  # epochs ended so far

    def __init__(
        self,
        mu: float = 1.0,
        growth: float = 2.0,
        mu_max: float = 1000.0,
        eta: float = 0.9,
        every: int = 10,
        rows: int | None = None,
    ) -> None:
        super().__init__()
        legal = {"mu > 0": mu > 0, "mu_max >= mu": mu_max >= mu, "growth >= 1": growth >= 1}
        legal |= {"0 < eta <= 1": 0 < eta <= 1, "every >= 1": every >= 1, "rows >= 1": rows is None or rows >= 1}
        for rule, holds in legal.items():
            if not holds:
                raise ValueError(
                    f"AugmentedLagrangian needs {rule}; got mu={mu}, growth={growth}, mu_max={mu_max}, eta={eta}, "
                    f"every={every}, rows={rows}."
                )
        self.mu_start, self.growth, self.mu_max, self.eta, self.every, self.rows = mu, growth, mu_max, eta, every, rows
        self._rows_to_come, self._shared = 0, False  # training rows, as the trainer tells them; whether others see some
        self.register_buffer("num_epochs", torch.tensor(0))
        self._new_buffers(0, torch.empty(0, 0), torch.zeros(0, dtype=torch.bool))

    def forward(
        self, data: Batch, objectives: Iterable[Objective], constraints: Iterable[Constraint]
    ) -> dict[str, Tensor]:
        """Scalars by name, as PenaltyLoss. Call on whole rows: `data["index"]` says which ones these are."""
        if not self.training:
            return super().forward(data, objectives, constraints)
        if not isinstance(data.get("index"), Tensor):
            raise MissingKeyError(
                "AugmentedLagrangian keeps multipliers for each training row, and reads their numbers from "
                f"batch['index']; found {type(data.get('index')).__name__}. "
                "Use a DictDataset, or yield 'index' with each batch."
            )
        out: dict[str, Tensor] = {}
        objective_terms = add_objectives(out, data, objectives)
        constraints = list(constraints)
        if not constraints:
            return totals(out, objective_terms, [])
        index = data["index"].reshape(-1)
        raw = [c.value(data) for c in constraints]
        flat = [_by_row(c, v, len(index)) for c, v in zip(constraints, raw, strict=True)]
        values = torch.cat(flat, dim=1)
        self._fit_buffers(index, values, flat, constraints)

        try:
            multipliers, mu = self.multipliers[index], self.mu[index]
        except IndexError as error:
            raise ValueError(f"AugmentedLagrangian(rows={self.rows}): batch['index'] goes beyond.") from error
        floor = multipliers / -mu
        penalties, start = [], 0
        for c, v in zip(constraints, flat, strict=True):
            columns = slice(start, start := start + v.shape[1])
            t = v if c.sense == "==" else torch.maximum(v, floor[:, columns])
            row_costs = (t * (multipliers[:, columns] + 0.5 * mu * t)).sum(dim=1)
            contribution = c.weight * row_costs.mean()
            out[c.name], out[f"{c.name}_violation"] = contribution, c.violation(v).mean()
            penalties.append(contribution)
        self.values[index] = values.detach().to(self.values.dtype)
        if self._shared:
            self.newest[index] = 1.0
        return totals(out, objective_terms, penalties)

    @torch.no_grad()
    def update(self) -> None:
        """Move the multipliers and penalty parameters of all rows seen since the last update, in place."""
        seen = ~self.values.isnan().any(dim=1, keepdim=True)
        t = torch.where(self.is_equality, self.values, torch.maximum(self.values, self.multipliers / -self.mu))
        violation = t.norm(dim=1, keepdim=True)
        grow = seen & (violation > self.eta * self.violation)
        self.multipliers.copy_(torch.where(seen, self.multipliers + self.mu * t, self.multipliers))
        self.mu.copy_(torch.where(grow, (self.mu * self.growth).clamp(max=self.mu_max), self.mu))
        self.violation.copy_(torch.where(seen, violation, self.violation))
        self.values.fill_(torch.nan)

    def on_fit_start(self, trainer: Any) -> None:
        """Learn the number of training rows, and whether other processes see some of them."""
        self._rows_to_come = trainer.run.state.rows("train") or 0
        self._shared = trainer.run.state.processes.world > 1

    def on_epoch_end(self, trainer: Any, metrics: Mapping[str, float]) -> None:
        """Count the epoch, and update after every `every` of them."""
        if self._shared:
            self._share_values(trainer.run.state.processes)
        self.num_epochs += 1
        if int(self.num_epochs) % self.every == 0:
            self.update()

    @torch.no_grad()
    def _share_values(self, processes: Any) -> None:
        """Give every process the values of the rows that others saw in this epoch. Every process must call."""
        share = processes.mean(self.newest)
        values = processes.mean(torch.where(self.newest > 0, self.values, 0.0)) / share
        self.values.copy_(torch.where(share > 0, values, self.values))
        self.newest.zero_()

    def _new_buffers(self, rows: int, like: Tensor, is_equality: Tensor) -> None:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32  # half is too short for a sum
        blank = torch.zeros(rows, like.shape[1], dtype=dtype, device=like.device)
        self.register_buffer("multipliers", blank)
        self.register_buffer("values", torch.full_like(blank, torch.nan))
        self.register_buffer("mu", blank.new_full((rows, 1), self.mu_start))
        self.register_buffer("violation", torch.full_like(self.mu, torch.inf))
        self.register_buffer("is_equality", is_equality.to(like.device))
        self.register_buffer("newest", torch.zeros_like(self.mu), persistent=False)

    def _fit_buffers(self, index: Tensor, values: Tensor, flat: list[Tensor], constraints: list[Constraint]) -> None:
        """Make room for the rows of `index`. Kept: what is known of earlier rows, if the entries are as many."""
        rows, entries = self.multipliers.shape
        needed = self.rows or self._rows_to_come
        if not needed:
            needed = max(rows, int(index.max()) + 1)  # waits for the GPU
        if (rows, entries) == (needed, values.shape[1]):
            return
        old = {k: getattr(self, k) for k in ("multipliers", "values", "mu", "violation")}
        flags = [c.sense == "==" for c, v in zip(constraints, flat, strict=True) for _ in range(v.shape[1])]
        self._new_buffers(needed, values.detach(), torch.tensor(flags))
        if rows and entries != values.shape[1]:
            warnings.warn(
                f"AugmentedLagrangian: the constraints now have {values.shape[1]} entries a row, before {entries}; "
                "its multipliers start anew at zero.",
                stacklevel=2,
            )
        elif rows:
            for key, tensor in old.items():
                keep = min(rows, needed)
                getattr(self, key)[:keep] = tensor[:keep]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take the sizes of what is loaded: they are known only once a batch was seen."""
        for key in ("multipliers", "values", "mu", "violation", "is_equality"):
            loaded, own = state_dict.get(prefix + key), getattr(self, key)
            if isinstance(loaded, Tensor) and loaded.shape != own.shape:
                self.register_buffer(key, torch.empty(loaded.shape, dtype=own.dtype, device=own.device))
        self.register_buffer("newest", torch.zeros_like(self.mu), persistent=False)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _by_row(constraint: Constraint, value: Tensor, num_rows: int) -> Tensor:
    if value.ndim == 0 or value.shape[0] != num_rows:
        raise ValueError(
            f"AugmentedLagrangian keeps multipliers for each row, so {constraint} must have one value or more for each "
            f"of the {num_rows} rows of batch['index']; its value has shape {tuple(value.shape)}."
        )
    return value.reshape(num_rows, -1)
