"""Gauss-Newton methods for losses that are sums of squares: Levenberg-Marquardt, and natural gradients with a search.

    problem = weft.Problem([net], [weft.residual(equation), weft.residual(boundary, weight=10.0)])
    weft.Phase(epochs=50, optimizer=weft.optim.NaturalGradient)

With r the residuals (loss = r'r) and J their Jacobian, both go along the d of (J'J + damping I) d = -J'r. With n
parameters and m residuals that is an n x n system, or by J' (J J' + damping I)^-1 an m x m one, whichever is smaller;
above `max_dense` numbers neither is made, and d comes from conjugate gradients with products alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from weft.optim.least_squares import LeastSquares, Rows
from weft.optim.searching import Searching, flat, with_gradient, write


class Near:
    """The residuals at steps from a point: called with one, the parameters are there afterwards."""

    def __init__(self, closure: LeastSquares, params: list[Tensor]) -> None:
        self.closure, self.params, self.x, self.evaluations = closure, params, flat(params), 0

    def __call__(self, d: Tensor) -> Tensor:
        self.evaluations += 1
        self.go(d)
        return self.closure.values()

    def go(self, d: Tensor) -> None:
        """Have the parameters a step away from the point."""
        write(self.params, self.x + d)

    def back(self) -> None:
        """Have them at the point."""
        write(self.params, self.x)


class GaussNewton(Searching):
    """What both methods share: the linear system for a damping, and the book-keeping of a step."""

    needs_residuals = True
    growth: tuple[float, float]
    """By what the damping grows after a step that failed, and by what this number grows then."""

    def __init__(
        self,
        params: Iterable[Tensor],
        damping: float = 1e-3,
        max_iter: int = 1,
        tolerance_grad: float = 0.0,
        max_dense: int = 2**27,
        cg_iterations: int = 200,
        accelerate: bool = True,
    ) -> None:
        if not damping > 0 or max_iter < 1 or cg_iterations < 1:
            raise ValueError("damping must be > 0, max_iter and cg_iterations at least 1.")
        super().__init__(
            params,
            {
                "damping": damping,
                "max_iter": max_iter,
                "tolerance_grad": tolerance_grad,
                "max_dense": max_dense,
                "cg_iterations": cg_iterations,
                "accelerate": accelerate,
            },
        )
        self.rows = Rows()

    def bound_to(self, problem: Any, batch: Any, closure: Callable[[], Any]) -> LeastSquares:
        """The closure that a step is given, for a trainer."""
        return LeastSquares(problem, batch, self._params, closure, self.rows)

    def step(self, closure: LeastSquares) -> Any:  # type: ignore[override]
        """Up to `max_iter` iterations; returns the loss at the start. TypeError for a closure without residuals."""
        if not isinstance(closure, LeastSquares):
            raise TypeError(
                f"{type(self).__name__} needs residuals: step(weft.optim.LeastSquares(problem, batch)); "
                f"got {type(closure).__name__}."
            )
        self.rows.given_up = self.rows.given_up or self.kept.get("whole", False)
        self.evaluations, before = 0, self.kept.get("n_iter", 0)
        with self.goes_back():
            first = with_gradient(closure)
            value, params = float(first), self.trained()
            self.search_stop = "max_iter" if math.isfinite(value) else "not finite"
            for _ in range(self.param_groups[0]["max_iter"] if math.isfinite(value) else 0):
                value = self._iterate(closure, value, params)
                if self.search_stop != "max_iter":
                    break
                self.kept["n_iter"] = self.kept.get("n_iter", 0) + 1
            if self.search_stop == "max_iter" or self.kept.get("n_iter", 0) > before:
                with_gradient(closure)  # what is there now is what is logged
        self.kept["whole"] = self.rows.given_up
        return first

    def _iterate(self, closure: LeastSquares, value: float, params: list[Tensor]) -> float:
        """Go to a lower loss; returns it, or says in `search_stop` why there is none."""
        system = self._linearized(closure, value)
        if float(system.gradient.abs().max()) <= self.param_groups[0]["tolerance_grad"] / 2:
            self.search_stop = "tolerance_grad"
            return value
        near = Near(closure, params)
        found = self._search(system, value * (1.0 - 4.0 * self.epsilon), near)  # below that it is rounding
        self.evaluations += near.evaluations
        if found is None:
            near.back()
            self.search_stop = "no lower loss"
            return value
        near.go(found[1])
        return found[0]

    def _search(self, system: System, value: float, near: Near) -> tuple[float, Tensor] | None:
        """The loss and the step of a point that is lower than `value`; None where there is none."""
        damping, (growth, faster) = self._damping(system), self.growth
        for _ in range(40):
            found = self._direction(system, damping, near)
            if found is not None:
                promised = system.promised(found[0], damping)
                if promised <= 4.0 * self.epsilon * value:
                    return None  # the smaller steps of more damping promise less
                best = self._along(*found, value, near)
                if best is not None:
                    factor = self._judged((value - best[0]) / promised)
                    self.kept["damping"] = max(damping * factor, system.scale * self.epsilon)
                    return best
            damping, growth = damping * growth, growth * faster
        return None

    def _along(self, d: Tensor, a: Tensor, value: float, near: Near) -> tuple[float, Tensor] | None:
        """Loss and step of a point t d + t^2 a that is lower than `value`; None where there is none."""
        raise NotImplementedError

    def _judged(self, ratio: float) -> float:
        """By what the damping is multiplied where the loss fell by `ratio` of what the linear model promised."""
        raise NotImplementedError

    def _direction(self, system: System, damping: float, near: Near) -> tuple[Tensor, Tensor] | None:
        """The step d for a damping, and half its geodesic acceleration a: x + t d + t^2 a bends with the residuals.

        a is zero where it is not small beside d, as then the second derivative says little (Transtrum and Sethna,
        arXiv:1201.5885). None where the matrix is singular.
        """
        near.back()
        d = system.solve(None, damping)
        if d is None or not bool(d.isfinite().all()):
            return None
        if not self.param_groups[0]["accelerate"]:
            return d, torch.zeros_like(d)
        h = 0.1
        ahead, behind = near(d * h), near(d * -h)
        bend = (ahead + behind - 2.0 * system.r) / h**2
        near.back()
        a = system.solve(bend, damping) if bool(bend.isfinite().all()) else None
        if a is None or not float(a.norm()) <= 0.75 * float(d.norm()):
            return d, torch.zeros_like(d)
        return d, a / 2

    def _damping(self, system: System) -> float:
        return self.kept.get("damping") or self.param_groups[0]["damping"] * system.scale

    def _linearized(self, closure: LeastSquares, value: float) -> System:
        """The linear system here. The graphs of its rows must agree with the loss, else they are given up."""
        x, group = flat(closure.params), self.param_groups[0]
        n, size = len(x), float(x.norm())
        while True:
            system = _system(closure, n, group["max_dense"], group["cg_iterations"])
            # near a solution r is a small difference of numbers as large as J x, and rounded as those
            bound = self.epsilon * (1e4 * math.sqrt(value) + 1e2 * math.sqrt(system.scale) * size)
            if abs(math.sqrt(system.value) - math.sqrt(value)) <= bound:
                return system
            if not self.rows.forget():
                raise ValueError(
                    f"{type(self).__name__}: the loss is {value:g}, but the mean squares of the residuals add up to "
                    f"{system.value:g}. The loss must be what `residuals(batch)` says: put every term into it, or let "
                    "the training step return the problem's own loss. (A random number in the loss does this, too.)"
                )


class LevenbergMarquardt(GaussNewton):
    """Steps d of (J'J + damping I) d = -J'r whose damping falls while they go well and rises until they do.

    params: one group of one real dtype; float64 where you want digits. damping: of the first step, in units of the
        largest diagonal entry of J'J (or of J J'); later ones adapt it. max_iter: iterations of one step, each of one
        Jacobian.
    tolerance_grad: a step ends where no entry of the loss's gradient is larger. max_dense: the most numbers of a dense
        matrix; above, `cg_iterations` products at most replace it. accelerate: bend each step with the second
        derivative of the residuals along it (two evaluations and a product more, mostly many steps fewer).
    Raises ValueError for a number out of its range, and for parameters of several groups or dtypes.

    `search_stop` says what ended the last step: "max_iter", "tolerance_grad", "no lower loss".
    Source: Nocedal & Wright, Numerical Optimization, 2nd ed., ch. 10.3; damping from the ratio of what was gained to
    what the linear model promised, after Nielsen (IMM-REP-1999-05, Technical University of Denmark).
    """

    growth = 2.0, 1.5

    def _along(self, d: Tensor, a: Tensor, value: float, near: Near) -> tuple[float, Tensor] | None:
        new = _square(near(d + a))
        return (new, d + a) if new < value else None

    def _judged(self, ratio: float) -> float:
        return 0.2


class NaturalGradient(GaussNewton):
    """Natural gradient steps of a least-squares loss: Gauss-Newton directions with a search along each.

    The direction is that of (J'J + damping I) d = -J'r; for a loss that is a squared norm of functions it is the energy
    natural gradient. How far is the best of powers of two; the damping falls where the loss falls by what the linear
    model promised, and rises where it does not.

    Arguments as for LevenbergMarquardt.
    Source: Mueller and Zeinhofer, ICML 2023 (arXiv:2302.13163), with its search; in the space of residuals as in
    arXiv:2505.12149; the acceleration is that of arXiv:1201.5885.
    """

    growth = 10.0, 1.0

    def _along(self, d: Tensor, a: Tensor, value: float, near: Near) -> tuple[float, Tensor] | None:
        best: tuple[float, Tensor] | None = None
        for i in range(24):  # t = 1, 1/2, 1/4, ..., until it rises again
            t = 2.0**-i
            step = d * t + a * t**2
            new = _square(near(step))
            if new < (value if best is None else best[0]):
                best = new, step
            elif best is not None:
                break
        return best

    def _judged(self, ratio: float) -> float:
        return 0.2 if ratio > 0.75 else 1.0 if ratio > 0.25 else 4.0


def _square(r: Tensor) -> float:
    return float(r @ r)


class System:
    """J'J + damping I, or J J' + damping I, and what a solution needs of it."""

    r: Tensor
    value: float
    """r'r."""
    gradient: Tensor
    """J'r, half the gradient of the loss."""
    scale: float
    """The largest diagonal entry."""

    def solve(self, w: Tensor | None, damping: float) -> Tensor | None:
        """-(J'J + damping I)^-1 J'w, w = r for None; None where rounding makes the matrix singular."""
        raise NotImplementedError

    def promised(self, d: Tensor, damping: float) -> float:
        """By how much the linear model falls along the solution d: -2 d'J'r - d'J'J d."""
        return float(damping * (d @ d) - self.gradient @ d)


class _Dense(System):
    """A matrix that is factored once for a damping."""

    matrix: Tensor
    _factored: tuple[float, Tensor | None] = (-1.0, None)

    def factor(self, damping: float) -> Tensor | None:
        """The Cholesky factor of the matrix with the damping on its diagonal; None where it is not positive."""
        if self._factored[0] != damping:
            shifted = self.matrix.clone()
            shifted.diagonal().add_(damping)
            factor, failed = torch.linalg.cholesky_ex(shifted)
            self._factored = (damping, None if int(failed) else factor)
        return self._factored[1]


class _InParameters(_Dense):
    """By the n x n matrix J'J, added up block by block. A Jacobian that is not large is kept for later products."""

    def __init__(self, closure: LeastSquares, n: int, keep: bool) -> None:
        like = closure.params[0]
        self.closure = closure
        self.matrix, self.gradient = like.new_zeros(n, n), like.new_zeros(n)
        rs, self.jacobians = [], list[Tensor]()
        for r, jacobian in closure.blocks():
            _add_square(self.matrix, jacobian)
            self.gradient.addmv_(jacobian.T, r)
            rs.append(r)
            if keep:
                self.jacobians.append(jacobian)
        self.r = torch.cat(rs)
        self.value, self.scale = _square(self.r), float(self.matrix.diagonal().max()) or 1.0

    def solve(self, w: Tensor | None, damping: float) -> Tensor | None:
        right = self.gradient if w is None else self._transposed(w)
        factor = self.factor(damping)
        return None if factor is None else -torch.cholesky_solve(right[:, None], factor)[:, 0]

    def _transposed(self, w: Tensor) -> Tensor:
        if not self.jacobians:
            return self.closure.transposed(w)
        parts = w.split([len(jacobian) for jacobian in self.jacobians])
        return torch.stack([j.T @ part for j, part in zip(self.jacobians, parts, strict=True)]).sum(0)


def _add_square(matrix: Tensor, jacobian: Tensor) -> None:
    """Add the lower triangle of J'J, which is what a Cholesky factorization reads; some 0.6 of the products of all."""
    n = len(matrix)
    for start in range(0, n, 128):
        rows = slice(start, min(n, start + 128))
        matrix[rows, : rows.stop].addmm_(jacobian[:, rows].T, jacobian[:, : rows.stop])


class _InResiduals(_Dense):
    """By the m x m matrix J J'; the Jacobian is kept."""

    def __init__(self, closure: LeastSquares) -> None:
        self.r, self.jacobian = (torch.cat(parts) for parts in zip(*closure.blocks(), strict=True))
        self.gradient, self.value = self.jacobian.T @ self.r, _square(self.r)
        self.matrix = self.jacobian @ self.jacobian.T
        self.scale = float(self.matrix.diagonal().max()) or 1.0

    def solve(self, w: Tensor | None, damping: float) -> Tensor | None:
        factor, right = self.factor(damping), self.r if w is None else w
        return None if factor is None else -(self.jacobian.T @ torch.cholesky_solve(right[:, None], factor)[:, 0])


class _ByProducts(System):
    """By conjugate gradients on the normal equations (CGLS; Bjorck, Numerical Methods for Least Squares Problems)."""

    def __init__(self, closure: LeastSquares, iterations: int) -> None:
        self.closure, self.iterations = closure, iterations
        self.r = closure.values()
        self.gradient, self.value = closure.transposed(self.r), _square(self.r)
        along = closure.product(self.gradient)
        self.scale = float(along @ along) / (float(self.gradient @ self.gradient) or 1.0) or 1.0

    def solve(self, w: Tensor | None, damping: float) -> Tensor | None:
        left = -(self.gradient if w is None else self.closure.transposed(w))
        d, direction, norm = torch.zeros_like(left), left, float(left @ left)
        goal = 1e-20 * norm
        for _ in range(self.iterations):
            if norm <= goal:
                break
            along = self.closure.product(direction)
            curvature = float(along @ along) + damping * float(direction @ direction)
            d = d + direction * (norm / curvature)
            left = left - (self.closure.transposed(along) + damping * direction) * (norm / curvature)
            before, norm = norm, float(left @ left)
            direction = left + direction * (norm / before)
        return d


def _system(closure: LeastSquares, n: int, max_dense: int, iterations: int) -> System:
    """In the smaller of both spaces; by products where what is dense there would be too large."""
    m = sum(r.numel() for r in closure.parts().values())
    if n <= m and n * n <= max_dense:
        return _InParameters(closure, n, keep=m * n <= max_dense)
    if m < n and m * n <= max_dense:
        return _InResiduals(closure)
    return _ByProducts(closure, iterations)
