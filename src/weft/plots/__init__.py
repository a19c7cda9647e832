"""Pictures of a run and of what it learned: matplotlib axes in, axes out.

    weft.plot.curves(result)                                  # train and dev, the best epoch marked
    weft.plot.save_summary(result, "runs/a/curves.png")
    weft.plot.solution_map(lambda x, y: (1 - x) ** 2 + 100 * (y - x**2) ** 2, (-2, 2), (-1, 3))
    weft.plot.rollout(closed["u"], bounds=(-1, 1), steps=True, labels=("time (s)", "torque (N m)"))
    weft.plot.phase_portrait(closed["x"], target=(0, 0))
    weft.plot.field(t, x, u, reference, labels=("t (s)", "x (m)", "u (m/s)"))
    weft.plot.spectrum(K, known_eigenvalues)

matplotlib is loaded by the first picture. Without `ax` pyplot makes a new figure, which a notebook shows by itself;
`save_summary` leaves pyplot alone, so a script that calls it has nothing to close.

curves                The losses of `result` over its epochs, one line a split, the best epoch marked.
field                 A field over a grid, with a `reference` also that and the absolute error.
phase_portrait        Paths in the plane of two states, a dot where each begins.
rollout               Trajectories over time, one colour each, with their bounds.
save_summary          Write a picture of `result`, curves above all `terms`, to `path` (its ending names the format).
search                The values of a sweep's trials in order with the best so far, and over each of its parameters.
series                The values of several runs, by name and epoch, one line each under its name.
solution_map          Filled contours of `fn(x, y)` over a rectangle, with a colour bar.
spectrum              The eigenvalues of a square matrix in the complex plane, with the unit circle.
terms                 One axes for each named term and constraint violation of `result`, train and dev in each.
"""

from weft.plots.curves import curves, save_summary, series, terms
from weft.plots.fields import field, solution_map
from weft.plots.searches import search
from weft.plots.systems import phase_portrait, rollout, spectrum

__all__ = [
    "curves",
    "field",
    "phase_portrait",
    "rollout",
    "save_summary",
    "search",
    "series",
    "solution_map",
    "spectrum",
    "terms",
]


def __dir__() -> list[str]:
    return __all__
