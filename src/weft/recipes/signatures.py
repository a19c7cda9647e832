"""What functions and classes take, read from their source: nothing named in a config is imported to look at it.

    read("pde.py:make_problem").parameters      # [Parameter(name="width", hint=int, default=8, help="hidden neurons")]

Importing a file runs it, which a look at a config that somebody sent must not do. What the source alone does not tell
(decorated functions, objects, `import *`) counts as unknown, and any argument is then taken.
"""

from __future__ import annotations

import ast
import contextlib
from pathlib import Path
from typing import Any, Literal, Optional, Union

from weft.recipes import class_paths
from weft.recipes.arguments import NO_DEFAULT, UNKNOWN, Parameter, Signature

_TYPES: dict[str, Any] = {t.__name__: t for t in (int, float, str, bool, list, dict, object)}
_TYPES |= {"Optional": Optional, "Union": Union, "Literal": Literal, "List": list, "Dict": dict}


def read(reference: str, section: str = "", skip: int = 0) -> Signature:
    """What the thing that `reference` names takes, without its first `skip` parameters.

    Raises AttributeError for a name that is surely not there, with the closest that is.
    """
    places, name = class_paths.places_of(reference, section)
    known: set[str] | None = set()
    for place in places:
        beside = [str(Path(place).resolve().parent)] if place.endswith(".py") else []
        path = Path(place) if beside else class_paths.source_of(place)
        if found := _find(path, name, beside):
            return _signature(*found, beside, skip)
        names = class_paths.names_at_top(class_paths.parsed(path)) if path else None
        known = known | names if known is not None and names is not None else None
    if known is not None and name.split(".")[0] not in known:
        raise class_paths.missing(places[0], name, known)
    return UNKNOWN


_Definition = tuple[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, Path]


def _find(path: Path | None, name: str, beside: list[str], imports: int = 8) -> _Definition | None:
    """The definition of `name` in a file, and the file it stands in, through at most so many imports."""
    if path is None or imports == 0:
        return None
    for node in class_paths.statements(class_paths.parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == name:
            return node, path
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    return _find(_imported_file(path, node, beside), alias.name, beside, imports - 1)
    return None


def _imported_file(path: Path, node: ast.ImportFrom, beside: list[str]) -> Path | None:
    if not node.level:
        return class_paths.source_of(node.module or "", beside)
    base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


def _signature(definition: Any, path: Path, beside: list[str], skip: int) -> Signature:
    docs = _documented(definition)
    if isinstance(definition, ast.ClassDef):
        methods = {n.name: n for n in definition.body if isinstance(n, ast.FunctionDef)}
        if definition.decorator_list or definition.keywords or "__new__" in methods or len(definition.bases) > 1:
            return UNKNOWN
        if "__init__" not in methods:
            base = _find(path, ast.unparse(definition.bases[0]), beside) if definition.bases else None
            return _signature(*base, beside, skip) if base and isinstance(base[0], ast.ClassDef) else UNKNOWN
        definition, skip = methods["__init__"], skip + 1
        docs |= _documented(definition)
    if definition.decorator_list:
        return UNKNOWN
    given = definition.args
    positional = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(positional) - len(given.defaults)) + given.defaults
    named = list(zip(positional, defaults, strict=True))[max(skip, len(given.posonlyargs)) :]
    named += zip(given.kwonlyargs, given.kw_defaults, strict=True)
    found = [Parameter(a.arg, _hint(a.annotation), _default(d), docs.get(a.arg, "")) for a, d in named]
    return Signature(found, takes_more=given.kwarg is not None)


def _documented(definition: Any) -> dict[str, str]:
    from docstring_parser import parse

    with contextlib.suppress(Exception):  # a docstring may have any form
        listed = [p for p in parse(ast.get_docstring(definition) or "").params if p.description]
        return {p.arg_name: str(p.description).split("\n\n")[0].replace("\n", " ") for p in listed}
    return {}


def _default(node: ast.expr | None) -> Any:
    if node is None:
        return NO_DEFAULT
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def _hint(node: ast.expr | None) -> Any:
    """The type that an annotation names, if it is made of plain ones; Any for all others."""
    match node:
        case ast.Constant(value=None):
            return type(None)
        case ast.Constant(value=str(text)):
            with contextlib.suppress(SyntaxError):
                return _hint(ast.parse(text, mode="eval").body)
        case ast.Name(id=name):
            return _TYPES.get(name, Any)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _of(Union, [_hint(left), _hint(right)])
        case ast.Subscript(value=ast.Name(id="Literal"), slice=choices):
            with contextlib.suppress(ValueError):
                found = ast.literal_eval(choices)
                return Literal[found]
        case ast.Subscript(value=ast.Name(id=name), slice=inner) if name in _TYPES:
            return _of(_TYPES[name], [_hint(n) for n in (inner.elts if isinstance(inner, ast.Tuple) else [inner])])
    return Any


def _of(kind: Any, inner: list[Any]) -> Any:
    if Any in inner and kind in (Union, Optional):
        return Any
    return kind[inner[0] if len(inner) == 1 else tuple(inner)]
