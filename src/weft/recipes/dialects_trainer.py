"""The trainer section of Lightning's and physicsml's configs, callbacks and loggers included, put into weft's words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft.config import TrainerConfig
from weft.types import suggest
from weft.words.foreign import LIMITS, NEUTRAL, NOTED, RENAMED

PROFILERS = {"SimpleProfiler": "simple", "AdvancedProfiler": "advanced", "PyTorchProfiler": "pytorch"}


class Translation:
    """What a translation finds on its way."""

    def __init__(self, is_physicsml: bool) -> None:
        self.is_physicsml, self.renames_metrics = is_physicsml, True
        self.wrong: list[str] = []
        self.notes: list[str] = []

    def metric(self, name: Any) -> Any:
        """A metric's name here: "val/total/loss" and "val_loss" are "dev_loss". A LightningModule keeps its own."""
        if not self.renames_metrics or not isinstance(name, str):
            return name
        parts = [p for p in name.split("/") if p != "total"] if "/" in name else name.split("_")
        return "_".join(["dev" if parts[0] == "val" else parts[0], *parts[1:]])


def trainer_section(section: Any, out: dict[str, Any], work: Translation, key: str = "trainer") -> None:
    """Put the options of a trainer section, which may be weft's own, into the sections of `out`."""
    if not isinstance(section, Mapping):
        out["trainer"] = section
        return
    options: dict[str, Any] = {}
    foreign = (*RENAMED, *LIMITS, *NEUTRAL, *NOTED, "callbacks", "logger", "enable_progress_bar", "max_epochs")
    for name, value in section.items():
        where = f"{key}.{name}={value!r}"
        if name in NEUTRAL:
            if value not in NEUTRAL[name][0]:
                work.wrong.append(f"{where}: has no meaning here; {NEUTRAL[name][1]}")
        elif name in NOTED:
            work.notes.append(f"{where}: has no effect here; {NOTED[name]}")
        elif name in LIMITS:
            if value not in (None, 1.0) or value is True or isinstance(value, int):
                options.setdefault("limit_batches", {})[LIMITS[name]] = value
        elif name == "reload_dataloaders_every_n_epochs":
            if value:
                out.setdefault("batches", {})["refresh_every"] = value
        elif name == "enable_progress_bar":
            options["progress"] = "auto" if value else False
        elif name == "callbacks":
            _callbacks(value, options, out, work, f"{key}.callbacks")
        elif name == "logger":
            _loggers(value, out, work)
        elif name in ("strategy", "profiler") and isinstance(value, Mapping):
            _object(name, value, options, out, work, key)
        elif name in ("max_epochs", "max_steps") and value in (-1, None):
            if name == "max_epochs":
                work.wrong.append(
                    f"{where}: a run has a number of epochs; give one, with max_time or patience to end it"
                )
        elif name == "max_time" and isinstance(value, Mapping):
            options[name] = _seconds(value)
        elif name == "deterministic" and value == "warn":
            work.wrong.append(f"{where}: expected true or false")
        elif name in RENAMED:
            if value is not None and (name, value) not in (("gradient_clip_val", 0), ("gradient_clip_val", 0.0)):
                options[RENAMED[name]] = value
        else:
            if name not in TrainerConfig.__dataclass_fields__ and suggest(str(name), foreign):
                hint = suggest(str(name), (*foreign, *TrainerConfig.__dataclass_fields__))
                work.wrong.append(f"{where}: there is no such option{hint}")
                continue
            options[name] = value
    merge_into(out, "trainer", options, work)


def merge_into(out: dict[str, Any], section: str, options: Mapping[str, Any], work: Translation) -> None:
    """Add options to a section of the result."""
    if options or section not in out:
        out[section] = {**out.get(section, {}), **options}


