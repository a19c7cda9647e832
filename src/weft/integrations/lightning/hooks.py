"""The hooks of callbacks, module and data module, called in Lightning's order: callbacks first, then the module."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from weft.integrations.lightning.names import is_a, overrides

if TYPE_CHECKING:
    from torch import nn

    from weft.integrations.lightning.view import TrainerView

Call = Callable[..., Any]


class Hooks:
    """Calls hooks by name. Within a hook, `module._current_fx_name` is its name: `self.log` asks for it.

    `call` looks a hook up each time (rare events); `bind` resolves one once and gives None where nobody listens, so
    that in the loop an unused hook costs one comparison.
    """

    def __init__(self, view: TrainerView, module: nn.Module, callbacks: list[Any]) -> None:
        self.view, self.module, self.callbacks = view, module, callbacks

    def bind(
        self, name: str, callbacks: bool = True, module: bool = True, always: bool = False, as_hook: bool = True
    ) -> Call | None:
        """A function that calls `name` of all who override it, and returns what the module's returned.

        `always`: also the module's inherited version (where Lightning's own does the work). Without `as_hook` the
        module's alone, and what it logs counts as logged where it is called.
        """
        heard = self._of_callbacks(name, self.callbacks) if callbacks else []
        own = getattr(self.module, name) if module and (always or overrides(self.module, name)) else None
        if not heard and own is None:
            return None
        if not as_hook:
            return own
        state, view, pl_module = vars(self.module), self.view, self.module

        def call(*args: Any, **kwargs: Any) -> Any:
            before, state["_current_fx_name"] = state["_current_fx_name"], name
            for function in heard:
                function(view, pl_module, *args, **kwargs)
            returned = own(*args, **kwargs) if own is not None else None
            state["_current_fx_name"] = before
            return returned

        return call

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a hook of the callbacks, then of the module; returns what the module's returned."""
        bound = self.bind(name, module=hasattr(self.module, name), always=hasattr(self.module, name))
        return bound(*args, **kwargs) if bound is not None else None

    def call_module(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call the module's version of a hook that callbacks do not have."""
        bound = self.bind(name, callbacks=False, always=True)
        assert bound is not None
        return bound(*args, **kwargs)

    def call_callbacks(self, name: str, *args: Any, monitoring: bool | None = None, **kwargs: Any) -> None:
        """Call a hook of the callbacks only; with `monitoring`, of those that read metrics, or of the others."""
        chosen = [c for c in self.callbacks if monitoring is None or is_monitoring(c) == monitoring]
        state = vars(self.module)
        before, state["_current_fx_name"] = state["_current_fx_name"], name
        for function in self._of_callbacks(name, chosen):
            function(self.view, self.module, *args, **kwargs)
        state["_current_fx_name"] = before

    def _of_callbacks(self, name: str, callbacks: list[Any]) -> list[Call]:
        return [getattr(c, name) for c in callbacks if overrides(c, name)]


def is_monitoring(callback: Any) -> bool:
    """Whether a callback waits for metrics at the end of an epoch: it is called after the module."""
    return is_a(callback, "EarlyStopping") or is_a(callback, "Checkpoint")


def in_order(callbacks: list[Any]) -> list[Any]:
    """Callbacks as Lightning calls them: those that tune first, those that save last."""
    tuning = [c for c in callbacks if is_a(c, "BatchSizeFinder") or is_a(c, "LearningRateFinder")]
    if tuning:
        names = [type(c).__name__ for c in tuning]
        raise NotImplementedError(
            f"The callbacks {names} rerun the trainer itself, which weft.Trainer does not support; "
            "`from weft.integrations.lightning import Trainer` runs them as they are."
        )
    saving = [c for c in callbacks if is_a(c, "Checkpoint")]
    return [c for c in callbacks if not any(c is s for s in saving)] + saving


def with_model_callbacks(callbacks: list[Any], given: Any) -> list[Any]:
    """The callbacks with those of `configure_callbacks`, which replace callbacks of their own class or a base of it."""
    if not given:
        return in_order(callbacks)
    own = list(given) if isinstance(given, list | tuple) else [given]
    kept = [c for c in callbacks if not any(isinstance(o, type(c)) and type(c).__name__ != "Callback" for o in own)]
    return in_order([*kept, *own])
