"""Small C libraries: built by g++ from the text of a graph, kept as files, loaded and called.

    build(path, source, kernels)
    run = load(path)
    outputs = run([*batch, *fixed])

A file ends with a digest of itself, and is loaded only if that is right: one that was cut short is made anew. Calls
from several threads, and from within each other, do not meet: each takes memory for its temporaries of its own.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.compile.cache import is_private
from weft.compile.thin import GUARD, CannotThin

MIN_FREE_BYTES = 2**30  # on the disk, for a precompiled header of 150 MB
MAX_HEADERS = 2  # kept; the least recently used go first


class KernelsFailed(RuntimeError):
    """The C++ compiler did not take the kernels; with its first complaint."""


def is_supported() -> bool:
    """Whether this system and this torch can build and call such libraries."""
    needed = ("unsafe_alloc_void_ptr_from_tensor", "alloc_tensors_by_stealing_from_void_ptrs")
    return hasattr(os, "memfd_create") and all(hasattr(getattr(torch._C, "_aoti", None), name) for name in needed)


# ---- building --------------------------------------------------------------------------------------------------------


def build(path: Path, source: str, kernels: str) -> None:
    """Write the library of a graph to `path`, whole or not at all. Raises CannotThin, KernelsFailed."""
    compiler, flags, libraries = _commands()
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        folder = Path(name)
        (folder / "run.cpp").write_text(source)
        (folder / "kernels.cpp").write_text(kernels + GUARD)
        header = _header(path.parent, compiler, flags)
        plain = [compiler, *flags, "-c", "kernels.cpp", "-o", "kernels.o"]
        first = _started(plain if header is None else [*plain, "-include", str(header)], folder)
        thin = ["-fno-exceptions", "-fasynchronous-unwind-tables", "-O1"]  # an exception of a kernel passes through
        second = _started([compiler, *flags, *thin, "-c", "run.cpp", "-o", "run.o"], folder)
        complaint, of_run = _complaint(first), _complaint(second)
        if complaint is not None and header is not None:  # damaged, perhaps: it is made anew
            header.with_name(f"{header.name}.gch").unlink(missing_ok=True)
            complaint = _complaint(_started(plain, folder))
        if complaint is not None:
            raise KernelsFailed(complaint)
        if of_run is not None:
            raise CannotThin(of_run)
        link = [compiler, "-shared", "-fPIC", "kernels.o", "run.o", "-o", "graph.so", *libraries]
        gold = ["-fuse-ld=gold"] if shutil.which("ld.gold") else []
        if (complaint := _complaint(_started(link + gold, folder))) is not None:
            raise CannotThin(complaint)
        code = (folder / "graph.so").read_bytes()
        with (folder / "graph.so").open("ab") as file:
            file.write(hashlib.sha256(code).digest())
        (folder / "graph.so").chmod(0o700)
        os.replace(folder / "graph.so", path)


def _started(command: list[str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _complaint(process: subprocess.Popen[str]) -> str | None:
    """The first error of a compiler, None if there was none."""
    _, text = process.communicate()
    if process.returncode == 0:
        return None
    lines = text.strip().splitlines() or [f"{process.args[0]} gave {process.returncode}"]  # type: ignore[index]
    return next((line for line in lines if "error" in line.lower()), lines[0])[:300]


def _commands() -> tuple[str, list[str], list[str]]:
    """Compiler, flags and libraries, as inductor has them with its present options; without debugging information."""
    from torch._inductor.cpp_builder import CppBuilder, CppTorchDeviceOptions
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    def options(compile_only: bool) -> CppTorchDeviceOptions:
        units = pick_vec_isa()
        return CppTorchDeviceOptions(vec_isa=units, device_type="cpu", aot_mode=True, compile_only=compile_only)

    builder = CppBuilder(name="x", sources="SOURCE", output_dir="/", BuildOption=options(compile_only=True))
    compiler, *flags = shlex.split(builder.get_command_line())
    left_out = ("SOURCE", "-g1", "-Wall", "-pedantic")
    flags = [flag for flag in flags[: flags.index("-c")] if flag not in left_out]
    linking = options(compile_only=False)
    libraries = [f"-L{folder}" for folder in linking.get_libraries_dirs()]
    return compiler, [*flags, "-w"], [*libraries, *(f"-l{name}" for name in linking.get_libraries())]


# ---- a header that is compiled once ----------------------------------------------------------------------------------


_asked: set[Path] = set()


def prepare_header(folder: Path) -> None:
    """Have what all kernels include compiled once in the background, if that is worth it and not yet done.

    It takes 3 s of another core and 150 MB, and saves each graph a second. g++ writes to another name and the file
    appears when it is complete. Whoever comes before takes the way without it, with the same bits. A process asks once.
    """
    from torch._inductor.cpp_builder import is_gcc

    compiler, flags, _ = _commands()
    header = folder / f"kernels-{_header_key(compiler, tuple(flags))}.h"
    compiled = header.with_name(f"{header.name}.gch")
    if compiled.exists() or compiled in _asked or not is_gcc() or (os.cpu_count() or 1) < 2:
        return
    _asked.add(compiled)
    if shutil.disk_usage(folder).free < MIN_FREE_BYTES:
        return
    for old in sorted(folder.glob("kernels-*.gch"), key=lambda p: p.stat().st_mtime)[: 1 - MAX_HEADERS or None]:
        old.unlink(missing_ok=True)
    handle, part = tempfile.mkstemp(dir=folder, suffix=".part")
    os.close(handle)
    header.unlink(missing_ok=True)
    header.write_text("#include <torch/csrc/inductor/cpp_prefix.h>\n")
    header.chmod(0o600)
    command = [compiler, *flags, "-x", "c++-header", str(header), "-o", part]
    nice = [] if shutil.which("nice") is None else ["nice", "-n", "10"]
    # by a shell that does not wait: whoever asked may be gone before it is done
    script = '{ "$@" && mv -f "$PART" "$DONE" || rm -f "$PART"; } >/dev/null 2>&1 </dev/null &'
    subprocess.run(
        ["sh", "-c", script, "sh", *nice, *command],
        env={**os.environ, "PART": part, "DONE": str(compiled)},
        start_new_session=True,
        check=False,
    )


def _header(folder: Path, compiler: str, flags: list[str]) -> Path | None:
    header = folder / f"kernels-{_header_key(compiler, tuple(flags))}.h"
    compiled = header.with_name(f"{header.name}.gch")
    return header if compiled.exists() and is_private(compiled) and header.exists() and is_private(header) else None


@functools.cache
def _header_key(compiler: str, flags: tuple[str, ...]) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    return hashlib.sha256(repr((version, flags, torch.version.git_version)).encode()).hexdigest()[:16]


# ---- loading and calling ---------------------------------------------------------------------------------------------

_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype, _capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


def load(path: Path) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    """The graph in a file that `build` wrote. Inputs after the moving ones must be the same objects in every call."""
    code = path.read_bytes()
    if hashlib.sha256(code[:-32]).digest() != code[-32:]:
        raise OSError(f"{path} is damaged")
    library = _opened(code[-32:], code[:-32])
    _, _, _, moving = (ctypes.c_int64 * 4).in_dll(library, "weft_counts")
    run = library.weft_run
    run.argtypes = [ctypes.c_void_p] * 4
    aoti: Any = torch._C._aoti  # type: ignore[attr-defined]
    handle_of, tensors_of, spare = (
        aoti.unsafe_alloc_void_ptr_from_tensor,
        aoti.alloc_tensors_by_stealing_from_void_ptrs,
        [],
    )

    def call(given: Sequence[Tensor]) -> Sequence[Tensor]:
        try:
            memory = spare.pop()
        except IndexError:  # the first call, or another is under way
            memory = _Memory(library, given)
        inputs, outputs = memory.inputs, memory.outputs
        for i in range(moving):
            inputs[i] = _pointer(handle_of(given[i]), None)
        if run(*memory.addresses):
            raise RuntimeError(f"a compiled graph failed: {(memory.why.value or b'').decode()}")
        found = [_capsule(pointer, None, None) for pointer in outputs]
        spare.append(memory)
        return tensors_of(found)

    return call


_libraries: dict[bytes, ctypes.CDLL] = {}


def _opened(digest: bytes, code: bytes) -> ctypes.CDLL:
    """The library that these bytes are, from memory: whatever happens to its file cannot reach what runs."""
    if digest not in _libraries:
        file = os.memfd_create("weft-graph")  # stays open: under a name that comes again, the loader gives the old one
        with open(file, "wb", closefd=False) as memory:
            memory.write(code)
        _libraries[digest] = ctypes.CDLL(f"/proc/self/fd/{file}")
    return _libraries[digest]


class _Memory:
    """What one call at a time uses: handles of inputs and outputs, and the temporaries that stay."""

    def __init__(self, library: ctypes.CDLL, given: Sequence[Tensor]) -> None:
        num_inputs, num_outputs, num_kept, moving = (ctypes.c_int64 * 4).in_dll(library, "weft_counts")
        if len(given) != num_inputs:
            raise RuntimeError(f"a compiled graph takes {num_inputs} tensors, it was given {len(given)}")
        self.fixed = given[moving:]
        self.inputs = (ctypes.c_void_p * num_inputs)()
        self.outputs = (ctypes.c_void_p * num_outputs)()
        self.kept = (ctypes.c_void_p * max(1, num_kept))()
        self.why = ctypes.c_char_p()
        self.addresses = (*map(ctypes.addressof, (self.inputs, self.outputs, self.kept, self.why)),)
        handle_of = torch._C._aoti.unsafe_alloc_void_ptr_from_tensor  # type: ignore[attr-defined]
        self.inputs[moving:] = [_pointer(handle_of(t), None) for t in self.fixed]
        weakref.finalize(self, _free, library.weft_free, (self.inputs, self.kept)).atexit = False


def _free(free: Callable[[Any, Any], None], arrays: Sequence[ctypes.Array[ctypes.c_void_p]]) -> None:
    for handles in arrays:
        free(ctypes.c_void_p(ctypes.addressof(handles)), ctypes.c_int64(len(handles)))
