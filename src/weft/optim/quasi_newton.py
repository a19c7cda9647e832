"""Quasi-Newton methods with a dense inverse Hessian that scales itself: SSBFGS and SSBroyden.

    weft.Phase(epochs=200, optimizer=weft.optim.SSBroyden)

L-BFGS keeps a few pairs of steps and gradient changes; these keep what all of them say. On the stiff losses of
physics-informed networks that is worth some orders of magnitude (Urban, Stefanou, Pons, arXiv:2405.04230; Kiyani et
al., arXiv:2501.16371). They need n^2 numbers for n parameters: 7 MB for 921 in float64, 0.8 GB for 10^4, and the same
once more during a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from weft.optim.searching import Searching, flat, flat_gradient, with_gradient, write
from weft.optim.wolfe import Point, search

Scaling = Callable[[float, float, int], tuple[float, float]]


class SSBFGS(Searching):
    """BFGS whose inverse Hessian is scaled before each update, so that large early curvature is forgotten.

    params: one group, of one real dtype, at most `max_parameters` in all (the inverse Hessian is dense).
    max_iter: iterations of one step, each a line search of two to three evaluations mostly.
    tolerance_grad: a step ends where no entry of the gradient is larger. tolerance_change: it ends where an iteration
        changes neither the loss nor a parameter by more; 0: only when no lower loss is found.
    line_search_evaluations: at most so many in one iteration. A number out of its range raises ValueError.

    `search_stop` says what ended the last step: "max_iter", "tolerance_grad", "tolerance_change", "no lower loss".
    Source: Al-Baali, Comput. Optim. Appl. 9 (1998); the form used here is that of arXiv:2405.04230.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        max_iter: int = 20,
        tolerance_grad: float = 0.0,
        tolerance_change: float = 0.0,
        line_search_evaluations: int = 25,
        max_parameters: int = 20_000,
    ) -> None:
        if max_iter < 1 or line_search_evaluations < 1:
            raise ValueError("max_iter and line_search_evaluations must be at least 1.")
        super().__init__(
            params,
            {
                "max_iter": max_iter,
                "tolerance_grad": tolerance_grad,
                "tolerance_change": tolerance_change,
                "line_search_evaluations": line_search_evaluations,
            },
        )
        n = sum(p.numel() for p in self._params)
        if n > max_parameters:
            size = n * n * self._params[0].element_size() / 2**30
            raise ValueError(
                f"{type(self).__name__} keeps a dense inverse Hessian: {n:,} parameters take {size:,.1f} GiB, "
                f"twice that during a step. Use torch.optim.LBFGS, or set max_parameters={n} if this is meant."
            )

    def scaling(self, b: float, h: float, n: int) -> tuple[float, float]:
        """tau and phi of the update, given b = s'Bs / y's and h = y'Hy / y's of n parameters."""
        return min(1.0, 1.0 / b), 1.0

    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        """Up to `max_iter` iterations; returns the loss that the closure gave first."""
        with self.goes_back():
            return self._iterate(closure)

    def _iterate(self, closure: Callable[[], Any]) -> Any:
        group, params = self.param_groups[0], self._params
        first = with_gradient(closure)
        x, here = flat(params), Point(0.0, float(first), flat_gradient(params), 0.0)
        self.search_stop = "max_iter" if here.is_finite else "not finite"
        for _ in range(group["max_iter"] if here.is_finite else 0):
            if float(here.gradient.abs().max()) <= group["tolerance_grad"]:
                self.search_stop = "tolerance_grad"
                break
            found, direction = self._searched(closure, x, here)
            if found is None:
                if self.kept.get("n_pairs"):  # what was learned leads nowhere: once more along the gradient
                    self._forget(here.gradient)
                    found, direction = self._searched(closure, x, here)
                if found is None:
                    write(params, x)
                    self.search_stop = "no lower loss"
                    break
            s = direction * found.length
            self._learn(s, found.gradient - here.gradient, -found.length * float(s @ here.gradient))
            moved = max(float(s.abs().max()), abs(here.value - found.value))
            x = x + s
            here = found
            self.kept["n_iter"] = self.kept.get("n_iter", 0) + 1
            if moved <= group["tolerance_change"]:
                self.search_stop = "tolerance_change"
                break
        write(params, x)
        return first

    def _searched(self, closure: Callable[[], Any], x: Tensor, here: Point) -> tuple[Point | None, Tensor]:
        """The point that a search along the quasi-Newton direction accepts, and the direction."""
        kept, params = self.kept, self._params
        if "inverse_hessian" not in kept:
            self._forget(here.gradient)
        direction = -(kept["inverse_hessian"] @ here.gradient)
        if any(not p.requires_grad for p in params):  # frozen in this phase
            direction *= torch.cat([p.new_full((p.numel(),), float(p.requires_grad)) for p in params])
        slope = float(here.gradient @ direction)
        if not slope < 0:
            self._forget(here.gradient)
            direction = -here.gradient
            slope = float(here.gradient @ direction)
        length = 1.0 if kept["n_pairs"] else min(1.0, 1.0 / float(here.gradient.abs().sum()))

        def evaluate(t: float) -> Point:
            write(params, x + direction * t)
            value = float(with_gradient(closure))
            gradient = flat_gradient(params)
            return Point(t, value, gradient, float(gradient @ direction))

        start = Point(0.0, here.value, here.gradient, slope)
        most = self.param_groups[0]["line_search_evaluations"]
        return search(evaluate, start, length, max_evaluations=most), direction

    def _forget(self, like: Tensor) -> None:
        self.kept.update(inverse_hessian=torch.eye(len(like), dtype=like.dtype, device=like.device), n_pairs=0)

    def _learn(self, s: Tensor, y: Tensor, sbs: float) -> None:
        """Update the inverse Hessian by a step s, the change y of the gradient, and s'Bs."""
        ys = float(y @ s)
        if not (math.isfinite(ys) and ys > 0 and sbs > 0):
            return  # rounding: a search that ends by Wolfe's conditions has y's > 0
        inverse = self.kept["inverse_hessian"]
        hy = inverse @ y
        yhy = float(y @ hy)
        if not yhy > 0:
            return
        tau, phi = self.scaling(sbs / ys, yhy / ys, len(s))
        update(inverse, s, hy, ys, yhy, tau, phi)
        self.kept["n_pairs"] += 1


