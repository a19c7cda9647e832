import deepxde as dde
import numpy as np
import torch

dde.config.set_random_seed(0)


def equation(x, u):  # u'' = -pi^2 sin(pi x)
    return dde.grad.hessian(u, x) + torch.pi**2 * torch.sin(torch.pi * x)


line = dde.geometry.Interval(0, 1)
ends = dde.icbc.DirichletBC(line, lambda x: 0, lambda x, on_boundary: on_boundary)
data = dde.data.PDE(line, equation, ends, num_domain=64, num_boundary=2)
net = dde.nn.FNN([1, 20, 20, 1], "tanh", "Glorot uniform")
model = dde.Model(data, net)
model.compile("adam", lr=1e-3, loss_weights=[1, 10], verbose=0)
model.train(iterations=1500, verbose=0)
x = np.linspace(0, 1, 100, dtype="float32")[:, None]
found = model.predict(x)
error = float(np.abs(found - np.sin(np.pi * x)).max())
