"""A function of tensors as one compiled graph: traced, made safe, compiled by inductor, kept on disk.

    graph, constants = trace(fn, inputs)                            # fn(*tensors) -> tuple of tensors
    run = compile_graph(graph, [*inputs, *constants], moving=2)
    outputs = run([x, y, *inputs[2:], *constants])                  # what fn changes in place, is changed in place

On a CPU the graph is a library (`weft.compile.thin`) or, where that cannot be had, an AOTInductor package: no Python
between its kernels, and a later process that traces the same graph loads it in milliseconds. On CUDA it is captured as
a CUDA graph. Tensors that `fn` reaches otherwise become inputs, so that later changes in place are seen.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import os
import platform
import re
import sysconfig
import tempfile
import threading
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from weft.compile import library
from weft.compile.cache import cache_folder, is_private, torchs_cache
from weft.compile.lifting import NESTED, ByReference, CannotCompile, NoReading, inputs_for_constants
from weft.compile.thin import VERSION, CannotThin, thin_source

Compiled = Callable[[Sequence[Tensor]], Sequence[Tensor]]

MAX_NODES = 12000  # of a graph; inductor's time grows with them, 5 to 20 ms each
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
        with ByReference(MAX_NODES), NoReading():
            return fn(*given)

    with _use_lazy_graph_module(True), _no_garbage_collection():  # half of the time otherwise
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the eager step has shown them
                graph = make_fx(lifted, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
        except CannotCompile as reason:
            if (line := _users_line(reason)) is None:
                raise
            raise type(reason)(f"{reason} ({line})") from reason
        except Exception as error:
            is_nested = any(f.name == "_jvp_with_argnums" for f in traceback.extract_tb(error.__traceback__))
            raise CannotCompile(f"{NESTED if is_nested else _first_line(error)} ({_where(error)})") from error
        _spell_out_alpha(graph.graph)
        _draw_in_order(graph.graph)
        _merge_scalars(graph.graph)
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


def _draw_in_order(graph: fx.Graph) -> None:
    """Have random numbers drawn into memory that is contiguous, and then seen in the shape that was asked for.

    They are drawn in the order of memory. Inductor gives a tensor like another (the mask of a dropout) strides of its
    own choice, and with them the numbers would end up at other places than in eager code.
    """
    aten = torch.ops.aten
    for node in list(graph.nodes):
        tags, value = getattr(node.target, "tags", ()), node.meta.get("val")
        if torch.Tag.nondeterministic_seeded not in tags or not isinstance(value, Tensor) or not node.args:
            continue
        model = node.args[0]
        is_filled = isinstance(model, fx.Node) and model.target is aten.empty_like.default and len(model.users) == 1
        is_like = isinstance(model, fx.Node) and node.target._opname.endswith("_like")
        order = sorted(range(value.dim()), key=lambda d: (-value.stride(d), d))
        if not (is_filled or is_like) or not value.permute(order).is_contiguous():
            continue
        if order != sorted(order) and re.search("normal|randn", node.target._opname):
            continue  # torch draws others where memory is not contiguous
        with graph.inserting_before(node):
            dtype, shape = model.meta["val"].dtype, [value.shape[d] for d in order]
            options = {"dtype": dtype, "device": value.device, "pin_memory": False}
            room = graph.call_function(aten.empty.memory_format, (shape,), options)
            drawn = graph.call_function(node.target, (room, *node.args[1:]), node.kwargs)
            back = graph.call_function(aten.permute.default, (drawn, [order.index(d) for d in range(value.dim())]))
        room.meta["val"] = drawn.meta["val"] = value.permute(order)
        back.meta["val"] = value
        node.replace_all_uses_with(back)
        graph.erase_node(node)
        if is_filled:
            graph.erase_node(model)


def _merge_scalars(graph: fx.Graph) -> None:
    """Compute each scalar once: bias corrections from a counter that all parameters share, say."""
    memory = {node: i for i, node in enumerate(graph.nodes)}  # which one a node's tensor is in
    writes: dict[int, int] = {}
    so_far: dict[fx.Node, list[int]] = {}  # for each node, how often what it reads was written before
    for node in graph.nodes:
        so_far[node] = [writes.get(memory[n], 0) for n in node.all_input_nodes]
        for value, is_write in _aliased(node):
            memory[node] = memory[value]
            writes[memory[value]] = writes.get(memory[value], 0) + is_write
    known: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        tags = getattr(node.target, "tags", ())
        is_free = _is_scalar(node) and memory[node] not in writes and not _aliased(node)
        if node.op == "call_function" and is_free and torch.Tag.nondeterministic_seeded not in tags:
            key = repr((node.target, node.args, node.kwargs, so_far[node], node.meta["val"].dtype))
            if (first := known.setdefault(key, node)) is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)


def _aliased(node: fx.Node) -> list[tuple[fx.Node, bool]]:
    """What a node's tensor shares memory with, and whether the node writes to it."""
    schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
    if schema is None:
        return []
    taken = [*zip(schema.arguments, node.args, strict=False)]
    taken += [(a, node.kwargs[a.name]) for a in schema.arguments if a.name in node.kwargs]
    found: list[tuple[fx.Node, bool]] = []
    for argument, value in taken:
        if argument.alias_info is not None:
            values = value if isinstance(value, list | tuple) else [value]
            found += [(v, argument.alias_info.is_write) for v in values if isinstance(v, fx.Node)]
    return found


