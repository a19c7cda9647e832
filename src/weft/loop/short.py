"""Errors that show the user's lines: `with SHORT: ...` takes ours out of what is raised there."""

from __future__ import annotations

from types import TracebackType


class _Short:
    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            from weft.loop.tracebacks import shorten

            shorten(error, trace)


SHORT = _Short()
