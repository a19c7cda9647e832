"""The run function that inductor writes for a graph, as a C library of its own.

    source = thin_source(wrapper_code, inputs, moving=2)        # `wrapper_code`: torch's text for a package

AOTInductor compiles that function together with a container, an interface and a check of every input, which are the
same for each graph and cost g++ four seconds. Here the function alone is cut out of the text, put behind a few lines
that declare what it calls, and compiled in 0.2 s. It calls the same kernels and the same C functions of torch in the
same order, so it gives the same bits.

The text is torch's own and changes with its versions. Whatever is not as expected raises `CannotThin`, and the stock
package is built. Declarations are taken from the headers of the torch that is installed.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

READ_VERSIONS = ("2.13",)
"""Of torch, whose text was read when this was written. With others it works as far as the text is as expected."""

VERSION = 1  # of what this file writes; part of every key in the cache
MAX_KEPT_BYTES = 8 * 2**20
"""Temporaries up to this size in all stay allocated between calls, which is 15 % of a small step."""


class CannotThin(Exception):
    """Why the function does not stand alone. `is_known`: this was to be expected, nobody need be told."""

    def __init__(self, reason: str, is_known: bool = False) -> None:
        super().__init__(reason)
        self.is_known = is_known


DECLARATION = re.compile(
    r"AOTI_TORCH_EXPORT\s+(AOTITorchError|int32_t|int64_t|bool|void)\s+"
    r"(aoti_torch_\w+)\s*\(([^;{]*?)\)\s*;"
)
"""A function that torch's headers declare: what it returns, its name, its arguments."""


def thin_source(wrapper: str, inputs: Sequence[Tensor], moving: int) -> str:
    """C++ of a library with `weft_run`; to be compiled without exceptions, and linked with `GUARD` and the kernels.

    `inputs`: tensors of the shapes, strides and dtypes that it is made for. The first `moving` are handles that
    each call uses up.
    """
    kernels, body = _cut(wrapper)
    body, num_outputs = _give_outputs(body)
    body, num_kept = _keep_temporaries(_borrow_inputs(body, len(inputs)))
    code = f"""
{kernels}
static int body(AtenTensorHandle* input_handles, AtenTensorHandle* output_handles, AtenTensorHandle* kept) {{
{body}
    return 0;
}}
{_expected(inputs)}
extern "C" const int64_t weft_counts[] = {{{len(inputs)}, {num_outputs}, {num_kept}, {moving}}};
{_ENDS}"""
    return _PRELUDE.replace("DECLARATIONS", _declarations(code + _PRELUDE)) + code


# ---- cutting the function out ----------------------------------------------------------------------------------------


def _cut(wrapper: str) -> tuple[str, str]:
    """The declarations of kernels, and the body of the run function."""
    first_kernel = re.search(r'^(extern "C" +void +cpp_|CACHE_TORCH_)', wrapper, re.MULTILINE)
    counts = re.search(r": AOTInductorModelBase\((\d+),\s*(\d+),\s*(\d+),", wrapper)
    run = re.search(
        r"^void AOTInductorModel::run_impl\(.*?\n\) \{\n(.*?)^\} // AOTInductorModel::run_impl",
        wrapper,
        re.MULTILINE | re.DOTALL,
    )
    if not (first_kernel and counts and run):
        raise CannotThin("no run function was found in the generated text")
    if counts[3] != "0":
        raise CannotThin("the graph holds constants", is_known=True)
    end = wrapper.find("namespace torch::aot_inductor {", first_kernel.start())
    if end < 0:
        raise CannotThin("the generated text has another order")
    body = run[1]
    for line in (
        r"__check_inputs_outputs\(.*\);",
        r"if \(_check_aoti_runtime_check_inputs_env\(\)\) \{.*\}",
        r"\[\[maybe_unused\]\] auto& kernels = .*;",
    ):
        body = re.sub(rf"^ *{line}\n", "", body, flags=re.MULTILINE)
    body = body.replace("this->device_idx_", "-1")
    if "proxy_executor" in body:
        raise CannotThin("an operation has no C function, and needs torch's executor", is_known=True)
    if left := re.search(r"this->\w*|\bconstants_\w*|\bkernels\b|\bstream\b", body):
        raise CannotThin(f"the function uses {left[0]}")
    return wrapper[first_kernel.start() : end], body


