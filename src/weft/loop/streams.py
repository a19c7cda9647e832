"""A stdout or stderr that is gone ends no training: a closed terminal, a pipe that nobody reads, a full disk.

with lasting_streams():
    ...     # whoever prints in here, weft or the user's code, is not told of it
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from typing import Any, cast


class Lasting:
    """A text file that goes silent when it can be written no longer. All else is as it is there."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        if name in ("write", "writelines", "flush"):  # an object of the user's may have `write` alone
            return partial(_tried, getattr(self._file, name, bool))
        return getattr(self._file, name)


def _tried(call: Callable[..., Any], *args: Any) -> Any:
    try:
        return call(*args)
    except (OSError, ValueError) as error:  # ValueError: the file was closed
        from weft.loop.silence import silence

        silence(error)


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Within: sys.stdout and sys.stderr are Lasting. Not where a process has none, or an outer fit sees to it."""
    given: list[Any] = [sys.stdout, sys.stderr]
    out, err = (cast(Any, f if isinstance(f, Lasting | None) else Lasting(f)) for f in given)
    with redirect_stdout(out), redirect_stderr(err):
        yield
