"""Norms of gradients in the log: of each optimizer before clipping, and of each term of the loss."""

from __future__ import annotations

from typing import Any

import torch

from weft.events import Hook
from weft.hooks.terms import term_gradients, trained_parameters
from weft.problem.weights import term_weights
from weft.step.optimizers import parameters_of


class GradientNorms(Hook):
    """Logs `grad_norm`, with `terms=True` also `grad_norm_<term>`.

    With several optimizers `grad_norm_<name>`.
    The 2-norm of all gradients before clipping. That of a term includes its weight, so that it tells what the term
    contributes; it costs a forward pass and one pass back per term, every `every` steps. Nothing waits for the device.
    """

    def __init__(self, terms: bool = False, every: int = 1, of: str | None = None) -> None:
        self.terms, self.every, self.of = terms, every, of

    def on_before_optimizer_step(self, trainer: Any, optimizer: torch.optim.Optimizer) -> None:
        if trainer.global_step % self.every == 0:
            names = {id(o): name for name, o in trainer.optimizers.items()}
            key = "grad_norm" if len(names) == 1 else f"grad_norm_{names[id(optimizer)]}"
            trainer.log({key: trainer.run.state.processes.norm(parameters_of(optimizer))})

    def on_fit_start(self, trainer: Any) -> None:
        self.names = list(term_weights(trainer.problem)) if self.terms else []
        if self.terms and not self.names:
            raise ValueError(f"GradientNorms(terms=True): {type(trainer.problem).__name__} has no named terms.")

    def on_step_start(self, trainer: Any, batch: Any) -> None:
        if self.names and trainer.global_step % self.every == 0:
            state = trainer.run.state
            _, gradients = term_gradients(state, batch, self.names, trained_parameters(state, self.of), weighted=True)
            norms = gradients.norm(dim=1).unbind()
            trainer.log({f"grad_norm_{name}": norm for name, norm in zip(self.names, norms, strict=True)})
