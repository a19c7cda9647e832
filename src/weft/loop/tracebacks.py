"""What a user sees of an error: their own lines, and what they called last; not the frames of the loop between them.

The frames are taken out of the traceback of the exception, which a notebook and a terminal show alike. With
`WEFT_TRACEBACK=full` in the environment they stay. Loaded when something was raised.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

_OURS = str(Path(__file__).parents[1]) + os.sep
_BETWEEN = ("nn/modules/module.py", "nn/modules/container.py", "torch/overrides.py", "lightning/fabric/")
_BETWEEN += ("contextlib.py", "<string>")
"""Frames of others that only hand on."""


def shorten(error: BaseException | None, trace: TracebackType | None = None) -> None:
    """Leave of the traceback of `error` its first frame, and of the others those that are not ours.

    trace: where to begin, if not with the whole. What caused the error is shortened too. An error of ours in the sense
    of a bug (an `assert`, or what only python itself raises in our lines) keeps all.
    """
    seen: set[int] = set()
    first = error.__traceback__ if error is not None and trace is None else trace
    while error is not None and id(error) not in seen and os.environ.get("WEFT_TRACEBACK") != "full":
        seen.add(id(error))
        if first is not None and not _is_bug(error, first):
            _cut(first)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        first = None if error is None else error.__traceback__


def _cut(first: TracebackType) -> None:
    last, frame = first, first.tb_next
    while frame is not None:
        name = frame.tb_frame.f_code.co_filename
        if not name.startswith(_OURS) and not any(part in name for part in _BETWEEN):
            last.tb_next = last = frame
        frame = frame.tb_next
    last.tb_next = None


def _is_bug(error: BaseException, first: TracebackType) -> bool:
    frame = first
    while frame.tb_next is not None:
        frame = frame.tb_next
    in_ours = frame.tb_frame.f_code.co_filename.startswith(_OURS)
    return in_ours and isinstance(error, AssertionError | AttributeError | NameError | IndexError | UnboundLocalError)
