"""The shape of the house: floors, cycles, size, names, and what an import may cost."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
import textwrap
import tokenize
from pathlib import Path

import pytest

import weft

SOURCE = Path(weft.__file__).parent
FLOORS = (
    ("types", "yamlfile", "charts", "surroundings", "prebatch", "strategies"),
    ("events",),
    ("watching",),
    ("terms",),
    ("losses", "drawing"),
    ("problem", "sharding"),
    ("batches",),
    ("data",),
    ("config", "references"),
    ("schema",),
    ("arguments",),
    ("constants",),
    ("metrics", "optimizers", "signals", "devices", "processes", "finite"),
    ("steps", "feed"),
    ("archive",),
    ("weights", "shardfiles"),
    ("checkpoint",),
    ("history", "seeding", "runs"),
    ("sameness",),
    ("resume",),
    ("saving",),
    ("loggers",),
    ("hooks",),
    ("result",),
    ("update", "evaluation"),
    ("graphs",),
    ("pure",),
    ("stepgraphs",),
    ("compiled",),
    ("phases", "sharded"),
    ("seams",),
    ("run",),
    ("launch",),
    ("trainer",),
    ("integrations",),
    ("recipe",),
    ("trials",),
    ("plots", "report", "sweeps", "demo"),
    ("cli",),
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
# Found lazily, by an import inside a function: `result.plot()` and the registry of integrations.
FOUND_LAZILY = {"plots", "report", "integrations"}
# These stand above the public names and may use them as a user does.
USERS = {"recipe", "report", "sweeps", "demo", "cli"}
NOT_CORE = {
    "integrations",
    "cli",
    "plots",
    "report",
    "sweeps",
    "demo",
    "yamlfile",
    "charts",
    "references",
    "schema",
    "arguments",
    "recipe",
    "trials",
    "surroundings",
    "graphs",
    "pure",
    "stepgraphs",
    "compiled",  # the same update once more, as a graph
    "strategies",
    "sharded",
    "shardfiles",  # problems that outgrow one GPU
}
ADDED_ROOMS = {  # what checkpoints of whole runs, several processes and graphs brought
    "resume",
    "sameness",
    "saving",
    "processes",
    "launch",
    "sharding",
    "constants",
    "prebatch",
    "drawing",
    "watching",
}
# Hooks that a user asks for; nothing of the core loads them.
OPTIONAL_HOOKS = {
    f"weft.hooks.{name}"
    for name in (
        "averaging",
        "balancing",
        "gradients",
        "parts",
        "pictures",
        "profiling",
        "sampling",
        "schedules",
        "terms",
        "timing",
    )
}


def modules() -> dict[str, Path]:
    """Path by dotted name of every module of the package, the package itself left out."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(("weft", *parts)).removesuffix(".__init__")
        if name != "weft":
            found[name] = path
    return found


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports_of(source: str, name: str, is_package: bool) -> tuple[set[str], set[str]]:
    """Modules of weft that `source` imports when it is loaded, and those that it imports inside functions."""
    known = modules()
    at_load: set[str] = set()
    lazily: set[str] = set()

    def visit(node: ast.AST, inside_function: bool) -> None:
        if is_type_checking(node):
            assert isinstance(node, ast.If)
            for child in node.orelse:
                visit(child, inside_function)
            return
        target = lazily if inside_function else at_load
        if isinstance(node, ast.Import):
            target.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = name.split(".")[: len(name.split(".")) - node.level + is_package]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            # `from weft import events` is the module events; `from weft import Trainer` is the package.
            modules_named = {f"{base}.{alias.name}" for alias in node.names} & set(known)
            target.update(modules_named if modules_named and base == "weft" else {base} | modules_named)
        inside = inside_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(source), inside_function=False)
    ours = {"weft", *known}
    return at_load & ours, lazily & ours


def imports_by_module() -> dict[str, tuple[set[str], set[str]]]:
    return {
        name: imports_of(path.read_text(encoding="utf-8"), name, path.name == "__init__.py")
        for name, path in modules().items()
    }


def upward_imports(name: str, at_load: set[str], lazily: set[str]) -> list[str]:
    """The imports of module `name` that reach its own level from above, in words."""
    own = name.split(".")[1]
    wrong = []
    for imported in sorted(at_load | lazily):
        if imported == "weft":
            if own not in USERS:
                wrong.append(f"{name} imports the package weft itself")
            continue
        other = imported.split(".")[1]
        if other == own or FLOOR_OF.get(other, 0) < FLOOR_OF.get(own, 0):  # another test names unlisted modules
            continue
        if imported not in at_load and other in FOUND_LAZILY:
            continue
        wrong.append(f"{name} imports {imported}")
    return wrong


def code_lines(path: Path) -> int:
    """The number of lines of a file that hold code: no blank lines, no comments, no docstrings."""
    source = path.read_text(encoding="utf-8")
    lines: set[int] = set()
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    with path.open("rb") as stream:
        for token in tokenize.tokenize(stream.readline):
            if token.type not in skipped and token.type != tokenize.ENCODING:
                lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def test_every_module_stands_on_a_floor() -> None:
    unlisted = {name.split(".")[1] for name in modules()} - set(FLOOR_OF)
    assert not unlisted, f"give a floor to {sorted(unlisted)}"