def _give_outputs(body: str) -> tuple[str, int]:
    """How many outputs there are, each given away as expected; one that is given twice gets a second handle."""
    given = re.findall(r"^ *output_handles\[(\d+)\] = (?:\w+\.release\(\)|output_handles\[\d+\]);$", body, re.MULTILINE)
    body, again = re.subn(
        r"^ *(output_handles\[\d+\]) = (output_handles\[\d+\]);$",
        r"    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(\2, &\1));",
        body,
        flags=re.MULTILINE,
    )
    if [int(i) for i in given] != list(range(len(given))) or body.count("output_handles") != len(given) + again:
        raise CannotThin("outputs are given away in another way")
    return body, len(given)


def _borrow_inputs(body: str, num_inputs: int) -> str:
    """Inputs are the caller's, and not stolen from an array."""
    body, found = re.subn(
        rf"^ *auto inputs = steal_from_raw_handles_to_raii_handles\(input_handles, {num_inputs}\);\n",
        "",
        body,
        flags=re.MULTILINE,
    )
    body, taken = re.subn(
        r"^ *auto (\w+) = std::move\(inputs\[(\d+)\]\);$",
        r"    Borrowed \1{input_handles[\2]};",
        body,
        flags=re.MULTILINE,
    )
    body, cleared = re.subn(r"^ *inputs\.clear\(\);\n", "", body, flags=re.MULTILINE)
    if (found, taken, cleared) != (1, num_inputs, 1) or re.search(r"\binputs\b", body):
        raise CannotThin("inputs are taken in another way")
    return body


# ---- temporaries that stay -------------------------------------------------------------------------------------------

_EMPTY = re.compile(
    r"^ *AtenTensorHandle (\w+)_handle;\n"
    r" *AOTI_TORCH_ERROR_CODE_CHECK\(aoti_torch_empty_strided\(\d+, (\w+), (\w+), cached_torch_dtype_(\w+), .*, "
    r"(&\1_handle)\)\);\n *RAIIAtenTensorHandle \1\(\1_handle\);",
    re.MULTILINE,
)
_VIEW = re.compile(
    r"^ *auto (\w+) = wrap_with_raii_handle_if_needed\((reinterpret_tensor_wrapper\((\w+), .*?\))\);", re.MULTILINE
)
_MOVE = re.compile(r"^ *auto (\w+) = std::move\((\w+)\);", re.MULTILINE)


def _keep_temporaries(body: str) -> tuple[str, int]:
    """Have memory that becomes no output made once and kept in `kept`, with the views of it; and how many those are."""
    kept: list[str] = []
    escaping, sizes, room = _escaping(body), _sizes(body), MAX_KEPT_BYTES

    def keep(name: str, made: str) -> str:
        kept.append(name)
        return f"    if (!kept[{len(kept) - 1}]) {{ {made} }}\n    Borrowed {name}{{kept[{len(kept) - 1}]}};"

    def memory(found: re.Match[str]) -> str:
        nonlocal room
        name, shape, strides, dtype, target = found.groups()
        size = _num_bytes(sizes.get(shape), sizes.get(strides), dtype)
        if name in escaping or size is None or size > room:
            return found[0]
        room -= size
        made = found[0].split("\n")[1].strip()
        return keep(name, made.replace(target, f"&kept[{len(kept)}]"))

    def view(found: re.Match[str]) -> str:
        name, made, of = found.groups()
        if name in escaping or of not in stays:
            return found[0]
        return keep(name, f"kept[{len(kept)}] = {made};")

    body = _EMPTY.sub(memory, body)
    stays, num_staying = set(kept), 0
    while num_staying < len(stays):  # what only has another name, and views of what stays
        num_staying = len(stays)
        stays |= {m[1] for m in _MOVE.finditer(body) if m[2] in stays}
        stays |= {m[1] for m in _VIEW.finditer(body) if m[3] in stays and m[1] not in escaping}
    return _VIEW.sub(view, body), len(kept)


def _escaping(body: str) -> set[str]:
    """What an output may share memory with. Whatever is named where something is made may be what it is made of."""
    behind: list[tuple[str, set[str]]] = []
    for line in body.splitlines():
        words = set(re.findall(r"\w+", line))
        made = re.findall(r"&(\w+?)(?:_handle)?\b", line)
        made += re.findall(r"^ *(?:auto|RAIIAtenTensorHandle|AtenTensorHandle|const [\w: ]+?) (\w+)[ =(\[]", line)
        behind += [(name, words) for name in made]
    escaping = set(re.findall(r"= (\w+)\.release\(\)", body))
    while more := {w for name, words in behind if name in escaping for w in words} - escaping:
        escaping |= more
    return escaping


