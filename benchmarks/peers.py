"""Who trains: each peer is a function (workload, problem, tick) -> the dev loss after the last epoch.

It trains `problem` for `workload.epochs` epochs with the workload's optimizer, clipping and batches, evaluates the dev
set after each, and calls `tick()` when an epoch begins and once at the end. It does so as its own documentation says.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import weft
from benchmarks.workloads import Tensors, Workload

Tick = Callable[[], None]
Peer = Callable[[Workload, nn.Module, Tick], float]


# ---- shared by those that are written by hand
# --------------------------------------------------------------------------


class Rows(Dataset):
    """Tensors by key, one row at a time."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, i: int) -> Tensors:
        return {k: t[i] for k, t in self.tensors.items()}


def collate(workload: Workload, name: str, rows: list[Tensors]) -> dict[str, Any]:
    return prepare(workload, name, torch.utils.data.default_collate(rows))


def prepare(workload: Workload, name: str, batch: dict[str, Any]) -> dict[str, Any]:
    """A batch as a problem wants it: with its split's name, and gradients where it takes derivatives."""
    for key in workload.require_grad:
        batch[key] = batch[key].detach().requires_grad_()
    return {**batch, "name": name}


def loaders(workload: Workload) -> tuple[DataLoader, DataLoader]:
    made = (
        DataLoader(Rows(t), batch_size=workload.batch_size, collate_fn=partial(collate, workload, name))
        for name, t in (("train", workload.train), ("dev", workload.dev))
    )
    return next(made), next(made)


def sliced(workload: Workload, name: str) -> Iterator[dict[str, Any]]:
    tensors, size = (workload.train if name == "train" else workload.dev), workload.batch_size
    for i in range(0, len(next(iter(tensors.values()))), size):
        yield prepare(workload, name, {k: t[i : i + size] for k, t in tensors.items()})


def evaluated(workload: Workload, problem: nn.Module, batches: Any) -> Tensor:
    """The mean dev loss over the rows."""
    problem.eval()
    total, rows = torch.zeros((), device=workload.device), 0
    with torch.set_grad_enabled(bool(workload.require_grad)):
        for batch in batches:
            n = len(next(iter(batch.values())))
            total += n * problem(batch)["dev_loss"].detach()
            rows += n
    problem.train()
    return total / rows


def loop(workload: Workload, problem: nn.Module, tick: Tick, batches: Callable[[str], Any]) -> float:
    optimizer = workload.optimizer(problem.parameters())
    loss = torch.zeros(())
    for _ in range(workload.epochs):
        tick()
        for batch in batches("train"):
            optimizer.zero_grad()
            problem(batch)["train_loss"].backward()
            nn.utils.clip_grad_norm_(problem.parameters(), workload.clip)
            optimizer.step()
        loss = evaluated(workload, problem, batches("dev"))
    tick()
    return float(loss)


# ---- the peers -------------------------------------------------------------------------------------------------------


def by_hand(workload: Workload, problem: nn.Module, tick: Tick) -> float:
    """The base of all ratios: plain PyTorch over slices of tensors in memory."""
    return loop(workload, problem, tick, partial(sliced, workload))


def by_hand_loader(workload: Workload, problem: nn.Module, tick: Tick) -> float:
    """Plain PyTorch with a DataLoader over rows, as tutorials have it."""
    train, dev = loaders(workload)
    return loop(workload, problem, tick, lambda name: train if name == "train" else dev)


def weft_fit(workload: Workload, problem: nn.Module, tick: Tick, **options: Any) -> float:
    """weft with history, best weights, early stopping, the check for non-finite numbers and the progress line on."""
    data = weft.Data(
        weft.DictDataset(workload.train),
        weft.DictDataset(workload.dev),
        batch_size=workload.batch_size,
        shuffle=False,
        inputs_require_grad=workload.require_grad,
    )
    trainer = weft.Trainer(
        epochs=workload.epochs,
        optimizer=workload.optimizer,
        clip=workload.clip,
        patience=10**6,
        accelerator=workload.device,
        hooks={"on_epoch_start": lambda _: tick(), "on_fit_end": lambda *_: tick()},
        **options,
    )
    return trainer.fit(problem, data).history["dev_loss"][-1]


def weft_eager(workload: Workload, problem: nn.Module, tick: Tick) -> float:
    """weft as it is."""
    return weft_fit(workload, problem, tick)


def weft_compiled(workload: Workload, problem: nn.Module, tick: Tick) -> float:
    """weft with compile=True."""
    return weft_fit(workload, problem, tick, compile=True)


