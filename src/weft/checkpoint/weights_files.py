"""Weights in files: written, read, and loaded into a problem."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from weft.checkpoint.archive import CheckpointError, is_in_parts, is_torchs, local, write
from weft.checkpoint.folder import load
from weft.checkpoint.weights import few, load_into

WEIGHTS_FORMAT = "weft-weights-1"


# ---- weights in files ------------------------------------------------------------------------------------------------


def save_weights(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the module's parameters and buffers to the file `path`, which `load_weights` reads; raises OSError."""
    write(path, {"format": WEIGHTS_FORMAT, "state_dict": module.state_dict()})


def load_weights(
    problem: nn.Module, path: str | os.PathLike[str], strict: bool = True, match: Mapping[str, str] | None = None
) -> nn.Module:
    """The problem, holding the weights in `path`: of a weights file, a checkpoint (its current ones), a run folder (its
    best, or its last if nothing was monitored), or a Lightning `.ckpt` (a leading "problem." is taken off its names).

    `match={new prefix: old prefix}` loads only those parts, from parts of other names; several may come from one.
    Raises CheckpointError for a file that is damaged or not safe, ValueError for names or shapes that do not fit (then
    the problem is unchanged); `strict=False` warns of names that do not fit instead. All name the file.
    """
    path = local(path)
    of_best = path.is_dir() and not is_in_parts(path) and not is_torchs(path)
    if of_best:
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        state, path = load(folder, "best" if (folder / "best").exists() else "last")
    else:
        state = _read_tensors(path) if is_torchs(path) else load(path)[0]
    own = problem.state_dict()
    weights = _weights_in(state, of_best, path)
    _tell_of_others(state, of_best, path)
    if "state_dict" in state and not any(name.startswith("problem.") for name in own):
        weights = {name.removeprefix("problem."): value for name, value in weights.items()}
    if match is not None:
        weights = {**own, **_matched(own, weights, match, strict, path)}
    elif strict and (found := _apart_by_a_prefix(own, weights)):
        raise ValueError(f"{path} holds {few(weights)}, and this problem {few(own)}; load it with match={found}.")
    load_into(problem, weights, source=str(path), strict=strict)
    return problem


def _weights_in(state: dict[str, Any], of_best: bool, path: Path) -> dict[str, Any]:
    best = (state.get("best") or {}).get("weights") if of_best and isinstance(state.get("best"), dict) else None
    for weights in (best, state.get("state_dict"), state.get("problem"), state):
        if isinstance(weights, dict) and any(isinstance(value, Tensor) for value in weights.values()):
            return weights
    raise CheckpointError(f"{path} holds no weights; its keys are {few(map(str, state))}.")


def _tell_of_others(state: Mapping[str, Any], of_best: bool, path: Path) -> None:
    best = state.get("best")
    others = best.get("others") if of_best and isinstance(best, Mapping) else state.get("others")
    if "format" in state and isinstance(others, Mapping) and others:
        warnings.warn(
            f"{path} also holds {few(others)}, which only an optimizer had: the problem does not register it, so it is "
            "not loaded. `resume` puts it back.",
            stacklevel=3,
        )


def _apart_by_a_prefix(own: Mapping[str, Any], weights: Mapping[str, Any]) -> dict[str, str]:
    """The `match` with which all weights are loaded, where one prefix is all in which their names differ; else {}."""
    for longer, shorter in ((weights, own), (own, weights)):
        first = next(iter(shorter), "")
        for prefix in (name.removesuffix(first) for name in longer if name.endswith(f".{first}")):
            if {f"{prefix}{name}" for name in shorter} == set(longer):
                return {"": prefix[:-1]} if longer is weights else {prefix[:-1]: ""}
    return {}


def _matched(
    own: Mapping[str, Any], weights: Mapping[str, Any], match: Mapping[str, str], strict: bool, path: Path
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for new, old in match.items():
        here, there = _below(own, new), _below(weights, old)
        if not here or not there:
            side, prefix, names = ("this problem", new, own) if not here else (str(path), old, weights)
            raise ValueError(f"match: {side} has nothing under {prefix!r}; it has {few(names)}.")
        missing, unexpected = here.keys() - there.keys(), there.keys() - here.keys()
        if (missing or unexpected) and strict:
            raise ValueError(
                f"{path}: {old!r} does not fit {new!r}: it lacks {few(sorted(missing))} and has "
                f"{few(sorted(unexpected))}"
                " besides; pass strict=False to load what both have."
            )
        result |= {here[rest]: weights[there[rest]] for rest in here.keys() & there.keys()}
    return result


def _below(names: Mapping[str, Any], prefix: str) -> dict[str, str]:
    """The full names under a prefix, by the rest of the name."""
    dotted = f"{prefix}." if prefix else ""
    return {name[len(dotted) :]: name for name in names if name.startswith(dotted)} or (
        {"": prefix} if prefix in names else {}
    )


def _read_tensors(path: Path) -> dict[str, Any]:
    from weft.checkpoint.parts import read_tensors

    return dict(read_tensors(path))
