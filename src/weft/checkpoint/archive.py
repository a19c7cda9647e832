"""One file of tensors and plain values: written at one instant, verified byte by byte, loaded without running code.

    archive.write("state.ckpt", {"weights": net.state_dict(), "step": 3})
    state = archive.read("state.ckpt")

The format is torch's own (a zip archive, nothing compressed): `torch.load(path, weights_only=True)` reads it anywhere.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import socket
import struct
import threading
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sized
from datetime import date, timedelta
from datetime import time as clock_time
from enum import Enum
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.serialization import config as torch_files

# At the end of each file, as the archive's comment: a checksum of all bytes before it. The entries' own checksums leave
# out the zip headers. A file without it (written by torch or Lightning) is judged by the entries alone.
STATE, METADATA = "state.ckpt", ".metadata"  # in the folder of a checkpoint in parts
SEAL = b"weft-crc32:"
SEALED = len(SEAL) + 8


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged or not safe to load; the message names the file and the reason."""


# ---- what may be in a checkpoint -------------------------------------------------------------------------------------

_SIMPLE = {type(None), bool, float, complex, str, torch.dtype, torch.device, torch.Size}
_SUB_BYTE = {getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in range(1, 8)}  # torch cannot save them
_LAYOUTS = (torch.strided, torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
_INSTEAD: list[tuple[Any, str]] = [
    (np.generic, "use .item()"),
    (np.ndarray, "use torch.from_numpy(...)"),
    (Enum, "use its .value"),
    (os.PathLike, "use str(...)"),
    ((date, clock_time), "use .isoformat()"),
    (timedelta, "use .total_seconds()"),
    (Tensor, "use a plain dense or sparse torch.Tensor (.full_tensor(), .dequantize(), ...)"),
    (frozenset, "use set(...)"),
    *((kind, f"use {kind.__name__}(...)") for kind in (str, int, float, bytes, dict, list, tuple, set)),
    (bytearray, "use bytes(...)"),
    (Callable, "leave it out and build it in code"),
]


def _refuse(value: object, where: str, why: str = "", instead: str = "") -> TypeError:
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    default = "use tensors, numbers, strings, lists and dicts"
    instead = instead or next((text for kinds, text in _INSTEAD if isinstance(value, kinds)), default)
    return TypeError(
        f"{where} is a {kind}{why}, which no checkpoint can hold (it could not be loaded safely); {instead}."
    )


def plain(
    value: Any,
    where: str = "state",
    *,
    clone: Literal["", "cpu", "there"] = "",
    kept: dict[str, Tensor] | None = None,
    _inside: tuple[int, ...] = (),
) -> Any:
    """The same value in new containers, with each tensor detached; or cloned, to the "cpu" or "there" on its device.

    `kept`: the copies of the call before by their place, which are written over; that costs a tenth of new ones.

    Holds only what loads with `weights_only=True`: tensors, None, bool, int, float, complex, str, bytes, list, tuple,
    set, dict, OrderedDict, Counter, torch.Size, dtype and device, exactly (no subclasses). Anything else raises a
    TypeError that names the key path, the type and what to use instead.
    """
    kind = type(value)
    if kind in _SIMPLE:
        return value
    if kind is Tensor or kind is torch.nn.Parameter:
        return _plain_tensor(value, where, clone, kept)
    if kind is int:
        if value.bit_length() > 2039:  # longer ones are written with an opcode that the safe loader does not know
            raise _refuse(value, where, " of more than 2039 bits", "use str(...)")
        return value
    if kind is bytes:
        if not value:  # pickle writes b"" as a call of `bytes`, which the safe loader refuses
            raise _refuse(value, where, " of length 0", "use None")
        return value
    if id(value) in _inside:
        raise _refuse(value, where, " that contains itself")
    inside = (*_inside, id(value))
    if kind is list or kind is tuple or kind is set:
        if kind is list and set(map(type, value)) <= _SIMPLE:  # a history of many floats
            return list(value)
        return kind(
            [plain(item, f"{where}[{i}]", clone=clone, kept=kept, _inside=inside) for i, item in enumerate(value)]
        )
    if kind is dict or kind is OrderedDict or kind is Counter:
        result = kind()
        for key, item in value.items():
            if isinstance(key, Tensor):
                raise _refuse(key, f"a key of {where}", instead="use a string")
            new_key = key if type(key) is str else plain(key, f"key {key!r} of {where}", _inside=inside)
            result[new_key] = plain(item, f"{where}[{key!r}]", clone=clone, kept=kept, _inside=inside)
        if kind is OrderedDict and vars(value):  # module.state_dict() carries the modules' versions as `_metadata`
            vars(result).update(plain(vars(value), f"{where}.__dict__", clone=clone, kept=kept, _inside=inside))
        return result
    raise _refuse(value, where)


def _plain_tensor(tensor: Tensor, where: str, clone: str, kept: dict[str, Tensor] | None) -> Tensor:
    unusual = tensor.is_quantized or tensor.is_nested or tensor.is_meta or tensor.dtype in _SUB_BYTE
    if unusual or tensor.layout not in _LAYOUTS:
        raise _refuse(tensor, where, f" of kind {tensor.dtype}, {tensor.layout}, {tensor.device}")
    tensor = tensor.detach()
    if clone:
        before = None if kept is None else kept.get(where)
        if before is not None and tensor.layout is torch.strided and _alike(before, tensor):
            return before.copy_(tensor)
        copy = tensor.to("cpu" if clone == "cpu" else tensor.device, copy=True)
        if kept is not None:
            kept[where] = copy
        return copy
    # A view would bring its whole storage into the file.
    is_view = tensor.layout is torch.strided and tensor.untyped_storage().nbytes() > tensor.nbytes
    return tensor.clone() if is_view else tensor


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.layout, a.shape, a.stride()) == (b.dtype, b.layout, b.shape, b.stride())


