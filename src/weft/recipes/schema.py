"""What a config file may say: its sections, what each may hold, and every mistake in one list.

    problem: pde.py:make_problem          # or {class_path: ..., init_args: {width: 80}}
    data: {class_path: pde.py:data_setup, init_args: {nsim: 5000}}
    batches: {batch_size: 64}
    optimizer: {class_path: AdamW, init_args: {lr: 1e-3}}
    trainer: {epochs: 200, patience: 20}

A config is a plain dict. Nothing named in it is imported here, and nothing slow is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from weft.config import TrainerConfig, complaints, config_in, matches, types_of
from weft.recipes import class_paths
from weft.recipes.batches import DataConfig
from weft.step.phase import Phase, Schedule
from weft.types import suggest
from weft.yamlfile import load as parse_yaml

SECTIONS = {
    "problem": "what is trained: a function or class that makes it, or a module",
    "data": "a data setup function, or a weft.Data",
    "batches": "how data is cut into batches, where it differs from what the data says (weft.DataConfig)",
    "trainer": "the options of the trainer (weft.TrainerConfig)",
    "optimizer": "a class of torch.optim or a function of the parameters; or several by name",
    "scheduler": "a class of torch.optim.lr_scheduler or a function of the optimizer; or several by name",
    "phases": "a list of stages, each {epochs, optimizer, scheduler, data, batches, freeze, weights, patience}",
    "hooks": "a list of hooks",
    "loggers": "csv, tensorboard, classes of Lightning's loggers, or a list of these",
    "metrics": "further metrics: a dict of functions by name",
    "training_step": "a function (trainer, batch) used instead of the problem's own loss",
    "validation_step": "a function (trainer, batch) for dev batches",
    "test_step": "a function (trainer, batch) for test batches",
    "predict_step": "a function (trainer, batch) that returns predictions",
    "strategy": "a strategy of Lightning Fabric as {class_path, init_args}; a plain name stands in trainer.strategy",
    "profiler": "a profiler as {class_path, init_args}; a plain name stands in trainer.profiler",
    "weights": "weights to start from: a path, or {path, match: {new: old}, strict}",
}
STEPS = ("training_step", "validation_step", "test_step", "predict_step")
PHASE = ("epochs", "optimizer", "scheduler", "data", "batches", "freeze", "weights", "patience")
SCHEDULE = ("interval", "frequency", "monitor")
OF_PYTHON = (
    ": this run was started from Python; run its script again, with fit(..., resume='auto') to go on, "
    "or name its problem and data here"
)
LOGGERS = ("csv", "tensorboard")  # plain names; others are classes


class ConfigError(ValueError):
    """What is wrong with a config, one line each in `problems`."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class Text(str):
    """A value typed on a command line: what it means (5, "5", null, a list) depends on where it goes."""


@dataclass
class Named:
    """One thing that a config names: where ("phases.0.optimizer"), in which section, and what."""

    key: str
    section: str
    spec: dict[str, Any]
    """{"class_path": ..., "init_args": {...}}: the dict that stands in the normal config."""


class PlainPhase(Phase):
    """A phase in a file, where weights are numbers."""

    weights: Mapping[str, float] | None = None


class Weights:
    """Weights to start from: a file or a run's folder, modules renamed as {new: old}, and whether all must be there."""

    path: str
    match: dict[str, str] | None
    strict: bool


