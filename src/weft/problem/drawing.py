"""A problem as a graph and as a table: which node hands which key to which node or term.

problem.show()                # in a notebook a picture where graphviz is installed, else text
print(problem.show())         # text
problem.show().save("problem.svg")
"""

from __future__ import annotations

import html
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DATA = -1  # where a key comes from that no node writes


class Drawing:
    """The graph as text (`str`), as source for graphviz (`dot`), and in a notebook as a picture if graphviz is there.

    `parts`: (name, kind, keys read, keys written) of each node and term, in order; kind is "node" or the term's.
    `edges`: (from, key, to) by name, from "data" where no node writes the key (then the data must bring it).
    """

    def __init__(self, title: str, parts: list[tuple[str, str, list[str], list[str]]]) -> None:
        self.title, self.parts = title, parts
        self._edges: list[tuple[int, str, int]] = []  # by number, since a node and a term may have one name; -1: data
        writer: dict[str, int] = {}
        for number, (_, _, reads, writes) in enumerate(parts):
            self._edges += [(writer.get(key, DATA), key, number) for key in reads]
            writer |= dict.fromkeys(writes, number)
        names = {DATA: "data"} | {number: part[0] for number, part in enumerate(parts)}
        self.edges = [(names[a], key, names[b]) for a, key, b in self._edges]

    def __str__(self) -> str:
        rows = []
        for number, (name, kind, _, writes) in enumerate(self.parts):
            shown = f"[{name}]" if kind == "node" else f"({name}, {kind})"
            read = ", ".join(
                f"{key} of {a}" for (a, key, _), (_, _, b) in zip(self.edges, self._edges, strict=True) if b == number
            )
            rows.append((read, shown, ", ".join(writes)))
        width = max((len(row[0]) for row in rows), default=0)
        middle = max((len(row[1]) for row in rows if row[2]), default=0)
        lines = [f"{a:>{width}} --> {b:{middle}} --> {c}" if c else f"{a:>{width}} --> {b}" for a, b, c in rows]
        return "\n".join([self.title, *lines])

    __repr__ = __str__

    @property
    def dot(self) -> str:
        """The graph in graphviz's language."""
        lines = ["digraph {", "  rankdir=LR; node [fontname=sans, fontsize=11]; edge [fontname=sans, fontsize=10];"]
        if any(source == DATA for source, _, _ in self._edges):
            lines.append(f"  {DATA} [shape=cylinder, label=data];")
        for number, (name, kind, _, _) in enumerate(self.parts):
            look = "shape=box, style=rounded" if kind == "node" else "shape=ellipse, style=filled, fillcolor=gray92"
            lines.append(f"  {number} [{look}, label={_quoted(name if kind == 'node' else f'{name}: {kind}')}];")
        lines += [f"  {a} -> {b} [label={_quoted(key)}];" for a, key, b in self._edges]
        return "\n".join([*lines, "}"])

    def svg(self) -> str | None:
        """The picture by graphviz's `dot`, None where it is not installed."""
        if (program := shutil.which("dot")) is None:
            return None
        done = subprocess.run([program, "-Tsvg"], input=self.dot.encode(), capture_output=True, check=True, timeout=60)
        return done.stdout.decode()  # UTF-8, whatever the machine's language

    def save(self, path: str | Path) -> Path:
        """Write an `.svg` (needs graphviz), `.dot` or `.txt` file; its ending says which.

        Raises ValueError for others.
        """
        path = Path(path)
        text = {".svg": self.svg, ".dot": lambda: self.dot, ".txt": lambda: str(self)}.get(path.suffix)
        if text is None:
            raise ValueError(f"{path}: a drawing is saved as .svg, .dot or .txt; got {path.suffix!r}.")
        if (content := text()) is None:
            raise RuntimeError(
                f"{path}: an svg needs graphviz's program 'dot', which is not installed; .dot and .txt do not."
            )
        path.write_text(content + "\n", encoding="utf-8")
        return path

    def _repr_html_(self) -> str:
        svg = self.svg()
        return svg[svg.index("<svg") :] if svg is not None else f"<pre>{html.escape(str(self))}</pre>"


def draw(problem: Any) -> Drawing:
    """The graph of a weft or NeuroMANCER problem, by its nodes' keys and, where terms tell theirs, the terms."""
    parts: list[tuple[str, str, list[str], list[str]]] = []
    for number, node in enumerate(problem.nodes):
        name = str(getattr(node, "name", None) or f"node_{number}")
        parts.append((name, "node", list(getattr(node, "input_keys", ())), list(getattr(node, "output_keys", ()))))
    for name, term in getattr(problem, "terms", {}).items():
        sense = f" {term.sense}" if hasattr(term, "sense") else ""
        parts.append((name, f"{term.kind}{sense}", list(term.keys), []))
    return Drawing(str(problem), parts)


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def table_of(problem: Any) -> str:
    """A table: which node reads and writes which key, what the terms read, and what the data must bring."""
    rows = [("node", "reads", "writes")]
    for node in problem.nodes:
        rows.append((str(node.name), ", ".join(node.input_keys) or "-", ", ".join(node.output_keys)))
    terms = [("term", "reads", "weight")]
    for term in problem.terms.values():
        kind = " ".join([term.kind, *([term.sense] if hasattr(term, "sense") else [])])
        terms.append((f"{term.name} ({kind})", ", ".join(term.keys) or "-", f"{term.weight.item():g}"))
    needed = f"from the data: {', '.join(problem.inputs) or '-'}"
    loss = f"loss: {type(problem.loss).__name__}"
    return "\n".join([f"{problem}", "", *_columns(rows), "", *_columns(terms), "", loss, needed])


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