def _sizes(body: str) -> dict[str, tuple[int, ...]]:
    """The arrays of numbers in the text, by name."""
    arrays = re.findall(r"static constexpr int64_t (\w+)\[\] = \{([\d, L]*)\};", body)
    found = {name: tuple(int(n) for n in re.findall(r"\d+", numbers)) for name, numbers in arrays}
    return found | dict.fromkeys(re.findall(r"static constexpr int64_t \*(\w+)=nullptr;", body), ())


def _num_bytes(sizes: tuple[int, ...] | None, strides: tuple[int, ...] | None, dtype: str) -> int | None:
    kind = getattr(torch, dtype, None)
    if sizes is None or strides is None or not isinstance(kind, torch.dtype):
        return None
    return (1 + sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True))) * kind.itemsize


# ---- what stands around it -------------------------------------------------------------------------------------------

_PRELUDE = r"""
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>

extern "C" {
struct AtenTensorOpaque;
struct AtenGeneratorOpaque;
using AtenTensorHandle = AtenTensorOpaque*;
using AtenGeneratorHandle = AtenGeneratorOpaque*;
using AOTITorchError = int32_t;
DECLARATIONS
}

static thread_local const char* failed = nullptr;
#define AOTI_TORCH_ERROR_CODE_CHECK(call) if ((call) != 0) { failed = #call; return 1; }
#define CACHE_TORCH_DTYPE(name) static const int32_t cached_torch_dtype_##name = aoti_torch_dtype_##name()
#define CACHE_TORCH_DEVICE(name) static const int32_t cached_torch_device_type_##name = aoti_torch_device_type_##name()
#define CACHE_TORCH_LAYOUT(name) static const int32_t cached_torch_layout_##name = aoti_torch_layout_##name()
#define CACHE_TORCH_MEMORY_FORMAT(name) \
  static const int32_t cached_torch_memory_format_##name = aoti_torch_memory_format_##name()

static inline void* address(AtenTensorHandle handle) {
  void* at = nullptr;
  aoti_torch_get_data_ptr(handle, &at);
  return at;
}

struct Borrowed {  // somebody else's tensor
  AtenTensorHandle handle;
  operator AtenTensorHandle() const { return handle; }
  AtenTensorHandle get() const { return handle; }
  void* data_ptr() const { return address(handle); }
  void reset() {}
  AtenTensorHandle release() {
    AtenTensorHandle another = nullptr;
    aoti_torch_new_tensor_handle(handle, &another);
    return another;
  }
};

struct RAIIAtenTensorHandle {  // a tensor of one's own
  AtenTensorHandle handle = nullptr;
  RAIIAtenTensorHandle() {}
  RAIIAtenTensorHandle(AtenTensorHandle handle) : handle(handle) {}
  RAIIAtenTensorHandle(RAIIAtenTensorHandle&& other) : handle(other.release()) {}
  RAIIAtenTensorHandle& operator=(RAIIAtenTensorHandle&& other) {
    if (this != &other) {
      reset();
      handle = other.release();
    }
    return *this;
  }
  ~RAIIAtenTensorHandle() { reset(); }
  operator AtenTensorHandle() const { return handle; }
  AtenTensorHandle get() const { return handle; }
  void* data_ptr() const { return address(handle); }
  __attribute__((noinline)) void reset() {
    if (handle) aoti_torch_delete_tensor_object(handle);
    handle = nullptr;
  }
  AtenTensorHandle release() {
    AtenTensorHandle given = handle;
    handle = nullptr;
    return given;
  }
};

template <typename T> static inline T& temporary_reference(T&& value) { return value; }
static inline RAIIAtenTensorHandle wrap_with_raii_handle_if_needed(AtenTensorHandle handle) {
  return RAIIAtenTensorHandle(handle);
}
static inline AtenTensorHandle reinterpret_tensor_wrapper(
    AtenTensorHandle of, int64_t dim, const int64_t* sizes, const int64_t* strides, int64_t offset) {
  AtenTensorHandle view = nullptr;
  aoti_torch__reinterpret_tensor(of, dim, sizes, strides, offset, &view);
  return view;
}
"""

