"""Words of other libraries for what weft has: one table, for options in Python and for their config dialects.

    advice("max_epochs", 3)      # "; here it is epochs=3"
    advice("lr", 0.01)           # "; here it is optimizer=lambda params: torch.optim.Adam(params, lr=0.01)"

Loaded where an unknown name was given, and by the config dialects.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec

from weft.types import suggest

P = ParamSpec("P")

RENAMED = {
    "max_epochs": "epochs",
    "gradient_clip_val": "clip",
    "gradient_clip_algorithm": "clip_algorithm",
    "accumulate_grad_batches": "accumulate",
    "check_val_every_n_epoch": "validate_every",
    "log_every_n_steps": "log_every",
    "default_root_dir": "root_dir",
    "enable_checkpointing": "checkpoint",
}
"""Lightning's options that mean the same under another name."""
LIMITS = {
    "limit_train_batches": "train",
    "limit_val_batches": "dev",
    "limit_test_batches": "test",
    "limit_predict_batches": "predict",
}
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "barebones": ((False,), "name what should be off: progress, loggers, checkpoint"),
    "detect_anomaly": ((False,), "call torch.autograd.set_detect_anomaly in the problem's file"),
    "min_steps": ((None,), "use min_epochs"),
    "overfit_batches": ((0, 0.0), "use limit_batches with batches.shuffle: false"),
    "sync_batchnorm": ((False,), "convert the module in the problem's file"),
    "use_distributed_sampler": ((True,), "a loader in several processes gets weft's sampler or is refused"),
    "val_check_interval": ((None, 1.0), "use validate_every, in epochs"),
    "benchmark": ((None, False), "set torch.backends.cudnn.benchmark in the problem's file"),
    "plugins": ((None, []), "plugins are given in Python: weft.Trainer(plugins=...)"),
}
"""Lightning's options without a counterpart: the values that ask for nothing, and what to do about the others."""
NOTED = {
    "enable_model_summary": "weft prints no summary of the model",
    "num_sanity_val_steps": "weft makes no dry runs",
    "inference_mode": "weft evaluates under no_grad, or with gradients where the problem asks for them",
}
"""Lightning's options that change no result: a note says what happens instead."""

