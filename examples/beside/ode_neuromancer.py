import torch
from neuromancer.constraint import variable
from neuromancer.dataset import DictDataset
from neuromancer.loss import PenaltyLoss
from neuromancer.problem import Problem
from neuromancer.system import Node, System
from neuromancer.trainer import Trainer

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
measured = torch.cat(states).unfold(0, 11, 1).transpose(1, 2)
plant = Oscillator()
system = System([Node(plant, ["x"], ["x"])], nsteps=10)
fit = ((variable("x") - variable("measured")) ** 2).minimize(name="fit")
problem = Problem([system], PenaltyLoss([fit], []))
data = DictDataset({"x": measured[:, :1], "measured": measured}, name="train")
loader = torch.utils.data.DataLoader(data, batch_size=len(data), collate_fn=data.collate_fn)
optimizer = torch.optim.Adam(problem.parameters(), lr=2e-2)
trainer = Trainer(
    problem,
    loader,
    optimizer=optimizer,
    epochs=300,
    eval_metric="train_loss",
    train_metric="train_loss",
    dev_metric="train_loss",
    epoch_verbose=1000,
    warmup=300,
)
problem.load_state_dict(trainer.train())
error = float((plant.unknown.detach() - true).abs().max())