def _seconds(parts: Mapping[str, float]) -> float:
    units = {"weeks": 604800, "days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
    return float(sum(units.get(unit, 0) * number for unit, number in parts.items()))


def _object(
    name: str, value: Mapping[str, Any], options: dict[str, Any], out: dict[str, Any], work: Translation, key: str
) -> None:
    """A strategy or profiler as {name, config}."""
    given, config = value.get("name", value.get("class_path")), value.get("config", value.get("init_args")) or {}
    if not isinstance(given, str):
        work.wrong.append(f"{key}.{name}={dict(value)!r}: expected a name, or {{name, config}}")
    elif name == "profiler" and given in PROFILERS:
        options["profiler"] = PROFILERS[given]
        work.wrong += [f"{key}.profiler.config.{k}={v!r}: has no meaning here" for k, v in config.items()]
    else:
        home = "lightning.fabric.strategies." if name == "strategy" and "." not in given else ""
        out[name] = {"class_path": home + given, "init_args": dict(config)}


def _loggers(value: Any, out: dict[str, Any], work: Translation) -> None:
    if value is None or value is False:
        return
    if value is True:
        out["loggers"] = ["tensorboard"]
        return
    is_one = isinstance(value, str) or (isinstance(value, Mapping) and ("name" in value or "class_path" in value))
    entries = [value] if is_one else list(value.values()) if isinstance(value, Mapping) else list(value)
    out["loggers"] = [_logger(entry, work) for entry in entries]


def _logger(entry: Any, work: Translation) -> Any:
    if not isinstance(entry, Mapping):
        return entry
    name = str(entry.get("name", entry.get("class_path")))
    config = dict(entry.get("config", entry.get("init_args")) or {})
    own = {"TensorBoardLogger": "tensorboard", "CSVLogger": "csv"}.get(name.rsplit(".", 1)[-1])
    if own and not set(config) - {"save_dir", "name", "version"}:
        work.notes += [
            f"logger {name}: {k}={v!r} has no effect here; files go into the run's folder" for k, v in config.items()
        ]
        return own
    return {"class_path": name if "." in name else f"lightning.pytorch.loggers.{name}", "init_args": config}


def _callbacks(value: Any, options: dict[str, Any], out: dict[str, Any], work: Translation, key: str) -> None:
    """Callbacks that weft has in itself become options; others become hooks."""
    entries = list(value.items()) if isinstance(value, Mapping) else list(enumerate(value or []))
    for number, entry in entries:
        where = f"{key}.{number}"
        spec: Any = {"name": entry} if isinstance(entry, str) else entry
        name = spec.get("name", spec.get("class_path")) if isinstance(spec, Mapping) else None
        if not isinstance(name, str):
            work.wrong.append(f"{where}={entry!r}: expected {{name, config}}")
            continue
        config: dict[str, Any] = dict(spec.get("config", spec.get("init_args")) or {})
        short = name.rsplit(".", 1)[-1]
        make = {
            "EarlyStopping": _early_stopping,
            "ModelCheckpoint": _checkpoint,
            "ModelCheckpointApply": _apply_best,
        }.get(short)
        if make is not None:
            make(config, options, work, where)
        elif short == "Timer" and config.get("interval", "step") == "step":
            options["max_time"] = (
                _seconds(config["duration"]) if isinstance(config.get("duration"), Mapping) else config.get("duration")
            )
        elif short in ("RichProgressBar", "TQDMProgressBar", "ModelSummary", "RichModelSummary", "LearningRateMonitor"):
            done = "learning rates are always logged" if short == "LearningRateMonitor" else "weft has its own line"
            work.notes.append(f"{where}={name!r}: has no effect here; {done}")
        else:
            path = name if "." in name or ":" in name else f"lightning.pytorch.callbacks.{name}"
            out.setdefault("hooks", []).append({"class_path": path, "init_args": config})


def _early_stopping(config: dict[str, Any], options: dict[str, Any], work: Translation, where: str) -> None:
    options["patience"] = config.pop("patience", 3)
    options |= {k: abs(config.pop(k)) for k in ("min_delta",) if k in config}
    _monitor(config, options, work, where)
    neutral = {
        "verbose": (True, False),
        "strict": (True,),
        "check_finite": (True,),
        "log_rank_zero_only": (True, False),
    }
    for name, value in config.items():
        if value is not None and not any(value is v for v in neutral.get(name, ())):
            work.wrong.append(f"{where}.config.{name}={value!r}: has no meaning here")


def _monitor(config: dict[str, Any], options: dict[str, Any], work: Translation, where: str) -> None:
    """The monitored metric and its direction: one for the whole run."""
    for name, value in (
        ("monitor_metric", work.metric(config.pop("monitor", None))),
        ("monitor_mode", config.pop("mode", None)),
    ):
        if value is None:
            continue
        if options.get(name, value) != value:
            work.wrong.append(
                f"{where}: monitors {value!r}, another callback {options[name]!r}; a run has one monitored metric"
            )
        options[name] = value


def _checkpoint(config: dict[str, Any], options: dict[str, Any], work: Translation, where: str) -> None:
    settings = {}
    for name, own in (("every_n_epochs", "every_n_epochs"), ("every_n_train_steps", "every_n_steps")):
        if config.get(name):
            settings[own] = config[name]
    if config.get("train_time_interval"):
        work.wrong.append(f"{where}.config.train_time_interval: use trainer.checkpoint.every_n_seconds")
    _monitor(config, options, work, where)
    known = (
        "every_n_epochs",
        "every_n_train_steps",
        "train_time_interval",
        "verbose",
        "save_last",
        "save_weights_only",
    )
    names = (
        "dirpath",
        "filename",
        "save_top_k",
        "auto_insert_metric_name",
        "enable_version_counter",
        "save_on_train_epoch_end",
    )
    for name, value in config.items():
        if name in names:
            work.notes.append(
                f"{where}.config.{name}={value!r}: has no effect here; the run's folder keeps the newest and the best"
            )
        elif name not in known:
            work.wrong.append(f"{where}.config.{name}={value!r}: has no meaning here")
    options["checkpoint"] = settings or True


def _apply_best(config: dict[str, Any], options: dict[str, Any], work: Translation, where: str) -> None:
    """After a fit the problem holds its best weights in any case."""
    _monitor(config, options, work, where)
    work.notes += [
        f"{where}.config.{k}={v!r}: has no effect here; best weights are always put back" for k, v in config.items()
    ]
