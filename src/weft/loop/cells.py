"""Updating outputs in the cells of a notebook, also from processes that were forked from its kernel.

A forked process cannot speak with the notebook: it writes what is to be shown into a pipe, and the kernel shows it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PIPE = "WEFT_CELL_PIPE"
"""In the environment of forked processes: the descriptor that they write to."""


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, or was forked from it."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")


class Output:
    """One output of a cell, shown when it is first given something and replaced from then on.

    rich's own needs ipywidgets, which a notebook may not have.
    """

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, **bundle: str) -> None:
        """Show texts by MIME type with an underscore: `text_plain`, `text_html`."""
        named = {name.replace("_", "/", 1): text for name, text in bundle.items()}
        if (descriptor := os.environ.get(PIPE)) is not None:
            os.write(int(descriptor), json.dumps([f"{os.getpid()}:{id(self)}", named]).encode() + b"\n")
        else:
            self.show_here(named)

    def show_here(self, bundle: dict[str, str]) -> None:
        """Show texts by MIME type, in this process."""
        from IPython.display import display  # pyright: ignore[reportMissingImports]: there in a notebook only

        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)


@contextmanager
def shown_for_children(forks: bool) -> Iterator[None]:
    """Within: what processes forked from a notebook's kernel show appears in the cell that started them."""
    if not (forks and in_notebook()):
        yield
        return
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    os.environ[PIPE] = str(writer)
    thread = threading.Thread(target=_show_all, args=(reader,), daemon=True)
    try:
        thread.start()
        yield
    finally:
        del os.environ[PIPE]
        os.close(writer)  # the children are gone: this was the last end to write to
        thread.join()


def _show_all(reader: int) -> None:
    outputs: dict[str, Output] = {}
    with os.fdopen(reader) as lines:
        for line in lines:
            who, bundle = json.loads(line)
            outputs.setdefault(who, Output()).show_here(bundle)
