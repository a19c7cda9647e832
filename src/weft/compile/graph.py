"""A function of tensors as one compiled graph: traced, made safe, compiled by inductor, kept on disk.

    graph, constants = trace(fn, inputs)                            # fn(*tensors) -> tuple of tensors
    run = compile_graph(graph, [*inputs, *constants], moving=2)
    outputs = run([x, y, *inputs[2:], *constants])                  # what fn changes in place, is changed in place

On a CPU the graph is an AOTInductor package: no guards and no Python between its kernels, and a later process that
traces the same graph loads it in milliseconds. On CUDA it is captured as a CUDA graph. Tensors that `fn` reaches
otherwise become inputs, so that later changes in place are seen.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import os
import platform
import tempfile
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from weft.compile.cache import cache_folder, is_private, torchs_cache
from weft.compile.lifting import ByReference, CannotCompile, NoReading, inputs_for_constants

Compiled = Callable[[Sequence[Tensor]], Sequence[Tensor]]

MAX_NODES = 6000  # of a graph; inductor's time grows with them, 5 to 20 ms each
MAX_FILES = 200  # packages in the cache folder; the least recently used go first


def trace(fn: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> tuple[fx.GraphModule, list[Tensor]]:
    """The graph of `fn`, and the tensors that it reaches otherwise, which are its further inputs (by reference).

    Nothing is computed, and no tensor is touched: each has a fake for the time of tracing, found by its identity when
    an operation meets it, below autograd. So it does not matter by which way `fn` came to a parameter, its gradients
    are those of eager, and code outside torch cannot freeze its results into the graph without a word.
    Raises CannotCompile with the reason and the line.
    """
    from torch.fx._lazy_graph_module import _use_lazy_graph_module
    from torch.fx.experimental.proxy_tensor import make_fx

    def lifted(*given: Tensor) -> Sequence[Tensor]:
        with ByReference(), NoReading():
            return fn(*given)

    with _use_lazy_graph_module(True), _no_garbage_collection():  # half of the time otherwise
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the eager step has shown them
                graph = make_fx(lifted, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
        except CannotCompile:
            raise
        except Exception as error:
            raise CannotCompile(f"{_first_line(error)} ({_where(error)})") from error
        if len(graph.graph.nodes) > MAX_NODES:
            raise CannotCompile(f"its graph has {len(graph.graph.nodes)} nodes, more than {MAX_NODES}")
        _spell_out_alpha(graph.graph)
        _keep_scalars(graph.graph)
        return inputs_for_constants(graph)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Tracing makes many small objects that all stay: looking through them again and again finds nothing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _spell_out_alpha(graph: fx.Graph) -> None:
    """Write `add(x, y, alpha=k)` as `x + k * y`.

    Inductor of torch 2.13 drops alpha where it fuses a matrix product with the addition (addmm in fx_passes/
    post_grad.py), which turns a coupled weight decay of 1e-4 into one of 1. Can go when that is fixed.
    """
    aten = torch.ops.aten
    for node in list(graph.nodes):
        alpha = node.kwargs.get("alpha", 1) if node.op == "call_function" else 1
        if alpha != 1 and node.target in (aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.sub_.Tensor):
            with graph.inserting_before(node):
                scaled = graph.call_function(aten.mul.Tensor, (node.args[1], alpha))
            node.args, node.kwargs = (node.args[0], scaled), {k: v for k, v in node.kwargs.items() if k != "alpha"}


def _keep_scalars(graph: fx.Graph) -> None:
    """Have every scalar that tensors are computed with put into memory.

    Inductor computes such a scalar anew for each vector of the tensors: both powers of Adam's bias correction for every
    16 elements of a weight, which costs as much as the rest of its step. What `as_strided` looks at, it keeps.
    """

    def is_scalar(node: fx.Node) -> bool:
        return isinstance(value := node.meta.get("val"), Tensor) and value.dim() == 0

    for node in list(graph.nodes):
        vectors = [user for user in node.users if not is_scalar(user) and user.op == "call_function"]
        if node.op == "call_function" and is_scalar(node) and vectors:
            with graph.inserting_after(node):
                kept = graph.call_function(torch.ops.aten.as_strided.default, (node, [], []))
            kept.meta = dict(node.meta)
            node.replace_all_uses_with(kept, lambda user, vectors=vectors: user in vectors)


def compile_graph(graph: fx.GraphModule, inputs: Sequence[Tensor], moving: int) -> Compiled:
    """`graph` compiled for inputs of these shapes, of which the first `moving` are other tensors in every call.

    Raises CannotCompile where that fails (no C++ compiler, say).
    """
    detached, folder = [t.detach() for t in inputs], cache_folder()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own deprecations
            if inputs[0].is_cuda:
                with torchs_cache():
                    return _captured(graph, detached, moving)
            path = folder / f"{_key(graph, inputs)}.pt2"
            if path.exists() and is_private(path):
                with contextlib.suppress(Exception):  # damaged where the power went, say: it is made anew
                    os.utime(path)
                    return _loaded(path)
            with torchs_cache():
                _write_package(path, graph, detached)
            return _loaded(path)
    except Exception as error:
        if "InvalidCxxCompiler" in repr(error):
            raise CannotCompile("there is no working C++ compiler (g++ or clang++; CXX names another)") from error
        raise CannotCompile(f"the compiler failed: {_first_line(error)}") from error


def _loaded(path: Path) -> Compiled:
    aoti: Any = torch._C._aoti  # type: ignore[attr-defined]
    return aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1).run


OPTIONS = {"fallback_random": True, "compile_threads": 1, "aot_inductor.package": True}
"""For inductor. With fallback_random a graph draws the random numbers that eager code draws."""


def _write_package(path: Path, graph: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
    import torch._inductor
    from torch._inductor.package.package import package_aoti

    files = torch._inductor.aot_compile(graph, tuple(inputs), options=OPTIONS)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".pt2")
    os.close(handle)
    package_aoti(name, files)  # type: ignore[arg-type]
    os.replace(name, path)  # whole or not at all, also with several processes
    packages = sorted(path.parent.glob("*.pt2"), key=lambda p: p.stat().st_mtime)
    for old in packages[:-MAX_FILES]:
        old.unlink(missing_ok=True)


def _key(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> str:
    """A hash of all that decides what the compiler makes, so that another machine or torch never loads it."""
    parts = [
        graph.graph.python_code("self").src,
        [(tuple(t.shape), tuple(t.stride()), str(t.dtype), str(t.device)) for t in inputs],
        torch.__version__,
        torch.version.git_version,
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        OPTIONS,
        *_cpu(),
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


@functools.cache
def _cpu() -> tuple[str, ...]:
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        model = next((line for line in lines if line.startswith("model name")), model)
    return platform.machine(), model, torch.backends.cpu.get_cpu_capability()


def _captured(graph: fx.GraphModule, inputs: Sequence[Tensor], moving: int) -> Compiled:
    """The compiled graph as a CUDA graph: one launch a call. Moving inputs are copied to where it reads them.

    What it replays are kernels at addresses: its fixed inputs must stay where they are (`addresses`), and of the CPU's
    tensors only scalars can be part of it, as copies. All graphs share the memory of what is between their kernels, as
    one runs after the other and what each gives is copied away at once.
    """
    from torch.fx._lazy_graph_module import _LazyGraphModule

    if elsewhere := [t for t in inputs if not t.is_cuda and t.dim()]:
        raise CannotCompile(
            f"a tensor of shape {tuple(elsewhere[0].shape)} that it needs is on the {elsewhere[0].device}"
        )
    _LazyGraphModule.force_recompile(graph)
    fused = torch.compile(graph, fullgraph=True, dynamic=False, options={"fallback_random": True})
    device, addresses = inputs[0].device, [t.data_ptr() for t in inputs[moving:]]
    on_cpu = {i: t for i, t in enumerate(inputs) if i >= moving and not t.is_cuda}
    inputs = [t.clone() if i < moving else t.to(device) for i, t in enumerate(inputs)]
    read = [bool(node.users) for node in graph.graph.nodes if node.op == "placeholder"]
    own = [(i, t) for i, t in enumerate(inputs[:moving]) if read[i]]  # the row numbers, mostly, nobody reads
    scalars = [(inputs[i], t) for i, t in on_cpu.items()]
    before, random = [t.clone() for t in inputs], torch.cuda.get_rng_state(device)
    with torch.no_grad(), torch.cuda.device(device):
        apart = _apart(device)
        pool, stream = apart.pool, apart.stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compile, and let libraries make their workspaces before the capture
                fused(*inputs)
            stream.synchronize()
            captured = torch.cuda.CUDAGraph()
            # thread_local: a thread that pins memory or writes a checkpoint must not break the capture
            with torch.cuda.graph(captured, pool, stream, capture_error_mode="thread_local"):
                outputs = fused(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, value in zip(inputs, before, strict=True):
            tensor.copy_(value)
    torch.cuda.set_rng_state(random, device)

    def run(given: Sequence[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad():  # a batch may require grad
            for mine, new in (*((t, given[i]) for i, t in own), *scalars):
                mine.copy_(new, non_blocking=True)
            captured.replay()
            return [o.clone() for o in outputs]  # the next replay writes to the same places

    run.addresses, run.apart = addresses, apart  # type: ignore[attr-defined]
    return run


class _Apart:
    """Memory and stream for all captures of a device: memory is only shared by captures on the same stream.

    Every captured graph holds it, and it goes with the last: torch refuses to capture into memory that no graph holds.
    """

    def __init__(self, device: torch.device) -> None:
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)


_held: weakref.WeakValueDictionary[torch.device, _Apart] = weakref.WeakValueDictionary()


def _apart(device: torch.device) -> _Apart:
    if (found := _held.get(device)) is None:
        found = _held[device] = _Apart(device)
    return found


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else 'no message'}"


def _where(error: BaseException) -> str:
    """File and line of the last call outside torch and weft, in which the reason is to be looked for."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
    foreign = [f for f in frames if not f.filename.startswith((*ours, "<"))] or frames
    return f"{Path(foreign[-1].filename).name}, line {foreign[-1].lineno}: {foreign[-1].line}"
