import torch
from neuromancer.constraint import variable
from neuromancer.dataset import DictDataset
from neuromancer.loss import PenaltyLoss
from neuromancer.problem import Problem
from neuromancer.system import Node
from neuromancer.trainer import LitTrainer

torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(1, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1))
x, p = variable("x"), variable("p")
near, bound = ((x - p) ** 2).minimize(name="near"), 10.0 * (x <= 0.8)
problem = Problem([Node(net, ["p"], ["x"], name="map")], PenaltyLoss([near], [bound]))


def data_setup(batch_size=64):
    generator = torch.Generator().manual_seed(1)
    train, dev = (torch.rand(n, 1, generator=generator) for n in (400, 100))
    return DictDataset({"p": train}, name="train"), DictDataset({"p": dev}, name="dev"), None, batch_size


adam = torch.optim.Adam(problem.parameters(), 1e-2)
trainer = LitTrainer(epochs=20, custom_optimizer=adam, accelerator="cpu", save_weights=False, patience=20)
trainer.fit(problem, data_setup)
dev = data_setup()[1]
with torch.no_grad():
    figure = float(problem({**dev.datadict, "name": "dev"})["dev_loss"])
