import torch

import weft

torch.manual_seed(0)
X = torch.rand(500, 1)
y = torch.sin(6 * X)
net = torch.nn.Sequential(torch.nn.Linear(1, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
trainer = weft.Trainer(epochs=200, patience=20, optimizer=lambda p: torch.optim.Adam(p, 1e-2), progress=False)
result = trainer.fit(
    weft.Supervised(net, torch.nn.functional.mse_loss),
    weft.Data((X[:400], y[:400]), dev=(X[400:], y[400:]), batch_size=64),
)  # the net holds the best weights; checkpoint=True, compile=True, devices=2 are a keyword each
figure = result.best_metric
