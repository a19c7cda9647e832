import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch.utils.data import DataLoader, TensorDataset

from weft.integrations.lightning import Trainer


class Fit(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(1, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return torch.nn.functional.mse_loss(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", torch.nn.functional.mse_loss(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


torch.manual_seed(0)
x = torch.rand(500, 1)
train, dev = (TensorDataset(t, torch.sin(6 * t)) for t in (x[:400], x[400:]))
trainer = Trainer(
    max_epochs=10,
    callbacks=[EarlyStopping("val_loss", patience=5)],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Fit(), DataLoader(train, batch_size=64, shuffle=True), DataLoader(dev, batch_size=64))
figure = float(trainer.callback_metrics["val_loss"])
