"""Builds the site: python docs/build.py, or `make docs`. It lies in build/docs/html; nothing is fetched for it.

Pages are the Markdown files beside this one, the notebooks of examples/ as they were executed, and what the docstrings
and the command line say of themselves. Cells of a page are executed while it is built; an error in one ends the build,
and so does a warning, a dead link among the pages, or a link to a file that the repository does not have.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from pathlib import Path

from sphinx.cmd.build import build_main

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "docs"
SHOWN = ("src", "tests", "examples/configs")  # linked to by pages, as files
COPIED = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE")


def assemble(source: Path) -> None:
    """Lay everything that pages are made of into `source`, each file under the name that links give it."""
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(ROOT / "docs", source, ignore=shutil.ignore_patterns("build.py", "__pycache__"))
    examples = source / "examples"
    for folder in ("pictures", "beside"):
        shutil.copytree(ROOT / "examples" / folder, examples / folder)
    for kind in ("ipynb", "py", "md"):
        for file in (ROOT / "examples").glob(f"*.{kind}"):
            shutil.copy(file, examples)
    for name in COPIED:
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "benchmarks" / "results", source / "benchmarks" / "results")
    for name in SHOWN:
        (source / name).symlink_to(ROOT / name)


def dead_links(html: Path) -> list[str]:
    """Each link of a page to a file that is not there."""
    return [
        f"{page.relative_to(html)}: {link}"
        for page in html.rglob("*.html")
        for link in sorted(set(re.findall(r'(?:href|src)="([^"#?:]+)[#"?]', page.read_text())))
        if not (page.parent / link).exists()
    ]


def main() -> int:
    began = time.perf_counter()
    source = BUILD / "source"
    assemble(source)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    os.environ.update(
        MPLBACKEND="module://matplotlib_inline.backend_inline", OMP_NUM_THREADS="1", NUMBA_DISABLE_JIT="1"
    )
    strict = ["-W", "--keep-going", "-q"]
    status = build_main(
        [*strict, "-b", "html", "-d", str(BUILD / "doctrees"), str(source), str(BUILD / "html"), *sys.argv[1:]]
    )
    if dead := dead_links(BUILD / "html"):
        print("dead links:", *dead, sep="\n  ")
        status = status or 1
    print(f"{BUILD / 'html' / 'index.html'}: {time.perf_counter() - began:.0f} s, exit status {status}")
    return status


if __name__ == "__main__":
    sys.exit(main())
