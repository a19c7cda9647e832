"""What objects hold that show no attributes: iterators, caches, proxies, weak references, arrays of objects.

Loaded where the walk of `weft.places` meets one. It stands low in the house beside it, which alone asks for it.
"""

from __future__ import annotations

import functools
import gc
import types
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any
from weakref import ref

import numpy as np
from torch import Tensor, nn

_CONTAINERS = Tensor | nn.Module | dict | list | tuple | deque | set | frozenset
_CODE = types.FunctionType | types.MethodType | types.BuiltinMethodType | types.MethodWrapperType
_LAZY = types.GeneratorType | types.MappingProxyType | map | filter | zip | enumerate | type(iter([])) | type(iter(()))


def referents(value: Any, is_library: Callable[[Any], bool]) -> list[Any]:
    """What `value` holds of the user's: tensors, nets, containers, functions, objects; no modules and classes."""
    if isinstance(value, np.ndarray):
        return list(value.flat) if value.dtype == object else []
    if isinstance(value, ContextVar):
        return [value.get(None)]
    if isinstance(value, ref):
        return [value()]
    if isinstance(value, functools._lru_cache_wrapper) and is_library(value.__wrapped__):
        return []
    held = [item for item in gc.get_referents(value) if not isinstance(item, type | types.ModuleType)]
    held = [item for item in held if not (isinstance(item, dict) and "__spec__" in item)]  # of a module
    return [item for item in held if isinstance(item, _CONTAINERS | _CODE | _LAZY) or not is_library(type(item))]
