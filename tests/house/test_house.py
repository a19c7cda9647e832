"""The shape of the house: who may know whom, what loads what, how long things are, and what exists only once."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import weft
from tests.helpers.source import (
    REPO,
    SOURCE,
    body_lines,
    circles,
    code_lines,
    functions_of,
    imports_by_module,
    imports_of,
    modules,
    room_of,
    told_by,
)

WORDS = {"types", "config", "events", "yamlfile", "demo", "places", "referents", "__main__"}
WINGS = {"compile", "sharded", "hooks", "recipes", "sweeps", "slurm", "cli", "plots", "integrations", "optim"}
ROOMS = {"words", "problem", "data", "devices", "checkpoint", "step", "loop", "loggers", "records"} | WINGS

# What a plain fit loads, in lines of code, and with checkpoint=True. The goals are 4,400 and 5,300. A plain fit was at
# 4,451 when the rooms were new; since then what is trained is found and told (places, step/trained: 320), rows paired
# with rows (problem/pairs: 70), options without effect (loop/remarks: 60), and what a batch counts for and metrics of
# all rows (150), keys of parts, problems over (X, y), words of others, runs refused or without data (120);
# then signals to groups of processes (devices/signals, loop/leaving: 130). With a folder also its owner
# (records/lease: 210), files that others wrote (records/foreign and its readers: 110), the sealed writer (30), what was
# trained (50). Optimizers that train at other weights than they evaluate, and phases that end by themselves (20). Told
# since: late parameters, gradients that a step takes and loops of one's own (100), buffers beside what only an
# optimizer holds (60), terms that pick rows (70), scripts of several fits that are run again (30); less the tools of
# an update of one's own and the joining of processes, which are loaded when they are used (120), and less
# constraints, barriers, rollouts, schedules, generators, several optimizers, GPUs' doubts, launchers, SLURM's queue,
# weights of terms and evaluations without a fit, which are loaded where they are met (690).
PLAIN_FIT, FIT_WITH_CHECKPOINTS = 4875, 7275
TOUR = ("loop/trainer.py", "loop/run.py", "step/update.py", "step/forward.py", "problem/problem.py")

# ---- who may know whom


def knows(room: str, unknown: Iterable[str], graph: dict[str, set[str]] | None = None) -> list[str]:
    """Imports by which `room` knows one of the rooms or modules `unknown`, in words."""
    names = tuple(f"weft.{name}" for name in unknown)
    return [
        f"{module} imports {other}"
        for module, imported in (imports_by_module() if graph is None else graph).items()
        if module == f"weft.{room}" or module.startswith(f"weft.{room}.")
        for other in sorted(imported)
        if other in names or other.startswith(tuple(f"{name}." for name in names))
    ]


RULES = {
    "a step knows no loop": ("step", {"loop"}),
    "the state of a run knows no run": ("step.state", {"loop"}),
    "a problem knows no run": ("problem", {"step", "loop"}),
    "data knows no run": ("data", {"step", "loop"}),
    "devices know no run": ("devices", {"step", "loop"}),
    "checkpoints know no run": ("checkpoint", {"step", "loop"}),
    "a run knows its trainer by a protocol": ("loop.run", {"loop.trainer"}),
    "services of the loop know no trainer": ("loop", {"loop.trainer"}),
    "the loop knows no integration": ("loop", {"integrations"}),
    "a step knows no integration": ("step", {"integrations"}),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_room_knows_nothing_of_what_stands_above_it(rule: str) -> None:
    room, unknown = RULES[rule]
    assert not (found := knows(room, unknown)), f"{rule}: {found}"


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("step.forward", "def f():\n    from weft.loop.run import Run"),
        ("step.state", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from weft.loop.run import Run"),
        ("problem.nodes", "from weft.step.state import RunState"),
        ("data.data", "from ..step import state"),
        ("devices.fabric", "import weft.loop.run"),
        ("checkpoint.archive", "from weft.step import state"),
        ("loop.run", "from weft.loop.trainer import Trainer"),
        ("loop.resume", "from .trainer import Trainer"),
        ("loop.trainer", "from weft.integrations.lightning import run"),
        ("step.update", "import weft.integrations"),
    ],
)
def test_a_room_that_knows_what_stands_above_it_is_found_out(module: str, code: str) -> None:
    graph = {f"weft.{module}": imports_of(code, f"weft.{module}")}
    assert any(knows(room, unknown, graph) for room, unknown in RULES.values())
    assert not any(knows(room, unknown, {f"weft.{module}": {"weft.events"}}) for room, unknown in RULES.values())


def test_no_module_is_in_a_circle_of_imports() -> None:
    """Imports under TYPE_CHECKING and in functions count: they are what a reader must know."""
    assert circles({name: found - {"weft"} for name, found in imports_by_module().items()}) == []


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []


def test_every_module_is_in_a_room_or_is_a_word() -> None:
    assert {room_of(name) for name in modules()} == ROOMS | WORDS
    assert len(list(SOURCE.glob("*.py"))) <= 9


def test_every_room_says_in_a_line_what_it_is_for() -> None:
    for folder in (path for path in SOURCE.rglob("*") if path.is_dir() and path.name != "__pycache__"):
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder


def only_hands_on(source: str) -> bool:
    """Whether a module holds nothing but imports and texts."""
    return all(
        isinstance(node, ast.Import | ast.ImportFrom)
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__")
        for node in ast.parse(source).body
    )


def test_a_file_that_only_hands_names_on_is_no_room() -> None:
    assert only_hands_on('"""Text."""\nfrom weft.events import Hook\n__all__ = ["Hook"]')
    assert not only_hands_on("from weft.events import Hook\nx = Hook()")
    faces = [name for name, path in modules().items() if path.name != "__init__.py" and only_hands_on(path.read_text())]
    assert faces == []


def imports_by_name(source: str) -> int:
    return sum(
        isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__")
        for node in ast.walk(ast.parse(source))
    )


def test_modules_are_imported_by_name_only_from_tables_and_configs() -> None:
    assert imports_by_name("import importlib\nimportlib.import_module('a')\n__import__('b')") == 2
    found = {n for n, path in modules().items() if path.name != "__init__.py" and imports_by_name(path.read_text())}
    assert {n for n in found if room_of(n) not in ("recipes", "cli")} <= {
        "weft.loop.adapters",
        # Lightning goes by two package names; which one is meant is known when a module is met.
        "weft.integrations.lightning.names",
        "weft.integrations.lightning.states",
    }


# ---- what loads what

FIT = """
import json, os, sys, tempfile, torch, weft
os.chdir(tempfile.mkdtemp())
p = weft.Problem([weft.Node(torch.nn.Linear(2, 1), ["p"], ["x"])], [weft.objective(lambda x: x**2, name="f")])
data = weft.DictDataset({"p": torch.rand(8, 2)})
weft.Trainer(epochs=2, patience=5, progress=False, **json.loads(sys.argv[1])).fit(p, data, data)
files = [m.__file__ for n, m in sys.modules.items() if n.split(".")[0] == "weft" and getattr(m, "__file__", None)]
print(json.dumps(files))
"""


def size_of(files: Iterable[str]) -> int:
    assert all(SOURCE in Path(file).parents for file in files)
    return sum(code_lines(Path(file).read_text(encoding="utf-8")) for file in files)


def test_a_plain_fit_loads_no_wing_and_no_more_than_its_lines() -> None:
    files = told_by(FIT, "{}")
    rooms = {Path(file).relative_to(SOURCE).parts[0] for file in files}
    assert "step" in rooms and not rooms & WINGS
    assert size_of(files) <= PLAIN_FIT


def test_a_fit_with_checkpoints_loads_no_more_than_its_lines() -> None:
    files = told_by(FIT, '{"checkpoint": true}')
    assert any("checkpoint/folder" in file for file in files)  # more than the plain one
    assert size_of(files) <= FIT_WITH_CHECKPOINTS


def test_lines_of_code_are_counted_without_comments_and_docstrings() -> None:
    code = '"""Two\nlines."""\n\n# why\nx = [\n    1,\n]\n\n\ndef f():\n    """Doc."""\n    return x  # yes\n'
    assert code_lines(code) == 5


# Later ones may use earlier ones; nothing below them uses any when it loads.
ORDER = ("optim", "hooks", "compile", "sharded", "plots", "integrations", "recipes", "sweeps", "slurm", "cli")
WITHOUT = """
import importlib, json, os, sys
import torch, lightning.fabric

