# %% [markdown]
# # A LightningModule on real data
#
# A `LightningModule` and its `LightningDataModule` train as they are: `weft.Trainer` calls their steps, optimizers and
# hooks in # Lightning's order. The data are scikit-learn's 1797 handwritten digits; the truth to be measured against is
# an SVM on # the same split.

# %%
import os

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from sklearn.datasets import load_digits
from sklearn.metrics import confusion_matrix
from sklearn.svm import SVC
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import weft

SMALL = bool(os.environ.get("WEFT_SMALL"))
torch.manual_seed(0)
torch.set_num_threads(1)


# %%
class Digits(LightningDataModule):
    """The images as (1, 8, 8), from 0 to 1, in three parts."""

    def setup(self, stage=None):
        images, labels = load_digits(return_X_y=True)
        images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        rows = TensorDataset(images[order], torch.tensor(labels)[order])
        ends = [0, 300, 500, 797] if SMALL else [0, 1197, 1497, 1797]
        self.train, self.val, self.rest = (
            torch.utils.data.Subset(rows, range(a, b)) for a, b in zip(ends, ends[1:], strict=False)
        )

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=64, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=300)

    def test_dataloader(self):
        return DataLoader(self.rest, batch_size=300)


class Classifier(LightningModule):
    """A small convolutional network."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Conv2d(1, 16, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
            torch.nn.Conv2d(16, 32, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
            torch.nn.Flatten(),
            torch.nn.Dropout(0.2),
            torch.nn.Linear(128, 10),
        )

    def forward(self, image):
        return self.net(image)

    def training_step(self, batch, batch_idx):
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        scores = self(batch[0])
        self.log_dict({"val_loss": cross_entropy(scores, batch[1]), "val_accuracy": self.accuracy(scores, batch[1])})

    def test_step(self, batch, batch_idx):
        self.log("test_accuracy", self.accuracy(self(batch[0]), batch[1]))

    def accuracy(self, scores, labels):
        return (scores.argmax(1) == labels).float().mean()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)}


# %% [markdown]
# ## The same two objects, another trainer
#
# In Lightning nothing is monitored unless a callback is; here one keyword keeps the best weights.

# %%
EPOCHS = 2 if SMALL else 30
model, digits = Classifier(), Digits()
trainer = weft.Trainer(epochs=EPOCHS, monitor_metric="val_loss", seed=0, progress=False)
result = trainer.fit(model, datamodule=digits)
print(result)

# %%
images, labels = (torch.stack([row[i] for row in digits.rest]) for i in range(2))
model.eval()
with torch.no_grad():
    predicted = model(images).argmax(1)
accuracy = float((predicted == labels).float().mean())
train_images, train_labels = (torch.stack([row[i] for row in digits.train]) for i in range(2))
svm = SVC(gamma=0.1).fit(train_images.flatten(1), train_labels)
accuracy_svm = float(svm.score(images.flatten(1), labels))
print(f"accuracy on the test digits: {accuracy:.3f}; support vector machine: {accuracy_svm:.3f}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
left.semilogy(result.history["train_loss"], label="train loss")
left.semilogy(result.history["val_loss"], label="validation loss")
left.set(xlabel="epoch", ylabel="cross-entropy")
left.legend()
shown = right.imshow(confusion_matrix(labels, predicted), cmap="Blues")
right.set(xlabel="predicted digit", ylabel="true digit", xticks=range(10), yticks=range(10))
figure.colorbar(shown, ax=right, label="test digits")
plt.show()

# %%
figures = {"accuracy": accuracy, "accuracy_svm": accuracy_svm, "best_val_loss": float(result.best_metric)}