# ---- one file --------------------------------------------------------------------------------------------------------


def write(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write `state` to `path` so that, whatever happens, the old or the new file is there whole.

    Raises TypeError, naming the key, for what could not be loaded safely (see `plain`), and OSError, naming the path
    and the bytes needed, if the disk fails; then an older file at `path` is unchanged. Missing folders are made.
    """
    path = local(path)
    state, sealed = plain(state), _Sealed()
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, lambda file: sealed.write_state(state, file), lambda file: _verify(file, path, sealed.seal), sealed)


def read(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """The dict in the file, after every byte was verified; only data is loaded, never code.

    Raises CheckpointError, naming the file and the reason, if it is missing, damaged, no zip file of torch, not a dict,
    or holds anything that would need unsafe loading; and for URLs.
    """
    path = local(path)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist or is no regular file"
        raise CheckpointError(f"{path} {found}; expected a checkpoint file.")
    try:
        with open(path, "rb") as file:  # verified and loaded from one open file: it cannot be exchanged in between
            _verify(file, path)
            file.seek(0)
            state = _load(file, map_location)
    except (CheckpointError, MemoryError, torch.OutOfMemoryError):
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    except Exception as error:
        raise CheckpointError(f"{path} cannot be loaded safely: {_reason(error)}.") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}; expected a dict.")
    return state


def local(path: str | os.PathLike[str]) -> Path:
    """`path`, if it is one on this machine. Raises CheckpointError for a URL."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", os.fspath(path)):  # Path("http://x") has one slash left
        raise CheckpointError(f"{os.fspath(path)} is a URL; download it and pass the file's path.")
    return Path(path)


def _load(file: IO[bytes], map_location: Any) -> Any:
    # An explicit weights_only=True is not overruled by TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD; the default is.
    return torch.load(file, map_location=map_location, weights_only=True, mmap=False)


def _reason(error: Exception) -> str:
    unsafe = re.search(r"GLOBAL (\S+) was not an allowed global|unsupported GLOBAL (\S+)", str(error))
    if unsafe:
        name = unsafe.group(1) or unsafe.group(2)
        return f"it holds {name}, which is code, not data (save the weights alone where it was made)"
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0].strip().rstrip('.')}"


class _Sealed:
    """The file that torch writes a state to: its checksum is taken on the way, and put at its end.

    Nothing is copied in memory, so that no thread that trains meanwhile waits for the interpreter's lock.

    Torch writes once from front to back. What its writer is told must not raise: it goes on writing while it is taken
    down, where a second error would end the process. So an error waits until it is through.
    """

    def __init__(self) -> None:
        self.size, self._checksum, self._held, self._error = 0, 0, b"", None
        self._file: Any = None

    @property
    def seal(self) -> bytes:
        """What the file ends with."""
        return SEAL + b"%08x" % self._checksum

    def write_state(self, state: Any, file: IO[bytes]) -> None:
        self._file = file
        with torch_files.patch("save.compute_crc32", True):  # pyright: ignore[reportAttributeAccessIssue]
            torch.save(state, self)  # pyright: ignore[reportArgumentType]: it needs no more than these methods
        self._pass_on(self._held[:-2] + struct.pack("<H", SEALED))  # the length of the archive's comment, so far 0
        seal, self.size = self.seal, self.size + SEALED
        if self._error is None:
            file.write(seal)
        else:
            raise self._error

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if len(view) < SEALED:
            self._held += bytes(view)
            view, self._held = memoryview(self._held[:-SEALED]), self._held[-SEALED:]
            self._pass_on(view)
        else:
            self._pass_on(self._held)
            self._pass_on(view[:-SEALED])
            self._held = bytes(view[-SEALED:])
        return len(data)

    def flush(self) -> None:
        """Nothing: the file is flushed when it is whole."""

    def _pass_on(self, data: Any) -> None:
        self.size += len(data)
        if self._error is None:
            try:
                self._checksum = zlib.crc32(data, self._checksum)
                self._file.write(data)
            except BaseException as error:  # noqa: BLE001, raised when torch is through
                self._error = error

    def __len__(self) -> int:
        return self.size


