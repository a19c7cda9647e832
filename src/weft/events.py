"""What happens when: the training loop as pseudocode, and the hooks that listen to it.

class PrintLoss(weft.Hook):
    def on_epoch_end(self, trainer, metrics):
        print(trainer.current_epoch, metrics["train_loss"])

weft.Trainer(hooks=[PrintLoss(), {"on_step_end": lambda trainer, batch, loss: ...}])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from weft.types import suggest

if TYPE_CHECKING:  # an editor knows the events and what they are called with
    from weft.words.editors import Events
else:
    Events = object

EVENTS: dict[str, tuple[str, ...]] = {
    "on_fit_start": ("trainer",),
    "on_epoch_start": ("trainer",),
    "on_step_start": ("trainer", "batch"),
    "on_before_optimizer_step": ("trainer", "optimizer"),
    "on_step_end": ("trainer", "batch", "loss"),
    "on_validation_start": ("trainer",),
    "on_validation_end": ("trainer", "metrics"),
    "on_epoch_end": ("trainer", "metrics"),
    "on_fit_end": ("trainer", "result"),
    "on_exception": ("trainer", "error"),
}
"""Every event and the arguments its hooks are called with."""

AT_REST = "at_rest"
"""A quiet point for weft's own hooks: called as `at_rest(trainer)` after a whole step or a closed epoch,
when the state of the run is complete and may be saved."""


class Hook(Events):
    """Something that listens to training. Define the events you need; no `super().__init__()` is called for.

    ::

        on_fit_start(trainer)
        for epoch in ...:
            on_epoch_start(trainer)
            for batch in train data:
                on_step_start(trainer, batch)
                loss = training_step(batch); backward(loss)
                on_before_optimizer_step(trainer, optimizer)     # gradients are there, not yet clipped
                optimizer.step()
                on_step_end(trainer, batch, loss)                # loss: detached, on the device
            on_validation_start(trainer)
            ... the dev set, without updates ...
            on_validation_end(trainer, metrics)                  # floats
            on_epoch_end(trainer, metrics)                       # floats, after validation and schedulers
        on_exception(trainer, error)                             # only if one was raised
        on_fit_end(trainer, result)                              # always

    Hooks run in the order given. Changing a tensor in place (a weight, a gradient, a learning rate) takes effect;
    replacing `metrics` does not. A hook with `state_dict` and `load_state_dict` is checkpointed.
    A method that is named like an event but is none ("on_stpe_end") is an error when the fit starts.
    """


def listeners(hooks: Iterable[Any]) -> list[Any]:
    """The hooks as a flat list, checked: each object or dict names at least one event, and no unknown one.

    Raises TypeError for a name that training never calls, with the closest one that it does.
    """
    flat: list[Any] = []
    for hook in hooks:
        if isinstance(hook, type):
            raise TypeError(f"hooks: {hook.__name__} is a class; give an object of it, {hook.__name__}(...).")
        names = list(hook) if isinstance(hook, Mapping) else [n for n in dir(hook) if n.startswith("on_")]
        owner = "The dict of hooks" if isinstance(hook, Mapping) else f"Hook {type(hook).__name__!r}"
        unknown = [n for n in names if n not in EVENTS and n != AT_REST]
        if unknown:
            raise TypeError(
                f"{owner} has {unknown}, which training never calls{suggest(unknown[0], EVENTS) or '.'} "
                f"Events: {', '.join(EVENTS)}."
            )
        if not names and not hasattr(hook, AT_REST):
            raise TypeError(f"{owner} has no event to be called at. Events: {', '.join(EVENTS)}.")
        functions = hook.items() if isinstance(hook, Mapping) else ((n, getattr(hook, n)) for n in names)
        for name, function in functions:
            if not callable(function):
                raise TypeError(f"{owner}: {name!r} is {function!r}; expected a function{_signature(name)}.")
        flat.append(hook)
    return flat


def as_hooks(hooks: Any) -> list[Any]:
    """The `hooks` option as a list: None, one hook, one dict of functions by event, or a list mixing both."""
    if hooks is None or hooks == []:
        return []
    from weft.words.calls import check_hooks

    return check_hooks(listeners(hooks if isinstance(hooks, list | tuple) else [hooks]), EVENTS)


def bind(hooks: Iterable[Any], event: str) -> list[Callable[..., Any]]:
    """The functions to call at `event`, in order. Resolved once per run: an event nobody listens to costs nothing."""
    bound = []
    for hook in hooks:
        function = hook.get(event) if isinstance(hook, Mapping) else getattr(hook, event, None)
        if function is not None:
            bound.append(function)
    return bound


def _signature(event: str) -> str:
    return f" {event}({', '.join(EVENTS[event])})" if event in EVENTS else ""
