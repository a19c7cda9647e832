"""What a checkpoint may hold: only what loads as data; everything else is refused when it is saved."""

from __future__ import annotations

import os
import random
import shutil
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from datetime import datetime, timedelta
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.helpers.bitwise import same
from tests.helpers.hostile import evil_files
from weft.checkpoint import archive
from weft.checkpoint import folder as checkpoints
from weft.checkpoint.archive import CheckpointError
from weft.checkpoint.background import BackgroundWriter
from weft.checkpoint.weights_files import load_weights
from weft.devices import seeding

# ---- safety ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forced", ["0", "1"])
def test_no_load_runs_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forced: str) -> None:
    with monkeypatch.context() as environment:
        environment.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", forced)
        _no_load_runs_code(tmp_path)


def _no_load_runs_code(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    (tmp_path / "evil").mkdir()
    files = evil_files(tmp_path / "evil", str(marker))
    assert len(files) == 7
    for path in files:
        folder = tmp_path / path.stem
        folder.mkdir()
        shutil.copy(path, folder / "step-000000001.ckpt")
        (folder / "last").write_text("step-000000001.ckpt")
        (folder / "best").write_text("step-000000001.ckpt")
        problem = nn.Linear(1, 1)
        calls: list[Callable[[], object]] = [
            partial(archive.read, path),
            partial(archive.read, path, "meta"),
            partial(checkpoints.load, path),
            partial(checkpoints.load, folder),
            partial(checkpoints.load, folder, "best"),
            partial(checkpoints.find, folder),
            partial(load_weights, problem, path),
            partial(load_weights, problem, folder),
        ]
        for call in calls:
            with pytest.raises(CheckpointError, match=r"\.ckpt"):
                call()
    assert not marker.exists()
    good = {"problem": nn.Linear(2, 2).state_dict(), "hyper_parameters": {"_instantiator": "os.system", "x": [1.0]}}
    archive.write(tmp_path / "good.ckpt", good)
    assert same(archive.read(tmp_path / "good.ckpt"), good)


@pytest.mark.parametrize("name", ["reduce", "eval", "nested", "legacy"])
def test_the_payloads_do_run_when_loaded_without_care(tmp_path: Path, name: str) -> None:
    """The positive control."""
    evil_files(tmp_path, str(tmp_path / "executed"))
    torch.load(tmp_path / f"{name}.ckpt", weights_only=False)
    assert (tmp_path / "executed").is_dir()


class Colour(IntEnum):
    RED = 1


Point = namedtuple("Point", "x y")

UNSAFE = [
    np.float64(1.0),
    np.int32(1),
    np.ones(2),
    Path("a"),
    datetime(2020, 1, 1),
    timedelta(1),
    frozenset({1}),
    Colour.RED,
    defaultdict(int),
    partial(print),
    Point(1, 2),
    torch.__version__,
    torch.Generator(),
    b"",
    1 << 2039,
    lambda: None,
    torch.ones(2, device="meta"),
    nn.Linear(1, 1),
    bytearray(b"a"),
]
DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


@st.composite
def any_tensor(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    tensor = torch.arange(-3.0, float(torch.Size(shape).numel()) - 3)[: torch.Size(shape).numel()].reshape(shape)
    tensor = tensor.to(draw(st.sampled_from(DTYPES)))
    forms: list[Callable[[Tensor], Tensor]] = [
        lambda t: t,
        lambda t: t.movedim(0, -1) if t.dim() else t,
        lambda t: torch.stack([t, t])[1],
        lambda t: t.expand(2, *t.shape),
        lambda t: t.clone().requires_grad_() if t.is_floating_point() else t,
    ]
    return draw(st.sampled_from(forms))(tensor)


plain_leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 2038), 1 << 2038),
    st.floats(),
    st.complex_numbers(),
    st.text(),
    st.binary(min_size=1),
    st.sampled_from([*DTYPES, torch.device("cuda:1"), torch.device("cpu"), torch.Size([2, 0])]),
    st.sets(st.integers()),
    any_tensor(),
)
keys = st.one_of(st.text(), st.integers(), st.booleans(), st.none(), st.tuples(st.integers(), st.text()))


