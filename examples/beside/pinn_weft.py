import torch
from torch import nn

import weft

torch.manual_seed(0)


def equation(u, x):  # u'' = -pi^2 sin(pi x)
    return (weft.gradient(weft.gradient(u, x), x) + torch.pi**2 * torch.sin(torch.pi * x)) ** 2


net = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1))
nodes = weft.Node(net, ["x"], ["u"]).on("inside", "ends")
ends = weft.equal("u", 0.0, part="ends", norm=2, weight=10.0)
problem = weft.Problem(nodes, [weft.objective(equation, part="inside")], [ends])
points = {"inside": {"x": torch.rand(64, 1)}, "ends": {"x": torch.tensor([[0.0], [1.0]])}}
trainer = weft.Trainer(epochs=1500, optimizer=lambda params: torch.optim.Adam(params, lr=1e-3), progress=False)
trainer.fit(problem, weft.Data(points, inputs_require_grad=["inside.x"]))
x = torch.linspace(0, 1, 100)[:, None]
found = trainer.predict({"inside": {"x": x}}, keys=["inside.u"])["inside.u"]
error = float((found - torch.sin(torch.pi * x)).abs().max())