# ------------------------------------------------------------------------------------------------ merging


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with what `over` says instead, dict by dict. Another class_path drops the arguments of the one before."""
    merged = dict(base)
    for key, value in over.items():
        before = merged.get(key)
        if isinstance(before, str) and isinstance(value, Mapping) and "init_args" in value:
            before = {"class_path": before}
        if isinstance(value, str) and isinstance(before, Mapping) and "class_path" in before:
            value = {"class_path": value}
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            new = value.get("class_path")
            if new is not None and before.get("class_path") not in (None, new):
                before = {k: v for k, v in before.items() if k != "init_args"}
            value = merge(before, value)
        merged[key] = value
    return merged


def with_option(config: Mapping[str, Any], key: str, text: str) -> dict[str, Any]:
    """`config` with one option of a command line: `trainer.epochs`, `data.nsim`, `optimizer`, `hooks.0.every`.

    Raises ConfigError for a name that cannot stand there.
    """
    first, *rest = key.split(".")
    if first not in SECTIONS:
        raise ConfigError([f"--{key}: there is no such option{_suggest_option(key)}"])
    changed = dict(config)
    changed[first] = _placed(first, changed.get(first), rest, Text(text), key)
    return changed


def _suggest_option(key: str) -> str:
    for section, cls in (("trainer", TrainerConfig), ("batches", DataConfig)):
        if key in cls.__dataclass_fields__:
            return f"; did you mean '--{section}.{key}'?"
    first, _, rest = key.partition(".")
    hint = suggest(first, SECTIONS)
    if rest and hint:
        return hint.replace("'?", f".{rest}'?").replace("mean '", "mean '--")
    return hint.replace("mean '", "mean '--")


def _placed(section: str, current: Any, rest: list[str], text: Text, key: str) -> Any:
    """What stands in a section after `text` was put at the path `rest` below it."""
    if section in ("hooks", "loggers", "phases"):
        return _placed_in_list(section, current, rest, text, key)
    if not rest:
        value = parse_yaml(text, f"--{key}") if text[:1] in "[{" else text
        return merge({section: current}, {section: value})[section] if isinstance(current, Mapping | str) else value
    if section in ("trainer", "batches", "weights", "metrics"):
        if section == "weights" and isinstance(current, str):
            current = {"path": current}
        return _at_path(current, rest, text)
    spec: dict[str, Any] = {"class_path": current} if isinstance(current, str) else dict(current or {})
    if rest[0] in spec and "class_path" not in spec:  # several optimizers by name
        spec[rest[0]] = _placed(section, spec[rest[0]], rest[1:], text, key)
        return spec
    own = {"class_path", "init_args", *(SCHEDULE if section == "scheduler" else ())}
    return _at_path(spec, rest if rest[0] in own else ["init_args", *rest], text)


def _placed_in_list(section: str, current: Any, rest: list[str], text: Text, key: str) -> Any:
    items = list(current) if isinstance(current, list) else [] if current is None else [current]
    if not rest:
        return parse_yaml(text, f"--{key}") if text[:1] in "[{" else [str(text)]
    if not rest[0].isdigit() or int(rest[0]) > len(items):
        raise ConfigError([f"--{key}={str(text)!r}: expected --{section}.0 to --{section}.{len(items)}"])
    number = int(rest[0])
    items += [None] * (number + 1 - len(items))
    if section == "phases" and len(rest) > 1 and rest[1] in ("optimizer", "scheduler", "data"):
        phase = dict(items[number] or {})
        phase[rest[1]] = _placed(rest[1], phase.get(rest[1]), rest[2:], text, key)
        items[number] = phase
    elif section == "phases":
        items[number] = _at_path(items[number], rest[1:], text)
    else:
        items[number] = _placed("hook", items[number], rest[1:], text, key)
    return items


def _at_path(current: Any, path: list[str], value: Any) -> Any:
    if not path:
        return value
    spec = dict(current) if isinstance(current, Mapping) else {}
    spec[path[0]] = _at_path(spec.get(path[0]), path[1:], value)
    return spec


# ------------------------------------------------------------------------------------------------ the normal form


def normal(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The config with every named thing as {class_path, init_args} and typed options, and all that is wrong with it.

    Files and modules are looked for, but nothing is imported.
    """
    wrong: list[str] = []
    out: dict[str, Any] = {}
    for section, value in config.items():
        if section not in SECTIONS:
            hint = f": there is no such section{suggest(str(section), SECTIONS) or _listed()}"
            wrong.append(f"{section}{OF_PYTHON if section == 'objects' else hint}")
        elif value is not None:
            out[section] = _normal_section(section, value, wrong)
    wrong += [f"{n.key}={n.spec['class_path']!r}: {c}" for n in named(out) if (c := _reference_complaint(n))]
    if "phases" in out and "epochs" in out.get("trainer", {}):
        wrong.append("trainer.epochs: with phases, each phase has its own epochs; leave it out")
    return out, wrong