class Refuse:
    def __init__(self, wing): self.wing = wing
    def find_spec(self, name, path=None, target=None):
        if name == self.wing or name.startswith(self.wing + "."):
            raise ModuleNotFoundError(f"{name} was deleted")

broken = []
for wing, names in json.loads(sys.argv[1]).items():
    reader, writer = os.pipe()
    if not os.fork():
        sys.meta_path.insert(0, Refuse(wing))
        failed = []
        for name in names:
            try:
                importlib.import_module(name)
            except ModuleNotFoundError as error:
                if "was deleted" in str(error):
                    failed.append(f"{name}: {error}")
        os.write(writer, json.dumps(failed).encode()[:60000])
        os._exit(0)
    os.close(writer)
    broken += json.loads(os.fdopen(reader).read())
print(json.dumps(broken))
"""


def without(wings: Iterable[str]) -> dict[str, list[str]]:
    """For each wing the modules that must be importable without it: those of rooms and of wings below."""
    names = [name for name in modules() if room_of(name) not in WORDS]
    return {
        f"weft.{wing}": [
            n for n in names if room_of(n) not in ORDER[ORDER.index(wing) :] and n != "weft.records.report"
        ]
        for wing in wings
    }


def test_every_wing_can_be_deleted_without_breaking_an_import_below_it() -> None:
    """With what must break in the same process, which takes its time to start: a room without a word that it needs."""
    assert set(ORDER) == WINGS
    broken = told_by(WITHOUT, json.dumps(without(ORDER) | {"weft.events": ["weft.step.state", "weft.types"]}))
    assert broken == ["weft.step.state: weft.events was deleted"]


def test_importing_weft_loads_neither_fabric_nor_the_compiler() -> None:
    heavy = ("lightning", "lightning_fabric", "torch._dynamo", "torch._inductor", "matplotlib", "neuromancer", "pandas")
    assert told_by(f"import json, sys, weft; print(json.dumps([n for n in {heavy!r} if n in sys.modules]))") == []


CALL_EACH = """
import importlib, json, sys, weft
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
print(json.dumps([name for name in weft.__all__ if not callable(getattr(weft, name))]))
"""


def test_no_room_takes_the_place_of_a_public_name() -> None:
    rooms = {path.stem for path in SOURCE.iterdir()}
    assert not rooms & {*weft.__all__, "submit", "plot"}
    assert told_by(CALL_EACH, json.dumps(list(modules()))) == []


def test_every_public_name_is_one_that_a_module_has() -> None:
    assert all(getattr(weft, name).__name__ == name for name in weft.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Trainerr'"):
        weft.Trainerr  # noqa: B018  # type: ignore[attr-defined]


# ---- what exists only once


def calls(source: str, names: set[str]) -> int:
    """How often a function with one of these names is called, or handed on."""
    return sum(
        isinstance(node, ast.Attribute | ast.Name)
        and (node.attr if isinstance(node, ast.Attribute) else node.id) in names
        for node in ast.walk(ast.parse(source))
    )


def loops_over_attributes(source: str) -> int:
    """Loops whose iterable is made of vars(x) or x.__dict__."""
    loops = [node.iter for node in ast.walk(ast.parse(source)) if isinstance(node, ast.For | ast.comprehension)]
    return sum(bool(re.search(r"\bvars\(|__dict__", ast.unparse(iterable))) for iterable in loops)


ONCE = {
    "clipping by torch": ({"clip_grad_norm_", "clip_grad_value_"}, "weft.devices.processes"),
    "the finite check of all gradients": (
        {"_amp_foreach_non_finite_check_and_unscale_"},
        "weft.devices.precision",
    ),
}
# Still there, to be replaced by the one above. Only shorter, never longer.
MORE_THAN_ONCE = {
    "clipping by torch": {
        "weft.compile.stepgraphs",
    },
    "the finite check of all gradients": set[str](),
}


@pytest.mark.parametrize("what", ONCE)
def test_clipping_and_the_finite_check_are_implemented_once(what: str) -> None:
    names, home = ONCE[what]
    found = {name for name, path in modules().items() if calls(path.read_text(encoding="utf-8"), names)}
    assert home in found and found - {home} <= MORE_THAN_ONCE[what]


def test_a_second_implementation_is_found() -> None:
    assert calls("torch.nn.utils.clip_grad_norm_(p, 1.0)", ONCE["clipping by torch"][0]) == 1
    assert calls("from torch.nn.utils import clip_grad_norm_\nlambda p: clip_grad_norm_(p)", {"clip_grad_norm_"}) == 1
    assert calls("clip(p)", ONCE["clipping by torch"][0]) == 0
    assert loops_over_attributes("for name, value in vars(module).items(): ...") == 1
    assert loops_over_attributes("[v for v in {**module.__dict__}]") == 1
    assert loops_over_attributes("for name in module.state_dict(): vars(module)[name]") == 0


def test_what_modules_hold_is_walked_through_in_one_place() -> None:
    found = {name for name, path in modules().items() if loops_over_attributes(path.read_text(encoding="utf-8"))}
    home = "weft.places"
    of_other_things = {
        "weft.checkpoint.parts",  # dtypes of torch
        "weft.hooks.schedules",  # names, for an error
        "weft.integrations.lightning.view",  # names, for an error
        "weft.loop.result",  # its own fields
        "weft.loop.trainer",  # its own options
        "weft.integrations.neuromancer.trainer",  # methods of a callback's class
        "weft.loop.misspelt",  # methods of a trainer's class
        "weft.loop.made",  # what a scheduler was made with
        "weft.loop.watching",  # attributes of hooks
        "weft.step.trained",  # attributes of hooks and trainers
    }
    left = {"weft.compile.watching"}  # only shorter, never longer
    assert home in found and found - {home} <= of_other_things | left


def groups_of_state() -> set[str]:
    """The fields of RunState that are groups of fields."""
    tree = ast.parse((SOURCE / "step/state.py").read_text())
    state = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "RunState")
    return {
        node.target.id for node in state.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def writes_to_state(source: str, groups: set[str]) -> list[str]:
    """Assignments to `...state.x` and `...state.group.x`, also by a short name for a group, as they are written."""
    found = []
    tree = ast.parse(source)
    short = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for targets, values in [(node.targets[0], node.value)]
        for target, value in (
            zip(targets.elts, values.elts, strict=False)
            if isinstance(targets, ast.Tuple) and isinstance(values, ast.Tuple)
            else [(targets, values)]
        )
        if isinstance(target, ast.Name) and re.fullmatch(rf"(.+\.)?state\.({'|'.join(groups)})", ast.unparse(value))
    }
    names = "|".join(groups)
    pattern = re.compile(rf"(.+\.)?state\.({names})(\.\w+)?|({'|'.join(short) or '-'})\.\w+")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            text = ast.unparse(node)
            if pattern.fullmatch(text):
                found.append(text)
    return found


# Writes that are left outside of loop/run.py and step/state.py, to become named methods. Only fewer, never more.
WRITES_LEFT = {
    "weft.compile.choosing": 2,
    "weft.hooks.balancing": 1,
    "weft.hooks.terms": 1,
    "weft.integrations.lightning.run": 3,
    "weft.loop.compatibility": 1,
    "weft.loop.feeding": 3,
    "weft.loop.launch": 2,
    "weft.loop.phases": 2,
    "weft.loop.resume": 6,
    "weft.loop.saving": 3,
    "weft.loop.settings": 1,
    "weft.loop.trainer": 1,
    "weft.step.closures": 3,
    "weft.step.evaluation": 2,
    "weft.step.microbatches": 1,
    "weft.step.optimizer_step": 1,
}


def test_the_state_of_a_run_is_written_by_the_run_and_by_methods_with_a_name() -> None:
    groups = groups_of_state()
    found = Counter[str]()
    for name, path in modules().items():
        if name not in ("weft.loop.run", "weft.step.state"):
            found[name] += len(writes_to_state(path.read_text(encoding="utf-8"), groups))
    assert {name: count for name, count in found.items() if count > WRITES_LEFT.get(name, 0)} == {}


def test_a_write_to_the_state_of_a_run_is_found() -> None:
    groups = groups_of_state()
    assert {"control", "kept", "epoch", "fabric"} <= groups
    assert writes_to_state("def f(state):\n    state.control.begun = True", groups) == ["state.control.begun"]
    assert writes_to_state("kept = run.state.kept\nkept.writer = None", groups) == ["kept.writer"]
    assert writes_to_state("step, kept = state.step, state.kept\nkept.writer: int = 1", groups) == ["kept.writer"]
    assert writes_to_state("self.state.progress.step += 1\ndel state.fabric", groups) == [
        "self.state.progress.step",
        "state.fabric",
    ]
    assert writes_to_state("state.begin(1)\nself.control = state.control\nx = state.step.batch", groups) == []


def uses_of_backward(source: str) -> list[str]:
    """Every `x.backward` and `x.manual_backward`, but where x is one of ours that hands it on to the update."""
    ours = ("self", "run", "running", "trainer", "update", "manual")
    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and node.attr in ("backward", "manual_backward")
        and ast.unparse(node.value).split(".")[-1] not in ours
    ]


def test_only_the_step_calls_backward() -> None:
    found = {name for name, path in modules().items() if uses_of_backward(path.read_text(encoding="utf-8"))}
    assert found and found <= {
        "weft.integrations.lightning.fitting",  # a strategy of Lightning's that does it in its own way
        "weft.step.update",
        "weft.step.several",
        "weft.step.closures",
        "weft.step.manual",
        "weft.compile.stepgraphs",  # what a graph is compared with must not be the update that it stands for
    }


def test_the_check_of_backward_can_fail() -> None:
    assert uses_of_backward("loss.backward()") == ["loss.backward"]
    assert uses_of_backward("call = fabric.backward") == ["fabric.backward"]
    assert uses_of_backward("self.run.backward(loss)") == []


# ---- how long things are


def python_files(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((REPO / folder).rglob("*.py"))


def attributes_set(cls: ast.ClassDef) -> set[str]:
    """The attributes of self that `__init__` sets."""
    init = next(node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    return {
        node.attr
        for node in ast.walk(init)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }


def test_a_run_has_few_attributes_and_no_group_of_its_state_many() -> None:
    tree = ast.parse((SOURCE / "loop/run.py").read_text())
    run = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Run")
    assert 1 <= len(attributes_set(run)) <= 20
    for node in ast.parse((SOURCE / "step/state.py").read_text()).body:
        if isinstance(node, ast.ClassDef) and "dataclass" in map(ast.unparse, node.decorator_list):
            assert sum(isinstance(field, ast.AnnAssign) for field in node.body) <= 14, node.name


def test_the_tour_for_readers_has_at_most_1200_lines() -> None:
    assert sum(len((SOURCE / name).read_text(encoding="utf-8").splitlines()) for name in TOUR) <= 1200


def long_bodies(source: str) -> list[str]:
    return [function.name for function in functions_of(source) if body_lines(function) > 70]


def test_no_function_has_a_body_of_more_than_70_lines() -> None:
    lines = "    x = 1\n"
    assert long_bodies(f'def f():\n    """Text."""\n{70 * lines}') == []
    assert long_bodies(f'def f():\n    """Text."""\n{71 * lines}') == ["f"]
    found = {path.name: long_bodies(path.read_text(encoding="utf-8")) for path in python_files("src")}
    assert {name: names for name, names in found.items() if names} == {}


def test_no_line_has_more_than_120_columns_and_no_comment_speaks_to_the_formatter() -> None:
    wrong = [
        f"{path.relative_to(REPO)}:{number}"
        for path in python_files("src", "tests", "examples", "benchmarks")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if len(without_pragma(line, path)) > 120 or re.search(r"#\s*fmt:\s*(skip|off|on)\b", line)
    ]
    assert wrong == []


def without_pragma(line: str, path: Path) -> str:
    """A line of the tests without what it says to a type checker or linter behind its code, as ruff counts."""
    return line if SOURCE in path.parents else re.sub(r"\s*# (type: ignore|pyright: ignore|noqa)\b.*$", "", line)


def formatted(*paths: Path | str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ruff", "format", "--check", *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPO, check=False)


def test_the_formatter_changes_nothing(tmp_path: Path) -> None:
    pytest.importorskip("ruff")
    (tmp_path / "a.py").write_text("x = { 'a':1 }\n")
    assert formatted(tmp_path / "a.py").returncode == 1
    done = formatted("src", "tests", "examples", "benchmarks")
    assert done.returncode == 0, done.stdout


def test_make_lint_looks_at_format_and_columns() -> None:
    lint = (REPO / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0]
    assert "ruff format --check" in lint and "ruff check" in lint
    assert "E501" in (REPO / "pyproject.toml").read_text()


def test_the_loop_of_fit_fits_one_screen() -> None:
    from weft.loop.trainer import Trainer

    function = ast.parse(textwrap.dedent(inspect.getsource(Trainer.fit))).body[0]
    assert isinstance(function, ast.FunctionDef) and body_lines(function) <= 50
    assert any(isinstance(node, ast.For | ast.While) for node in ast.walk(function)), "the loop has left Trainer.fit"


# ---- what every module and name has


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


# ---- the tests themselves


def imported_tests(source: str) -> list[str]:
    """Test files that a source imports."""
    names = [
        name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
    ]
    return [name for name in names if name.split(".")[-1].startswith("test_") or "conftest" in name]


def test_no_test_file_imports_another() -> None:
    assert imported_tests("def f():\n    from tests.loop.test_kill import train") == ["tests.loop.test_kill"]
    assert imported_tests("from tests.loop import test_kill") == ["test_kill"]
    assert imported_tests("from tests.helpers.killing import train") == []
    found = {path.name: imported_tests(path.read_text(encoding="utf-8")) for path in python_files("tests")}
    assert {name: tests for name, tests in found.items() if tests} == {}


def definitions(source: str) -> dict[str, str]:
    """Functions and classes at the top of a file that are no tests, by name, without their docstrings."""
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return {node.name: ast.unparse(node) for node in nodes if not node.name.startswith("test_")}


# Names that stand for different things in several test files: to be told apart. Only fewer, never more.
NAMES_LEFT = 27


def test_a_helper_of_the_tests_is_defined_once() -> None:
    assert set(definitions("def points(): ...\nclass Net: ...\ndef test_x(): ...\nx = 1")) == {"points", "Net"}
    homes: dict[str, dict[str, str]] = {}
    frozen = {"bits.py", "test_digests.py", "test_files_of_before.py"}  # what they train must never change
    for path in (path for path in python_files("tests") if path.name not in frozen):
        for name, text in definitions(path.read_text(encoding="utf-8")).items():
            homes.setdefault(name, {})[path.name] = text
    several = {name: found for name, found in homes.items() if len(found) > 1}
    assert {name: list(found) for name, found in several.items() if len(set(found.values())) < len(found)} == {}
    assert len(several) <= NAMES_LEFT
