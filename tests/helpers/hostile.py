"""Files that run code when they are loaded without care."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Evil:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def evil_files(folder: Path, marker: str) -> list[Path]:
    """Files that make the folder `marker` when they are loaded without care."""
    inner = io.BytesIO()
    torch.save(Evil(os.mkdir, marker), inner, _use_new_zipfile_serialization=False)
    weights = {"w": torch.ones(2)}
    payloads = {
        "reduce": Evil(os.mkdir, marker),
        "eval": Evil(builtins.eval, f"__import__('os').mkdir({marker!r})"),
        "nested": Evil(torch.storage._load_from_bytes, inner.getvalue()),  # pyright: ignore[reportPrivateUsage]
    }
    for name, payload in payloads.items():
        torch.save({"problem": weights, "state_dict": weights, "x": payload}, folder / f"{name}.ckpt")
    (folder / "pickle.ckpt").write_bytes(pickle.dumps({"x": Evil(os.mkdir, marker)}))
    torch.save({"x": Evil(os.mkdir, marker)}, folder / "legacy.ckpt", _use_new_zipfile_serialization=False)
    for name, prefix, extra in (("outside", "../archive/", ""), ("script", "archive/", "constants.pkl")):
        with (
            zipfile.ZipFile(folder / "reduce.ckpt") as source,
            zipfile.ZipFile(folder / f"{name}.ckpt", "w") as archive,
        ):
            for entry in source.namelist():
                archive.writestr(prefix + entry.split("/", 1)[1], source.read(entry))
            if extra:
                archive.writestr(prefix + extra, b"")
    return sorted(folder.glob("*.ckpt"))