def _listed() -> str:
    return f"; there are {', '.join(SECTIONS)}"


def _normal_section(section: str, value: Any, wrong: list[str]) -> Any:
    if section == "trainer":
        return _normal_options(TrainerConfig, "trainer", value, wrong)
    if section == "batches":
        return _normal_options(DataConfig, "batches", value, wrong)
    if section in ("optimizer", "scheduler"):
        if isinstance(value, Mapping) and "class_path" not in value and "init_args" not in value:
            return {name: _normal_reference(f"{section}.{name}", section, v, wrong) for name, v in value.items()}
        return _normal_reference(section, section, value, wrong)
    if section in ("hooks", "loggers"):
        items = value if isinstance(value, list) else [value]
        return [_normal_item(section, i, item, wrong) for i, item in enumerate(items)]
    if section == "phases":
        if not isinstance(value, list) or not value:
            wrong.append(f"phases={value!r}: expected a list of at least one phase")
            return []
        return [_normal_phase(i, phase, wrong) for i, phase in enumerate(value)]
    if section == "metrics":
        if not isinstance(value, Mapping):
            wrong.append(f"metrics={value!r}: expected a dict of functions by name")
            return {}
        return {name: _normal_reference(f"metrics.{name}", "metrics", v, wrong) for name, v in value.items()}
    if section == "weights":
        return _normal_weights(value, wrong)
    return _normal_reference(section, section, value, wrong)


def _normal_options(cls: type, key: str, value: Any, wrong: list[str]) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        wrong.append(f"{key}={value!r}: expected a dict of options")
        return {}
    types = types_of(cls)
    values = {k: typed(v, types.get(k, Any)) for k, v in value.items()}
    sections = [name for name in values if name in SECTIONS and name not in types]
    wrong += [f"{key}.{name}={values.pop(name)!r}: {name} is a section of its own: --{name} ..." for name in sections]
    wrong += complaints(cls, values, f"{key}.")
    return values


def typed(value: Any, kind: Any) -> Any:
    """`value` as the type `kind` may have it, where it is text of a command line: a number, a list, null, or the text.

    Text that is allowed as it stands stays text where what it reads as is not allowed ("0,2", "007").
    """
    if isinstance(value, Mapping):
        inner = config_in(kind)
        types = types_of(inner) if inner else dict.fromkeys(value, kind)
        return {k: typed(v, types.get(k, Any)) for k, v in value.items()}
    if not isinstance(value, Text):
        return value
    try:
        read = parse_yaml(value)
    except ValueError:
        return str(value)  # the check of types says what was expected
    return str(value) if not matches(read, kind) and matches(value, kind) else read


def _normal_item(section: str, number: int, item: Any, wrong: list[str]) -> Any:
    if section == "loggers" and (item is True or item in LOGGERS):
        return "csv" if item is True else str(item)
    return _normal_reference(f"{section}.{number}", section, item, wrong)


