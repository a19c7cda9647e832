"""Graphs as small libraries: the bits of torch's own packages, made in a fraction of the time, and safe to call."""

from __future__ import annotations

import errno
import os
import resource
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from tests.helpers.bitwise import same
from tests.helpers.problems import parameter_rows, small_rosenbrock, tanh_net
from weft.compile import graph as graphs
from weft.compile import library, thin
from weft.compile.lifting import CannotCompile


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> Path:
    """An empty cache; with the precompiled header where the session has one by now."""
    (tmp_path / "cache").mkdir()
    for header in cache.glob("kernels-*"):
        os.link(header, tmp_path / "cache" / header.name)
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "prepare_header", lambda folder: None)
    return tmp_path / "cache"


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own packages, whose wrapper is not optimized: it computes nothing."""
    monkeypatch.setattr(graphs, "OPTIONS", graphs.OPTIONS | {"aot_inductor.compile_wrapper_opt_level": "O0"})


def compiled_fit(fn: Callable[..., Sequence[Tensor]], *inputs: Tensor) -> Callable[..., Sequence[Tensor]]:
    graph, fixed = graphs.trace(fn, inputs)
    run = graphs.compile_graph(graph, [*inputs, *fixed], moving=len(inputs))
    return lambda *given: run([*given, *fixed])


def graph_files(folder: Path) -> list[str]:
    return sorted(path.suffix for path in folder.iterdir() if path.suffix in (".so", ".pt2"))


# ---- the same bits ---------------------------------------------------------------------------------------------------


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(64, 3)
        )

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.net(batch["x"].reshape(-1, 1, 4, 4)).square().mean()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(4, 6, batch_first=True), nn.Linear(6, 1)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return (self.head(self.cell(batch["x"].reshape(-1, 4, 4))[0]) - 1).square().mean()


class Pinn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = tanh_net(16, 1)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        with torch.enable_grad():  # also in evaluations
            x = batch["x"].detach().requires_grad_()
            u = self.net(x)
            (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return (first.sum(1) - u[:, 0]).square().mean()


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 5), nn.Linear(5, 1)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return (self.head(self.table((batch["x"][:, 0] * 6).long())) - 1).square().mean()


class SquaredNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = tanh_net(16, 2)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return (self.net(batch["x"]) - 1).square().mean()


PROBLEMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "conv": (Conv, {}),
    "gru": (Recurrent, {"clip": 1.0}),
    "pinn": (Pinn, {}),
    "embedding": (Embedded, {}),
    "float64": (SquaredNet, {"precision": "64-true"}),
    "sgd": (SquaredNet, {"optimizer": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=1e-2)}),
    "rosenbrock": (small_rosenbrock, {"clip": 1.0}),
}


def quick_fit(name: str) -> tuple[weft.FitResult, dict[str, Any]]:
    torch.manual_seed(0)
    make, options = PROBLEMS[name]
    rows = torch.rand(22, 16, generator=torch.Generator().manual_seed(1))
    data = weft.Data({"x": rows}, {"x": rows[:5]}, batch_size=8)
    if name == "rosenbrock":
        data = weft.Data(parameter_rows(22), parameter_rows(5, 2), batch_size=8)
    trainer = weft.Trainer(**{"epochs": 4, "seed": 0, "progress": False, "compile": True} | options)
    result = trainer.fit(make(), data)
    assert trainer.run is not None
    return result, dict(trainer.run.graphs.made)


@pytest.mark.long
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.usefixtures("stock")
def test_weights_are_bit_for_bit_those_of_torchs_own_packages(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quick, graphs_made = quick_fit(name)
        assert set(graph_files(folder)) == {".so"}
        assert set(graphs_made.values()) == {1}
        monkeypatch.setenv("WEFT_CACHE", str(folder) + "-stock")
        monkeypatch.setattr(library, "is_supported", lambda: False)
        stock, _ = quick_fit(name)
    assert set(graph_files(Path(f"{folder}-stock"))) == {".pt2"}
    assert same(quick.last_weights, stock.last_weights)
    assert quick.history == stock.history


@pytest.mark.usefixtures("stock")
@pytest.mark.long
def test_a_graph_has_the_bits_of_torchs_own_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = tanh_net(3, 2), torch.rand(9, 3)

    def step(x: Tensor) -> list[Tensor]:
        loss = (net(x) - 1).square().mean()
        return [loss.detach(), *torch.autograd.grad(loss, list(net.parameters()))]

    quick = compiled_fit(step, x)(x)
    monkeypatch.setattr(library, "is_supported", lambda: False)
    monkeypatch.setenv("WEFT_CACHE", f"{folder}-stock")
    stock = compiled_fit(step, x)(x)
    assert (graph_files(folder), graph_files(Path(f"{folder}-stock"))) == ([".so"], [".pt2"])
    assert same([*quick], [*stock])
    assert not same([*quick], [t.detach() for t in compiled_fit(step, x)(x + 1e-6)])


def test_which_torch_was_read() -> None:
    """With a version that is not in the list, read what it generates (or see that it is recognised), then add it."""
    assert torch.__version__.startswith(thin.READ_VERSIONS)


# ---- memory ----------------------------------------------------------------------------------------------------------


def several_kinds(x: Tensor, y: Tensor) -> list[Tensor]:
    """Outputs that are inputs, copies of them, views of each other and of temporaries, and the same one twice."""
    z = (x @ y).tanh()
    w = z @ z + 1
    return [x, z, z.t(), w[0], w, z.t()[1:], (z @ z).sum(), y.detach().clone()]


def test_outputs_own_their_memory_and_inputs_stay(folder: Path) -> None:
    one, other = torch.rand(2, 4, 4), torch.rand(2, 4, 4)
    run = compiled_fit(several_kinds, *one)
    kept = run(*one)
    first = [t.clone() for t in kept]
    second = run(*other)
    assert graph_files(folder) == [".so"]
    assert same(first, kept)  # nothing that the second call did has reached them
    for given, found in ((one, first), (other, second)):
        for expected, value in zip(several_kinds(*given), found, strict=True):
            torch.testing.assert_close(value, expected)
    assert not same(first[1], second[1])
    assert kept[-1].data_ptr() != one[1].data_ptr()


def test_temporaries_are_kept_only_up_to_a_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(2, 4, 4)
    found = []
    for most in (thin.MAX_KEPT_BYTES, 0):
        monkeypatch.setattr(thin, "MAX_KEPT_BYTES", most)
        monkeypatch.setenv("WEFT_CACHE", f"{folder}-{most}")
        sources: list[str] = []
        build = library.build
        monkeypatch.setattr(
            library, "build", lambda path, source, k, b=build, s=sources: (s.append(source), b(path, source, k))
        )
        run = compiled_fit(lambda a, b: [((a @ b).tanh() @ b).sum()], *x)
        run(*x)
        found.append(run(*x)[0])
        assert ("if (!kept[0])" in sources[0]) == (most > 0)
    assert same(found[0], found[1])


def test_nothing_of_a_batch_stays_after_its_call(folder: Path) -> None:
    run = compiled_fit(lambda x: [x.sum()], torch.ones(2**20))
    run(torch.ones(2**20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(100):  # 4 MiB each
        run(torch.ones(2**20))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10  # KiB


# ---- calls -----------------------------------------------------------------------------------------------------------


def test_another_shape_dtype_or_stride_is_refused_before_anything_is_computed(folder: Path) -> None:
    weight = torch.rand(3, 3)

    def step(x: Tensor) -> list[Tensor]:
        weight.mul_(0.5)
        return [(x @ weight).sum()]

    good = torch.rand(4, 3)
    run, before = compiled_fit(step, good), weight.clone()
    for bad in (torch.rand(5, 3), good.double(), torch.rand(3, 4).t(), torch.rand(12)):
        with pytest.raises(RuntimeError, match="another shape, dtype, stride or device"):
            run(bad)
    assert same(weight, before)
    weight.data = weight.data.double()
    with pytest.raises(RuntimeError, match="another shape, dtype"):
        run(good)
    weight.data = before.clone()
    torch.testing.assert_close(run(good)[0], (good @ (before / 2)).sum())
    assert torch.is_grad_enabled()


def test_threads_may_call_one_graph_at_the_same_time(folder: Path) -> None:
    weight = torch.rand(64, 64) / 8
    run = compiled_fit(
        lambda x: [torch.linalg.multi_dot([x, weight, weight, weight, weight]).tanh() @ weight], torch.rand(64, 64)
    )
    given = [torch.rand(64, 64) for _ in range(4)]
    alone = [run(x)[0].clone() for x in given]
    wrong: list[int] = []

    def repeat(i: int) -> None:
        for _ in range(200):
            if not torch.equal(run(given[i])[0], alone[i]):
                wrong.append(i)

    threads = [threading.Thread(target=repeat, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forked_process_may_go_on_calling(folder: Path) -> None:
    run, x = compiled_fit(lambda x: [x.tanh() @ x], torch.rand(4, 4)), torch.rand(4, 4)
    expected = run(x)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forking with threads
        child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(run(x)[0], expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_an_error_of_a_kernel_is_an_error_of_the_call(folder: Path) -> None:
    run = compiled_fit(lambda a, b: [a // b], torch.tensor([4, 6]), torch.tensor([2, 3]))
    with pytest.raises(RuntimeError, match="(?i)zero"):
        run(torch.tensor([4, 6]), torch.tensor([2, 0]))
    assert torch.is_grad_enabled()
    assert run(torch.tensor([4, 6]), torch.tensor([2, 3]))[0].tolist() == [2, 2]


# ---- what goes wrong while it is made ---------------------------------------------------------------------


@pytest.mark.usefixtures("stock")
def test_what_has_no_c_function_takes_torchs_own_way_without_a_word(folder: Path) -> None:
    a = torch.rand(3, 3) + 3 * torch.eye(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = compiled_fit(lambda b: [torch.linalg.solve(a, b)], torch.rand(3, 2))
    assert graph_files(folder) == [".pt2"]
    b = torch.rand(3, 2)
    torch.testing.assert_close(a @ run(b)[0], b)


@pytest.mark.usefixtures("stock")
def test_text_that_is_not_recognised_takes_torchs_own_way_and_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = thin._cut
    monkeypatch.setattr(thin, "_cut", lambda wrapper: cut(wrapper.replace("::run_impl(", "::another(")))
    with pytest.warns(
        UserWarning, match="not as expected .no run function.*, so torch's own package is built"
    ) as caught:
        run = compiled_fit(lambda x: [x.tanh() @ x], torch.rand(4, 4))
    assert len(caught) == 1
    assert graph_files(folder) == [".pt2"]
    torch.testing.assert_close(run(torch.eye(4))[0], torch.eye(4).tanh())


def test_a_header_that_was_cut_short_is_thrown_away(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header: list[Path] = []

    def cut_short(folder: Path) -> None:
        compiler, flags, _ = library._commands()
        path = folder / f"kernels-{library._header_key(compiler, tuple(flags))}.h"
        path.unlink(missing_ok=True)
        path.write_text("#include <torch/csrc/inductor/cpp_prefix.h>\n")
        header.append(path.with_name(f"{path.name}.gch"))
        header[0].unlink(missing_ok=True)  # a link
        header[0].write_bytes(b"gpch.013" + bytes(1000))

    monkeypatch.setattr(library, "prepare_header", cut_short)
    run = compiled_fit(lambda x: [x.tanh() @ x], torch.rand(4, 4))
    torch.testing.assert_close(run(torch.eye(4))[0], torch.eye(4).tanh())
    assert graph_files(folder) == [".so"]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("compile", "is_there", "expected"), [(True, False, 1), (True, True, 0), ("auto", False, 0)])
def test_the_header_is_begun_before_the_first_step_where_a_graph_is_sure(
    compile: Any, is_there: bool, expected: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for header in folder.glob("kernels-*"):
        header.unlink()
    if is_there:
        (folder / "0123.so").touch()
    begun: list[Path] = []
    monkeypatch.setattr(library, "prepare_header", begun.append)
    at_first: list[int] = []
    hooks = {"on_step_start": lambda *_: at_first.append(len(begun))}
    weft.Trainer(epochs=1, compile=compile, progress=False, hooks=hooks).fit(
        small_rosenbrock(), weft.Data(parameter_rows(20), batch_size=10)
    )
    assert at_first == [expected] * 2


def test_a_file_that_was_cut_short_is_made_anew(folder: Path) -> None:
    def build() -> Tensor:
        return compiled_fit(lambda x: [x.tanh() @ x], torch.rand(4, 4))(torch.eye(4))[0]

    first = build()
    (path,) = folder.glob("*.so")
    whole = path.read_bytes()
    copy_of_it = path.with_suffix(".part")
    copy_of_it.write_bytes(whole[: len(whole) // 2])
    os.replace(copy_of_it, path)  # the loaded one is left as it is
    with pytest.raises(OSError, match="damaged"):
        library.load(path)
    assert same(build(), first)
    assert path.read_bytes()[-32:] != whole[: len(whole) // 2][-32:]


def test_a_full_disk_means_eager_and_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, source: str, kernels: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(library, "build", full)
    with pytest.raises(CannotCompile, match="No space left"):
        compiled_fit(lambda x: [x.tanh() @ x], torch.rand(4, 4))
    assert graph_files(folder) == []


@pytest.mark.long
def test_vector_units_that_the_compiler_does_not_know_are_looked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands, seen = library._commands, []

    def misled() -> tuple[str, list[str], list[str]]:
        from torch._inductor import config

        seen.append(config.cpp.vec_isa_ok)
        compiler, flags, libraries = commands()
        return compiler, [*flags, "-mno-such-unit"] if config.cpp.vec_isa_ok else flags, libraries

    monkeypatch.setattr(library, "_commands", misled)
    run = compiled_fit(lambda x: [x.tanh() @ x], torch.rand(4, 4))
    torch.testing.assert_close(run(torch.eye(4))[0], torch.eye(4).tanh())
    assert seen == [True, None]
