"""What of a run no checkpoint holds: found by looking whether it changes, said once, when the first are written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from weft.devices.generators import generator_states, generators_within
from weft.loop.order import generators_in
from weft.step.state import RunState

_STEPS = ("training_step", "validation_step", "test_step", "configure_optimizers", "update")
_SAVES = 3  # looked at so often


class Watch:
    """Random generators of steps and hooks; numbers, texts and tensors of loaders and of hooks without state."""

    def __init__(self, state: RunState) -> None:
        self._hooks = {f"Hook {type(hook).__name__}": hook for hook in state.trainer.hooks if _is_forgotten(hook)}
        self._hooks |= _of_loaders(state)
        known = {id(generator) for generator in generators_in(state).values()}
        found = generators_within(list(_code_of(state)), "", [state, state.trainer, *vars(state).values()])
        self._generators = {name: one for name, one in found.items() if id(one) not in known}
        self._before, self._left = self._look(), _SAVES

    def _look(self) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for name, hook in self._hooks.items():
            for attribute, value in vars(hook).items():
                if attribute == "epoch" and hasattr(hook, "set_epoch"):  # it is told from outside
                    continue
                if isinstance(value, Tensor):
                    seen[f"{name}.{attribute}"] = id(value), value._version
                elif isinstance(value, bool | int | float | complex | str | None):  # lists are what a hook writes down
                    seen[f"{name}.{attribute}"] = repr(value)
        for name, one in generator_states(self._generators).items():
            seen[f"the random generator {name.rpartition(':')[2].rpartition('.')[2]}"] = str(_bytes_of(one))
        return seen

    def tell(self, state: RunState) -> None:
        """Warn once if something has changed since the start that a resumed run begins anew."""
        if not self._left:
            return
        self._left -= 1
        now = self._look()
        if changed := [name for name, value in now.items() if self._before.get(name) != value]:
            self._left = 0
            state.warn_once(
                f"No checkpoint holds {', '.join(changed)}: a resumed run begins with it anew and goes another way. "
                "Give a hook state_dict and load_state_dict; keep values in trainer.state, and draw from torch's own "
                "random numbers or from a generator that the problem or the data holds as an attribute."
            )


def _of_loaders(state: RunState) -> dict[str, Any]:
    """What loaders draw by that is the user's own: samplers that count their epochs, datasets that count their rows."""
    found: dict[str, Any] = {}
    for split in ("train", "dev", "test"):
        loader: Any = getattr(state.feed.splits.get(split), "loader", None)
        batch_sampler, dataset = getattr(loader, "batch_sampler", None), getattr(loader, "dataset", None)
        own = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
        for thing in (*own, dataset, getattr(dataset, "dataset", None), getattr(loader, "collate_fn", None)):
            if hasattr(thing, "__dict__") and not type(thing).__module__.startswith(("torch.", "weft.", "builtins")):
                found[f"the {split} data's {type(thing).__name__}"] = thing
    return found


def _is_forgotten(hook: Any) -> bool:
    own = hasattr(hook, "__dict__") and not type(hook).__module__.startswith("weft.")
    return own and not isinstance(hook, nn.Module | Mapping) and not hasattr(hook, "state_dict")


def _code_of(state: RunState) -> Iterator[Any]:
    """Functions and objects of the user's that run in a step."""
    trainer = state.trainer
    yield from (value for name in _STEPS if (value := trainer.options.get(name)) is not None)
    yield from (
        getattr(type(trainer), name) for name in _STEPS if trainer.overrides(name) and name not in vars(trainer)
    )
    yield from (hook for hook in trainer.hooks if not hasattr(hook, "state_dict"))
    for module in state.problem.modules():
        if not type(module).__module__.startswith("torch."):
            yield type(module).forward
            yield [value for value in vars(module).values() if callable(value) and not isinstance(value, nn.Module)]


def _bytes_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.numpy().tobytes()
    if isinstance(value, Mapping):
        return {name: _bytes_of(item) for name, item in value.items()}
    return [_bytes_of(item) for item in value] if isinstance(value, list) else value