def fabric(workload: Workload, problem: nn.Module, tick: Tick) -> float:
    """Lightning Fabric's documented loop."""
    from lightning.fabric import Fabric

    runner = Fabric(accelerator="cpu", devices=1)
    model, optimizer = runner.setup(problem, workload.optimizer(problem.parameters()))
    train, dev = runner.setup_dataloaders(*loaders(workload))
    loss = torch.zeros(())
    for _ in range(workload.epochs):
        tick()
        for batch in train:
            optimizer.zero_grad()
            runner.backward(model(batch)["train_loss"])
            runner.clip_gradients(model, optimizer, max_norm=workload.clip)
            optimizer.step()
        loss = evaluated(workload, model, dev)
    tick()
    return float(loss)


def accelerate(workload: Workload, problem: nn.Module, tick: Tick) -> float:
    """Hugging Face accelerate's documented loop."""
    from accelerate import Accelerator

    runner = Accelerator(cpu=True)
    model, optimizer, train, dev = runner.prepare(problem, workload.optimizer(problem.parameters()), *loaders(workload))
    loss = torch.zeros(())
    for _ in range(workload.epochs):
        tick()
        for batch in train:
            optimizer.zero_grad()
            runner.backward(model(batch)["train_loss"])
            runner.clip_grad_norm_(model.parameters(), workload.clip)
            optimizer.step()
        loss = evaluated(workload, model, dev)
    tick()
    return float(loss)


