"""Lightning's and physicsml's ways of writing a config, put into weft's: dicts in, dicts out, and known nowhere else.

    translate({"trainer": {"max_epochs": 5, "gradient_clip_val": 1.0}})
    # {"trainer": {"epochs": 5, "clip": 1.0}}

Understood are the sections of physicsml (`{name, config: {optimizer, scheduler, datamodule, trainer, transfer_learning,
compile, ...}}`, also without the frame), those of LightningCLI (`model, data, trainer, optimizer, lr_scheduler,
seed_everything, ckpt_path`), and weft's own, which stay as they are. Where a physicsml config leaves something out, its
own defaults are written into the result, so that they can be seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft.recipes.dialects_trainer import Translation, merge_into, trainer_section
from weft.recipes.schema import SECTIONS, ConfigError
from weft.types import suggest

BODY = ("optimizer", "scheduler", "datamodule", "trainer", "transfer_learning", "compile", "float32_matmul_precision")
SPLITS = {"train": "train", "validation": "dev", "test": "test", "predict": "predict"}


def translate(
    config: Mapping[str, Any],
    *,
    trainer_config: Mapping[str, Any] | None = None,
    datamodule_config: Mapping[str, Any] | None = None,
    optimizer_config: Mapping[str, Any] | None = None,
    scheduler_config: Mapping[str, Any] | None = None,
    transfer_learning_config: Mapping[str, Any] | None = None,
    compile_config: Any = None,
    ckpt_path: str | None = None,
) -> dict[str, Any]:
    """`config` in weft's own words. Its key "notes", if there, lists what was left out because it changes nothing.

    The keyword arguments are those of physicsml's `model.train`: they go before what the config says, in the result
    only; `config` itself is never changed. Raises ConfigError for keys that ask for something weft does not do.
    """
    over = {
        "trainer": trainer_config,
        "datamodule": datamodule_config,
        "optimizer": optimizer_config,
        "scheduler": scheduler_config,
        "transfer_learning": transfer_learning_config,
        "compile": compile_config,
    }
    given = {k: v for k, v in over.items() if v is not None} | ({"ckpt_path": ckpt_path} if ckpt_path else {})
    out, wrong = translated(config, given)
    if wrong:
        raise ConfigError(wrong)
    return out


def translated(config: Mapping[str, Any], over: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], list[str]]:
    """Like `translate`, with everything that is wrong as a list instead of an error."""
    work = Translation(is_physicsml="config" in config and "name" in config)
    out, body = _unframed(config, work)
    for section, value in (over or {}).items():
        both = isinstance(value, Mapping) and isinstance(body.get(section), Mapping)
        body[section] = {**body[section], **value} if both else value
    work.renames_metrics = "model" not in body
    _top_level(body, out, work)
    if work.is_physicsml:
        _fill_defaults(body)
    _optimizers(body, out, work)
    for name, value in list(body.items()):
        if name == "trainer":
            trainer_section(value, out, work)
        elif name == "datamodule":
            _datamodule(value, out, work)
        elif name == "transfer_learning":
            _transfer_learning(value, body, out, work)
    if work.notes:
        out["notes"] = work.notes
    return out, work.wrong


def _unframed(config: Mapping[str, Any], work: Translation) -> tuple[dict[str, Any], dict[str, Any]]:
    """(What is weft's already, what is to be translated) of a config with or without physicsml's frame."""
    body = dict(config)
    out: dict[str, Any] = {}
    if work.is_physicsml:
        name, inner = body.pop("name"), body.pop("config") or {}
        twice = [k for k in inner if k in body]
        work.wrong += [f"config.{k}: stands outside of config as well; keep one of them" for k in twice]
        arguments = {k: v for k, v in inner.items() if k not in BODY and k not in SECTIONS}
        body |= {k: v for k, v in inner.items() if k in BODY or k in SECTIONS}
        problem = body.pop("problem", name)
        problem = dict(problem) if isinstance(problem, Mapping) else {"class_path": problem}
        problem["init_args"] = {**arguments, **(problem.get("init_args") or {})}
        if not any(mark in str(problem.get("class_path")) for mark in ".:"):
            work.wrong.append(f"name={name!r}: no function or class; name yours as `problem: file.py:function`")
        else:
            out["problem"] = problem
    return out, body


def _top_level(body: dict[str, Any], out: dict[str, Any], work: Translation) -> None:
    """The keys beside the big sections; what is weft's own goes into `out` as it is."""
    trainer = dict(body["trainer"]) if isinstance(body.get("trainer"), Mapping) else {}
    for name in list(body):
        value = body[name]
        if name == "model":
            out["problem"] = body.pop(name)
        elif name == "lr_scheduler":
            body["scheduler"] = body.pop(name)
        elif name == "seed_everything":
            body.pop(name)
            if value is True:
                work.wrong.append("seed_everything=True: give a number, so that the run can be repeated")
            elif value not in (False, None):
                trainer["seed"] = value
        elif name == "ckpt_path":
            if body.pop(name) is not None:
                trainer["resume"] = value
        elif name == "compile":
            body.pop(name)
            if isinstance(value, Mapping):
                work.notes += [f"compile.{k}: weft compiles the whole update in its own way" for k in value]
            if value:
                trainer["compile"] = True
        elif name == "float32_matmul_precision":
            if body.pop(name) not in (None, "highest"):
                work.wrong.append(
                    f"float32_matmul_precision={value!r}: it is a switch of the whole process; call "
                    "torch.set_float32_matmul_precision in the problem's file"
                )
        elif name not in BODY:
            out[name] = body.pop(name)
    if trainer or "trainer" in body:
        body["trainer"] = trainer if isinstance(body.get("trainer", {}), Mapping) else body["trainer"]


def _fill_defaults(body: dict[str, Any]) -> None:
    """What physicsml takes where a config says nothing."""
    body["trainer"] = {
        "max_epochs": 1,
        "default_root_dir": "training",
        "enable_checkpointing": False,
        **body.get("trainer", {}),
    }
    body.setdefault("optimizer", {"name": "Adam", "config": {"lr": 1e-3}})
    body.setdefault("scheduler", {"name": "CosineAnnealingLR", "config": {"T_max": "num_steps"}})
    datamodule = dict(body.get("datamodule") or {})
    datamodule["train"] = {
        "batch_size": datamodule.get("train_batch_size") or 1,
        "drop_last": True,
        **datamodule.get("train", {}),
    }
    body["datamodule"] = datamodule


def _optimizers(body: dict[str, Any], out: dict[str, Any], work: Translation) -> None:
    for section in ("optimizer", "scheduler"):
        if body.get(section) is not None:
            out[section] = _named(section, section, body[section], work)


def _named(key: str, section: str, value: Any, work: Translation) -> Any:
    """{name, config} as {class_path, init_args}; anything else stays."""
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        return value
    known = ("name", "config", *(("interval", "frequency", "monitor", "strict") if section == "scheduler" else ()))
    work.wrong += [
        f"{key}.{k}={value[k]!r}: there is no such key{suggest(str(k), known)}" for k in value if k not in known
    ]
    spec: dict[str, Any] = {"class_path": value["name"], "init_args": dict(value.get("config") or {})}
    if section != "scheduler":
        return spec
    totals = {v for k, v in spec["init_args"].items() if k in ("T_max", "total_steps")}
    spec["interval"] = (
        "step" if "num_steps" in totals else "epoch" if "num_epochs" in totals else value.get("interval", "step")
    )
    if "interval" in value and value["interval"] != spec["interval"]:
        work.notes.append(f"{key}.interval={value['interval']!r}: {spec['interval']!r}, as the scheduler's length says")
    if "frequency" in value:
        spec["frequency"] = value["frequency"]
    if value.get("strict") is False:
        work.wrong.append(f"{key}.strict=False: a monitored metric that is not there is always an error")
    if value["name"].endswith("ReduceLROnPlateau"):
        spec["monitor"] = work.metric(value.get("monitor", "val_loss"))
    elif "monitor" in value:
        work.notes.append(f"{key}.monitor={value['monitor']!r}: {value['name']} looks at no metric")
    return spec


def _datamodule(section: Any, out: dict[str, Any], work: Translation, key: str = "datamodule") -> None:
    if not isinstance(section, Mapping):
        work.wrong.append(f"{key}={section!r}: expected a dict")
        return
    batches: dict[str, Any] = {}
    sizes: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for name, value in section.items():
        if name in SPLITS:
            _split(f"{key}.{name}", SPLITS[name], value, sizes, batches, work)
        elif name in ("num_workers", "pre_batch"):
            batches[name] = value
        elif name == "pre_batch_in_memory":
            batches |= {"pre_batch": "in_memory"} if value else {}
        elif name in ("train_batch_size", "validation_batch_size"):
            if value is not None:
                sizes.setdefault(SPLITS[name.removesuffix("_batch_size")], value)
        else:
            own[name] = value
    if sizes:
        rest = sizes.get("train", next(iter(sizes.values())))  # the size of an evaluation's batches changes no mean
        batches["batch_size"] = {split: sizes.get(split, rest) for split in SPLITS.values()}
    if batches:
        merge_into(out, "batches", batches, work)
    if own:
        data = out.get("data")
        if data is None:
            work.wrong += [
                f"{key}.{k}={v!r}: goes to the data setup function; name one under `data`" for k, v in own.items()
            ]
            return
        data = dict(data) if isinstance(data, Mapping) else {"class_path": data}
        out["data"] = {**data, "init_args": {**own, **(data.get("init_args") or {})}}


def _split(key: str, split: str, value: Any, sizes: dict[str, Any], batches: dict[str, Any], work: Translation) -> None:
    if not isinstance(value, Mapping):
        work.wrong.append(f"{key}={value!r}: expected a dict like {{batch_size: 64}}")
        return
    for name, given in value.items():
        if name == "batch_size":
            sizes[split] = given
        elif name == "drop_last" and split == "train":
            batches["drop_last"] = given
        elif name == "mode":
            if given != "max_size_cycle":
                work.notes.append(
                    f"{key}.mode={given!r}: of several datasets the smaller ones start over (max_size_cycle)"
                )
        else:
            work.wrong.append(
                f"{key}.{name}={given!r}: there is no such key{suggest(str(name), ('batch_size', 'drop_last', 'mode'))}"
            )


def _transfer_learning(section: Any, body: Mapping[str, Any], out: dict[str, Any], work: Translation) -> None:
    """Weights to start from, and a phase for each stage."""
    if not isinstance(section, Mapping) or not isinstance(section.get("stages"), list):
        if section is not None:
            work.wrong.append("transfer_learning: expected {pre_trained_model_path, modules_to_match, stages: [...]}")
        return
    for name in section:
        if name in ("repo_url", "rev", "model_path_in_repo"):
            work.wrong.append(f"transfer_learning.{name}: fetch the model and give its file as pre_trained_model_path")
        elif name not in ("stages", "pre_trained_model_path", "modules_to_match"):
            work.wrong.append(f"transfer_learning.{name}={section[name]!r}: there is no such key")
    if section.get("pre_trained_model_path"):
        match = section.get("modules_to_match")
        out["weights"] = {"path": section["pre_trained_model_path"], **({"match": dict(match)} if match else {})}
    phases = [_stage(i, stage, body, work) for i, stage in enumerate(section["stages"])]
    out["phases"] = phases
    if isinstance(out.get("trainer"), dict):
        out["trainer"].pop("epochs", None)  # the phases say how long
    body["trainer"].pop("max_epochs", None) if isinstance(body.get("trainer"), dict) else None


def _stage(number: int, stage: Any, body: Mapping[str, Any], work: Translation) -> dict[str, Any]:
    """A stage as a phase. It starts with an optimizer and a scheduler of its own, as in physicsml."""
    key = f"transfer_learning.stages.{number}"
    if not isinstance(stage, Mapping):
        work.wrong.append(f"{key}={stage!r}: expected a dict")
        return {}
    known = ("freeze_modules", "trainer", "datamodule", "optimizer", "scheduler")
    work.wrong += [
        f"{key}.{k}={stage[k]!r}: there is no such key{suggest(str(k), known)}" for k in stage if k not in known
    ]
    inner: dict[str, Any] = {}
    top: Any = body.get("trainer")
    epochs = top.get("max_epochs", top.get("epochs", 1)) if isinstance(top, Mapping) else 1
    trainer_section({"max_epochs": epochs, **(stage.get("trainer") or {})}, inner, work, f"{key}.trainer")
    options = inner.pop("trainer", {})
    phase = {"epochs": options.pop("epochs", 1)} | (
        {"patience": options.pop("patience")} if "patience" in options else {}
    )
    options |= inner
    work.wrong += [
        f"{key}.trainer: {k}={v!r} is one for the whole run; set it in the trainer section" for k, v in options.items()
    ]
    if stage.get("freeze_modules"):
        phase["freeze"] = list(stage["freeze_modules"])
    for section in ("optimizer", "scheduler"):
        if stage.get(section) is not None or body.get(section) is not None:
            spec = {**(body.get(section) or {}), **(stage.get(section) or {})}
            phase[section] = _named(f"{key}.{section}", section, spec, work)
    if stage.get("datamodule"):
        inner = {}
        _datamodule(stage["datamodule"], inner, work, f"{key}.datamodule")
        phase |= inner
    return phase
