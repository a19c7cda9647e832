"""The parameters of a function or class as options: what they are called, what they mean, and whether a value fits.

    parameters(data_setup)                                     # [Parameter(name="nsim", hint=int, default=5000, ...)]
    converted("data", data_setup, {"nsim": "many"}, wrong=[])     # wrong: ["data.nsim='many': expected a whole number"]

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

from weft.config import describe
from weft.recipes.schema import Text
from weft.types import suggest
from weft.yamlfile import load as parse_yaml

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


def parameters(target: Callable[..., Any], skip: int = 0) -> list[Parameter]:
    """The parameters of a function or class that may be given by name, without the first `skip`."""
    return _inspected(target, skip)[0]


def _inspected(target: Callable[..., Any], skip: int) -> tuple[list[Parameter], bool]:
    """The parameters, and whether further ones are taken (**kwargs, or nothing is known)."""
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # a builtin without a signature
        return [], True
    hints: dict[str, Any] = {}
    with contextlib.suppress(Exception):  # annotations may name what is only there for type checkers
        hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    docs = _documented(target)
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = [
        Parameter(p.name, hints.get(p.name, Any), p.default, docs.get(p.name, ""))
        for i, p in enumerate(signature.parameters.values())
        if i >= skip and p.kind in kinds
    ]
    return found, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())


def _documented(target: Any) -> dict[str, str]:
    from docstring_parser import parse

    texts = [inspect.getdoc(target), inspect.getdoc(target.__init__) if inspect.isclass(target) else None]
    docs: dict[str, str] = {}
    for text in texts:
        with contextlib.suppress(Exception):  # a docstring may have any form
            docs |= {
                p.arg_name: p.description.split("\n\n")[0].replace("\n", " ")
                for p in parse(text or "").params
                if p.description
            }
    return docs


def fields(cls: type) -> list[Parameter]:
    """The fields of a dataclass as options, each with the text that stands below it in the source."""
    from docstring_parser import parse_from_object

    docs = {p.arg_name: " ".join((p.description or "").split()) for p in parse_from_object(cls).params}
    return [Parameter(p.name, p.hint, p.default, docs.get(p.name, "")) for p in parameters(cls)]


def converted(
    key: str, target: Callable[..., Any], given: Mapping[str, Any], wrong: list[str], skip: int = 0
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments as `target` takes them, and the same as plain data for a file. What does not fit goes into `wrong`.

    `key` is the section's name ("data"). The first `skip` parameters are given by weft. Values that name a class
    ({class_path, init_args}) become objects of it where the annotation asks for one.
    """
    known, takes_more = _inspected(target, skip)
    by_name = {p.name: p for p in known}
    name = getattr(target, "__qualname__", str(target))
    values, plain = {}, {}
    for argument, value in given.items():
        parameter = by_name.get(argument)
        if parameter is None and not takes_more:
            hint = suggest(str(argument), by_name) or (f"; it has {', '.join(by_name)}" if by_name else "; it has none")
            shown = _parsed(value) if isinstance(value, Text) else value
            wrong.append(f"{key}.{argument}={shown!r}: {name} has no such parameter{hint}")
            continue
        hint = parameter.hint if parameter is not None else Any
        plain[argument] = _plain(value, hint)
        try:
            values[argument] = _fit(value, hint)
        except _Misfit:
            shown = str(value) if isinstance(value, Text) else value
            choices = [c for c in typing.get_args(hint) if isinstance(c, str)]
            near = suggest(shown, choices) if isinstance(shown, str) else ""
            wrong.append(f"{key}.{argument}={shown!r}: expected {describe(hint)}{near}")
    for parameter in known:
        if parameter.default is NO_DEFAULT and parameter.name not in given:
            wrong.append(f"{key}.{parameter.name}: missing; {name} needs it ({parameter.type_name or 'any value'})")
    return values, plain


class _Misfit(Exception):
    pass


def _plain(value: Any, hint: Any) -> Any:
    """What stands in a file for a value: typed text as number, list, ... unless the parameter is a text."""
    if not isinstance(value, Text):
        return value
    return str(value) if hint is str else _parsed(value)


def _parsed(text: str) -> Any:
    try:
        return parse_yaml(text)
    except ValueError:
        return str(text)


def _fit(value: Any, hint: Any) -> Any:
    """`value` as the type `hint` wants it. Raises _Misfit if it cannot be one."""
    if hint is Any or hint is object:
        return _parsed(value) if isinstance(value, Text) else value
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False, add_help=False)
    try:
        parser.add_argument("--value", type=hint)
    except (ValueError, TypeError):  # a type that it does not know: anything goes
        return _parsed(value) if isinstance(value, Text) else value
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            parsed = (
                parser.parse_args([f"--value={value}"])
                if isinstance(value, Text)
                else parser.parse_object({"value": value})
            )
            return parser.instantiate(parsed).value
    except (ArgumentError, TypeError, ValueError, KeyError, ImportError) as error:
        raise _Misfit from error
