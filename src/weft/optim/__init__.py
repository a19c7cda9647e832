"""Second-order optimizers: quasi-Newton with self-scaling, and Gauss-Newton for sums of squares.

weft.Trainer(phases=[weft.Phase(epochs=1000), weft.Phase(epochs=100, optimizer=weft.optim.SSBroyden)])

LeastSquares       A closure that evaluates the loss and its residuals; called, it leaves gradients in the parameters.
LevenbergMarquardt Steps d of (J'J + damping I) d = -J'r whose damping falls while they go well and rises until they do.
NaturalGradient    Natural gradient steps of a least-squares loss: Gauss-Newton directions with a search along each.
SSBFGS             BFGS whose inverse Hessian is scaled before each update, so that large early curvature is forgotten.
SSBroyden          The self-scaled update of Broyden's class whose mix of BFGS and DFP is chosen anew in each iteration.
"""

from typing import TYPE_CHECKING

from weft import _face

if TYPE_CHECKING:
    from weft.optim.gauss_newton import LevenbergMarquardt as LevenbergMarquardt
    from weft.optim.gauss_newton import NaturalGradient as NaturalGradient
    from weft.optim.least_squares import LeastSquares as LeastSquares
    from weft.optim.quasi_newton import SSBFGS as SSBFGS
    from weft.optim.quasi_newton import SSBroyden as SSBroyden
else:
    __getattr__, __dir__, __all__ = _face(__name__)