def test_a_module_imports_only_from_the_floors_below_it() -> None:
    wrong = [text for name, (now, later) in imports_by_module().items() for text in upward_imports(name, now, later)]
    assert not wrong, "\n".join(wrong)


def test_the_check_of_floors_can_fail() -> None:
    now, later = imports_of("from weft.loop.trainer import Trainer", "weft.data.data", is_package=False)
    assert upward_imports("weft.data.data", now, later) == ["weft.data.data imports weft.loop.trainer"]
    now, later = imports_of("from . import hooks", "weft.loggers", is_package=True)
    assert upward_imports("weft.loggers", now, later) == []  # the loggers' own folder has no `hooks`
    now, later = imports_of("def f():\n    from weft import run", "weft.data.data", is_package=False)
    assert upward_imports("weft.data.data", now, later) == ["weft.data.data imports weft.loop.run"]
    now, later = imports_of("from weft import Trainer", "weft.data.data", is_package=False)
    assert upward_imports("weft.data.data", now, later) == ["weft.data.data imports the package weft itself"]
    code = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from weft.loop.run import Run"
    now, later = imports_of(code, "weft.data.data", is_package=False)
    assert upward_imports("weft.data.data", now, later) == []


def test_there_are_no_import_cycles() -> None:
    graph = {name: now - {"weft", name} for name, (now, _) in imports_by_module().items()}
    # A package comes before its modules only if its __init__ imports them, so a plain graph of modules is enough.
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for imported in sorted(graph[name]):
                walk(imported, (*path, name))
            done.add(name)

    for name in graph:
        walk(name, ())


def test_the_core_does_not_grow_any_more() -> None:
    """The design asks for about 4,000 lines for one device. Resuming, processes and graphs have added theirs since."""
    known = {name: path for name, path in modules().items() if name.split(".")[1] not in NOT_CORE}
    core = {name: path for name, path in known.items() if name not in OPTIONAL_HOOKS}
    imported = {other for name, (at_load, _) in imports_by_module().items() if name in core for other in at_load}
    assert not imported & OPTIONAL_HOOKS
    rooms = {name.split(".")[1]: 0 for name in core}
    for name, path in core.items():
        rooms[name.split(".")[1]] += code_lines(path)
    assert sum(rooms.values()) < 6090
    assert sum(lines for room, lines in rooms.items() if room not in ADDED_ROOMS) < 4900


def test_lines_of_code_are_counted_without_comments_and_docstrings(tmp_path: Path) -> None:
    path = tmp_path / "sample.py"
    path.write_text('"""Two\nlines."""\n\n# why\nx = [\n    1,\n]\n\n\ndef f():\n    """Doc."""\n    return x  # yes\n')
    assert code_lines(path) == 5


@pytest.mark.parametrize("path", modules().values(), ids=modules().keys())
def test_files_have_at_most_500_lines_and_functions_70(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 500
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or node.lineno) - node.lineno + 1 <= 70, f"{path.name}: {node.name}"


def test_every_public_name_has_a_docstring() -> None:
    missing = []
    for name in weft.__all__:
        thing = getattr(weft, name)
        if not (inspect.isclass(thing) or inspect.isroutine(thing) or inspect.ismodule(thing)):
            continue
        if not thing.__doc__:
            missing.append(name)
        if inspect.isclass(thing) and thing.__module__.startswith("weft"):
            missing += [
                f"{name}.{member}"
                for member, value in vars(thing).items()
                if inspect.isfunction(value)
                and not member.startswith("_")
                and not inspect.getdoc(getattr(thing, member))
            ]
    assert not missing, f"without a docstring: {missing}"


def test_the_package_is_typed() -> None:
    assert (SOURCE / "py.typed").is_file()


def test_all_modules_can_be_imported() -> None:
    for name in modules():
        importlib.import_module(name)


def test_importing_weft_loads_neither_fabric_nor_the_compiler() -> None:
    heavy = ("lightning", "lightning_fabric", "torch._dynamo", "torch._inductor", "matplotlib", "neuromancer", "pandas")
    code = f"import sys, weft; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_loop_of_fit_fits_one_screen() -> None:
    from weft.loop.trainer import Trainer

    tree = ast.parse(textwrap.dedent(inspect.getsource(Trainer.fit)))
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    body = function.body[1:] if ast.get_docstring(function) else function.body
    assert (function.end_lineno or 0) - body[0].lineno + 1 <= 50
    loops = [node for node in ast.walk(function) if isinstance(node, ast.For | ast.While)]
    assert loops, "the loop is no longer in Trainer.fit"


def uses_of_backward(source: str) -> list[str]:
    """Every `x.backward` and `x.manual_backward`, but where x is one of ours that hands it on to the update."""
    ours = ("self", "run", "_running", "trainer", "update")
    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and node.attr in ("backward", "manual_backward")
        and ast.unparse(node.value).split(".")[-1] not in ours
    ]


def test_only_the_update_calls_backward() -> None:
    found = {name: uses_of_backward(path.read_text(encoding="utf-8")) for name, path in modules().items()}
    assert {name: uses for name, uses in found.items() if uses and name != "weft.step.update"} == {}
    assert found["weft.step.update"]


def test_the_check_of_backward_can_fail() -> None:
    assert uses_of_backward("loss.backward()") == ["loss.backward"]
    assert uses_of_backward("call = fabric.backward") == ["fabric.backward"]
    assert uses_of_backward("self.run.backward(loss)") == []
