"""A stdout or stderr that is gone ends no training: a closed terminal, a pipe that nobody reads, a full disk.

with lasting_streams():
    ...     # whoever prints in here, weft or the user's code, is not told of it
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Lasting:
    """A text file that goes silent when it can be written no longer. All else is as it is there."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> Any:
        """As of the file, where it works."""
        return _tried(self._file.write, text)

    def flush(self) -> None:
        """As of the file, where it works; an object of the user's may have `write` alone."""
        _tried(getattr(self._file, "flush", bool))


def _tried(call: Callable[..., Any], *args: str) -> Any:
    try:
        return call(*args)
    except UnicodeError:  # the text's own fault
        raise
    except (OSError, ValueError):  # ValueError: the file was closed
        from weft.loop.silence import silence

        silence()


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Within: sys.stdout and sys.stderr are Lasting. Not where a process has none, or an outer fit sees to it."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = ours = [f if isinstance(f, Lasting | None) else Lasting(f) for f in before]
    try:
        yield
    finally:  # unless somebody has put another one there
        now = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = [b if n is o else n for b, o, n in zip(before, ours, now, strict=True)]
