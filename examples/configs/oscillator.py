"""Stiffness and damping of an oscillator, found from its motion: what `oscillator.yaml` trains.

x'' = -k x - c x',    observed at a fixed time step; k and c are the parameters
"""

import torch
from torch import Tensor, nn

import weft

TIME_STEP = 0.05  # s


class Oscillator(nn.Module):
    """One step of the classical Runge-Kutta method: state (position, velocity) now -> state a time step later."""

    def __init__(self, stiffness: float, damping: float) -> None:
        super().__init__()
        self.stiffness = nn.Parameter(torch.tensor(stiffness))  # 1/s^2
        self.damping = nn.Parameter(torch.tensor(damping))  # 1/s

    def slope(self, state: Tensor) -> Tensor:
        """d(state)/dt, (batch, 2)."""
        position, velocity = state[:, :1], state[:, 1:]
        return torch.cat([velocity, -self.stiffness * position - self.damping * velocity], dim=1)

    def forward(self, state: Tensor) -> Tensor:
        k1 = self.slope(state)
        k2 = self.slope(state + TIME_STEP / 2 * k1)
        k3 = self.slope(state + TIME_STEP / 2 * k2)
        k4 = self.slope(state + TIME_STEP * k3)
        return state + TIME_STEP / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def make_problem(stiffness: float = 1.0, damping: float = 0.0, steps: int = 10) -> weft.Problem:
    """The problem: predict `steps` time steps, compare with what was observed.

    Args:
        stiffness: first guess (1/s^2)
        damping: first guess (1/s)
        steps: length of the rollout, in time steps
    """
    rollout = weft.Rollout([weft.Node(Oscillator(stiffness, damping), ["x"], ["x"], name="oscillator")], steps)
    error = weft.objective(lambda x, observed: (x - observed) ** 2, name="prediction_error")
    return weft.Problem([rollout], objectives=[error])


def data_setup(
    stiffness: float = 4.0,
    damping: float = 0.3,
    noise: float = 0.01,
    steps: int = 10,
    batch_size: int = 32,
    seed: int = 0,
) -> weft.Data:
    """Windows of three noisy experiments: for training, for early stopping, and a test.

    Args:
        stiffness: the truth (1/s^2)
        damping: the truth (1/s)
        noise: standard deviation of what is observed
        steps: time steps of a window
        batch_size: windows in a batch
        seed: of the noise
    """
    generator = torch.Generator().manual_seed(seed)
    splits = []
    for start in ([1.0, 0.0], [0.0, 2.0], [-1.0, 1.0]):
        with torch.no_grad():
            states = [torch.tensor([start])]
            truth = Oscillator(stiffness, damping)
            for _ in range(300):
                states.append(truth(states[-1]))
        series = torch.cat(states)
        series = series + noise * torch.randn(series.shape, generator=generator)
        observed = weft.windows({"observed": series}, length=steps + 1).datadict["observed"]
        splits.append(weft.DictDataset({"x": observed[:, :1], "observed": observed}))
    return weft.Data(*splits, batch_size=batch_size)
