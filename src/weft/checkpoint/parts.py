"""Checkpoints in parts: a folder in which every process wrote the shards it holds, there whole or not at all.

    step-000000123.ckpt/  .metadata  __0_0.distcp  __1_0.distcp  ...  state.ckpt

The shards are in the format of `torch.distributed.checkpoint`, so torch's own tools read them too. `state.ckpt` holds
all
else: in place of each sharded tensor its name, and the size and checksum of every other file. All is written into a
temporary folder, read back and compared by the process that wrote it, and committed by one rename.

Nothing in the folder is trusted: checksums come before use, `.metadata`, which is a pickle, is read by an unpickler
that knows only the classes it needs, and tensors with `weights_only=True`.
"""

from __future__ import annotations

import ctypes
import io
import os
import pickle
import shutil
import socket
import threading
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weft.checkpoint import archive
from weft.checkpoint.archive import METADATA, STATE, CheckpointError, is_in_parts, remove, sync_folder

if TYPE_CHECKING:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.device_mesh import DeviceMesh

    from weft.devices.processes import Processes

MARK = "weft.shards"
_CLASSES = {  # what `.metadata` is made of; none of them runs anything when it is made or filled
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),  # a layout by its name
    "torch": (
        "Size",
        *sorted(str(v).removeprefix("torch.") for v in vars(torch).values() if isinstance(v, torch.dtype)),
    ),
    "pathlib": ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath"),  # Python 3.13
}


def write_parts(path: Path, state: Mapping[str, Any], processes: Processes) -> tuple[dict[str, Any], Callable]:
    """Write the sharded tensors of `state` beside `path`. Call in every process.

    Returns the state without them, and a function (path, state) that commits all of it, for the first process to call.
    Raises OSError in every process if one of them could not write, or read back something else.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    found: dict[str, Tensor] = {}
    rest = _take_out(dict(state), "", found)
    temporary = processes.first(partial(_make_folder, path))
    try:
        try:
            save(found, storage_writer=FileSystemWriter(temporary, sync_files=True))
        except CheckpointException as error:
            raise OSError(f"{path} could not be written: {_reason(error)}") from error
        if told := [reason for reasons in processes.gather(_read_back(found, temporary)) for reason in reasons]:
            raise OSError(f"{path} could not be written: {told[0]}")
    except OSError:
        if processes.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return rest, partial(_commit, temporary)


def _read_back(found: Mapping[str, Tensor], folder: Path) -> list[str]:
    """What differs in the files from what this process wrote, in words."""
    try:
        metadata = read_metadata(folder / METADATA)
        for name, value in found.items():  # one by one: there may be no room for all of them twice
            again = {name: torch.empty_like(value)}
            _load(again, folder, metadata, alone=True)
            if not _same(value, again[name]):
                return [f"{name} was read back as something else."]
    except CheckpointError as error:
        return [str(error)]
    return []


def _make_folder(path: Path) -> Path:
    name = f".{path.name}.{os.getpid()}-{threading.get_ident()}@{socket.gethostname()}.tmp"
    temporary = path.with_name(name)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def _same(a: Any, b: Any) -> bool:
    one, other = (t.to_local().cpu().reshape(-1).view(torch.uint8) for t in (a, b))
    return one.equal(other)


def _commit(temporary: Path, path: Path, state: Mapping[str, Any]) -> None:
    """Put `state` beside the shards, and the folder in its place at one instant. Call in the first process."""
    try:
        files = {file.name: _size_and_checksum(file) for file in sorted(temporary.iterdir())}
        archive.write(temporary / STATE, {**state, MARK: files})
        sync_folder(temporary)
        if not (path.exists() and _exchange(temporary, path)):
            if (
                path.exists()
            ):  # no folder can be renamed onto another; a crash right here costs this step's earlier save
                os.replace(path, temporary.with_name(temporary.name.replace(path.name, f"{path.name}.old", 1)))
            os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        for left in path.parent.glob(f".{path.name}.*.tmp"):
            remove(left)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change names at one instant, where the system can (Linux): whether it did."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    at_cwd, exchange = -100, 2
    return rename(at_cwd, os.fsencode(one.absolute()), at_cwd, os.fsencode(other.absolute()), exchange) == 0


def _take_out(value: Any, where: str, found: dict[str, Tensor]) -> Any:
    """`value` with each sharded tensor in it put into `found`, and what tells of it in its place."""
    if hasattr(value, "to_local"):
        found[where] = value.detach()
        return {MARK: where, "shape": list(value.shape), "dtype": value.dtype, **_layout_of(value, where)}
    if isinstance(value, dict):
        return _alike(value, {k: _take_out(v, f"{where}/{k}" if where else str(k), found) for k, v in value.items()})
    if type(value) in (list, tuple):
        return type(value)(_take_out(v, f"{where}/{i}", found) for i, v in enumerate(value))
    return value


def _layout_of(value: Any, where: str) -> dict[str, Any]:
    from torch.distributed.tensor import Replicate, Shard

    def plain(placement: Any) -> list[Any]:
        if type(placement) is Shard:
            return [placement.dim]
        if type(placement) is Replicate:
            return []
        if hasattr(placement, "split_factor"):  # sharded by fully_shard, of a layer that tensor parallelism has split
            return [placement.dim, placement.split_factor]
        raise TypeError(f"{where} is a sharded tensor of the kind {placement}, which no checkpoint can hold.")

    return {"mesh": list(value.device_mesh.mesh_dim_names or ()), "placements": [plain(p) for p in value.placements]}


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_parts(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The state in the folder, without its sharded tensors, after every byte of every file was verified.

    Raises CheckpointError naming what is missing or damaged.
    """
    state = archive.read(path / STATE, map_location)
    files = state.get(MARK)
    if not isinstance(files, dict):
        raise CheckpointError(f"{path / STATE} does not say which files belong to it.")
    there = {file.name for file in path.iterdir()} - {STATE}
    if missing := sorted(files.keys() - there):
        raise CheckpointError(f"{path} is damaged: it lacks {missing[0]}.")
    for name in sorted(there):
        if (file := path / name).is_symlink() or files.get(name) != _size_and_checksum(file):
            raise CheckpointError(f"{file} is damaged, or does not belong there: its checksum is not the one saved.")
    return {key: value for key, value in state.items() if key != MARK}