SAME = {
    "epochs": "n_epochs num_epochs nb_epochs nb_epoch num_train_epochs max_epoch iterations n_iter max_iter",
    "clip": "max_grad_norm grad_clip clip_grad clip_grad_norm clipnorm gradient_clip",
    "accumulate": "gradient_accumulation_steps grad_accum accumulation_steps",
    "validate_every": "eval_every validation_freq val_every valid_every",
    "log_every": "logging_steps log_interval log_freq",
    "root_dir": "output_dir log_dir logdir save_dir checkpoint_dir dirpath",
    "hooks": "callbacks callback custom_hooks",
    "loggers": "logger report_to custom_logger",
    "patience": "early_stopping early_stopping_patience early_stopping_rounds",
    "seed": "random_state random_seed manual_seed seed_everything",
    "optimizer": "optim opt custom_optimizer",
    "scheduler": "lr_scheduler lr_schedule learning_rate_scheduler",
    "resume": "resume_from_checkpoint ckpt_path checkpoint_path",
    "monitor_metric": "monitor metric_for_best_model eval_metric",
    "run_name": "experiment_name",
    "net": "model module network",
    "loss_fn": "loss loss_function criterion",
    "metrics": "metric",
    "num_nodes": "nnodes",
    "devices": "gpus n_gpus num_gpus device_ids num_processes",
    "max_steps": "num_steps n_steps steps total_steps max_iters",
    "compile": "jit torch_compile jit_compile",
    "limit_batches": "steps_per_epoch limit_batch",
    "monitor_mode": "mode direction",
    "train": "train_data train_dataset train_set",
    "dev": "val valid validation val_data valid_data validation_data eval_data val_set val_dataset eval_dataset",
    "test": "test_data test_set test_dataset",
    "batch_size": "bs train_batch_size per_device_train_batch_size",
    "keep": "save_top_k max_to_keep save_total_limit",
    "every_n_steps": "every_n_train_steps save_steps save_every",
    "every_n_seconds": "train_time_interval",
    "best": "save_best save_best_only",
    "trials": "n_trials num_trials num_samples n_iter",
    "workers": "n_jobs",
    "mode": "direction",
    "name": "study_name",
}
"""By weft's own word the others that take the same value, or one of the same kind; a word may stand for several, of
which a class has one."""
INSTEAD = {
    "lr learning_rate": "optimizer=lambda params: torch.optim.Adam(params, lr={value})",
    "weight_decay momentum betas": "optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3, {name}={value})",
    "loss loss_fn loss_function criterion objective": "brought by the problem: weft.Supervised(net, loss_fn) over "
    "(X, y), or weft.Problem(nodes, [weft.objective(fn)])",
    "model module net network pl_module": "the first argument of fit, in a problem: fit(weft.Supervised(net, loss_fn), "
    "(X, y))",
    "bs batch_size train_batch_size per_device_train_batch_size eval_batch_size": "a matter of the data: "
    "weft.Data((X, y), batch_size={value})",
    "shuffle drop_last num_workers pre_batch refresh_every inputs_require_grad": "a matter of the data: "
    "weft.Data(train, dev, {name}={value})",
    "val valid validation validation_data val_data valid_data eval_data eval_set eval_dataset valid_set val_set "
    "val_dataset validation_dataset X_val x_val": "fit(problem, (X, y), dev=(X_dev, y_dev))",
    "validation_split train_split val_size test_size": "split the rows yourself: fit(problem, (X[100:], y[100:]), "
    "dev=(X[:100], y[:100]))",
    "train_loader train_dataloader train_dataset train_data data_loader dataloader train_set": "fit(problem, data)",
    "test_data test_loader test_set test_dataset": "weft.Data(train, dev, test), or trainer.test(data)",
    "metric eval_metrics compute_metrics": 'metrics={{"name": function of keys}}, or weft.Supervised(net, loss_fn, '
    'metrics=["accuracy"])',
    "verbose enable_progress_bar disable_tqdm progress_bar show_progress quiet": "progress=False for silence; the line "
    "is shown without being asked for",
    "fp16 amp use_amp mixed_precision half": 'precision="16-mixed"',
    "bf16": 'precision="bf16-mixed"',
    "double float64": 'precision="64-true"',
    "device": 'accelerator="cpu", "gpu" or "auto"',
    "gpu use_gpu cuda use_cuda no_cuda": 'accelerator="gpu" (or "cpu")',
    "distributed ddp multi_gpu distributed_backend": 'devices=2, strategy="ddp"',
    "save_best load_best_model_at_end restore_best_weights save_best_only": "nothing to ask for: after fit the problem "
    "holds the best weights",
    "save_weights save_every save_steps checkpoint_every": "checkpoint=True, or checkpoint=dict(every_n_steps=100)",
    "tensorboard use_tensorboard": 'loggers="tensorboard"',
    "wandb use_wandb": "loggers=[WandbLogger(...)]",
    "training_step_fn train_step step_fn": "training_step=function of (trainer, batch)",
    "keys outputs": "fit has none; predict(data, keys=[...]) has",
    "collate_fn sampler batch_sampler pin_memory prefetch_factor persistent_workers": "a matter of a loader of your "
    "own, which is iterated as it is: fit(problem, DataLoader(..., {name}=...))",
    "save_weights_only": "trainer.save_weights(path); checkpoints hold all that a resumed run needs",
    "save_last": "nothing to ask for: the newest checkpoint is always kept",
    "X y inputs targets": "the pair (X, y): weft.Data((X, y), batch_size=32)",
    "loss_weights": "a number at each term: weft.objective(fn, weight=10.0)",
    "display_every": "progress, which shows a line without being asked for",
    "class_weight sample_weight": "a key of the data that the loss function or a term reads",
    **{name: f"limit_batches={{{{{split!r}: {{value}}}}}}" for name, split in LIMITS.items()},
}
"""By words of others, what to write here; {name} and {value} are what was given."""
VALUES = {
    "fp16": "16-mixed",
    "float16": "16-mixed",
    "half": "16-mixed",
    "fp32": "32-true",
    "float32": "32-true",
    "float": "32-true",
    "full": "32-true",
    "fp64": "64-true",
    "float64": "64-true",
    "double": "64-true",
    "bfloat16": "bf16-mixed",
    "minimize": "min",
    "maximize": "max",
    "lower": "min",
    "higher": "max",
    "l2": "norm",
}
"""Values by the words of others."""