def _is_scalar(node: fx.Node) -> bool:
    return isinstance(value := node.meta.get("val"), Tensor) and value.dim() == 0


def _keep_scalars(graph: fx.Graph) -> None:
    """Have every scalar that tensors are computed with put into memory.

    Inductor computes such a scalar anew for each vector of the tensors: both powers of Adam's bias correction for every
    16 elements of a weight, which costs as much as the rest of its step. What `as_strided` looks at, it keeps.
    """

    for node in list(graph.nodes):
        vectors = [user for user in node.users if not _is_scalar(user) and user.op == "call_function"]
        if node.op == "call_function" and _is_scalar(node) and vectors:
            with graph.inserting_after(node):
                kept = graph.call_function(torch.ops.aten.as_strided.default, (node, [], []))
            kept.meta = dict(node.meta)
            node.replace_all_uses_with(kept, lambda user, vectors=vectors: user in vectors)


def compile_graph(graph: fx.GraphModule, inputs: Sequence[Tensor], moving: int) -> Compiled:
    """`graph` compiled for inputs of these shapes, of which the first `moving` are other tensors in every call.

    Raises CannotCompile where that fails (no C++ compiler, say).
    """
    detached, reason = [t.detach() for t in inputs], None
    folder = cache_folder()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own deprecations
            if inputs[0].is_cuda:
                with torchs_cache():
                    return _captured(graph, detached, moving)
            key = _key(graph, inputs, moving)
            if (loaded := _found(folder, key)) is None:
                with torchs_cache():
                    reason = _write(folder, key, graph, detached, moving)
                loaded = _found(folder, key)
    except CannotCompile:
        raise
    except Exception as error:
        if "InvalidCxxCompiler" in repr(error):
            raise CannotCompile("there is no working C++ compiler (g++ or clang++; CXX names another)") from error
        raise CannotCompile(f"the compiler failed: {_first_line(error)}") from error
    if reason is not None:
        warnings.warn(
            f"compile: what torch {torch.__version__} generates is not as expected ({reason}), so torch's own package "
            "is built: it takes longer and computes the same.",
            stacklevel=2,
        )
    if loaded is None:
        raise CannotCompile(f"what the compiler made in {folder} cannot be loaded")
    return loaded


def get_ready(device: torch.device) -> None:
    """A graph will be made: where this machine has never made one, begin with what takes longest, on another core."""
    if device.type != "cpu" or not library.is_supported():
        return
    with contextlib.suppress(Exception):  # what is wrong is told where the graph is made
        folder = cache_folder()
        if not any(path.suffix in (".gch", ".so", ".pt2") for path in folder.iterdir()):
            from torch._inductor import config  # pyright: ignore[reportPrivateImportUsage]

            with torchs_cache(), config.patch({"cpp.vec_isa_ok": OPTIONS["cpp.vec_isa_ok"]}):
                library.prepare_header(folder)


def _found(folder: Path, key: str) -> Compiled | None:
    """The graph that was made under `key`, None if there is none that can be used."""
    for path, load in ((folder / f"{key}.so", library.load), (folder / f"{key}.pt2", _package)):
        if path.exists() and is_private(path):
            with contextlib.suppress(Exception):  # damaged where the power went, say: it is made anew
                os.utime(path)
                return load(path)
    return None


def _package(path: Path) -> Compiled:
    aoti: Any = torch._C._aoti  # type: ignore[attr-defined]
    return aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1).run


OPTIONS = {"fallback_random": True, "compile_threads": 1, "aot_inductor.package": True, "cpp.vec_isa_ok": True}
"""For inductor. With fallback_random a graph draws the random numbers that eager code draws; with vec_isa_ok it takes
the vector units that the processor says it has, without building a program for each to see (4 s)."""


