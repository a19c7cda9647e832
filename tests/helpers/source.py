"""What the source says about itself: who imports whom, how long things are, what a process has loaded."""

from __future__ import annotations

import ast
import io
import json
import os
import subprocess
import sys
import tokenize
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import weft

SOURCE = Path(weft.__file__).parent
REPO = Path(__file__).resolve().parents[2]
_EMPTY = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def modules() -> dict[str, Path]:
    """Path by dotted name of every module of the package, the package itself left out."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    del found["weft"]
    return found


def room_of(module: str) -> str:
    """The folder or file directly in the package that holds a module; "" for the package itself."""
    return module.partition(".")[2].partition(".")[0]


def text_of(module: str) -> str:
    """The source of a module."""
    return modules()[module].read_text(encoding="utf-8")


def imports_of(source: str, module: str, is_package: bool = False) -> set[str]:
    """Modules of weft that `source` imports anywhere: at its top, in functions, and under TYPE_CHECKING."""
    found = set()
    ours = {"weft", *modules()}
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:  # `from weft.devices import seeding` is the module, not its room
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in ours else base)
    return (found & ours) - {module}


@cache
def imports_by_module() -> dict[str, set[str]]:
    """What each module imports; those that only hand on names by a table import nothing."""
    return {
        name: imports_of(path.read_text(encoding="utf-8"), name, path.name == "__init__.py")
        for name, path in modules().items()
    }


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of two or more names that all reach each other."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, ahead = set[str](), list(graph[start])
        while ahead:
            name = ahead.pop()
            if name not in seen:
                seen.add(name)
                ahead.extend(graph.get(name, ()))
        reached[start] = seen
    groups = {frozenset(b for b in reached[a] if a in reached.get(b, ())) for a in graph}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def is_text(node: ast.stmt) -> bool:
    """Whether a statement is a string that stands alone: documentation."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def code_lines(source: str) -> int:
    """Lines that hold code: no blank lines, no comments, no strings that stand alone."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _EMPTY:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt) and is_text(node):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def functions_of(source: str) -> Iterator[Function]:
    """Every function and method, inner ones too."""
    return (node for node in ast.walk(ast.parse(source)) if isinstance(node, Function))


def body_lines(function: Function) -> int:
    """From the first statement after the docstring to the last line."""
    first = function.body[1] if is_text(function.body[0]) and len(function.body) > 1 else function.body[0]
    return (function.end_lineno or first.lineno) - first.lineno + 1


def told_by(code: str, *arguments: str) -> list[str]:
    """The list that a new process prints as JSON in its last line."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE.parent), str(REPO)])}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
