"""Adaptive resampling of collocation points: more of them where the residual is large.

weft.hooks.Resample(
    residual=lambda u, x, t: burgers(u, x, t),                       # argument names are keys
    candidates=lambda g: {"x": 2 * torch.rand(10_000, 1, generator=g) - 1, "t": torch.rand(10_000, 1, generator=g)},
    every=100,
)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from weft.data.datasets import DictDataset
from weft.events import Hook
from weft.hooks.terms import KeyFunction, key_function
from weft.problem.lagrangian import AugmentedLagrangian


class Resample(Hook):
    """Replaces or adds training points by their residual, before every `every`-th epoch but the first.

    Wu, Zhu, Tan, Kartha & Lu, arXiv:2207.10289. Of the `candidates` S, with e the absolute residual,
    "rad" (algorithm 2) replaces all points by as many, drawn without replacement with probabilities (eq. 2)
        p(x) ~ e(x)^`k` / mean_S(e^`k`) + `c`;
    "rar-d" (algorithm 3) adds `add` points drawn so; "rar" (RAR-G, algorithm 1) adds the `add` points of largest
    residual. The paper's defaults: k = 1, c = 1 for "rad"; k = 2, c = 0 for "rar-d".

    residual: a key of what the nodes compute, or a function whose argument names are keys (`problem` is the problem).
    candidates: a function of a torch.Generator (on the CPU) that returns a tensor for every key of the data, all of one
        length, at least as many as are drawn. The generator's seed is a function of the run's seed and the epoch.
    method, k, c, add: as above. Raises ValueError for another method or an `every` below 1, and for too few candidates.
    part: which part, where the training data is a dict of datasets by name.

    Logs `residual_mean` over the candidates, `num_points`, and `data_version`, which counts the resamplings. The points
    are part of a checkpoint. A phase or refresh that brings new data starts from that data.
    """

    def __init__(
        self,
        residual: KeyFunction,
        candidates: Callable[[torch.Generator], Mapping[str, Tensor]],
        *,
        every: int = 100,
        method: Literal["rad", "rar-d", "rar"] = "rad",
        k: float | None = None,
        c: float | None = None,
        add: int = 10,
        part: str | None = None,
    ) -> None:
        if method not in ("rad", "rar-d", "rar"):
            raise ValueError(f"Resample: method={method!r}; expected 'rad', 'rar-d' or 'rar'.")
        if every < 1 or add < 1:
            raise ValueError(f"Resample: every={every}, add={add}; expected at least 1 epoch and 1 point.")
        self.residual, self.candidates, self.every, self.method = residual, candidates, every, method
        self.k = k if k is not None else {"rad": 1.0, "rar-d": 2.0}.get(method, 1.0)
        self.c = c if c is not None else {"rad": 1.0, "rar-d": 0.0}.get(method, 0.0)
        self.add, self.part = add, part
        self.version = 0
        self._to_put_back: dict[str, Tensor] | None = None
        self._points: dict[str, Tensor] = {}
        self._run: Any | None = None

    def on_fit_start(self, trainer: Any) -> None:
        if any(isinstance(module, AugmentedLagrangian) for module in trainer.problem.modules()):
            raise ValueError(
                "Resample: an AugmentedLagrangian has multipliers for each row; new points would get old ones."
            )
        self._run = trainer.run
        if trainer.run.state.control.is_new:
            self.version, self._points, self._to_put_back = 0, {}, None

    def on_epoch_start(self, trainer: Any) -> None:
        run = trainer.run
        if self._to_put_back is not None:  # resumed: the points of the checkpoint
            self._put(run, self._to_put_back)
            self._to_put_back = None
        progress = run.progress
        if progress.batch == 0 and progress.epoch and progress.epoch % self.every == 0:
            self._resample(run)
            self.version += 1
        trainer.log({"num_points": len(self._dataset(run)), "data_version": self.version})

    def _resample(self, run: Any) -> None:
        generator = torch.Generator().manual_seed((run.state.feed.seed * 1_000_003 + run.progress.epoch) % 2**63)
        old = self._dataset(run).datadict
        found = {
            key: value.to(old[key].device, old[key].dtype) for key, value in self._candidates(generator, old).items()
        }
        errors = self._errors(run, found)
        run.log({"residual_mean": errors.mean()})
        if self.method == "rar":
            chosen = errors.topk(self.add).indices.cpu()
        else:
            powers = errors.cpu().double() ** self.k
            number = self.add if self.method == "rar-d" else len(next(iter(old.values())))
            chosen = torch.multinomial(powers / powers.mean() + self.c, number, generator=generator)
        new = {key: value[chosen.to(value.device)] for key, value in found.items()}
        if self.method != "rad":
            new = {key: torch.cat([old[key].detach(), value]) for key, value in new.items()}
        self._put(run, new)

    def _candidates(self, generator: torch.Generator, old: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = dict(self.candidates(generator))
        if set(found) != set(old):
            raise ValueError(
                f"Resample: the candidates have the keys {sorted(found)}, the training data {sorted(old)}."
            )
        needed = len(next(iter(old.values()))) if self.method == "rad" else self.add
        lengths = {key: len(value) for key, value in found.items()}
        if len(set(lengths.values())) > 1 or min(lengths.values()) < needed:
            raise ValueError(f"Resample: the candidates have {lengths} rows; expected equal, at least {needed}.")
        return found

    def _errors(self, run: Any, points: Mapping[str, Tensor]) -> Tensor:
        """The absolute residual of each point, (points,), the mean over its components where it has several."""
        batch: dict[str, Any] = {key: value.detach().clone() for key, value in points.items()}
        rows = len(next(iter(batch.values())))
        for key in self._requiring_grad(run):
            batch[key].requires_grad_()
        residual = key_function(self.residual, run.problem, "Resample's residual")
        with torch.enable_grad():
            errors = residual({**batch, "name": "train", "epoch": run.progress.epoch}).detach().abs()
        if errors.ndim == 0 or len(errors) != rows:
            raise ValueError(
                f"Resample: the residual has shape {tuple(errors.shape)}; expected one row for each of {rows}."
            )
        if not bool(errors.isfinite().all()):
            raise FloatingPointError(
                f"Resample: the residual is not finite at {int((~errors.isfinite()).sum())} candidates."
            )
        return errors.flatten(1).mean(1) if errors.ndim > 1 else errors

    def _requiring_grad(self, run: Any) -> list[str]:
        asked = set(run.data.inputs_require_grad)
        return [key for key, value in self._dataset(run).datadict.items() if key in asked or value.requires_grad]

    def _dataset(self, run: Any) -> DictDataset:
        train = run.data.train
        if self.part is not None:
            if not isinstance(train, Mapping) or self.part not in train:
                raise ValueError(f"Resample: the training data has no part {self.part!r}.")
            train = train[self.part]
        train = DictDataset(train) if isinstance(train, Mapping) else train
        if not isinstance(getattr(train, "datadict", None), Mapping):
            raise TypeError(f"Resample: the training data is {type(train).__name__}; expected a weft.DictDataset.")
        return train

    def _put(self, run: Any, points: Mapping[str, Tensor]) -> None:
        old = self._dataset(run).datadict
        tensors = {k: v.to(old[k].device).requires_grad_(old[k].requires_grad) for k, v in points.items()}
        new: Any = DictDataset(tensors)
        if self.part is not None:
            new = {**run.data.train, self.part: new}
        run.use_data(replace(run.data, train=new))
        self._points = {key: value.detach() for key, value in tensors.items()}

    def state_dict(self) -> dict[str, Any]:
        """The points in use, if they were resampled, and how often they were."""
        return {"version": self.version, "points": {k: v.clone() for k, v in self._points.items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave: the points are put back, at once in a run that goes on within an epoch."""
        self.version = state_dict["version"]
        points = dict(state_dict["points"]) or None
        if points is not None and self._run is not None:
            self._put(self._run, points)
        else:
            self._to_put_back = points
