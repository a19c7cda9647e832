"""How Sphinx builds the site, and what it takes from the code itself: docstrings, options, and help."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from functools import partial
from typing import Any

import latex2mathml.converter
from docutils import nodes
from docutils.statemachine import StringList
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import weft

project, author, copyright = "weft", "the weft developers", "2026, the weft developers"
version = release = weft.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx_design", "sphinx_copybutton"]
exclude_patterns = ["README.md", "examples/README.md", "src/**", "tests/**", "examples/configs/**"]
html_theme, html_title, html_static_path, html_css_files = "furo", "weft", ["_static"], ["weft.css"]
html_show_sourcelink = html_copy_source = False
html_math_renderer = "mathml"  # browsers show it without a script
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode, nb_execution_raise_on_error, nb_execution_timeout = "force", True, 90
nb_execution_excludepatterns = ["examples/*"]  # executed by `python -m examples --notebooks`, which the suite checks
nb_merge_streams, nb_execution_show_tb = True, True
autodoc_typehints, autodoc_member_order, autodoc_class_signature = "signature", "bysource", "mixed"
autodoc_typehints_format = "fully-qualified"  # `_plain_types` shortens them
autodoc_default_options = {"members": True}
# notebooks begin with any heading; pages that a link leads to need no place in the menu
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type", "toc.not_included", "ref.python"]


ITEM = re.compile(r"(?!Source|Options)(\*{0,2}\w+(?:, \*{0,2}\w+)*): (?=\S)")


def as_rst(lines: list[str]) -> list[str]:
    """A docstring as reStructuredText. weft's are plain text: code between backticks or in indented blocks, and one
    paragraph that begins with `name: ` for an argument, its further lines indented."""
    text: list[str] = []
    before = "blank"
    for line in lines:
        if not line.strip():
            text.append("")
            before = "block" if before == "block" else "blank"
            continue
        if line == "::":
            continue  # said by the indented block that follows
        if line.startswith("  ") and before == "item":
            text.append("  " + _escape(line.strip()))
        elif line.startswith("    "):
            if before != "block":
                text += ["", "::", ""]
            text.append(line)
            before = "block"
        elif line.startswith("* "):
            text += ([] if before == "item" else [""]) + ["* " + _escape(line[2:])]
            before = "item"
        elif found := ITEM.match(line):
            text += ([] if before == "item" else [""]) + [f"* ``{found[1]}``: {_escape(line[found.end() :])}"]
            before = "item"
        else:
            text += ([""] if before in ("item", "block") else []) + [_escape(line)]
            before = "text"
    return text


def _escape(line: str) -> str:
    parts = re.split(r"(`+[^`]*`+)", line)
    code = [f"``{part.strip('`')}``" if part.startswith("`") else re.sub(r"([*_|\\])", r"\\\1", part) for part in parts]
    return re.sub(r"``(?=\w)", r"``\\ ", "".join(code)) if "``" in line else "".join(code)


def _docstring(app: Sphinx, kind: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if kind == "module":  # what it is, and its example; the names that `help` lists follow with their own texts
        first, _, rest = "\n".join(lines).partition("\n\n")
        example = rest.partition("\n\n")[0] if rest.startswith("weft.") else ""
        lines[:] = [*first.splitlines(), "", *(f"    {line}" for line in example.splitlines()), ""]
    lines[:] = as_rst(lines)


BOUND = re.compile(r"[\w.]*Annotated\[((?:[^\[\]]|\[[^\[\]]*\])*?), <function .*? at 0x[0-9a-f]+>\]")


def _plain_types(app: Sphinx, tree: nodes.document) -> None:
    """Types without their modules, and without the functions that hold the bounds of an option."""
    for kind in (addnodes.desc_annotation, addnodes.desc_parameter):
        for found in tree.findall(kind):
            text = re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Za-z_])", "", BOUND.sub(r"\1", found.astext()))
            if text != found.astext():
                found.clear()
                found += nodes.Text(text)


def _mathml(translator: Any, node: nodes.Element, display: str) -> None:
    translator.body.append(latex2mathml.converter.convert(node.astext(), display=display))
    raise nodes.SkipNode


class Options(SphinxDirective):
    """`{weft-options} weft.TrainerConfig`: a table of a class's fields: name, default, and the sentence beneath it."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        from weft.recipes.arguments import NO_DEFAULT, fields

        module, name = self.arguments[0].rsplit(".", 1)
        lines = ["| option | default | what it does |", "|---|---|---|"]
        for p in fields(getattr(importlib.import_module(module), name)):
            default = "required" if p.default is NO_DEFAULT else f"`{p.default!r}`"
            lines.append(f"| `{p.name}` | {default} | {(p.help or '').replace('|', '&#124;')} |")
        box = nodes.Element()
        self.state.nested_parse(StringList(lines, source=self.arguments[0]), self.content_offset, box)
        return box.children


class Help(SphinxDirective):
    """`{weft-help} fit`: what `weft fit --help` prints."""

    optional_arguments, final_argument_whitespace = 1, True

    def run(self) -> list[nodes.Node]:
        command = [sys.executable, "-m", "weft.cli", *self.arguments[:1], "--help"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return [nodes.literal_block(done.stdout, done.stdout, language="text")]


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", _docstring)
    app.connect("doctree-read", _plain_types)
    inline, block = ((partial(_mathml, display=display), None) for display in ("inline", "block"))
    app.add_html_math_renderer("mathml", inline, block)
    app.add_directive("weft-options", Options)
    app.add_directive("weft-help", Help)