def complete(state: Any, path: Path | None, processes: Any = None) -> dict[str, Any]:
    """`state` of a checkpoint in parts with the tensors that are in other files: as shards of `processes`, or whole."""
    if path is None or not is_in_parts(path):
        return state
    return (
        put_shards(state, path, processes.meshes)
        if processes is not None and processes.in_shards
        else put_whole(state, path)
    )


def put_whole(state: Any, path: Path) -> Any:
    """`state`, as `read_parts` gave it, with the sharded tensors in it, whole and on the CPU. One process is enough."""
    wanted = {mark[MARK]: torch.empty(mark["shape"], dtype=mark["dtype"]) for mark in _marks(state)}
    _load(wanted, path, alone=True)
    return _put_in(state, wanted)


def put_shards(state: Any, path: Path, meshes: Mapping[tuple[str, ...], DeviceMesh]) -> Any:
    """`state` with this process's shards of its tensors; `meshes` by the names of their dimensions. All must call."""
    from torch.distributed.tensor import Replicate, Shard, empty
    from torch.distributed.tensor.placement_types import _StridedShard

    kinds: tuple[Callable[..., Any], ...] = (
        Replicate,
        Shard,
        lambda dim, factor: _StridedShard(dim, split_factor=factor),
    )
    wanted = {}
    for mark in _marks(state):
        if (mesh := meshes.get(tuple(mark["mesh"]))) is None:
            raise CheckpointError(
                f"{path}: {mark[MARK]} is sharded over {mark['mesh']}; this problem has {list(meshes)}."
            )
        placements = [kinds[len(numbers)](*numbers) for numbers in mark["placements"]]
        wanted[mark[MARK]] = empty(mark["shape"], dtype=mark["dtype"], device_mesh=mesh, placements=placements)
    _load(wanted, path)
    return _put_in(state, wanted)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a folder that `torch.distributed.checkpoint` wrote, whole and on the CPU, by name."""
    entries = read_metadata(path / METADATA).state_dict_metadata
    tensors: dict[str, Any] = dict(entries)
    found = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in tensors.items()}
    _load(found, path, alone=True)
    return found


def read_metadata(path: Path) -> Metadata:
    """What the `.metadata` of a checkpoint says. Nothing in it is run.

    Raises CheckpointError naming the file and the class if it holds anything but what metadata is made of.
    """
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

    try:
        metadata = _Unpickler(io.BytesIO(path.read_bytes()), path).load()
        entries, places = metadata.state_dict_metadata, metadata.storage_data
        sane = type(metadata) is Metadata and all(type(e) is TensorStorageMetadata for e in entries.values())
        sane = sane and all(type(p) is _StorageInfo and not p.transform_descriptors for p in places.values())
        outside = [p.relative_path for p in places.values() if sane and Path(p.relative_path).name != p.relative_path]
    except CheckpointError:
        raise
    except Exception as error:  # an unpickler raises anything
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}.") from error
    if not sane or outside:
        raise CheckpointError(f"{path} tells of {outside[0] if outside else 'something else than tensors'}; not read.")
    return metadata


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if name not in _CLASSES.get(module, ()):
            raise CheckpointError(
                f"{self.path} cannot be loaded safely: it holds {module}.{name}, which is no part of a checkpoint's "
                "metadata."
            )
        return super().find_class(module, name)


def _reader(path: Path, metadata: Metadata) -> FileSystemReader:
    """Torch's reader of such folders, with metadata that was read safely."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import StorageMeta

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            metadata.storage_meta = StorageMeta(load_id=self.load_id)
            return metadata

    return Reader(path)


