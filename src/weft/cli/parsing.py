"""The words of a command line as a `Call`: a command, a config made of files and options, and what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft.recipes.schema import ConfigError, merge, with_option
from weft.types import suggest

FLAGS = ("help", "debug", "print_config", "trust")
SHORT = {
    "seed": "trainer.seed",
    "devices": "trainer.devices",
    "epochs": "trainer.epochs",
    "fast_dev_run": "trainer.fast_dev_run",
}
"""Options of the trainer that may be given by their bare names."""


@dataclass
class Call:
    """What a command line asks for."""

    command: str
    config: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    flags: set[str] = field(default_factory=set)
    others: dict[str, str] = field(default_factory=dict)
    """The command's own options."""
    places: list[str] = field(default_factory=list)
    """What stands without an option: run folders, files."""


@dataclass
class Command:
    """A subcommand: what it does, what it takes, and the function that does it."""

    run: Callable[[Call], int]
    summary: str
    places: tuple[str, ...] = ()
    """What it takes without an option; in brackets: may be left out."""
    own: dict[str, str] = field(default_factory=dict)
    """Options of its own and what they mean."""
    switches: tuple[str, ...] = ()
    """Those of them that need no value."""
    takes_config: bool = False
    prefix: str = "-"
    """Options of any name that begin so are its own too ("slurm.")."""


def parse(name: str, known: Command, words: Sequence[str]) -> Call:
    """The words after `weft NAME` as a Call; what is wrong with them is collected in it."""
    call = Call(name)
    overrides: list[tuple[str, str]] = []
    files: list[str] = []
    i = 0
    while i < len(words):
        word, i = words[i], i + 1
        if word in ("-h", "--help"):
            call.flags.add("help")
        elif not word.startswith("--"):
            call.places.append(word)
        elif word[2:] in FLAGS:
            call.flags.add(word[2:])
        else:
            option, equals, value = word[2:].partition("=")
            if not equals:
                has_value = i < len(words) and not words[i].startswith("--")
                value, i = (words[i], i + 1) if has_value else (_bare(option, known), i)
                if value is None:
                    call.wrong.append(f"--{option}: needs a value")
                    continue
            if option in known.own or option.startswith(known.prefix):
                call.others[option] = value
            elif option == "config" and known.takes_config:
                files.append(value)
            elif known.takes_config:
                overrides.append((SHORT.get(option, option), value))
            else:
                call.wrong.append(f"--{option}: there is no such option{suggest(option, known.own)}")
    _read_configs(call, files, overrides)
    return call


def _bare(name: str, known: Command) -> str | None:
    """What an option without a value means: true if it is a switch, else None."""
    if name in known.switches or name.startswith(known.prefix):
        return "true"
    from weft.config import TrainerConfig
    from weft.recipes.batches import DataConfig

    section, _, option = SHORT.get(name, name).partition(".")
    cls = {"trainer": TrainerConfig, "batches": DataConfig}.get(section)
    is_switch = cls is not None and "bool" in str(getattr(cls.__dataclass_fields__.get(option), "type", ""))
    return "true" if is_switch else None


def _read_configs(call: Call, files: Sequence[str], overrides: Sequence[tuple[str, str]]) -> None:
    from weft.recipes import recipe

    if call.command in ("resume", "validate", "test", "predict") and call.places:
        files = [str(Path(call.places[0]) / "config.yaml"), *files]
    for path in files:
        try:
            source = recipe.read(path)
            call.config = merge(call.config, source.config)
            call.wrong += source.wrong
            call.notes += source.notes
        except ConfigError as error:
            call.wrong += error.problems
    for name, value in sorted(overrides, key=lambda option: option[0].count(".")):  # a class before its arguments
        try:
            call.config = with_option(call.config, name, value)
        except (ConfigError, ValueError) as error:
            call.wrong += getattr(error, "problems", [str(error)])