def update(inverse: Tensor, s: Tensor, hy: Tensor, ys: float, yhy: float, tau: float, phi: float) -> None:
    """One update of Broyden's class in place, scaled by tau; phi = 1 and tau = 1 are BFGS.

        H <- (H - Hy (Hy)' / y'Hy + phi v v') / tau + s s' / y's,   v = sqrt(y'Hy) (s / y's - Hy / y'Hy)

    (arXiv:2405.04230, the self-scaled Broyden formula.) As one product, in which each pair of entries is made of the
    same numbers in the same order: the matrix stays symmetric to the last bit.
    """
    v = math.sqrt(yhy) * (s / ys - hy / yhy)
    columns = torch.stack([hy * (1 / (yhy * tau)) ** 0.5, v * (abs(phi) / tau) ** 0.5, s * (1 / ys) ** 0.5], dim=1)
    signs = columns.new_tensor([-1.0, math.copysign(1.0, phi), 1.0])
    inverse.addmm_(columns * signs, columns.T, beta=1 / tau)


class SSBroyden(SSBFGS):
    """The self-scaled update of Broyden's class whose mix of BFGS and DFP is chosen anew in each iteration.

    Arguments as for SSBFGS; on physics-informed losses mostly the faster of the two.
    Source: Al-Baali and Khalfan, J. Comput. Appl. Math. (2005), in the form of arXiv:2405.04230.
    """

    def scaling(self, b: float, h: float, n: int) -> tuple[float, float]:
        """tau and phi of the update, given b = s'Bs / y's and h = y'Hy / y's of n parameters."""
        a = max(h * b - 1.0, 1e-14)  # >= 0 by Cauchy and Schwarz
        c = math.sqrt(a / (a + 1.0))
        rho = min(1.0, h * (1.0 - c))
        theta = max((rho - 1.0) / a, min(1.0 / rho, (1.0 - b) / b))
        sigma = max(1.0 + theta * a, 1e-14)
        scale, root = min(1.0, 1.0 / b), sigma ** (-1.0 / max(1, n - 1))
        tau = scale * min(root, 1.0 / theta) if theta > 0 else min(scale * root, sigma)
        return tau, (1.0 - theta) / sigma
