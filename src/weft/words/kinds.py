"""What a type asks for, in words. Loaded where a value does not fit, and by the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from weft.types import alternatives, suggest
from weft.words.foreign import VALUES

_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "nothing (null)"}
_WORDS |= {dict: "a dict", Mapping: "a dict", list: "a list", tuple: "a list", Sequence: "a list"}


def expected(kind: Any, found: Any) -> str:
    """What the type `kind` asks for, in words, with the closest of its choices to the text `found`."""
    choices = [c for a in alternatives(kind) if get_origin(a) is Literal for c in get_args(a) if isinstance(c, str)]
    if not isinstance(found, str) or not choices:
        return f"expected {describe(kind)}"
    theirs = VALUES.get(found.lower())
    return f"expected {describe(kind)}{suggest(found if theirs not in choices else theirs, choices)}"


def describe(kind: Any) -> str:
    """The type `kind` in words: "a whole number or nothing (null)"."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return describe(args[0])
    if origin is Literal:
        return " or ".join(repr(c) for c in args)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(describe(a) for a in args))
    if origin in (list, tuple, Sequence):
        return f"a list (each {describe(args[0])})"
    name = origin or kind
    return _WORDS.get(name, getattr(name, "__name__", str(kind)))
