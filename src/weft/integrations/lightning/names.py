"""Lightning's classes without importing them, which hooks are overridden, and forms that are no longer called."""

from __future__ import annotations

import inspect
import sys
from abc import ABCMeta
from importlib import reload
from pkgutil import resolve_name
from typing import Any

PACKAGES = ("lightning.pytorch", "pytorch_lightning")

LEGACY = {
    "training_epoch_end": "on_train_epoch_end(self)",
    "validation_epoch_end": "on_validation_epoch_end(self)",
    "test_epoch_end": "on_test_epoch_end(self)",
    "predict_epoch_end": "on_predict_epoch_end(self)",
    "training_end": "on_train_batch_end(self, outputs, batch, batch_idx)",
    "validation_end": "on_validation_epoch_end(self)",
    "test_end": "on_test_epoch_end(self)",
    "training_step_end": "on_train_batch_end(self, outputs, batch, batch_idx)",
    "validation_step_end": "on_validation_batch_end(self, outputs, batch, batch_idx)",
    "test_step_end": "on_test_batch_end(self, outputs, batch, batch_idx)",
    "on_epoch_start": "on_train_epoch_start(self)",
    "on_epoch_end": "on_train_epoch_end(self)",
    "on_batch_start": "on_train_batch_start(self, batch, batch_idx)",
    "on_batch_end": "on_train_batch_end(self, outputs, batch, batch_idx)",
    "on_pretrain_routine_start": "on_fit_start(self)",
    "on_pretrain_routine_end": "on_fit_start(self)",
    "on_before_accelerator_backend_setup": "setup(self, stage)",
    "on_hpc_save": "on_save_checkpoint(self, checkpoint)",
    "on_hpc_load": "on_load_checkpoint(self, checkpoint)",
    "configure_sharded_model": "configure_model(self)",
    "tbptt_split_batch": "a loop of your own in training_step with self.automatic_optimization = False",
    "truncated_bptt_steps": "a loop of your own in training_step with self.automatic_optimization = False",
}
"""Names that Lightning 2 does not call (or has deprecated), and what stands in their place today."""


def package_of(thing: Any) -> str:
    """The package a LightningModule, LightningDataModule or Callback comes from: one of `PACKAGES`."""
    for cls in type(thing).__mro__:
        for package in PACKAGES:
            if cls.__module__.startswith(f"{package}."):
                return package
    raise TypeError(f"{type(thing).__name__} comes from none of {PACKAGES}.")


def package_in_use() -> str:
    """The package that a script has imported: the older one, if the other is not there or came after this library."""
    loaded = list(sys.modules)  # in the order of their imports
    if PACKAGES[1] not in loaded:
        return PACKAGES[0]
    came_after = PACKAGES[0] not in loaded or loaded.index(__name__) < loaded.index(PACKAGES[0])
    return PACKAGES[1] if came_after else PACKAGES[0]


class OfTheScript(ABCMeta):
    """What makes `Trainer` and its subclasses: of the package that a script uses, which it may import after weft's."""

    def __new__(cls, name: str, bases: tuple[Any, ...], members: dict[str, Any], **kwargs: Any) -> Any:
        """A class, with the Trainer of today among its bases."""
        return super().__new__(cls, name, tuple(map(cls.of_today, bases)), members, **kwargs)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """An object of the Trainer of today."""
        return ABCMeta.__call__(OfTheScript.of_today(cls), *args, **kwargs)

    @staticmethod
    def of_today(kind: Any) -> Any:
        """The class itself; of `Trainer` the one of the package in use, for which its module may be loaded anew."""
        if type(kind) is not OfTheScript or kind.__module__ != f"{__package__}.trainer":
            return kind
        module: Any = sys.modules[kind.__module__]
        return (module if module.PACKAGE == package_in_use() else reload(module)).Trainer


def lightning_class(thing: Any, path: str) -> Any:
    """A class of the package that `thing` comes from: `lightning_class(module, "trainer.states.TrainerState")`."""
    module, name = path.rsplit(".", 1)
    return resolve_name(f"{package_of(thing)}.{module}:{name}")