_ENDS = r"""
static bool fits(AtenTensorHandle* inputs) {
  for (int64_t i = 0; i < weft_counts[0]; i++) {
    const Expected& wanted = expected[i];
    int32_t dtype = -1, device = -1;
    int64_t dim = -1, *sizes = nullptr, *strides = nullptr;
    aoti_torch_get_dtype(inputs[i], &dtype);
    aoti_torch_get_device_type(inputs[i], &device);
    aoti_torch_get_dim(inputs[i], &dim);
    if (dtype != wanted.dtype || dim != wanted.dim || device != aoti_torch_device_type_cpu()) return false;
    aoti_torch_get_sizes(inputs[i], &sizes);
    aoti_torch_get_strides(inputs[i], &strides);
    for (int64_t d = 0; d < dim; d++)
      if (sizes[d] != wanted.sizes[d] || (sizes[d] > 1 && strides[d] != wanted.strides[d])) return false;
  }
  return true;
}

extern "C" bool weft_begin() {
  bool had_grad = aoti_torch_grad_mode_is_enabled();
  if (had_grad) aoti_torch_grad_mode_set_enabled(false);
  return had_grad;
}
extern "C" int weft_body(
    AtenTensorHandle* inputs, AtenTensorHandle* outputs, AtenTensorHandle* kept, const char** why) {
  failed = "an input has another shape, dtype, stride or device than the graph was made for";
  int error = fits(inputs) ? body(inputs, outputs, kept) : 1;
  *why = failed;
  return error;
}
extern "C" void weft_free(AtenTensorHandle* handles, int64_t number) {
  for (int64_t i = 0; i < number; i++)
    if (handles[i]) {
      aoti_torch_delete_tensor_object(handles[i]);
      handles[i] = nullptr;
    }
}
extern "C" void weft_end(AtenTensorHandle* inputs, bool had_grad) {
  weft_free(inputs, weft_counts[3]);
  if (had_grad) aoti_torch_grad_mode_set_enabled(true);
}
"""

GUARD = r"""
#include <cstring>
#include <exception>
extern "C" {
bool weft_begin();
int weft_body(void**, void**, void**, const char**);
void weft_end(void**, bool);
int weft_run(void** inputs, void** outputs, void** kept, const char** why) {
  static thread_local char text[256];
  bool had_grad = weft_begin();
  int error = 1;
  try {
    error = weft_body(inputs, outputs, kept, why);
  } catch (const std::exception& e) {  // a kernel divided an integer by zero, say
    strncpy(text, e.what(), sizeof(text) - 1);
    *why = text;
  }
  weft_end(inputs, had_grad);
  return error;
}
}
"""
"""Goes with the kernels, which may throw, into a file that is compiled with exceptions."""


def _expected(inputs: Sequence[Tensor]) -> str:
    """A table of what each input must be."""
    numbers: list[int] = [0]  # an array must not be empty
    rows = []
    for t in inputs:
        at = len(numbers)
        numbers += [*t.shape, *t.stride()]
        dtype = f"aoti_torch_dtype_{str(t.dtype).removeprefix('torch.')}()"
        rows.append(f"{{{dtype}, {t.dim()}, numbers + {at}, numbers + {at + t.dim()}}}")
    return f"""
struct Expected {{ int32_t dtype; int64_t dim; const int64_t *sizes, *strides; }};
static const int64_t numbers[] = {{{", ".join(map(str, numbers))}}};
static const Expected expected[] = {{{", ".join(rows)}}};"""


def _declarations(code: str) -> str:
    """Of the C functions that the code calls, as torch's headers declare them."""
    names = set(re.findall(r"\b(aoti_torch_\w+)\(", code))
    for macro, prefix in re.findall(r"#define (CACHE_TORCH_\w+)\(name\)[^=]*= (aoti_torch_\w+)##name", code):
        names |= {prefix + name for name in re.findall(rf"^{macro}\((\w+)\)", code, re.MULTILINE)}
    declared = _declared()
    names = {name for name in names if not name.endswith("_")}  # the macros' own
    if missing := sorted(names - declared.keys()):
        raise CannotThin(f"torch's headers do not declare {missing[0]}")
    return "\n".join(declared[name] for name in sorted(names))


@functools.cache
def _declared() -> dict[str, str]:
    """Every C function of torch's interface for a CPU, by name."""
    folder = Path(torch.__file__).parent / "include/torch/csrc/inductor/aoti_torch"
    headers = ("c/shim.h", "c/shim_deprecated.h", "c/shim_cpu.h", "generated/c_shim_cpu.h", "generated/c_shim_aten.h")
    found: dict[str, str] = {}
    for header in headers:
        if (folder / header).exists():
            text = re.sub(r"//.*", "", (folder / header).read_text())
            for result, name, arguments in DECLARATION.findall(text):
                found.setdefault(name, " ".join(f"{result} {name}({arguments});".split()))
    return found
