"""The hooks of module, data module and callbacks: compared with a recording that Lightning itself makes here."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers.lightning_tools import LIGHTNING_WARNINGS, lightning_trainer, weft_trainer

pytestmark = [pytest.mark.filterwarnings(w) for w in LIGHTNING_WARNINGS]

NOT_RECORDED = {"configure_sharded_model", "on_save_checkpoint", "on_load_checkpoint"}  # legacy; not in a plain fit
MODULE_HOOKS = {name for c in (ModelHooks, DataHooks, CheckpointHooks) for name in vars(c) if name[0] != "_"} | {
    "training_step",
    "validation_step",
    "test_step",
    "predict_step",
    "configure_optimizers",
    "configure_callbacks",
    "optimizer_step",
    "optimizer_zero_grad",
    "backward",
    "lr_scheduler_step",
    "configure_gradient_clipping",
}
DATA_HOOKS = {name for name in vars(DataHooks) if name[0] != "_"}


def record(owner: str, name: str, log: list[Any], original: Any) -> Any:
    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = self if owner == "module" else next((a for a in args if isinstance(a, pl.LightningModule)), None)
        state = None
        if module is not None and module._trainer is not None:
            trainer = module.trainer
            grads = [p.grad is not None for p in module.parameters()]
            state = (
                trainer.current_epoch,
                trainer.global_step,
                str(trainer.state.fn),
                str(trainer.state.stage),
                grads,
                module.training,
                torch.is_grad_enabled(),
                module._current_fx_name,
            )
        shown = tuple(a for a in args if isinstance(a, int | str))
        log.append((owner, name, shown, state))
        return original(self, *args, **kwargs)

    return recorded


class PlainModule(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.2), torch.nn.Linear(4, 1))
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        self.log("loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val_loss", torch.nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        step = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return [optimizer], [{"scheduler": step, "interval": "step"}, {"scheduler": plateau, "monitor": "loss_epoch"}]


class Manual(PlainModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def linspace_rows(n: int, shuffle: bool = False) -> DataLoader:
    x = torch.linspace(-1, 1, 3 * n).reshape(n, 3)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4, shuffle=shuffle)


class Splits(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return linspace_rows(18, shuffle=True)

    def val_dataloader(self) -> Any:
        return linspace_rows(8)

    def test_dataloader(self) -> Any:
        return [linspace_rows(4), linspace_rows(6)]

    def predict_dataloader(self) -> Any:
        return linspace_rows(8)


def recording(base: type, owner: str, names: set[str], log: list[Any]) -> type:
    """A subclass of `base` that overrides each hook in `names`, records the call and goes on as before."""
    found = {n: record(owner, n, log, getattr(base, n)) for n in sorted(names - NOT_RECORDED) if hasattr(base, n)}
    return type(base.__name__, (base,), found)


def everything(base: type, log: list[Any]) -> tuple[Any, Any, Any]:
    module = recording(base, "module", MODULE_HOOKS, log)()
    datamodule = recording(Splits, "data", DATA_HOOKS, log)()
    names = {n for n in vars(pl.Callback) if n.startswith("on_") or n in ("setup", "teardown")}
    return module, datamodule, recording(pl.Callback, "callback", names, log)()


def of_fit(use: Any, base: type, with_data: bool, **options: Any) -> tuple[list[Any], Any]:
    log: list[Any] = []
    torch.manual_seed(1)
    module, datamodule, callback = everything(base, log)
    if not with_data:
        for name in ("train_dataloader", "val_dataloader"):
            setattr(type(module), name, record("module", name, log, getattr(Splits, name)))
    trainer = use(callbacks=[callback], max_epochs=2, **options)
    trainer.fit(module, **({"datamodule": datamodule} if with_data else {}))
    return log, module


@pytest.mark.parametrize("with_data", [True, False], ids=["datamodule", "module's own data"])
@pytest.mark.parametrize(
    ("base", "options"),
    [
        (PlainModule, {}),
        (PlainModule, {"accumulate_grad_batches": 2}),
        (PlainModule, {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}),
        (PlainModule, {"check_val_every_n_epoch": 2}),
        (Manual, {}),
    ],
    ids=["plain", "accumulate", "clip", "every second epoch", "manual"],
)
def test_every_hook_is_called_in_lightnings_order_with_its_arguments_and_state(
    base: type, options: dict[str, Any], with_data: bool
) -> None:
    theirs, their_module = of_fit(lightning_trainer, base, with_data, **options)
    ours, our_module = of_fit(weft_trainer, base, with_data, **options)
    for number, (their_call, our_call) in enumerate(zip(theirs, ours, strict=False)):
        assert our_call == their_call, f"call {number}, after {theirs[max(0, number - 3) : number]}"
    assert len(ours) == len(theirs)
    assert our_module.losses == their_module.losses


def test_the_comparison_of_hooks_can_fail() -> None:
    theirs, _ = of_fit(lightning_trainer, PlainModule, True)
    ours, _ = of_fit(weft_trainer, PlainModule, True, accumulate_grad_batches=2)
    assert ours != theirs


@pytest.mark.parametrize("what", ["validate", "test", "predict"])
def test_evaluation_calls_every_hook_in_lightnings_order(what: str) -> None:
    calls = []
    for use in (lightning_trainer, weft_trainer):
        log: list[Any] = []
        torch.manual_seed(1)
        module, datamodule, callback = everything(PlainModule, log)
        kind = type(module)
        if what == "test":  # two loaders: the steps take the number of the loader
            kind.test_step = record("module", "test_step", log, with_loader(PlainModule.test_step))
        options = {"verbose": False} if what != "predict" and use is lightning_trainer else {}
        getattr(use(callbacks=[callback]), what)(module, datamodule=datamodule, **options)
        calls.append([(o, n, a, s and s[2:4] + s[5:6]) for o, n, a, s in log])  # weft evaluates without inference mode
    for number, (their_call, our_call) in enumerate(zip(*calls, strict=False)):
        assert our_call == their_call, f"call {number}, after {calls[0][max(0, number - 3) : number]}"
    assert len(calls[0]) == len(calls[1])


def with_loader(step: Any) -> Any:
    def step_of_loader(self: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return step(self, batch, batch_idx)

    return step_of_loader