def lightning(workload: Workload, problem: nn.Module, tick: Tick, **options: Any) -> float:
    """lightning.pytorch.Trainer with a LightningModule that logs both losses."""
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.problem = problem

        def training_step(self, batch: Any, number: int) -> Tensor:
            loss = self.problem(batch)["train_loss"]
            if not options:
                self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(next(iter(batch.values()))))
            return loss

        def validation_step(self, batch: Any, number: int) -> None:
            with torch.set_grad_enabled(bool(workload.require_grad)):
                loss = self.problem(batch)["dev_loss"].detach()
            losses.append((loss, len(next(iter(batch.values())))))
            if not options:
                self.log("dev_loss", loss, batch_size=losses[-1][1])

        def on_validation_epoch_start(self) -> None:
            losses.clear()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return workload.optimizer(self.parameters())

    class Ticking(pl.Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            tick()

        def on_train_end(self, *_: Any) -> None:
            tick()

    losses: list[tuple[Tensor, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=workload.epochs,
            accelerator="cpu",
            devices=1,
            gradient_clip_val=workload.clip,
            callbacks=[Ticking()],
            num_sanity_val_steps=0,
            default_root_dir=folder,
            inference_mode=not workload.require_grad,
            **options,
        )
        trainer.fit(Module(), *loaders(workload))
    return float(sum(loss * n for loss, n in losses) / sum(n for _, n in losses))


def lightning_barebones(workload: Workload, problem: nn.Module, tick: Tick) -> float:
    """The same with barebones=True: no logging, no checkpoints, no progress bar."""
    return lightning(workload, problem, tick, barebones=True)


def neuromancer_trainer(workload: Workload, problem: nn.Module, tick: Tick) -> float:
    """NeuroMANCER's Trainer (keeps the best weights, prints an epoch's losses)."""
    from neuromancer.callbacks import Callback
    from neuromancer.dataset import DictDataset
    from neuromancer.trainer import Trainer

    class Ticking(Callback):
        def begin_epoch(self, *_: Any) -> None:
            tick()

        def end_train(self, *_: Any) -> None:
            tick()
            losses.append(
                evaluated(workload, problem, sliced(workload, "dev"))
            )  # the best weights come back after this

    losses: list[Tensor] = []
    made = []
    for name, tensors in (("train", workload.train), ("dev", workload.dev)):
        dataset = DictDataset(tensors, name=name)
        made.append(DataLoader(dataset, batch_size=workload.batch_size, collate_fn=dataset.collate_fn))
    optimizer = workload.optimizer(problem.parameters())
    trainer = Trainer(
        problem,
        *made,
        None,
        optimizer,
        epochs=workload.epochs,
        clip=workload.clip,
        patience=10**6,
        callback=Ticking(),
        train_metric="train_loss",
        dev_metric="dev_loss",
        eval_metric="dev_loss",
    )
    trainer.train()
    return float(losses[-1])


def neuromancer_lit_trainer(workload: Workload, problem: nn.Module, tick: Tick) -> float:
    """NeuroMANCER's LitTrainer. It shuffles, and does not pass its `custom_optimizer` on: it trains with Adam(1e-3)."""
    from neuromancer.dataset import DictDataset
    from neuromancer.trainer import LitTrainer

    def setup() -> Any:
        train, dev = DictDataset(workload.train, name="train"), DictDataset(workload.dev, name="dev")
        return train, dev, None, workload.batch_size

    with tempfile.TemporaryDirectory() as folder:
        trainer = LitTrainer(
            epochs=workload.epochs,
            clip=workload.clip,
            weight_path=folder,
            accelerator="cpu",
            devices=1,
            custom_optimizer=workload.optimizer(problem.parameters()),
            custom_hooks={"on_train_epoch_start": lambda self: tick(), "on_train_end": lambda self: tick()},
        )
        trainer.fit(problem, setup)
    return float(trainer.callback_metrics["dev_loss"])


def keras(workload: Workload, problem: nn.Module, tick: Tick) -> float:
    """Keras 3 on torch: a Model with its own train_step, as its guide for PyTorch has it."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras as k

    class Model(k.Model):
        def __init__(self) -> None:
            super().__init__()
            self.problem = k.layers.TorchModuleWrapper(problem)

        def call(self, batch: Any) -> Any:
            return self.problem(batch)

        def train_step(self, batch: Any) -> dict[str, Any]:
            self.zero_grad()
            loss = problem(batch)["train_loss"]
            loss.backward()
            weights = list(self.trainable_weights)
            with torch.no_grad():
                self.optimizer.apply([w.value.grad for w in weights], weights)
            return {"loss": loss.detach()}

        def test_step(self, batch: Any) -> dict[str, Any]:
            return {"loss": problem(batch)["dev_loss"].detach()}

    class Ticking(k.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            tick()

        def on_train_end(self, logs: Any = None) -> None:
            tick()

    model = Model()
    model.built = True
    model.compile(
        optimizer=k.optimizers.AdamW(1e-3, weight_decay=0.01, epsilon=1e-8, global_clipnorm=workload.clip),
        jit_compile=False,
    )
    train, dev = loaders(workload)
    model.fit(train, validation_data=dev, epochs=workload.epochs, verbose=0, shuffle=False, callbacks=[Ticking()])
    return float(evaluated(workload, problem, sliced(workload, "dev")))


JAX_TAKES = ("Rosenbrock (weft)", "PINN (Burgers)", "neural ODE", "wide MLP")


def jax(workload: Workload, problem: nn.Module, tick: Tick) -> float:
    """JAX, written by hand, an epoch as one lax.scan."""
    from benchmarks import in_jax

    return in_jax.train(workload, problem, tick)


def matrix_products(workload: Workload, problem: nn.Module, tick: Tick) -> float:
    """The floor: only the products of forward and backward, without any of the rest."""
    sizes = [workload.batch_size] * (workload.steps - 1)
    rows, dev_rows = len(next(iter(workload.train.values()))), len(next(iter(workload.dev.values())))
    sizes.append(rows - sum(sizes))
    pairs = list(zip(workload.widths[:-1], workload.widths[1:], strict=True))
    weights = [(torch.randn(o, i), torch.randn(o)) for i, o in pairs]
    inputs = {
        n: [torch.randn(n, i) for i, _ in pairs] for n in {*sizes, workload.batch_size, dev_rows % workload.batch_size}
    }
    grads = {n: [torch.randn(n, o) for _, o in pairs] for n in inputs}
    for _ in range(workload.epochs):
        tick()
        for n in sizes:
            for x, (w, b) in zip(inputs[n], weights, strict=True):
                torch.addmm(b, x, w.T)
            for number, (x, g, (w, _)) in enumerate(zip(inputs[n], grads[n], weights, strict=True)):
                torch.mm(g.T, x)
                if number:
                    torch.mm(g, w)
        for n in [workload.batch_size] * (dev_rows // workload.batch_size) + [dev_rows % workload.batch_size]:
            for x, (w, b) in zip(inputs[n], weights, strict=True):
                torch.addmm(b, x, w.T)
    tick()
    return float("nan")


BASE = by_hand
PEERS: dict[str, Peer] = {
    "hand-written, in memory": by_hand,
    "hand-written, DataLoader": by_hand_loader,
    "weft, eager": weft_eager,
    "weft, compiled": weft_compiled,
    "Fabric's loop": fabric,
    "accelerate": accelerate,
    "Lightning, default": lightning,
    "Lightning, barebones": lightning_barebones,
    "NeuroMANCER Trainer": neuromancer_trainer,
    "NeuroMANCER LitTrainer": neuromancer_lit_trainer,
    "Keras 3 on torch": keras,
    "JAX, scan over an epoch": jax,
    "matrix products alone": matrix_products,
}


def takes(name: str, workload: Workload) -> bool:
    """Whether this peer can train this workload as it stands."""
    if workload.device != "cpu" and not name.startswith(("weft", "hand-written, in memory")):
        return False
    if name.startswith("NeuroMANCER"):  # its loaders cannot make inputs that require grad
        return not workload.require_grad
    if name.startswith("Keras"):  # its optimizers are its own: the one that is the same as torch's is AdamW
        return workload.name in ("Rosenbrock (weft)", "Rosenbrock (NeuroMANCER)", "one batch an epoch")
    if name.startswith("JAX"):
        return workload.name in JAX_TAKES
    return name != "matrix products alone" or bool(workload.widths)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No lines on the terminal, no warnings: peers talk much."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield
