"""Whether a run can go on from a checkpoint: what must be the same is refused, what changed otherwise is named."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from weft.loop.settings import MARK, NEW, PRINTS, fixed_settings, settings
from weft.step.history import Progress

if TYPE_CHECKING:
    from weft.step.state import RunState

# A LightningModule brings its loaders only when training begins.
_OF_LOADERS = ("rows of the training data", "batches in an epoch")


def describe(progress: Progress) -> str:
    """Where a run is, in words: "after epoch 3, step 120" or "epoch 3, after batch 17, step 117"."""
    if progress.batch == 0:
        return f"after epoch {progress.epoch - 1}, step {progress.step}"
    return f"epoch {progress.epoch}, after batch {progress.batch}, step {progress.step}"


def compare(state: RunState, saved: Mapping[str, Any], renew: tuple[str, ...] = ()) -> None:
    """Raise ValueError for settings that must not change, naming all; warn once of those that did otherwise.

    The warning says which side is in force; of optimizers and schedulers the checkpoint's, but for what `renew` names.
    """
    here, there, path = fixed_settings(state), saved["fixed"], state.kept.resumed_from
    unknown = {name for name in _OF_LOADERS if "None" in (here[name], there.get(name))}
    unknown |= {"schedulers"} & {f"{name}s" for name in renew}
    names = [name for name in here if here[name] != there.get(name) and name not in unknown]
    wrong = [f"{name}: {there.get(name)} there, {here[name]} here" for name in names]
    if not saved["error"] and 1 + len(saved["other_processes"]) != state.processes.world:
        wrong.append(f"state of {1 + len(saved['other_processes'])} processes there")
    if wrong:
        hint = " fit(..., renew='scheduler') makes the new scheduler win." if "schedulers" in names else ""
        raise ValueError(
            f"{path} cannot be resumed with these settings: {'; '.join(wrong)}.{hint} "
            "To train on from its weights alone, use weft.load_weights(problem, path)."
        )
    here, there = settings(state), saved["options"]
    changed = _changed(here, there)
    told = [f"{name}: {there.get(name, 'nothing')} -> {here.get(name, 'nothing')}" for name in changed]
    torn = f" It was saved at an error, maybe in the middle of a step ({saved['error']})." if saved["error"] else ""
    old = [name for name in changed if _kind_of(name, state) not in ("", *renew)]
    if told or torn:
        but = f" Changed since: {'; '.join(told)}." + _in_force(changed, old, state) if told else ""
        warnings.warn(
            f"Resuming {path} ({describe(state.progress)}).{but}{torn} "
            "The run will not end bit for bit where the undisturbed one would.",
            stacklevel=5,
        )
    state.kept.in_force = {name: there[name] for name in old if name in there}


def _changed(here: Mapping[str, str], there: Mapping[str, str]) -> list[str]:
    unknown = {name for name in PRINTS if "None rows" in (here.get(name), there.get(name))}
    if MARK not in there:
        unknown |= {name for name in here if name.startswith(NEW)}
    return [name for name in {**there, **here} if here.get(name) != there.get(name) and name not in unknown]


def _kind_of(name: str, state: RunState) -> str:
    """What `renew` calls a setting that the checkpoint decides about; "" for one that is in force as it is now."""
    if name == "optimizer" or name.startswith(("optimizer ", "groups of optimizer ")):
        return "optimizer"
    if name == "scheduler" or name.startswith("scheduler "):
        return "scheduler"
    begun = [f"weights of phase {number}" for number in range(state.progress.phase + 1)]
    return "weights" if name in begun else ""


def _in_force(changed: list[str], old: list[str], state: RunState) -> str:
    """Which side of each change is in force, in words."""
    if not old:
        return " In force is what stands here now."
    kinds = tuple(dict.fromkeys(kind for name in old if (kind := _kind_of(name, state)) != "weights"))
    now = [name for name in changed if name not in old]
    text = f" In force is the checkpoint's {', '.join(old)}" + (f", and {', '.join(now)} as now." if now else ".")
    return text + (f" fit(..., resume=..., renew={kinds}) makes the new side win." if kinds else "")
