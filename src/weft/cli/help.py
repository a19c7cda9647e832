"""What a command takes, as text for people and as words for a shell that completes them."""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path
from typing import Any

from weft.cli.commands import COMMANDS
from weft.cli.parsing import FLAGS, SHORT, Call, parse
from weft.recipes.schema import SECTIONS, named, normal

COMMON = {
    "config FILE": "a YAML file; several are merged, later ones and options go before earlier ones",
    "print_config": "print the config that all of this amounts to, and do nothing",
    "seed N, --devices N, --epochs N, --fast_dev_run [N]": "short for --trainer.seed, ...",
    "trust": "run what the config of a folder names although another user owns it",
    "debug": "show whole tracebacks",
    "help": "this text",
}


def overview() -> str:
    """What there is, in a screen."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name.ljust(width)}{command.summary}" for name, command in COMMANDS.items()]
    codes = "0 done, 1 error, 2 bad usage or config, 3 numbers not finite, 130 interrupted, 143 terminated"
    more = "weft COMMAND --help lists a command's options; weft --version."
    return "\n".join(["usage: weft COMMAND [OPTIONS]", "", *lines, "", more, f"Exit codes: {codes}."])


def command_help(call: Call) -> str:
    """What a command takes, with the options of what is named already."""
    command = COMMANDS[call.command]
    lines = [f"usage: weft {call.command} {' '.join([*command.places, '[OPTIONS]'])}", "", f"{command.summary}.", ""]
    if command.takes_config:
        lines += [_entry(f"--{name}", text) for name, text in COMMON.items()]
    lines += [_entry(f"--{name}", text) for name, text in command.own.items()]
    for title, options in option_groups(call):
        lines += ["", f"{title}:", *(_entry(*option) for option in options)]
    return "\n".join(lines)


def _entry(name: str, text: str) -> str:
    width = min(shutil.get_terminal_size().columns, 110)
    return f"  {name}\n" + textwrap.fill(text, width, initial_indent=" " * 8, subsequent_indent=" " * 8)


def option_groups(call: Call) -> list[tuple[str, list[tuple[str, str]]]]:
    """The options of a command by group: (title, [(name, what it means)]); those of named functions included."""
    if not COMMANDS[call.command].takes_config:
        return []
    from weft.config import TrainerConfig
    from weft.recipes.arguments import fields
    from weft.recipes.batches import DataConfig

    own = [(f"--{name}", text) for name, text in SECTIONS.items() if name not in ("trainer", "batches")]
    groups = [("what is run", own)]
    groups += [(title, options) for title, options in _named_groups(call) if options]
    for section, cls in (("trainer", TrainerConfig), ("batches", DataConfig)):
        groups.append((SECTIONS[section], [_option(section, p) for p in fields(cls)]))
    return groups


def _option(section: str, parameter: Any) -> tuple[str, str]:
    from weft.recipes.arguments import NO_DEFAULT

    default = "required" if parameter.default is NO_DEFAULT else f"default: {_shown(parameter.default)}"
    kind = f"{parameter.type_name}; " if parameter.type_name else ""
    text = f"{parameter.help} ({kind}{default})" if parameter.help else f"({kind}{default})"
    return f"--{section}.{parameter.name}", text


def _shown(value: Any) -> str:
    """A default as it would be written in a file."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value}"


def _named_groups(call: Call) -> list[tuple[str, list[tuple[str, str]]]]:
    """The parameters of what the config and the command line name, as its source tells: nothing of it is imported."""
    from weft.recipes import recipe, signatures

    config, _ = normal(recipe.rooted(call.config, Path.cwd()))
    groups = []
    for thing in named(config):
        name = thing.spec["class_path"]
        try:
            found = signatures.read(name, thing.section, recipe.PARTIAL.get(thing.section, 0)).parameters
            options = [_option(thing.key, p) for p in found]
        except (AttributeError, ValueError, SyntaxError, OSError) as error:
            options = [(f"--{thing.key}", str(error))]
        groups.append((f"{thing.key} {name}", options))
    return groups


def completions(line: str, point: str | None = None) -> list[str]:
    """What may stand at the end of a command line that is being typed, for the shell."""
    words = line[: int(point)] if point and point.isdigit() else line
    typed = words.split()[1:]
    current = "" if not typed or words.endswith(" ") else typed.pop()
    if not typed:
        return sorted(name for name in COMMANDS if name.startswith(current))
    if typed[0] not in COMMANDS or not current.startswith("-"):
        return []
    try:
        call = parse(typed[0], COMMANDS[typed[0]], typed[1:])
        names = [name for _, options in option_groups(call) for name, _ in options]
    except Exception:  # noqa: BLE001 - half a command line may be anything
        names = []
    command = COMMANDS[typed[0]]
    names += [f"--{name}" for name in (*command.own, *FLAGS, *(("config", *SHORT) if command.takes_config else ()))]
    return sorted({name for name in names if name.startswith(current)})