def nested_states(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.lists(inner, max_size=3).map(tuple),
            st.dictionaries(keys, inner, max_size=4),
            st.dictionaries(st.text(), inner, max_size=3).map(OrderedDict),
        ),
        max_leaves=8,
    )


@given(st.dictionaries(st.text(), nested_states(plain_leaves), max_size=4))
@settings(max_examples=150)
def test_every_plain_state_reads_back_equal(state: dict[str, Any]) -> None:
    archive.write("a.ckpt", state)
    for read_back in (archive.read("a.ckpt"), torch.load("a.ckpt", weights_only=True)):
        assert same(read_back, archive.plain(state))


@given(
    st.dictionaries(st.text(), nested_states(st.one_of(plain_leaves, st.sampled_from(UNSAFE))), min_size=1, max_size=4)
)
@settings(max_examples=150)
def test_a_state_is_refused_by_key_or_reads_back_equal(state: dict[str, Any]) -> None:
    try:
        archive.write("b.ckpt", state)
    except TypeError as error:
        assert str(error).startswith(("state[", "key ")) and ";" in str(error)
        assert not Path("b.ckpt").exists()
    else:
        assert same(archive.read("b.ckpt"), archive.plain(state))
        Path("b.ckpt").unlink()


@pytest.mark.parametrize("value", UNSAFE, ids=lambda value: type(value).__name__)
def test_what_could_not_be_loaded_is_refused_when_saving_and_its_key_named(value: object) -> None:
    for state, key in (
        ({"hooks": [{"a": 1}, {"seen": value}]}, "state['hooks'][1]['seen'] is a "),
        ({"t": (1, value)}, "state['t'][1] is a "),
    ):
        with pytest.raises(TypeError, match="no checkpoint can hold") as caught:
            archive.write("a.ckpt", state)
        assert str(caught.value).startswith(key)
    assert not os.listdir()


def test_refusals_say_what_to_use_instead_and_find_cycles_and_attributes() -> None:
    for value, advice in (
        (np.float64(1), ".item()"),
        (Path("a"), "str("),
        (Point(1, 2), "tuple("),
        (Colour.RED, ".value"),
    ):
        with pytest.raises(TypeError, match="use") as caught:
            archive.plain({"a": value})
        assert advice in str(caught.value)
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(TypeError, match="contains itself"):
        archive.plain({"a": loop})
    marked = OrderedDict(a=1)
    vars(marked)["extra"] = Path("x")
    with pytest.raises(TypeError, match="__dict__"):
        archive.plain({"a": marked})
    with pytest.raises(TypeError, match="a key of state"):
        archive.plain({torch.ones(1): 1})


@pytest.mark.filterwarnings("ignore:torch.quantize", "ignore:ComplexHalf", "ignore:Sparse")
def test_every_dtype_and_sparse_layout_of_torch_is_written_and_read_or_refused() -> None:
    refused = 0
    for dtype in {value for value in vars(torch).values() if isinstance(value, torch.dtype)}:
        archive.write("d.ckpt", {"d": dtype})
        assert archive.read("d.ckpt")["d"] is dtype
        try:
            archive.write("d.ckpt", {"t": torch.empty(2, dtype=dtype)})
        except TypeError as error:
            assert "state['t']" in str(error)
            refused += 1
        else:
            assert archive.read("d.ckpt")["t"].dtype is dtype
    assert refused <= 19  # the quantized ones and those of less than a byte
    dense = torch.eye(4)
    for t in (dense.to_sparse(), dense.to_sparse_csr(), dense.to_sparse_csc(), dense.to_sparse_bsr((2, 2))):
        archive.write("s.ckpt", {"t": t})
        assert same(archive.read("s.ckpt"), {"t": t})


