"""Second-order optimizers: quasi-Newton with self-scaling, and Gauss-Newton for sums of squares.

weft.Trainer(phases=[weft.Phase(epochs=1000), weft.Phase(epochs=100, optimizer=weft.optim.SSBroyden)])
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
