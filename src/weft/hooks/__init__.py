"""Hooks that come with weft, and which of them a trainer's options ask for.

weft.Trainer(hooks=[weft.hooks.EMA(0.999), weft.hooks.ReLoBRaLo()])
"""

from typing import TYPE_CHECKING

from weft import _face

if TYPE_CHECKING:
    from weft.hooks.averaging import EMA as EMA
    from weft.hooks.averaging import SWA as SWA
    from weft.hooks.balancing import GradNorm as GradNorm
    from weft.hooks.balancing import LearningRateAnnealing as LearningRateAnnealing
    from weft.hooks.balancing import NTKWeights as NTKWeights
    from weft.hooks.balancing import ReLoBRaLo as ReLoBRaLo
    from weft.hooks.balancing import SelfAdaptive as SelfAdaptive
    from weft.hooks.balancing import SoftAdapt as SoftAdapt
    from weft.hooks.gradients import GradientNorms as GradientNorms
    from weft.hooks.parts import freeze as freeze
    from weft.hooks.parts import load_node as load_node
    from weft.hooks.parts import unfreeze as unfreeze
    from weft.hooks.pictures import Figures as Figures
    from weft.hooks.pictures import WeightHistograms as WeightHistograms
    from weft.hooks.profiling import AdvancedProfiler as AdvancedProfiler
    from weft.hooks.profiling import PyTorchProfiler as PyTorchProfiler
    from weft.hooks.sampling import Resample as Resample
    from weft.hooks.schedules import Curriculum as Curriculum
    from weft.hooks.timing import SimpleProfiler as SimpleProfiler
else:
    __getattr__, __dir__, __all__ = _face(__name__)
