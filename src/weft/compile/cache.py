"""Where compiled code is kept. It is loaded as code, so only from places that nobody else can write to."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TORCHS = "TORCHINDUCTOR_CACHE_DIR"


def cache_folder() -> Path:
    """Where compiled packages are kept: $WEFT_CACHE, else weft/ in the user's cache folder ($XDG_CACHE_HOME).

    Where that is another user's, or others may write to it: a folder of this process alone, which says so.
    """
    given = os.environ.get("WEFT_CACHE")
    return _private(Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weft")


@contextmanager
def torchs_cache() -> Iterator[None]:
    """Within: torch keeps what it compiles below `cache_folder`, or in a folder that its user named, if it is private.

    Torch's own choice is below /tmp, where anybody can have made it before.
    """
    given = os.environ.get(_TORCHS)
    folder = _private(Path(given)) if given else _private(cache_folder() / "torch")
    os.environ[_TORCHS] = str(folder)
    try:
        yield
    finally:
        del os.environ[_TORCHS]
        if given:
            os.environ[_TORCHS] = given


def is_private(path: Path) -> bool:
    """Whether a file or folder is this user's, and nobody else may write to it."""
    if os.name == "nt":
        return True
    found = path.stat()
    return found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _private(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if is_private(folder):
        return folder
    return _instead_of(folder)


@functools.cache
def _instead_of(folder: Path) -> Path:
    warnings.warn(
        f"Compiled code is not loaded from {folder}, which is another user's or can be written by others (chmod go-w, "
        "or set WEFT_CACHE): it is made anew, for this process alone.",
        stacklevel=2,
    )
    own = Path(tempfile.mkdtemp(prefix="weft-cache-"))
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return own
