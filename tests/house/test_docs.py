"""The site: its cells run, each mistake on its page of mistakes happens as quoted, public names say what they are."""

from __future__ import annotations

import contextlib
import dis
import inspect
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import weft
import weft.events

ROOT = Path(__file__).parents[2]
CELL = re.compile(r"```\{code-cell\}\n((?::\w+:[^\n]*\n)*)(.*?)```", re.DOTALL)


def cells(page: str) -> list[tuple[str, str]]:
    """The cells of a page: (its options, its code without the lines that only IPython reads)."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    return [(options, re.sub(r"^%.*\n", "", code, flags=re.MULTILINE)) for options, code in CELL.findall(text)]


@pytest.mark.parametrize("page", ["index", "tour", "reference/optim"])
def test_the_cells_of_a_page_run_as_they_stand(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import pyplot

    monkeypatch.setattr(pyplot, "show", lambda: None)
    names: dict[str, Any] = {"__name__": page}
    with contextlib.redirect_stdout(io.StringIO()):
        for _, code in cells(page):
            exec(compile(re.sub("epochs=(300|2000)", "epochs=3", code), f"{page}.md", "exec"), names)  # noqa: S102, our own text
    pyplot.close("all")


def test_each_mistake_of_the_page_of_mistakes_happens_and_says_what_the_page_quotes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    quoted = re.findall(r"^\*\.\.\. (.*?) \.\.\.\*$", (ROOT / "docs" / "troubles.md").read_text(), flags=re.MULTILINE)
    names: dict[str, Any] = {"__name__": "troubles"}
    mistakes = [code for options, code in cells("troubles") if "raises-exception" in options]
    assert len(mistakes) == len(quoted) >= 19
    ((_, first),) = [cell for cell in cells("troubles") if "raises-exception" not in cell[0]]
    exec(first, names)  # noqa: S102
    for code, message in zip(mistakes, quoted, strict=True):
        with pytest.raises(Exception) as caught:
            exec(code, names)  # noqa: S102
        told = " ".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
        assert message in told, f"{code}\nsays {told!r}"


@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning")  # Lightning's data module meets torch 2.13
def test_the_script_for_lightnings_trainer_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lightning.pytorch as L
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

    class Model(BoringModel):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.step(batch))

    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "lightning.md").read_text(), re.DOTALL)
    assert 'devices=2, strategy="ddp"' in code and "max_epochs=10" in code
    code = code.replace('devices=2, strategy="ddp"', 'accelerator="cpu", enable_progress_bar=False')
    names: dict[str, Any] = {"ModelCheckpoint": ModelCheckpoint, "model": Model(), "data": BoringDataModule()}
    exec(compile(code.replace("max_epochs=10", "max_epochs=2"), "lightning.md", "exec"), names)  # noqa: S102
    assert isinstance(names["trainer"], L.Trainer) and names["trainer"].checkpoint_callback.best_model_path


RUN_BY = {
    ("index", "code-cell"): "test_the_cells_of_a_page_run_as_they_stand",
    ("tour", "code-cell"): "test_the_cells_of_a_page_run_as_they_stand",
    ("optim", "code-cell"): "test_the_cells_of_a_page_run_as_they_stand",
    ("troubles", "code-cell"): "test_each_mistake_of_the_page_of_mistakes_happens_and_says_what_the_page_quotes",
    ("lightning", "python"): "test_the_script_for_lightnings_trainer_runs",
    ("index", "bash"): "the installation, which is how the suite came to run",
    ("cluster", "bash"): "tests/slurm",
    ("cluster", "python"): "tests/slurm",
}
"""What runs the blocks of each page (those that README, examples and pairs bring along: their own tests)."""


def test_no_page_has_a_block_that_nothing_runs() -> None:
    found = set()
    for path in (ROOT / "docs").rglob("*.md"):
        kinds = re.findall(r"^```\{?([\w-]+)", path.read_text(), re.MULTILINE)
        found |= {(path.stem, kind) for kind in kinds if kind in ("code-cell", "python", "bash", "yaml", "pycon")}
    assert found == set(RUN_BY)


FACES = (weft, weft.hooks, weft.plot, weft.optim, weft.integrations.lightning, weft.integrations.neuromancer)
EVENTS = set(weft.events.EVENTS)  # what each gets stands on the page of hooks


def public_names() -> dict[str, Any]:
    """What the reference shows: functions, classes, and the methods that classes add to what they are made from."""
    found = {}
    for face in FACES:
        for name in face.__all__:
            thing = getattr(face, name)
            found[f"{face.__name__}.{name}"] = thing
            for key, method in vars(thing).items() if inspect.isclass(thing) else ():
                if inspect.isfunction(method) and not key.startswith("_") and key not in EVENTS:
                    found[f"{face.__name__}.{name}.{key}"] = method
    return {name: thing for name, thing in found.items() if callable(thing)}


def docs_of(name: str, thing: Any, names: dict[str, Any]) -> str:
    """The docstring, with those of the public names that it sends its reader to ("see `less_equal`")."""
    text = inspect.getdoc(thing) or ""
    for base in thing.__mro__ if inspect.isclass(thing) else ():
        text += f" {inspect.getdoc(base.__init__)} {base.__doc__ if base.__module__.startswith('weft') else ''}"
    owner = names.get(name.rpartition(".")[0])
    if owner:  # the class's own text, and what the method is where the class it is made from has it, too
        above = [vars(base).get(name.rpartition(".")[2]) for base in owner.__mro__[1:]]
        text += " ".join([inspect.getdoc(owner) or "", *(inspect.getdoc(method) or "" for method in above if method)])
    sent = re.findall(r"(?:[Ss]ee|[Aa]s(?: for| in| of)?|those of) `?((?:\w+\.)*\w+)", text)
    for other, there in names.items():
        if there is not thing and any(f".{other}".endswith(f".{word}") for word in sent):
            text += f" {inspect.getdoc(there) or ''}"
    return text


def missing_words(name: str, thing: Any, names: dict[str, Any]) -> list[str]:
    """Its arguments that the text does not name; "raises" where the function itself raises and the text is silent."""
    text = docs_of(name, thing, names)
    if inspect.isclass(thing) and issubclass(thing, Exception):
        return []
    parameters = inspect.signature(thing).parameters.values()
    asked = [p.name for p in parameters if p.name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    missing = [word for word in asked if not re.search(rf"\b{word}\b", text)]
    body = thing.__init__ if inspect.isclass(thing) else thing
    steps = dis.get_instructions(body) if inspect.isfunction(body) else ()
    if any(step.opname == "RAISE_VARARGS" for step in steps) and not re.search(r"[Rr]aise|Error|refuse", text):
        missing.append("raises")
    return missing


def test_every_public_name_says_what_it_is_its_arguments_and_what_it_raises() -> None:
    names = public_names()
    assert len(names) > 150
    silent = [name for name, thing in names.items() if not (inspect.getdoc(thing) or "").strip()]
    assert not silent
    long = [name for name, thing in names.items() if len((inspect.getdoc(thing) or "").splitlines()[0]) > 120]
    assert not long
    missing = {name: found for name, thing in names.items() if (found := missing_words(name, thing, names))}
    assert not missing


def test_an_argument_that_is_not_told_is_found() -> None:
    def fit(data: Any, epochs: int) -> None:
        """Train on `data`."""
        raise ValueError(epochs)

    assert missing_words("fit", fit, {"fit": fit}) == ["epochs", "raises"]


COMING = {"hand": 0.02, "skorch": 0.1, "lightning": 0.0, "neuromancer": 0.0, "littrainer": 0.02}


@pytest.mark.long
@pytest.mark.parametrize("library", COMING)
def test_both_scripts_of_a_pair_end_alike(library: str) -> None:
    """At 0.0 to the bit, else both below the bound."""
    if library == "skorch":
        pytest.importorskip("skorch")

    def figure(side: str) -> float:
        script = str(ROOT / "docs" / "coming" / f"{library}_{side}.py")
        code = f"import runpy; print(runpy.run_path({script!r})['figure'])"
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
        return float(done.stdout.split()[-1])

    theirs, ours = figure("theirs"), figure("weft")
    assert theirs == ours if COMING[library] == 0.0 else max(theirs, ours) < COMING[library]


def test_pairs_that_change_an_import_change_nothing_else() -> None:
    for library in ("lightning", "neuromancer", "littrainer"):
        texts = [(ROOT / "docs" / "coming" / f"{library}_{side}.py").read_text() for side in ("theirs", "weft")]
        theirs, ours = ({line for line in text.splitlines() if line} for text in texts)
        assert all("import" in line for line in theirs ^ ours) and theirs != ours


@pytest.mark.long
def test_the_site_is_built_without_a_warning_or_a_dead_link() -> None:
    done = subprocess.run(
        [sys.executable, "docs/build.py", "-E"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(list((ROOT / "build" / "docs" / "html").rglob("*.html"))) > 25