def _verify(file: IO[bytes], path: Path, seal: bytes = b"") -> None:
    """Raise CheckpointError unless every byte of the file is as it was written, as far as its checksums reach.

    With a `seal`, taken while it was written: unless it ends with that, and is built like a checkpoint.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(16)
    if not head.startswith(b"PK\x03\x04"):
        found = f"begins with {head!r}" if size else "is empty"
        raise CheckpointError(f"{path} is no checkpoint: it {found}, and torch's files are zip archives.")
    file.seek(max(0, size - SEALED))
    tail = file.read()
    is_sealed = tail.startswith(SEAL)
    if seal:
        is_damaged = tail != seal
    else:
        is_damaged = is_sealed and tail != SEAL + b"%08x" % _crc32(file, size - SEALED)
    if is_damaged:
        raise CheckpointError(f"{path} is damaged: its checksum does not match its content.")
    try:
        with zipfile.ZipFile(file) as archive:
            entries, comment = archive.infolist(), archive.comment
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            # Before they are read: compressed or overlapping parts may be any number of times as long as the file.
            stored = stored and sum(entry.file_size for entry in entries) <= size
            damaged = archive.testzip() if stored and not is_sealed else None  # the seal is over all bytes
    except Exception as error:  # zipfile raises a dozen types for damaged headers
        raise CheckpointError(f"{path} is damaged or cut off: {type(error).__name__}: {error}.") from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: the checksum of its part {damaged!r} is wrong.")
    if comment and (comment != tail or not tail.startswith(SEAL)):
        raise CheckpointError(f"{path} is damaged: bytes at its end are missing or left over.")
    names = [entry.filename for entry in entries]
    top = names[0].split("/")[0] if names else ""
    sane = all(re.fullmatch(r"[^/\\:]+(/[^/\\:]+)+", name) and ".." not in name.split("/") for name in names)
    is_script = f"{top}/constants.pkl" in names  # which torch.load would hand on to torch.jit.load
    if is_script or not (sane and stored and len(set(names)) == len(names) and f"{top}/data.pkl" in names):
        raise CheckpointError(f"{path} is no file of torch.save: its parts are {names[:5]}.")


def _crc32(file: IO[bytes], size: int) -> int:
    checksum = 0
    file.seek(0)
    while size > 0 and (chunk := file.read(min(size, 1 << 20))):
        checksum = zlib.crc32(chunk, checksum)
        size -= len(chunk)
    return checksum


def put(path: Path, data: bytes | memoryview) -> None:
    """Make `data` the content of `path` at one instant; a crash leaves the old content or the new."""

    def check(file: IO[bytes]) -> None:
        if _crc32(file, len(data) + 1) != zlib.crc32(data):
            raise OSError(errno.EIO, "what was read back differs from what was written")

    _replace(path, lambda file: file.write(data), check, data)


def _replace(path: Path, fill: Callable[[IO[bytes]], Any], check: Callable[[IO[bytes]], None], sized: Sized) -> None:
    """Make what `fill` writes into a file the content of `path` at one instant, after `check` has looked at it."""
    # In the same folder: only there is the rename atomic. $TMPDIR is often another disk.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}@{socket.gethostname()}.tmp")
    try:
        with open(temporary, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        with open(temporary, "rb") as file:
            check(file)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        text = f"{path} could not be written: {error.strerror} ({len(sized)} bytes needed, {free} free on the disk)"
        unchanged = "; an older file of this name is unchanged" if temporary.exists() else ""
        raise OSError(error.errno, text + unchanged) from error
    finally:
        with contextlib.suppress(OSError):  # gone already if all went well
            temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Have the names in `folder` on the disk before anything goes on; nothing where a system cannot do that."""
    if os.name == "nt":  # folders cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(handle)


# ---- a checkpoint in parts, which is a folder (`weft.checkpoint.parts`)


def is_in_parts(path: Path) -> bool:
    """Whether `path` is a checkpoint in parts (a folder of checkpoints is not)."""
    return (path / STATE).is_file()


def is_torchs(path: Path) -> bool:
    """Whether `path` is a folder that `torch.distributed.checkpoint` wrote, and weft did not."""
    return (path / METADATA).is_file() and not is_in_parts(path)


# ---- writing: every process calls
# --------------------------------------------------------------------------------------


def remove(path: Path) -> None:
    """Delete a checkpoint, in parts or one file; nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
