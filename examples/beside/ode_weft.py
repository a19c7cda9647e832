import torch

import weft

torch.manual_seed(0)
t, dt, true = torch.arange(101) * 0.1, 0.1, torch.tensor([0.5, 2.0])


def step(x, damping, stiffness):  # x'' = -stiffness x - damping x', semi-implicit Euler
    v = x[:, 1:] + dt * (-stiffness * x[:, :1] - damping * x[:, 1:])
    return torch.cat([x[:, :1] + dt * v, v], dim=1)


class Oscillator(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.unknown = torch.nn.Parameter(torch.tensor([0.1, 1.0]))

    def forward(self, x):
        return step(x, *self.unknown)


states = [torch.tensor([[1.0, 0.0]])]
for _ in t[1:]:
    states.append(step(states[-1], *true))
measured = weft.windows({"measured": torch.cat(states)}, length=11).datadict["measured"]
plant = Oscillator()
rollout = weft.Rollout([weft.Node(plant, ["x"], ["x"])], steps=10)
problem = weft.Problem([rollout], [weft.objective(lambda x, measured: (x - measured) ** 2, name="fit")])
trainer = weft.Trainer(epochs=300, optimizer=lambda params: torch.optim.Adam(params, lr=2e-2), progress=False)
trainer.fit(problem, {"x": measured[:, :1], "measured": measured})
error = float((plant.unknown.detach() - true).abs().max())
