"""Cells that run in a real Jupyter kernel."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.patience import patience

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")


def run_notebook(*cells: str, **options: Any) -> Any:
    """The notebook of these cells after it ran."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=int(patience()), **options).execute()
    return notebook
