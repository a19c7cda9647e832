"""Hooks that come with weft, and which of them a trainer's options ask for.

weft.Trainer(hooks=[weft.hooks.EMA(0.999), weft.hooks.ReLoBRaLo()])

AdvancedProfiler      cProfile from the first step to the last: every Python function, by its own time.
Curriculum            Sets what `schedule(epoch)` returns before each epoch, and logs it.
EMA                   Exponential moving average of the weights, after every step.
Figures               Logs what functions of the trainer draw, every `every` epochs and at the end of the last one.
GradNorm              Gradient normalization: weights under which all terms train at similar rates.
GradientNorms         Logs `grad_norm`, with `terms=True` also `grad_norm_<term>`.
LearningRateAnnealing Weights that bring each term's mean gradient up to the largest of the residual's.
LivePlot              The curves of the run in the cell of a notebook, redrawn while it trains.
NTKWeights            Weights from the neural tangent kernel: all terms converge at the same mean rate.
PyTorchProfiler       torch.profiler over a few steps, its ranges named after parts and nodes. Needs a run folder.
ReLoBRaLo             Relative loss balancing with random lookback: terms that shrink slowly get more weight.
Resample              Replaces or adds training points by their residual, before every `every`-th epoch but the first.
SWA                   Stochastic weight averaging: the mean of the weights at the ends of later epochs.
SelfAdaptive          Weights that are maximised while the parameters minimise, for terms that stay wrong.
SimpleProfiler        A stopwatch for the parts of the training.
SoftAdapt             Softmax of the rates at which losses change: terms that shrink least get more weight.
WeightHistograms      Logs the distribution of each parameter, every `every` epochs (>= 1, else ValueError).
freeze                Let the parameters of these nodes or submodules of `problem` train no more, until `unfreeze`.
load_node             The problem, whose part `node` now holds the weights that stand in a file.
unfreeze              Let the parameters of these nodes or submodules of `problem` train again. Call before the fit.
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
    from weft.hooks.live import LivePlot as LivePlot
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