NAMES = {
    "fit train": "weft.Trainer(epochs=...).fit(problem, data)",
    "Model Module NeuralNetRegressor NeuralNetClassifier PINN PDE": "weft.Supervised(net, loss_fn), or "
    "weft.Problem(nodes, objectives)",
    "Dataset DataLoader TensorDataset DataModule LightningDataModule": "weft.Data(train, dev, batch_size=...), of "
    "tensors, tables, files or loaders",
    "LightningModule": "lightning.pytorch.LightningModule, which weft.Trainer().fit takes as it is",
    "callbacks Callback callback": "weft.Hook, and what weft.hooks holds",
    "EarlyStopping early_stopping": "weft.Trainer(patience=...)",
    "ModelCheckpoint Checkpoint": "weft.Trainer(checkpoint=True); the best weights are in the problem",
    "LRScheduler LearningRateScheduler ReduceLROnPlateau LearningRateMonitor": "weft.Trainer(scheduler=...), "
    "weft.Schedule",
    "GradientClipping": "weft.Trainer(clip=...)",
    "ProgressBar TQDMProgressBar RichProgressBar ProgbarLogger": "weft.Trainer(progress=...)",
    "TensorBoard TensorBoardLogger CSVLogger WandbLogger": "weft.Trainer(loggers=...)",
    "lr_find lr_finder LRFinder LearningRateFinder": "weft.find_lr(problem, data)",
    "kfold KFold cross_val cross_val_score CrossValidation": "weft.cross_validate(make_problem, data, folds=5)",
    "seed_everything manual_seed set_seed": "weft.Trainer(seed=...)",
    "variable minimize Objective loss Loss": "weft.objective(function of keys)",
    "constraint Constraint variables": "weft.less_equal, weft.greater_equal, weft.equal",
    "System": "weft.Rollout(nodes, steps=...)",
    "grad jacobian hessian gradients": "weft.gradient(u, x), and of that again for second derivatives",
    "DirichletBC NeumannBC RobinBC PeriodicBC PointSetBC BC IC OperatorBC": "a term of that part of the data: "
    'weft.objective(fn, part="boundary")',
    "geometry Interval Rectangle GeometryXTime TimeDomain TimePDE": "tensors of points, in parts: "
    'weft.Data({"interior": {"x": x}, "boundary": {"x": ends}}, inputs_require_grad=["interior.x"])',
    "Variable Parameter": "torch.nn.Parameter, which a problem trains as its attribute: problem.k = k",
    "nn": "torch.nn",
    "tune Tuner GridSearchCV study create_study": "weft.sweep(run, space)",
    "load load_model load_from_checkpoint load_checkpoint": "weft.load_weights(problem, path)",
    "save save_model": "weft.save_weights(problem, path)",
}
"""Names that other libraries have at their top, by what does the same here."""
OF_OTHERS = {
    *[
        "net",
        "loss_fn",
        "metrics",
        "train",
        "dev",
        "test",
        "batch_size",
        "keep",
        "best",
        "trials",
        "workers",
        "mode",
        "name",
    ]
}
OF_OTHERS |= {"every_n_steps", "every_n_seconds"}
_HOMES: dict[str, str] = dict.fromkeys(
    ("keep", "best", "every_n_steps", "every_n_seconds"), "checkpoint=dict({ours}={value})"
)
_HOMES |= dict.fromkeys(("trials", "workers", "name"), "weft.sweep(run, space, {ours}={value})")
"""Of weft's words in `SAME` those that are no options of the trainer."""
_SAME: dict[str, tuple[str, ...]] = {word: (ours,) for word, ours in RENAMED.items()}
for _ours, _words in SAME.items():
    for _word in _words.split():
        _SAME[_word] = (*_SAME.get(_word, ()), _ours)
_INSTEAD = {word: way for words, way in INSTEAD.items() for word in words.split()}


def advice(name: str, value: Any, known: Iterable[str] = ()) -> str:
    """ "; " and what to write for an option of another library, else the closest of the `known` ones, else ""."""
    known, meant = list(known), _SAME.get(name, ())
    if ours := next((word for word in meant if word in known), None):
        return f"; here it is {ours}={shown(VALUES.get(value, value) if isinstance(value, str) else value)}"
    if name in _INSTEAD:
        return f"; here it is {_INSTEAD[name].format(name=name, value=shown(value))}"
    if meant and meant[0] in _HOMES:
        return f"; here it is {_HOMES[meant[0]].format(ours=meant[0], value=shown(value))}"
    if meant and meant[0] not in OF_OTHERS:
        return f"; here it is an option of the trainer: weft.Trainer({meant[0]}={shown(value)})"
    if name in NEUTRAL or name in NOTED:
        return f"; it has no meaning here: {NEUTRAL[name][1] if name in NEUTRAL else NOTED[name]}"
    return suggest(name, known)


def unknown_options(owner: str, given: Iterable[tuple[str, Any]], known: Iterable[str]) -> TypeError:
    """What to raise for options that `owner` does not have, each with what to write."""
    known = list(known)
    listed = f"; there are {', '.join(known)}" if len(known) < 20 else ""
    told = [f"{owner} has no option {name!r}{advice(name, value, known) or listed}" for name, value in given]
    return TypeError(". ".join(told).rstrip(".?") + ("?" if told[-1].endswith("?") else "."))


def elsewhere(name: str, names: Mapping[str, str]) -> str:
    """ "; here it is ..." for a name that stands in a table of others' (`NAMES`), else ""."""
    return next((f"; here it is {way}" for words, way in names.items() if name in words.split()), "")


def no_name(package: str, name: str, known: Iterable[str]) -> str:
    """What to say of a name that a package does not have."""
    near = elsewhere(name, NAMES) or suggest(name, known)
    return f"module {package!r} has no attribute {name!r}{near}"


def told(init: Callable[P, None]) -> Callable[P, None]:
    """An `__init__` that meets the words of other libraries with its own."""
    known = list(inspect.signature(init).parameters)[1:]

    @functools.wraps(init)
    def __init__(*args: P.args, **given: P.kwargs) -> None:
        if unknown := [(name, value) for name, value in given.items() if name not in known]:
            raise unknown_options(type(args[0]).__name__, unknown, known)
        init(*args, **given)

    return __init__


def shown(value: Any) -> str:
    """A value as it was written, if it is short."""
    return repr(value) if _is_short(value) else "<what you gave>"


def _is_short(value: Any) -> bool:
    return isinstance(value, int | float | str | bool | None) and len(repr(value)) <= 40
