"""Things named in text: `pde.py:make_problem`, `package.module:function`, `torch.optim.AdamW`.

    complaint("pde.py:make_probem")     # "pde.py has no 'make_probem'; did you mean 'make_problem'?"
    load("pde.py:make_problem")         # the function; its file is imported

`complaint` looks without importing anything, so that a slip of the pen costs no start of torch.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import os
import sys
import zlib
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from weft.types import suggest

HOMES = {
    "optimizer": ("torch.optim",),
    "scheduler": ("torch.optim.lr_scheduler",),
    "hooks": ("weft.hooks",),
    "loggers": ("weft.loggers", "lightning.pytorch.loggers"),
    "strategy": ("lightning.fabric.strategies",),
}
"""Where a bare name is looked for, by section: `optimizer: AdamW` is torch.optim.AdamW."""


def split(reference: str, section: str = "") -> tuple[str, str]:
    """(The module or the path of a .py file, the name in it). Raises ValueError for text that names nothing."""
    place, colon, name = reference.rpartition(":")
    if not colon:
        if reference.endswith(".py"):
            raise ValueError(f"names a file; expected '{reference}:function'")
        place, _, name = reference.rpartition(".")
        if not place and section in HOMES:
            return HOMES[section][0], name
    if not place or not all(part.isidentifier() for part in name.split(".")):
        raise ValueError("expected 'module:function', 'file.py:function' or a class path like 'package.module.Class'")
    return place, name


def complaint(reference: str, section: str = "") -> str:
    """Why `reference` cannot be loaded, as far as can be seen without importing it; "" if nothing is wrong."""
    try:
        place, name = split(reference, section)
    except ValueError as error:
        return str(error)
    if not place.endswith(".py"):
        return _module_complaint(place)
    path = Path(place)
    if not path.is_file():
        near = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        return f"there is no file {place}{suggest(path.name, near)}"
    try:
        tree = parsed(path)
    except (SyntaxError, ValueError) as error:
        return f"{place}, line {getattr(error, 'lineno', '?')}: {getattr(error, 'msg', error)}"
    names = names_at_top(tree)
    first = name.split(".")[0]
    if names is not None and first not in names:
        return str(missing(place, first, names))
    return ""


def _module_complaint(place: str) -> str:
    top = place.split(".")[0]
    return "" if top in sys.modules or _spec(top) is not None else f"there is no module {top!r}"


def places_of(reference: str, section: str = "") -> tuple[tuple[str, ...], str]:
    """(The modules, or the .py file, in which a name is looked for; the name). Raises ValueError as `split` does."""
    place, name = split(reference, section)
    is_bare = section in HOMES and ":" not in reference and "." not in reference
    return (HOMES[section] if is_bare else (place,)), name


def _spec(top: str, beside: Sequence[str] = ()) -> ModuleSpec | None:
    """Where a package or module is, without importing it; the folders `beside` and the working folder go first."""
    with contextlib.suppress(ImportError, ValueError):
        return PathFinder.find_spec(top, [*beside, os.getcwd(), *sys.path]) or importlib.util.find_spec(top)
    return None


def source_of(module: str, beside: Sequence[str] = ()) -> Path | None:
    """The .py file of a module, found without importing it or the packages it is in; None where there is none."""
    top, *rest = module.split(".")
    spec = _spec(top, beside)
    for name in rest:
        folders = spec.submodule_search_locations if spec is not None else None
        spec = PathFinder.find_spec(name, list(folders)) if folders else None
    path = Path(spec.origin or "") if spec is not None else Path()
    return path if path.suffix == ".py" and path.is_file() else None


def _look_in_working_folder() -> None:
    """`module:function` also finds a module beside you, as `python -m` does."""
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file. Raises SyntaxError or ValueError where it is no Python."""
    return _parsed(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _parsed(path: Path, changed: int) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def statements(tree: ast.Module) -> list[ast.stmt]:
    """What a module does when it is imported, also under `if`, `try` and `with`; the last statement first."""
    found: list[ast.stmt] = []
    nodes = list(tree.body)
    while nodes:
        node = nodes.pop()
        found.append(node)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            nodes += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
            nodes += [s for h in ast.iter_child_nodes(node) if isinstance(h, ast.ExceptHandler) for s in h.body]
    return found


def names_at_top(tree: ast.Module) -> set[str] | None:
    """What a module defines, read from its text; None where that cannot be known (`import *`, `__getattr__`)."""
    names: set[str] = set()
    for node in statements(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        else:
            names |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return None if names & {"*", "__getattr__"} else names


def load(reference: str, section: str = "") -> Any:
    """The object that `reference` names; its module is imported.

    Raises ValueError for text that names nothing and AttributeError for a name that is not there, with the closest
    that is. What the module raises while it is imported comes through as it is.
    """
    places, name = places_of(reference, section)
    modules = []
    for place in places:
        modules.append(_load_file(Path(place)) if place.endswith(".py") else _load_module(place))
        found: Any = modules[-1]
        for part in name.split("."):
            found = getattr(found, part, _MISSING)
            if found is _MISSING:
                break
        if found is not _MISSING:
            return found
    raise missing(places[0], name, [n for module in modules for n in dir(module)])


def missing(place: str, name: str, names: Iterable[str]) -> AttributeError:
    """The error that says that a module or file has no such name, with the closest of `names`."""
    return AttributeError(f"{place} has no {name!r}{suggest(name, [n for n in names if not n.startswith('_')])}")


_MISSING = object()


def _load_module(place: str) -> ModuleType:
    _look_in_working_folder()
    return importlib.import_module(place)


def _load_file(path: Path) -> ModuleType:
    """The module of a .py file, imported once, as `import` with its folder on the path would do."""
    path = path.resolve()
    folder = str(path.parent)
    if folder not in sys.path:  # so that it can import its neighbours, as a script can
        sys.path.insert(0, folder)
    name = path.stem
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    found = importlib.util.find_spec(name) if known is None and name.isidentifier() else None
    if found is not None and found.origin == str(path):
        return importlib.import_module(name)
    name = f"{name}_{zlib.crc32(folder.encode()):08x}"  # another module has this name
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
