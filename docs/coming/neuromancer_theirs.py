import torch
from neuromancer.constraint import variable
from neuromancer.dataset import DictDataset
from neuromancer.loss import PenaltyLoss
from neuromancer.problem import Problem
from neuromancer.system import Node
from neuromancer.trainer import Trainer

torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(1, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1))
x, p = variable("x"), variable("p")
near, bound = ((x - p) ** 2).minimize(name="near"), 10.0 * (x <= 0.8)
problem = Problem([Node(net, ["p"], ["x"], name="map")], PenaltyLoss([near], [bound]))
train, dev = (DictDataset({"p": torch.rand(n, 1)}, name=name) for n, name in ((400, "train"), (100, "dev")))
loaders = [torch.utils.data.DataLoader(d, batch_size=100, collate_fn=d.collate_fn) for d in (train, dev)]
optimizer = torch.optim.Adam(problem.parameters(), 1e-2)
trainer = Trainer(problem, *loaders, optimizer=optimizer, epochs=20, patience=20, epoch_verbose=20)
best = trainer.train()
figure = float(trainer.best_devloss)
