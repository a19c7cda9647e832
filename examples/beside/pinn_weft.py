import numpy as np
import torch

import weft

torch.manual_seed(0)


def slope(of, by):
    return torch.autograd.grad(of.sum(), by, create_graph=True)[0]


def equation(u, x):  # u'' = -pi^2 sin(pi x)
    return (slope(slope(u, x), x) + torch.pi**2 * torch.sin(torch.pi * x)) ** 2


net = torch.nn.Sequential(
    torch.nn.Linear(1, 20), torch.nn.Tanh(), torch.nn.Linear(20, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1)
)
nodes = [weft.Node(net, [f"{part}.x"], [f"{part}.u"], name=part) for part in ("inside", "ends")]
ends = weft.equal("ends.u", 0.0, norm=2, weight=10.0)
problem = weft.Problem(nodes, [weft.objective(equation, part="inside")], [ends], grad_inference=True)
points = {"inside": {"x": torch.rand(64, 1)}, "ends": {"x": torch.tensor([[0.0], [1.0]])}}
trainer = weft.Trainer(epochs=1500, optimizer=lambda params: torch.optim.Adam(params, lr=1e-3), progress=False)
trainer.fit(problem, weft.Data(points, inputs_require_grad=["x"]))
x = np.linspace(0, 1, 100, dtype="float32")[:, None]
found = trainer.predict({"inside": {"x": x}}, keys=["inside.u"])["inside.u"].numpy()
error = float(np.abs(found - np.sin(np.pi * x)).max())
