"""Notebooks from scripts: a script in py:percent cells is the source, the notebook is made from it and executed.

    python -m examples --notebooks             # makes and executes all (full settings)
    python -m examples --notebooks gan         # only that one

`# %%` begins a cell of code, `# %% [markdown]` one of text.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
MAX_TEXT = 4000  # characters of an output that are kept


def cells_of(script: str) -> list[tuple[str, str]]:
    """The cells of a py:percent script as ("markdown" or "code", text)."""
    cells = []
    for kind, body in re.findall(
        r"^# %%( \[markdown\])?[^\n]*\n(.*?)(?=^# %%|\Z)", script, flags=re.MULTILINE | re.DOTALL
    ):
        if kind:
            text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines())
        else:
            text = re.sub(r"  # noqa: E402$", "", body.strip(), flags=re.MULTILINE)
        if text:
            cells.append(("markdown" if kind else "code", text))
    return cells


def notebook_of(script: str, name: str) -> Any:
    """The notebook, not executed; the same script always gives the same file."""
    import nbformat

    make = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    cells = []
    for number, (kind, text) in enumerate(cells_of(script)):
        cell = make[kind](text)
        cell["id"] = hashlib.sha256(f"{name} {number}".encode()).hexdigest()[:8]
        cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def execute(notebook: Any, folder: Path = FOLDER, timeout: float = 1800.0) -> dict[str, Any]:
    """Execute the notebook in a clean kernel, in place, and return its `figures`; outputs are kept short.

    Raises nbclient's CellExecutionError.
    """
    import nbclient
    import nbformat

    notebook.cells.append(nbformat.v4.new_code_cell("import json\n\nprint(json.dumps(figures))"))
    nbclient.NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": str(folder)}}).execute()
    figures = json.loads(notebook.cells.pop().outputs[0]["text"])
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata = {}
        if "outputs" in cell:  # what other libraries say on stderr holds paths and times
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.get("outputs", []):
            if "text" in output and len(output["text"]) > MAX_TEXT:
                output["text"] = output["text"][:MAX_TEXT] + "\n...\n"
    return figures


def write_notebook(name: str) -> dict[str, Any]:
    """Make and execute `<name>.ipynb` beside `<name>.py`; its figures and seconds.

    Its last picture goes to `pictures/`.
    """
    import nbformat
    from examples.__main__ import used_by_children

    notebook = notebook_of((FOLDER / f"{name}.py").read_text(encoding="utf-8"), name)
    began, used = time.perf_counter(), used_by_children()
    figures = execute(notebook)
    seconds = {"seconds": time.perf_counter() - began, "processor_seconds": used_by_children() - used}
    nbformat.write(notebook, FOLDER / f"{name}.ipynb")
    outputs = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [data["image/png"] for data in outputs if "image/png" in data]
    (FOLDER / "pictures").mkdir(exist_ok=True)
    (FOLDER / "pictures" / f"{name}.png").write_bytes(base64.b64decode(pictures[-1]))
    return {"figures": figures, **seconds}
