import torch
from skorch import NeuralNetRegressor
from skorch.helper import predefined_split
from torch.utils.data import TensorDataset

torch.manual_seed(0)
X = torch.rand(500, 1)
y = torch.sin(6 * X)
net = NeuralNetRegressor(
    torch.nn.Sequential(torch.nn.Linear(1, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)),
    optimizer=torch.optim.Adam,
    lr=1e-2,
    max_epochs=100,
    batch_size=64,
    iterator_train__shuffle=True,
    train_split=predefined_split(TensorDataset(X[400:], y[400:])),
    verbose=0,
)
net.fit(X[:400], y[:400])
figure = float((torch.as_tensor(net.predict(X[400:])) - y[400:]).square().mean())