def test_a_slice_does_not_bring_the_whole_tensor_into_the_file() -> None:
    archive.write("a.ckpt", {"x": torch.zeros(1_000_000)[:10]})
    assert os.path.getsize("a.ckpt") < 10_000


def test_a_module_state_keeps_its_versions_and_loads_anywhere() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    archive.write("a.ckpt", {"problem": module.state_dict()})
    read_back = torch.load("a.ckpt", weights_only=True)["problem"]
    assert same(read_back, module.state_dict()) and read_back._metadata == module.state_dict()._metadata  # pyright: ignore


OPTIMIZERS: list[Callable[..., torch.optim.Optimizer]] = [
    partial(torch.optim.Adam, amsgrad=True),
    torch.optim.AdamW,
    partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    partial(torch.optim.Adam, fused=True),
    torch.optim.LBFGS,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("make", range(len(OPTIMIZERS)))
def test_an_optimizer_goes_on_bit_for_bit_from_a_file(make: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w0 = torch.randn(8, 3, generator=generator).to(dtype), torch.randn(3, 1, generator=generator).to(dtype)

    def build() -> tuple[nn.Parameter, torch.optim.Optimizer, Callable[[], Tensor]]:
        weight = nn.Parameter(w0.clone())
        optimizer = OPTIMIZERS[make]([weight])

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = ((x @ weight).tanh() - 0.5).square().mean()
            loss.backward()
            return loss

        return weight, optimizer, closure

    weight, optimizer, closure = build()
    for _ in range(3):
        optimizer.step(closure)
    archive.write("o.ckpt", {"w": weight, "optimizer": optimizer.state_dict()})
    read_back = archive.read("o.ckpt")
    assert same(read_back["optimizer"], optimizer.state_dict())
    other, resumed, other_closure = build()
    other.data.copy_(read_back["w"])
    resumed.load_state_dict(read_back["optimizer"])
    optimizer.step(closure)
    resumed.step(other_closure)
    assert same(other, weight) and same(resumed.state_dict(), optimizer.state_dict())


# ---- random state ----------------------------------------------------------------------------------------------------


def draws() -> list[Any]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3), torch.randn(2)]


def test_random_numbers_go_on_where_the_file_left_them() -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    draws()  # leaves half a pair of normal numbers behind in python and numpy
    archive.write("r.ckpt", {"random": seeding.random_state()})
    expected = draws()
    assert not same(draws(), expected)
    seeding.set_random_state(archive.read("r.ckpt")["random"])
    assert same(draws(), expected)


def test_a_missing_part_of_the_random_state_is_an_error_before_anything_is_set() -> None:
    state = seeding.random_state()
    for part in state:
        with pytest.raises(ValueError, match="has the parts"):
            seeding.set_random_state({key: value for key, value in state.items() if key != part})
    before = draws()
    seeding.set_random_state(state)
    too_many = [torch.zeros(16, dtype=torch.uint8)] * (torch.cuda.device_count() + 1)
    random.random()
    now = seeding.random_state()
    with pytest.raises(ValueError, match="cuda devices, this process sees"):
        seeding.set_random_state({**state, "cuda": too_many})
    assert same(seeding.random_state(), now)
    seeding.set_random_state(state)
    assert same(draws(), before)


@pytest.mark.gpu
def test_cuda_states_and_tensors_survive_the_file() -> None:
    x = torch.rand(1000, device="cuda")
    writer = BackgroundWriter()
    writer.save("c", 1, {"x": x, "random": seeding.random_state()})
    expected, kept = torch.rand(1000, device="cuda"), x.cpu().clone()
    x.zero_()
    writer.wait()
    state, _ = checkpoints.load("c")
    seeding.set_random_state(state["random"])
    assert same(state["x"], kept) and same(torch.rand(1000, device="cuda").cpu(), expected.cpu())
