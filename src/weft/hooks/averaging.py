"""Averages of the weights along training: evaluated with, then swapped out again.

weft.Trainer(hooks=weft.hooks.EMA(0.999))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weft.devices.processes import own_part
from weft.events import Hook


class WeightAverage(Hook):
    """Keeps averages of the parameters: dev and test sets are evaluated with them, training goes on with the others.

    Because the monitored metric is that of the averages, best weights are averages too. Without any validation the
    problem holds the averages when the fit ends; `result.last_weights` are the trained ones in any case. Buffers are
    not averaged (after a fit with batch norm: torch.optim.swa_utils.update_bn).
    """

    def __init__(self) -> None:
        self.count = 0
        self.averages: dict[str, Tensor] = {}
        self._live: list[Tensor] | None = None  # the trained weights, while the averages stand in the problem
        self._validated = False

    def on_fit_start(self, trainer: Any) -> None:
        self._validated, self._live = False, None
        if trainer.run.state.control.is_new:
            self.count, self.averages = 0, {}

    def on_step_start(self, trainer: Any, batch: Any) -> None:
        self._swap_out(trainer.problem)  # after an evaluation in the middle of an epoch

    def on_validation_start(self, trainer: Any) -> None:
        self._validated = True
        self._swap_in(trainer.problem)

    def on_epoch_end(self, trainer: Any, metrics: Mapping[str, float]) -> None:
        self._swap_out(trainer.problem)  # not before: the best weights are taken between the two

    def on_exception(self, trainer: Any, error: BaseException) -> None:
        self._swap_out(trainer.problem)

    def on_fit_end(self, trainer: Any, result: Any) -> None:
        if self._live is not None:  # interrupted while validating
            names = [name for name, _ in trainer.problem.named_parameters()]
            result.last_weights.update(zip(names, self._live, strict=True))
        self._live = None
        if not self._validated and result.stop_reason != "error":
            self._swap_in(trainer.problem)
            self._live = None

    def update(self, problem: nn.Module, share: float) -> None:
        """average <- average + share * (parameter - average); the first call copies."""
        parameters = dict(problem.named_parameters())
        self.count += 1
        if not self._fit(parameters):
            self.averages, self.count = {name: p.detach().clone() for name, p in parameters.items()}, 1
            return
        averages = [self.averages[name].to(p.device) for name, p in parameters.items()]
        now = [own_part(p.detach()) for p in parameters.values()]
        torch._foreach_lerp_([own_part(a) for a in averages], now, share)  # pyright: ignore[reportPrivateImportUsage]
        self.averages = dict(zip(parameters, averages, strict=True))

    def _fit(self, parameters: Mapping[str, Tensor]) -> bool:
        """Whether the averages are those of these parameters; a net may grow."""
        of = {name: p.shape for name, p in parameters.items()}
        return of == {name: average.shape for name, average in self.averages.items()}

    def _swap_in(self, problem: nn.Module) -> None:
        parameters = dict(problem.named_parameters())
        if self.averages and self._live is None and self._fit(parameters):
            self._live = [p.detach().clone() for p in parameters.values()]
            _copy(parameters.values(), [self.averages[name] for name in parameters])

    def _swap_out(self, problem: nn.Module) -> None:
        if self._live is not None:
            _copy(problem.parameters(), self._live)
            self._live = None

    def state_dict(self) -> dict[str, Any]:
        """The averages by parameter name, how many weights went into them, and, while they stand in the problem (which
        is then saved with them), the trained weights."""
        live = None if self._live is None else [p.clone() for p in self._live]
        return {"count": self.count, "averages": {name: a.clone() for name, a in self.averages.items()}, "live": live}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.count, self.averages, self._live = (
            state_dict["count"],
            dict(state_dict["averages"]),
            state_dict.get("live"),
        )


class EMA(WeightAverage):
    """Exponential moving average of the weights, after every step.

    average <- `decay` average + (1 - `decay`) parameter.
    As torch.optim.swa_utils.get_ema_multi_avg_fn. `decay`: between 0 and 1 (else ValueError); about
    1 / (1 - decay) steps are averaged.
    """

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"EMA: decay={decay}; expected a number between 0 and 1.")
        self.decay = decay

    def on_step_end(self, trainer: Any, batch: Any, loss: Tensor) -> None:
        self.update(trainer.problem, 1.0 - self.decay)


class SWA(WeightAverage):
    """Stochastic weight averaging: the mean of the weights at the ends of later epochs.

    Of each epoch from `start_epoch` (>= 0, else ValueError) on.
    Izmailov et al., arXiv:1803.05407; as torch.optim.swa_utils.get_swa_multi_avg_fn. Each epoch's validation is of the
    mean of the epochs before it.
    """

    def __init__(self, start_epoch: int = 0) -> None:
        super().__init__()
        if start_epoch < 0:
            raise ValueError(f"SWA: start_epoch={start_epoch}; expected at least 0.")
        self.start_epoch = start_epoch

    def on_epoch_end(self, trainer: Any, metrics: Mapping[str, float]) -> None:
        super().on_epoch_end(trainer, metrics)
        if trainer.current_epoch >= self.start_epoch:
            self.update(trainer.problem, 1.0 / (self.count + 1))


def _copy(to: Any, values: list[Tensor]) -> None:
    with torch.no_grad():
        for tensor, value in zip(to, values, strict=True):
            tensor.copy_(value)