def _load(wanted: dict[str, Any], path: Path, metadata: Metadata | None = None, alone: bool = False) -> None:
    """Fill the tensors in `wanted`; `alone`: in this process, else in all together."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    metadata = metadata or read_metadata(path / METADATA)
    for name, value in wanted.items():
        entry = metadata.state_dict_metadata.get(name)
        if entry is None or not _is_like(entry, value):
            raise CheckpointError(f"{path / METADATA} does not tell of {name} with shape {tuple(value.shape)}.")
    try:
        with warnings.catch_warnings():  # torch 2.13 says that it loads in a single process, as it is told to
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            load(wanted, storage_reader=_reader(path, metadata), no_dist=alone)
    except CheckpointException as error:
        raise CheckpointError(f"{path} cannot be loaded: {_reason(error)}") from error


def _reason(error: Any) -> str:
    reason = next(iter(error.failures.values()))[0]  # of the first process that failed
    return f"{type(reason).__name__}: {reason}"


def _marks(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, dict):
        return [value] if MARK in value else [mark for v in value.values() for mark in _marks(v)]
    return [mark for v in value for mark in _marks(v)] if type(value) in (list, tuple) else []


def _put_in(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if MARK in value:
            return tensors[value[MARK]]
        return _alike(value, {k: _put_in(v, tensors) for k, v in value.items()})
    return type(value)(_put_in(v, tensors) for v in value) if type(value) in (list, tuple) else value


def _alike(value: dict[Any, Any], items: dict[Any, Any]) -> dict[Any, Any]:
    if not isinstance(value, OrderedDict):
        return items
    made = OrderedDict(items)
    vars(made).update(vars(value))  # module.state_dict() carries the modules' versions as `_metadata`
    return made


def _size_and_checksum(file: Path) -> list[int]:
    size, checksum = 0, 0
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}.") from error
    return [size, checksum]


def _is_like(entry: Any, value: Tensor) -> bool:
    return entry.size == value.shape and entry.properties.dtype == value.dtype