def _write(folder: Path, key: str, graph: fx.GraphModule, inputs: Sequence[Tensor], moving: int) -> str | None:
    """Compile the graph to a file in the cache: a small library, or torch's package where that cannot be had.

    Why it could not, None if it could or nobody need be told.
    """
    with _no_garbage_collection():
        try:
            reason = _run_inductor(folder, key, graph, inputs, moving, OPTIONS)
        except library.KernelsFailed:  # the compiler does not know these vector units: probe them after all
            from torch._inductor.cpu_vec_isa import valid_vec_isa_list

            valid_vec_isa_list.cache_clear()
            reason = _run_inductor(folder, key, graph, inputs, moving, OPTIONS | {"cpp.vec_isa_ok": None})
    made = sorted([*folder.glob("*.pt2"), *folder.glob("*.so")], key=lambda p: p.stat().st_mtime)
    for old in made[:-MAX_FILES]:
        old.unlink(missing_ok=True)
    return reason


def _run_inductor(
    folder: Path, key: str, graph: fx.GraphModule, inputs: Sequence[Tensor], moving: int, options: dict[str, Any]
) -> str | None:
    import torch._inductor
    from torch._inductor import config  # pyright: ignore[reportPrivateImportUsage]
    from torch._inductor.package.package import package_aoti

    path, failed = folder / f"{key}.so", list[library.KernelsFailed]()

    def make(wrapper: str, kernels: str) -> list[str]:
        try:
            library.build(path, thin_source(wrapper, inputs, moving), kernels)
        except library.KernelsFailed as error:
            failed.append(error)
            raise
        return [str(path)]

    try:
        with config.patch({"cpp.vec_isa_ok": options["cpp.vec_isa_ok"]}):
            library.prepare_header(folder)
        with _instead_of_package(make) as reasons:
            files = torch._inductor.aot_compile(graph, tuple(inputs), options=options)
    except Exception as error:
        if failed and error is not failed[0]:  # inductor dresses it up
            raise failed[0] from error
        raise
    if files != [str(path)]:
        handle, name = tempfile.mkstemp(dir=folder, suffix=".pt2")
        os.close(handle)
        package_aoti(name, files)  # type: ignore[arg-type]
        os.replace(name, folder / f"{key}.pt2")  # whole or not at all, also with several processes
    return next((str(reason) for reason in reasons if not reason.is_known), None)


_patching = threading.RLock()


@contextmanager
def _instead_of_package(make: Callable[[str, str], list[str]]) -> Iterator[list[CannotThin]]:
    """Within, in this thread: what inductor has written goes to `make`; where that gives up, torch builds its package.

    Gives a list, to which why it gave up is added.
    """
    from torch._inductor.codecache import AotCodeCompiler

    reasons = list[CannotThin]()
    stock, thread = AotCodeCompiler.__dict__["compile"], threading.get_ident()

    def compile(cls: Any, lowered: Any, wrapper: str, kernels: str, externs: Any, **others: Any) -> Any:
        if threading.get_ident() == thread:
            try:
                if externs or others.get("additional_files"):
                    raise CannotThin("an operation needs torch's executor", is_known=True)
                return make(wrapper, kernels)
            except CannotThin as reason:
                reasons.append(reason)
        return stock.__func__(cls, lowered, wrapper, kernels, externs, **others)

    if not library.is_supported():
        yield reasons
        return
    with _patching:
        AotCodeCompiler.compile = classmethod(compile)  # type: ignore[method-assign]
        try:
            yield reasons
        finally:
            AotCodeCompiler.compile = stock  # type: ignore[method-assign]


def _key(graph: fx.GraphModule, inputs: Sequence[Tensor], moving: int) -> str:
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
        moving,
        VERSION,
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
    """File and line of the user's last call, in which the reason is to be looked for; of anybody's if there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
    foreign = [f for f in frames if not f.filename.startswith((*ours, "<frozen", "<eval"))] or frames
    return _users_line(error) or _line(foreign[-1])


def _users_line(error: BaseException) -> str | None:
    frames = traceback.extract_tb(error.__traceback__)
    folders = tuple(sysconfig.get_paths()[k] for k in ("stdlib", "platstdlib", "purelib", "platlib"))
    libraries = (*folders, str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), "<frozen", "<eval")
    own = [f for f in frames if not f.filename.startswith(libraries)]
    return _line(own[-1]) if own else None


def _line(frame: traceback.FrameSummary) -> str:
    return f"{Path(frame.filename).name}, line {frame.lineno}: {frame.line}"
