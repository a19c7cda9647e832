"""Hooks that come with weft, and which of them a trainer's options ask for.

weft.Trainer(hooks=[weft.hooks.EMA(0.999), weft.hooks.ReLoBRaLo()])
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from weft.types import suggest

# hooks that are asked for by name, and the module each lives in, imported when first used
_HOME = {
    "weft.hooks.averaging": ("EMA", "SWA"),
    "weft.hooks.balancing": (
        "GradNorm",
        "LearningRateAnnealing",
        "NTKWeights",
        "ReLoBRaLo",
        "SelfAdaptive",
        "SoftAdapt",
    ),
    "weft.hooks.gradients": ("GradientNorms",),
    "weft.hooks.profiling": ("AdvancedProfiler", "PyTorchProfiler"),
    "weft.hooks.timing": ("SimpleProfiler",),
    "weft.hooks.pictures": ("Figures", "WeightHistograms"),
    "weft.hooks.parts": ("freeze", "load_node", "unfreeze"),
    "weft.hooks.sampling": ("Resample",),
    "weft.hooks.schedules": ("Curriculum",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

if TYPE_CHECKING:
    from weft.hooks.averaging import EMA, SWA  # noqa: F401
    from weft.hooks.balancing import GradNorm, LearningRateAnnealing, NTKWeights, ReLoBRaLo, SelfAdaptive, SoftAdapt
    from weft.hooks.gradients import GradientNorms  # noqa: F401
    from weft.hooks.parts import freeze, load_node, unfreeze  # noqa: F401
    from weft.hooks.pictures import Figures, WeightHistograms  # noqa: F401
    from weft.hooks.profiling import AdvancedProfiler, PyTorchProfiler  # noqa: F401
    from weft.hooks.sampling import Resample  # noqa: F401
    from weft.hooks.schedules import Curriculum  # noqa: F401
    from weft.hooks.timing import SimpleProfiler  # noqa: F401


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'weft.hooks' has no attribute {name!r}{suggest(name, _MODULE_OF)}")