def is_a(thing: Any, name: str) -> bool:
    """Whether a class of that name from Lightning is among the bases of `thing`."""
    return _base(thing, name) is not None


def overrides(thing: Any, method: str) -> bool:
    """Whether a module, data module or callback has its own version of one of Lightning's methods."""
    base = next(b for n in ("LightningModule", "LightningDataModule", "Callback") if (b := _base(thing, n)) is not None)
    own, inherited = vars(thing).get(method, getattr(type(thing), method, None)), getattr(base, method, None)
    if method in vars(thing) and vars(thing)[method] is None:
        return False
    # the base's own method, bound (`self.val_dataloader = super().val_dataloader`), is no override
    return own is not None and getattr(own, "__func__", own) is not inherited


def takes(function: Any, argument: str, at_least: int | None = None) -> bool:
    """Whether a bound method has this argument (`self` aside), takes any, or takes `at_least` so many."""
    found = inspect.getfullargspec(getattr(function, "__wrapped__", function))
    names = found.args[1:]
    return argument in names or found.varargs is not None or (at_least is not None and len(names) >= at_least)


def names_explicitly(function: Any, argument: str) -> bool:
    """Whether a bound method names this argument."""
    found = inspect.getfullargspec(getattr(function, "__wrapped__", function))
    return argument in found.args[1:] or argument in found.kwonlyargs


def refuse_legacy(module: Any) -> None:
    """Raise NotImplementedError for forms that Lightning 2 no longer calls, with the form of today."""
    who = type(module).__name__
    found = [name for name in LEGACY if getattr(module, name, None) is not None and _is_own(module, name)]
    if found:
        today = "; ".join(f"{name} is today {LEGACY[name]}" for name in found)
        raise NotImplementedError(f"{who} has {found}, which Lightning 2 does not call: {today}. Keep outputs in self.")
    steps = [step for step in (module.training_step, module.optimizer_step) if step is not None]
    if any(names_explicitly(step, "optimizer_idx") for step in steps):
        raise NotImplementedError(
            f"{who} takes 'optimizer_idx'. Today: self.automatic_optimization = False in __init__, and in "
            "training_step "
            "`opt_a, opt_b = self.optimizers()`, self.manual_backward(loss), opt_a.step()."
        )
    if module.training_step is not None and names_explicitly(module.training_step, "hiddens"):
        raise NotImplementedError(f"{who}.training_step takes 'hiddens'. Today: keep the hidden state in self.")
    for step in ("training_step", "validation_step", "test_step", "predict_step"):
        if (own := getattr(module, step)) is not None and names_explicitly(own, "dataloader_iter"):
            raise NotImplementedError(
                f"{who}.{step} takes 'dataloader_iter', which weft does not support; take `batch`."
            )


def tell_of_log_dict(run: Any, returned: Any, step: str) -> None:
    """Warn once of a returned `{"log": {...}}`, a form that Lightning 1 took."""
    for key in ("log", "progress_bar"):
        if isinstance(returned.get(key), dict):
            values = ", ".join(f"{name!r}: ..." for name in returned[key])
            run.state.warn_once(
                f"{type(run.module).__name__}.{step} returned {key!r}: {{{values}}}, which Lightning 2 does not read. "
                f"Today: self.log_dict({{{values}}}{', prog_bar=True' if key == 'progress_bar' else ''})."
            )


def _base(thing: Any, name: str) -> type | None:
    lightning = tuple(f"{package}." for package in PACKAGES)
    return next((c for c in type(thing).__mro__ if c.__name__ == name and c.__module__.startswith(lightning)), None)


def _is_own(module: Any, name: str) -> bool:
    """Whether a name is the module's own, not one that its Lightning base class has."""
    base = _base(module, "LightningModule")
    return getattr(type(module), name, None) is not getattr(base, name, None) or name in vars(module)
