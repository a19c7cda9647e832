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
"""

from weft.plots.curves import curves, save_summary, terms
from weft.plots.fields import field, solution_map
from weft.plots.systems import phase_portrait, rollout, spectrum

__all__ = ["curves", "field", "phase_portrait", "rollout", "save_summary", "solution_map", "spectrum", "terms"]
