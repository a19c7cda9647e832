"""YAML as people expect it: `1e-3` is a number, `no` and `12:30` are text, and a key that stands twice is an error.

    load("lr: 1e-3")        # {"lr": 0.001}
    dump({"lr": 1e-3})      # "lr: 0.001\n"; load(dump(x)) == x for plain data

These are the rules of YAML 1.2's core schema; PyYAML alone follows 1.1.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1 << 20
MAX_DEPTH = 64
MAX_VALUES = 100_000
"""Of a file, so that one that somebody else wrote is read in bounded time."""

_PATTERNS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
}


class _Loader(yaml.SafeLoader):
    """Reads."""


class _Dumper(yaml.SafeDumper):
    """Writes."""

    def ignore_aliases(self, data: Any) -> bool:
        return True  # what is used twice is written twice


_Loader.yaml_implicit_resolvers, _Dumper.yaml_implicit_resolvers = {}, {}  # none of YAML 1.1's
for _tag, (_pattern, _first) in _PATTERNS.items():
    for _class in (_Loader, _Dumper):  # a dumper quotes what its patterns would read as something else
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), list(_first))


def _int(loader: yaml.SafeLoader, node: Any) -> int:
    return int(node.value, 16 if node.value.startswith("0x") else 10)


def _float(loader: yaml.SafeLoader, node: Any) -> float:
    return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _mapping(loader: yaml.SafeLoader, node: Any) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    seen: set[Any] = set()
    for key, (key_node, _) in zip(keys, node.value, strict=True):
        if not isinstance(key, Hashable):
            raise yaml.constructor.ConstructorError(None, None, f"{key} cannot be a key", node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
        seen.add(key)
    return {k: loader.construct_object(v, deep=True) for k, (_, v) in zip(keys, node.value, strict=True)}


_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def load(text: str, name: str = "the text") -> Any:
    """What a YAML text says. Raises ValueError naming `name`, the line and what is wrong there."""
    try:
        found = yaml.load(text, _Loader)  # a SafeLoader
        if depth_of(found) > MAX_DEPTH:
            raise yaml.YAMLError(f"nested deeper than {MAX_DEPTH}")
        if "*" in text and _size_of(found, {}) > MAX_VALUES:
            raise yaml.YAMLError(f"its aliases stand for more than {MAX_VALUES} values")
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{name}{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
        raise ValueError(f"{name}: not valid YAML: {error}") from None
    return found


def depth_of(data: Any) -> int:
    """How deep lists and dicts are nested in `data`, up to a little more than MAX_DEPTH (it may contain itself)."""
    depth, level = 0, [data]
    while level and depth <= MAX_DEPTH:
        inner = {id(item): item for item in level if isinstance(item, list | dict)}  # what is used twice counts once
        level = [v for item in inner.values() for v in (item.values() if isinstance(item, dict) else item)]
        depth += bool(inner)
    return depth


def _size_of(data: Any, known: dict[int, int]) -> int:
    """How many values `data` has where each alias stands for all of what it names."""
    if not isinstance(data, list | dict):
        return 1
    if id(data) not in known:
        items = data.values() if isinstance(data, dict) else data
        known[id(data)] = 1 + sum(_size_of(item, known) for item in items)
    return known[id(data)]


def only_files(path: str, flags: int) -> int:
    """An opener (`open(path, opener=only_files)`) for files of strangers: to read a pipe or a device may never end.

    Raises ValueError for these.
    """
    try:
        number = os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ELOOP):  # a socket, a link to itself
            raise ValueError(f"{path}: no regular file") from error
        raise
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise ValueError(f"{path}: no regular file")
    return number


def load_file(path: str | Path) -> Any:
    """What a YAML file says. Raises FileNotFoundError or ValueError naming the file."""
    try:
        with open(path, "rb", opener=only_files) as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"{path}: longer than {MAX_BYTES >> 10} KiB")
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file") from None
    return load(text, str(path))


def dump(data: Any) -> str:
    """`data` (dicts, lists, strings, numbers, None) as YAML, keys in their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
