"""What editors, type checkers and `help` are told: signatures written out, and the sentences of the options.

Nothing of it is loaded when a problem is trained. The sentences stand once, below the fields of the classes that check
the options; `manual` reads them there. The signature of the trainer is written out here for whoever reads source only
(a checker, an editor); a test holds it equal to the options that there are.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    import weft
    from weft import Hook

# ------------------------------------------------------------------------------------------------ sentences


def sentences(cls: type) -> dict[str, str]:
    """What stands below each annotated field of a class in its source, on one line, by name; "" where nothing does."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            found[node.target.id] = " ".join(str(text).split())
    return found


def manual(text: str | None, kinds: Iterable[type | str]) -> str:
    """`text` and below it each option of `kinds` (classes, or their names here): name, default, sentence."""
    entries = []
    for name, (default, sentence) in options_of(kinds).items():
        head = name if default is inspect.Parameter.empty else f"{name}={default!r}"
        entries.append(textwrap.fill(f"{head}: {sentence}", 100, initial_indent="    ", subsequent_indent=" " * 8))
    head = "Options (values that one does not allow raise ValueError):"
    return "\n".join([inspect.cleandoc(text or "").rstrip(), "", head, "", *entries])


def options_of(kinds: Iterable[type | str]) -> dict[str, tuple[Any, str]]:
    """Default and sentence of each option by name; those of several classes with one name are joined."""
    found: dict[str, tuple[Any, str]] = {}
    for kind in (globals()[k] if isinstance(k, str) else k for k in kinds):
        for name, sentence in sentences(kind).items():
            default, before = found.get(name, (getattr(kind, name, inspect.Parameter.empty), ""))
            found[name] = default, f"{before} {sentence}".strip()
    return found


# ------------------------------------------------------------------------------------------------ signatures


class Objects:
    """The options of a trainer that may be objects; all others are fields of TrainerConfig."""

    optimizer: Optimizer | Callable[..., Any] | Mapping[str, Any] | None = None
    """An instance, a function of the parameters, or a dict of them by name; None: Adam(1e-3, (0.0, 0.9))."""
    scheduler: LRScheduler | weft.Schedule | Callable[..., Any] | Mapping[str, Any] | None = None
    """A function of the optimizer, an instance, a `weft.Schedule`, or a dict of them by optimizer name."""
    phases: Sequence[weft.Phase] | None = None
    """A list of `weft.Phase`, trained one after the other; `epochs` is then theirs."""
    metrics: Mapping[str, Any] | None = None
    """Further metrics by name: a function whose argument names are keys of the problem's output or of the batch,
    averaged over batches; for what is no mean (R2, RMSE, a maximum) `weft.whole(fn)`, which gets all rows, or an
    object with `update`, `compute` and `reset` (torchmetrics). `(metric, keys)` names the keys of its arguments."""
    training_step: Callable[[weft.Trainer, Any], Any] | None = None
    """`fn(trainer, batch)` -> the loss of a training batch, or a dict that holds it; None: what the problem returns."""
    validation_step: Callable[[weft.Trainer, Any], Any] | None = None
    """The same for a dev batch."""
    test_step: Callable[[weft.Trainer, Any], Any] | None = None
    """The same for a test batch."""
    predict_step: Callable[[weft.Trainer, Any], Any] | None = None
    """`fn(trainer, batch)` -> predictions by key; None: what the nodes compute."""
    hooks: Hook | Listening | Mapping[str, Callable[..., Any]] | Sequence[Hook | Listening | object] | None = None
    """A `weft.Hook`, a dict of functions by event, or a list mixing both (with a LightningModule, Callbacks, too)."""
    loggers: Any = None
    """"tensorboard", "csv", any Lightning logger, or a list; a run folder has its metrics.csv in any case."""
    plugins: Any = None
    """Plugins of Fabric, as they are."""
    strategy: Any = None
    """Also one of Fabric's strategies as an object."""
    profiler: Any = None
    """Also anything with start, step, stop."""


class Events:
    """The events that a hook may have; at run time a hook has those alone that it defines."""

    def on_fit_start(self, trainer: weft.Trainer) -> Any: ...
    def on_epoch_start(self, trainer: weft.Trainer) -> Any: ...
    def on_step_start(self, trainer: weft.Trainer, batch: Any) -> Any: ...
    def on_before_optimizer_step(self, trainer: weft.Trainer, optimizer: Optimizer) -> Any: ...
    def on_step_end(self, trainer: weft.Trainer, batch: Any, loss: Tensor) -> Any: ...
    def on_validation_start(self, trainer: weft.Trainer) -> Any: ...
    def on_validation_end(self, trainer: weft.Trainer, metrics: Mapping[str, float]) -> Any: ...
    def on_epoch_end(self, trainer: weft.Trainer, metrics: Mapping[str, float]) -> Any: ...
    def on_fit_end(self, trainer: weft.Trainer, result: weft.FitResult) -> Any: ...
    def on_exception(self, trainer: weft.Trainer, error: BaseException) -> Any: ...


class Listening(TypedDict, total=False):
    """Functions by event: hooks as a dict."""

    on_fit_start: Callable[[weft.Trainer], Any]
    on_epoch_start: Callable[[weft.Trainer], Any]
    on_step_start: Callable[[weft.Trainer, Any], Any]
    on_before_optimizer_step: Callable[[weft.Trainer, Optimizer], Any]
    on_step_end: Callable[[weft.Trainer, Any, Tensor], Any]
    on_validation_start: Callable[[weft.Trainer], Any]
    on_validation_end: Callable[[weft.Trainer, Mapping[str, float]], Any]
    on_epoch_end: Callable[[weft.Trainer, Mapping[str, float]], Any]
    on_fit_end: Callable[[weft.Trainer, weft.FitResult], Any]
    on_exception: Callable[[weft.Trainer, BaseException], Any]
