"""Adaptive weights of loss terms: six published methods, each a hook that sets the terms' `weight` tensors.

    weft.Trainer(hooks=weft.hooks.ReLoBRaLo())                       # from the losses of each step, at no cost
    weft.Trainer(hooks=weft.hooks.GradNorm(of="net", every=10))      # from gradients: passes of its own, every 10 steps

All of them: `terms` are the names to balance (None: all, which must be named terms of a weft or NeuroMANCER problem);
the weights are logged as `weight_<term>`, are part of every checkpoint, and survive phases and a second fit; the
weights a term was given are where most methods start from (ReLoBRaLo, SoftAdapt, NTKWeights replace them). Methods that
read losses set the weights after a step, for the next one; methods that read gradients compute them for the batch at
hand before its step, with a forward pass of their own (a training step that counts or draws numbers does so twice).
The monitored loss changes its meaning with the weights: name a `monitor_metric` that does not, or validate a term.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weft.events import Hook
from weft.hooks.terms import (
    KeyFunction,
    flat_gradient,
    key_function,
    losses_of_last_step,
    over_processes,
    term_gradients,
    term_names,
    trained_parameters,
    weights_of,
)
from weft.problem.weights import set_term_weights

if TYPE_CHECKING:
    from weft.step.state import RunState


class Balancing(Hook):
    """What the methods share: the names of the terms, the weights, their log, and what is remembered (`state`).

    terms: which terms are weighted; None: all of the loss.
    every: how many steps lie between two choices of weights (>= 1; less raises ValueError).
    """

    reads_losses = True
    """Whether the weights follow from the losses of the last step, or from gradients before a step."""

    def __init__(self, terms: Sequence[str] | None = None, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"{type(self).__name__}: every={every}; expected at least 1 step.")
        self.wanted, self.every, self.names = terms, every, list[str]()
        self.state: dict[str, Any] = {}

    def on_fit_start(self, trainer: Any) -> None:
        names = term_names(trainer.problem, self.wanted, type(self).__name__)
        if trainer.run.state.control.is_new:
            self.state = {}
        self.names = names
        if self.reads_losses:
            trainer.run.state.step.measured = []
        self.begin(trainer.run.state)

    def begin(self, state: RunState) -> None:
        """What a method does when a fit starts; `state` is the run's."""

    def on_step_end(self, trainer: Any, batch: Any, loss: Tensor) -> None:
        state = trainer.run.state
        if self.reads_losses and state.progress.step % self.every == 0:
            losses = losses_of_last_step(state, self.names)
            if losses is not None:
                self._set(state, self.weights_from_losses(state, losses))
        trainer.log({f"weight_{n}": w for n, w in zip(self.names, weights_of(state.problem, self.names), strict=True)})

    def on_step_start(self, trainer: Any, batch: Any) -> None:
        state = trainer.run.state
        if not self.reads_losses and state.progress.step % self.every == 0:
            self._set(state, self.weights_from_batch(state, batch))

    def weights_from_losses(self, state: RunState, losses: Tensor) -> Tensor | None:
        """The new weights, (terms,), given the losses, (terms,), of the last step without weights; None: as they are.

        `state` is the run's."""
        raise NotImplementedError

    def weights_from_batch(self, state: RunState, batch: Any) -> Tensor | None:
        """The new weights, (terms,), given the batch of the next step; None: as they are. `state` is the run's."""
        raise NotImplementedError

    def _set(self, state: RunState, weights: Tensor | None) -> None:
        if weights is not None:  # a loss is read back as value / weight, so no weight becomes zero
            weights = weights.detach().clamp(min=torch.finfo(weights.dtype).eps)
            set_term_weights(state.problem, dict(zip(self.names, weights.unbind(), strict=True)))

    def state_dict(self) -> dict[str, Any]:
        """What the method remembers; the weights themselves are saved with the run."""
        return {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in self.state.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.state = dict(state_dict)

    def remembered(self, name: str, like: Tensor) -> Tensor:
        """A tensor of `state` on the device and in the dtype of `like`; `like` itself is kept if there is none yet."""
        self.state[name] = self.state[name].to(like) if name in self.state else like.detach().clone()
        return self.state[name]


class ReLoBRaLo(Balancing):
    """Relative loss balancing with random lookback: terms that shrink slowly get more weight.

    Bischof & Kraus, arXiv:2110.09813, section on ReLoBRaLo. With m terms, rho ~ Bernoulli(`rho`) and
    bal(t, t') = m softmax_i(L_i(t) / (`temperature` L_i(t'))),

        w(t) = `alpha` (rho w(t-1) + (1 - rho) bal(t, 0)) + (1 - `alpha`) bal(t, t-1),   w(0) = 1,   w(1) = bal(1, 0).

    The draws come from a generator of this hook, seeded with the run's seed. In the paper w(t) already weights L(t);
    here, as the losses are those the step has used, it weights L(t+1).
    """

    def __init__(
        self,
        alpha: float = 0.999,
        temperature: float = 1.0,
        rho: float = 0.9999,
        terms: Sequence[str] | None = None,
        every: int = 1,
    ) -> None:
        super().__init__(terms, every)
        self.alpha, self.temperature, self.rho = alpha, temperature, rho

    def weights_from_losses(self, state: RunState, losses: Tensor) -> Tensor | None:
        first = "initial" not in self.state
        initial, last = self.remembered("initial", losses), self.remembered("last", losses)
        count = self.state["count"] = self.state.get("count", -1) + 1
        self.state["last"] = losses.clone()
        if first:
            return torch.ones_like(losses)
        eps = torch.finfo(losses.dtype).eps  # a constraint that holds has no loss
        of_last = torch.softmax(losses / (self.temperature * last + eps), 0) * len(losses)
        if count == 1:
            return of_last
        if self._keeps_history(state):
            history = weights_of(state.problem, self.names).to(losses)
        else:
            history = torch.softmax(losses / (self.temperature * initial + eps), 0) * len(losses)
        return self.alpha * history + (1 - self.alpha) * of_last

    def _keeps_history(self, state: RunState) -> bool:
        """One draw of rho. The state of the generator is remembered, so that a resumed run draws on."""
        generator = torch.Generator()
        if "generator" in self.state:
            generator.set_state(self.state["generator"].cpu())
        else:
            generator.manual_seed(state.feed.seed)
        draw = torch.rand((), generator=generator).item()
        self.state["generator"] = generator.get_state()
        return draw < self.rho


class SoftAdapt(Balancing):
    """Softmax of the rates at which losses change: terms that shrink least get more weight.

    So do those that grow.
    Heydari, Thompson & Mehmood, arXiv:1912.12355, sections 3.1.1 to 3.1.3. With s_i = L_i(t) - L_i(t-1),

        w_i = exp(`beta` s_i) / sum_j exp(`beta` s_j),

    where `normalized` divides s by sum_j |s_j| first, and `loss_weighted` multiplies each exponential by L_i(t).
    The weights add up to 1. `every` is the distance of t-1 and t in steps.
    """

    def __init__(
        self,
        beta: float = 0.1,
        normalized: bool = False,
        loss_weighted: bool = False,
        terms: Sequence[str] | None = None,
        every: int = 1,
    ) -> None:
        super().__init__(terms, every)
        self.beta, self.normalized, self.loss_weighted = beta, normalized, loss_weighted

    def weights_from_losses(self, state: RunState, losses: Tensor) -> Tensor | None:
        first = "last" not in self.state
        rates = losses - self.remembered("last", losses)
        self.state["last"] = losses.clone()
        if first:
            return None
        eps = torch.finfo(losses.dtype).eps
        if self.normalized:
            rates = rates / (rates.abs().sum() + eps)
        weights = torch.softmax(self.beta * rates, 0)
        if self.loss_weighted:
            weights = weights * losses
            weights = weights / (weights.sum() + eps)
        return weights


class SelfAdaptive(Balancing):
    """Weights that are maximised while the parameters minimise, for terms that stay wrong.

    Such terms get ever more weight.
    McClenny & Braga-Neto, arXiv:2009.04544, section on self-adaptive PINNs. The weight is m(v) = v^`power`, and v goes
    up the gradient of the loss with step `ascent_rate`:

        v_i <- v_i + `ascent_rate` m'(v_i) L_i.

    One v for each term. The paper's one for each point is a parameter of your problem with an optimizer of its own:
    `optimizer={"net": ..., "point_weights": lambda p: torch.optim.Adam(p, maximize=True)}`.
    """

    def __init__(
        self, ascent_rate: float = 0.01, power: int = 2, terms: Sequence[str] | None = None, every: int = 1
    ) -> None:
        super().__init__(terms, every)
        if power < 1:
            raise ValueError(f"SelfAdaptive: power={power}; expected at least 1.")
        self.ascent_rate, self.power = ascent_rate, power

    def weights_from_losses(self, state: RunState, losses: Tensor) -> Tensor | None:
        v = self.remembered("v", weights_of(state.problem, self.names).to(losses) ** (1 / self.power))
        self.state["v"] = v + self.ascent_rate * self.power * v ** (self.power - 1) * losses
        return self.state["v"] ** self.power


class GradNorm(Balancing):
    """Gradient normalization: weights under which all terms train at similar rates.

    Chen et al., arXiv:1711.02257, eq. (1) and (2) and algorithm 1. With G_i = |grad_W(w_i L_i)|, G their mean, and
    r_i = (L_i / L_i(0)) / mean_j(L_j / L_j(0)), one step of gradient descent with `learning_rate` on
    sum_i |G_i - G r_i^`alpha`| (the target G r_i^alpha taken as constant), then w is scaled to add up to the number of
    terms.

    `of`: the node or submodule whose parameters are W (the last shared layer, say); None: all that train.
    """

    reads_losses = False

    def __init__(
        self,
        alpha: float = 1.5,
        learning_rate: float = 0.025,
        of: str | None = None,
        terms: Sequence[str] | None = None,
        every: int = 1,
    ) -> None:
        super().__init__(terms, every)
        self.alpha, self.learning_rate, self.of = alpha, learning_rate, of

    def weights_from_batch(self, state: RunState, batch: Any) -> Tensor | None:
        losses, gradients = term_gradients(state, batch, self.names, trained_parameters(state, self.of))
        norms, eps = gradients.norm(dim=1), torch.finfo(losses.dtype).eps
        weights = weights_of(state.problem, self.names).to(norms)
        of_each = weights * norms
        ratios = losses / (self.remembered("initial", losses) + eps)
        target = of_each.mean() * (ratios / (ratios.mean() + eps)) ** self.alpha
        slope = torch.sign(of_each - target) * norms  # of |G_i - target| in w_i
        weights = (weights - self.learning_rate * slope).clamp(min=eps)
        return weights * (len(weights) / weights.sum())


class LearningRateAnnealing(Balancing):
    """Weights that bring each term's mean gradient up to the largest of the residual's.

    The largest entry of its gradient, that is.
    Wang, Teng & Perdikaris, arXiv:2001.04536, algorithm 1. For each term i but the residual r, over all entries theta,

        v_i = max |grad(w_r L_r)| / mean |grad L_i|,     w_i <- (1 - `alpha`) w_i + `alpha` v_i.

    The weight of the `residual` term stays. A term without any gradient (a constraint that holds) keeps its weight.
    """

    reads_losses = False

    def __init__(
        self,
        residual: str,
        alpha: float = 0.1,
        of: str | None = None,
        terms: Sequence[str] | None = None,
        every: int = 10,
    ) -> None:
        super().__init__(terms, every)
        self.residual, self.alpha, self.of = residual, alpha, of

    def begin(self, state: RunState) -> None:
        term_names(state.problem, [self.residual], "LearningRateAnnealing")
        if self.residual not in self.names:
            self.names.append(self.residual)

    def weights_from_batch(self, state: RunState, batch: Any) -> Tensor | None:
        _, gradients = term_gradients(state, batch, self.names, trained_parameters(state, self.of))
        weights, fixed = weights_of(state.problem, self.names).to(gradients), self.names.index(self.residual)
        largest = (weights[fixed] * gradients[fixed]).abs().max()
        means = gradients.abs().mean(dim=1)
        new = (1 - self.alpha) * weights + self.alpha * largest / means
        keep = means == 0
        keep[fixed] = True
        return torch.where(keep, weights, new)


class NTKWeights(Balancing):
    """Weights from the neural tangent kernel: all terms converge at the same mean rate.

    The rate is that of the residuals.
    Wang, Yu & Perdikaris, arXiv:2007.14527, algorithm 1. With K_i = J_i J_i^T, J_i the derivatives of the residuals of
    term i in all parameters,

        w_i = sum_j tr(K_j) / tr(K_i),

    where tr is divided by the number of residuals, because weft's terms are means and the paper's losses are sums.

    `residuals`: for each term, a key or a function whose argument names are keys: what is squared in its loss.
    `points`: how many residuals of a batch, evenly spaced, the mean is taken over; each costs a pass back. None: all.
    """

    reads_losses = False

    def __init__(self, residuals: Mapping[str, KeyFunction], points: int | None = 64, every: int = 100) -> None:
        super().__init__(list(residuals), every)
        self.residuals, self.points = dict(residuals), points

    def begin(self, state: RunState) -> None:
        self._functions = [key_function(fn, state.problem, f"NTKWeights {n!r}") for n, fn in self.residuals.items()]

    def weights_from_batch(self, state: RunState, batch: Any) -> Tensor | None:
        first = batch[0] if isinstance(batch, list) else batch
        params = trained_parameters(state, None)
        traces = torch.stack([self._mean_trace(function(first), params) for function in self._functions])
        traces = over_processes(state, traces)
        weights = traces.sum() / traces
        return torch.where(traces == 0, weights_of(state.problem, self.names).to(traces), weights)

    def _mean_trace(self, residual: Tensor, params: Sequence[Tensor]) -> Tensor:
        entries = residual.flatten()
        step = 1 if self.points is None else max(1, len(entries) // self.points)
        rows = [flat_gradient(entry, params).square().sum() for entry in entries[::step][: self.points].unbind()]
        return torch.stack(rows).mean()
