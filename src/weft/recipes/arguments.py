"""The arguments of a function or class as options: what they are called, what they mean, and whether a value fits.

    signature(data_setup).parameters      # [Parameter(name="nsim", hint=int, default=5000)]
    converted("data", "data_setup", signature(data_setup), {"nsim": "many"}, wrong=[], fit=made)
    # wrong: ["data.nsim='many': expected a whole number"]

Types are read from annotations and checked by jsonargparse; a parameter without one takes anything.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from weft.config import matches
from weft.recipes.schema import Text, typed
from weft.types import suggest
from weft.words.kinds import describe, expected

NO_DEFAULT = inspect.Parameter.empty


@dataclass
class Parameter:
    """One parameter that may be given by name."""

    name: str
    hint: Any
    default: Any
    help: str = ""

    @property
    def type_name(self) -> str:
        """Its type in words, "" if it is not annotated."""
        return "" if self.hint is Any else describe(self.hint)


@dataclass
class Signature:
    """The parameters that may be given by name, and whether further ones are taken."""

    parameters: list[Parameter]
    takes_more: bool


UNKNOWN = Signature([], takes_more=True)


def signature(target: Callable[..., Any], skip: int = 0) -> Signature:
    """What a function or class takes, without its first `skip` parameters."""
    try:
        listed = list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):  # a builtin without a signature
        return UNKNOWN
    hints: dict[str, Any] = {}
    with contextlib.suppress(Exception):  # annotations may name what is only there for type checkers
        hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = [Parameter(p.name, hints.get(p.name, Any), p.default) for p in listed[skip:] if p.kind in kinds]
    return Signature(found, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in listed))


def fields(cls: type) -> list[Parameter]:
    """The fields of a dataclass as options, each with the text that stands below it in the source."""
    from weft.words.editors import sentences

    docs = sentences(cls)
    return [Parameter(p.name, p.hint, p.default, docs.get(p.name, "")) for p in signature(cls).parameters]


class Misfit(Exception):
    """A value that is not of the type asked for."""


def converted(
    key: str, name: str, takes: Signature, given: Mapping[str, Any], wrong: list[str], fit: Callable[[Any, Any], Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments as `fit` (`made` or `looked_at`) returns them, and as plain data. What is wrong goes into `wrong`.

    `key` is the section's name ("data"), `name` that of the function.
    """
    by_name = {p.name: p for p in takes.parameters}
    values, plain = {}, {}
    for argument, value in given.items():
        if argument not in by_name and not takes.takes_more:
            hint = suggest(str(argument), by_name) or (f"; it has {', '.join(by_name)}" if by_name else "; it has none")
            wrong.append(f"{key}.{argument}={typed(value, Any)!r}: {name} has no such parameter{hint}")
            continue
        hint = by_name[argument].hint if argument in by_name else Any
        plain[argument] = read = typed(value, hint)
        try:
            values[argument] = fit(read, hint)
        except Misfit:
            wrong.append(f"{key}.{argument}={read!r}: {expected(hint, read)}")
    for parameter in takes.parameters:
        if parameter.default is NO_DEFAULT and parameter.name not in given:
            wrong.append(f"{key}.{parameter.name}: missing; {name} needs it ({parameter.type_name or 'any value'})")
    return values, plain


def looked_at(value: Any, hint: Any) -> Any:
    """`value`, if it is of a plain type. Nothing is made of it, and nothing it names is imported."""
    if not matches(typed(Text(value), hint) if isinstance(value, str) else value, hint):
        raise Misfit
    return value


def made(value: Any, hint: Any) -> Any:
    """`value` as the type `hint` wants it: where an object is asked for, {class_path, init_args} becomes one."""
    if hint is Any or hint is object:
        return value
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False, add_help=False)
    try:
        parser.add_argument("--value", type=hint)
    except (ValueError, TypeError):  # a type that it does not know: anything goes
        return value
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return parser.instantiate(parser.parse_object({"value": value})).value
    except (ArgumentError, TypeError, ValueError, KeyError, ImportError) as error:
        raise Misfit from error