def _normal_reference(key: str, section: str, value: Any, wrong: list[str]) -> dict[str, Any]:
    spec = {"class_path": value} if isinstance(value, str) else value
    if not isinstance(spec, Mapping) or not isinstance(spec.get("class_path"), str):
        found = "no class_path" if isinstance(spec, Mapping) and spec.get("class_path") is None else repr(value)
        wrong.append(
            f"{key}: found {found}; expected 'module:function', 'file.py:function' or {{class_path, init_args}}"
        )
        return {}
    allowed = ("class_path", "init_args", *(SCHEDULE if section == "scheduler" else ()))
    for name in spec:
        if name not in allowed:
            hint = suggest(str(name), allowed) or f"; its own parameters go into {key}.init_args"
            wrong.append(f"{key}.{name}={spec[name]!r}: there is no such key{hint}")
    init_args = spec.get("init_args") or {}
    if not isinstance(init_args, Mapping):
        wrong.append(f"{key}.init_args={init_args!r}: expected a dict of arguments by name")
        init_args = {}
    elif section in ("metrics", *STEPS) and init_args:
        wrong.append(f"{key}.init_args: this function is called by the trainer; it takes no arguments from here")
    found = {"class_path": str(spec["class_path"]), "init_args": dict(init_args)}
    if section == "scheduler":
        found |= _normal_options(Schedule, key, {k: spec[k] for k in SCHEDULE if spec.get(k) is not None}, wrong)
    return found


def _normal_phase(number: int, phase: Any, wrong: list[str]) -> dict[str, Any]:
    key = f"phases.{number}"
    if not isinstance(phase, Mapping):
        wrong.append(f"{key}={phase!r}: expected a dict of {', '.join(PHASE)}")
        return {}
    wrong += [f"{key}.{k}={phase[k]!r}: there is no such option{suggest(k, PHASE)}" for k in phase if k not in PHASE]
    given = {k: v for k, v in phase.items() if v is not None}
    plain = {k: v for k, v in given.items() if k in ("epochs", "patience", "freeze", "weights")}
    out = _normal_options(PlainPhase, key, plain, wrong)
    for name in ("optimizer", "scheduler", "data"):
        if name in given:
            out[name] = _normal_reference(f"{key}.{name}", name, given[name], wrong)
    if "batches" in given:
        out["batches"] = _normal_options(DataConfig, f"{key}.batches", given["batches"], wrong)
    if "epochs" not in phase:
        wrong.append(f"{key}.epochs: missing; a phase says how many epochs it lasts")
    return out


def _normal_weights(value: Any, wrong: list[str]) -> dict[str, Any]:
    spec = {"path": value} if isinstance(value, str) else value
    if not isinstance(spec, Mapping) or not isinstance(spec.get("path"), str):
        wrong.append(f"weights={value!r}: expected a path, or {{path, match, strict}}")
        return {}
    return _normal_options(Weights, "weights", {k: v for k, v in spec.items() if v is not None}, wrong)


# ------------------------------------------------------------------------------------------------ what is named


def named(config: Mapping[str, Any]) -> Iterator[Named]:
    """Everything that a normal config names."""
    for section, value in config.items():
        if section in ("problem", "data", "strategy", "profiler", *STEPS):
            yield from _one(section, section, value)
        elif section in ("optimizer", "scheduler"):
            several = "class_path" not in value
            for name, spec in value.items() if several else [("", value)]:
                yield from _one(f"{section}.{name}" if several else section, section, spec)
        elif section == "metrics":
            for name, spec in value.items():
                yield from _one(f"metrics.{name}", section, spec)
        elif section in ("hooks", "loggers"):
            for i, spec in enumerate(value):
                yield from _one(f"{section}.{i}", section, spec)
        elif section == "phases":
            for i, phase in enumerate(value):
                for name in ("optimizer", "scheduler", "data"):
                    yield from _one(f"phases.{i}.{name}", name, phase.get(name))


def _one(key: str, section: str, spec: Any) -> Iterator[Named]:
    if isinstance(spec, dict) and "class_path" in spec:
        yield Named(key, section, spec)


def _reference_complaint(thing: Named) -> str:
    complaint = class_paths.complaint(thing.spec["class_path"], thing.section)
    if complaint and thing.section == "loggers":
        complaint += suggest(thing.spec["class_path"], LOGGERS) if "did you mean" not in complaint else ""
    return complaint
