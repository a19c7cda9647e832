import torch

torch.manual_seed(0)
X = torch.rand(500, 1)
y = torch.sin(6 * X)
net = torch.nn.Sequential(torch.nn.Linear(1, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
optimizer = torch.optim.Adam(net.parameters(), 1e-2)
best, best_loss, waited = None, float("inf"), 0
for epoch in range(200):
    order = torch.randperm(400)
    for i in range(0, 400, 64):
        rows = order[i : i + 64]
        loss = torch.nn.functional.mse_loss(net(X[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        dev = float(torch.nn.functional.mse_loss(net(X[400:]), y[400:]))
    waited = 0 if dev < best_loss else waited + 1
    if dev < best_loss:
        best_loss = dev
        best = {k: v.clone() for k, v in net.state_dict().items()}
    if waited >= 20:
        break
net.load_state_dict(best)
figure = best_loss
