import torch

import weft

torch.manual_seed(0)
X = torch.rand(600, 2)
y = (X[:, 0] > X[:, 1]).long()
net = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
problem = weft.Supervised(net, torch.nn.CrossEntropyLoss(), metrics=["accuracy"])
trainer = weft.Trainer(epochs=30, optimizer=lambda params: torch.optim.Adam(params, lr=1e-2), progress=False)
trainer.fit(problem, weft.Data((X[100:], y[100:]), dev=(X[:100], y[:100]), batch_size=32))
found = trainer.predict(X[:100]).argmax(1)
accuracy = float((found == y[:100]).float().mean())
