"""Clearer words for errors of torch that a step raised. Loaded when there is one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from weft.problem.hardcoded import misplaced


def explained(error: Exception, batch: Any, problem: nn.Module) -> Exception | None:
    """A clearer error for a mixture of dtypes or devices, that says what to do; None for every other error."""
    text = str(error)
    device = next((p.device for p in problem.parameters()), None)
    if "device" in text and device is not None and (found := misplaced(problem, device)):
        return RuntimeError(
            f"{text}. The parameters are on {device}, and {'; '.join(found)}. Give a node what it needs as an input, "
            "or as a buffer of a module."
        )
    if "dtype" not in text and "must be the same" not in text and "expected scalar type" not in text:
        return None
    weights = {p.dtype for p in problem.parameters() if p.is_floating_point()}
    data = {k: v.dtype for k, v in batch.items() if isinstance(v, Tensor)} if isinstance(batch, Mapping) else {}
    other = {k: str(d) for k, d in data.items() if d not in weights and k != "index"}
    if not other:
        return None
    whole = [k for k in other if not data[k].is_floating_point]
    way = f"give {whole} as floats (.float())" if whole else "train with precision='64-true', which casts both"
    return TypeError(
        f"{text}. The data has {other}, the parameters are {sorted(map(str, weights))}. Convert the data, or {way}."
    )
