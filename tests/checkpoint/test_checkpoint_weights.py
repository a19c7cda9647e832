"""Weights in memory and in files: copied, kept, put back, moved between problems."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.bitwise import same
from weft.checkpoint import archive
from weft.checkpoint import folder as checkpoints
from weft.checkpoint.archive import CheckpointError
from weft.checkpoint.weights import Snapshot, state_of
from weft.checkpoint.weights_files import load_weights, save_weights


class Growing(nn.Module):
    """Buffers that change size at the first step of training, as those of an augmented Lagrangian do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.register_buffer("multipliers", torch.empty(0))
        self.register_buffer("best", torch.tensor(1e9))
        self.register_buffer("scale", None)
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def grow(self, rows: int = 5) -> Growing:
        self.multipliers = torch.arange(float(rows * 2)).reshape(rows, 2)
        self.best = torch.full((rows, 1), 2.0)
        self.scale = torch.ones(2)
        return self


def cloned_state(module: nn.Module) -> dict[str, Any]:
    return OrderedDict((name, value.clone()) for name, value in module.state_dict().items())


def change_weights(module: nn.Module) -> None:
    with torch.no_grad():
        for value in module.state_dict().values():
            value.add_(1) if value.layout is torch.strided else value.mul_(2)


def test_a_snapshot_holds_and_restores_every_bit_in_place() -> None:
    module = Growing().grow()
    snapshot, before, parameters = Snapshot(), cloned_state(module), list(module.parameters())
    for _ in range(2):  # the second take is the short way
        snapshot.take(module)
        change_weights(module)
        assert same(snapshot.state_dict(), dict(before)) and not same(cloned_state(module), before)
        snapshot.restore(module)
        assert same(cloned_state(module), before)
        assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))


def test_a_snapshot_uses_its_memory_again_and_gives_out_copies_only() -> None:
    module, snapshot = nn.Linear(2, 2), Snapshot()
    snapshot.take(module)
    kept = [value.data_ptr() for value in snapshot._kept.values()]
    change_weights(module)
    snapshot.take(module)
    assert [value.data_ptr() for value in snapshot._kept.values()] == kept
    snapshot.state_dict()["weight"].zero_()
    assert same(snapshot.state_dict(), dict(cloned_state(module)))


def test_a_snapshot_follows_replaced_parameters_buffers_modules_and_dtypes() -> None:
    module, snapshot = Growing(), Snapshot()

    def replace_parameter() -> None:
        module.net[0].weight = nn.Parameter(torch.randn(4, 2))

    def add_module() -> None:
        module.extra = nn.Linear(1, 1)

    def drop_buffer() -> None:
        module.scale = None

    changes = [
        lambda: None,
        replace_parameter,
        module.grow,
        lambda: module.grow(7),
        module.double,
        add_module,
        drop_buffer,
        lambda: setattr(module, "multipliers", torch.eye(3).to_sparse()),
    ]
    for change in changes:
        change()
        snapshot.take(module)
        assert same(snapshot.state_dict(), dict(cloned_state(module)))
        other = Snapshot()
        other.take(module)
        assert same(other.state_dict(), snapshot.state_dict())


def test_restoring_gives_buffers_their_old_size_or_absence_back() -> None:
    module, snapshot = Growing(), Snapshot()
    before = cloned_state(module)
    snapshot.take(module)
    module.grow()
    snapshot.restore(module)
    assert same(cloned_state(module), before) and module.scale is None
    module.grow(3)
    before = cloned_state(module)
    snapshot.take(module)
    module.grow(9)
    change_weights(module)
    snapshot.restore(module)
    assert same(cloned_state(module), before)


class Cone(nn.Module):
    """Sparse buffers that cannot be deep-copied (as cvxpylayers has), tied weights, extra state, its own saving."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("A", torch.eye(3, dtype=torch.float64).to_sparse_csr())
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.count = {"calls": [1]}

    def get_extra_state(self) -> Any:
        return self.count

    def set_extra_state(self, state: Any) -> None:
        self.count = state


@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_tied_and_extra_state_are_kept() -> None:
    module, snapshot = Cone(), Snapshot()
    for _ in range(2):
        snapshot.take(module)
        before = snapshot.state_dict()
        with torch.no_grad():
            module.first.weight.add_(1)
            module.A = torch.ones(3, 3, dtype=torch.float64).to_sparse_csr()
        module.count["calls"].append(2)
        assert same(snapshot.state_dict(), before)
        snapshot.restore(module)
        assert same(state_of(module), before)
        assert module.second.weight is module.first.weight and module.count == {"calls": [1]}


def test_an_empty_snapshot_says_so() -> None:
    with pytest.raises(RuntimeError, match="take"):
        Snapshot().restore(nn.Linear(1, 1))


# ---- files -----------------------------------------------------------------------------------------------------------


def test_weights_come_back_from_every_kind_of_file() -> None:
    source = Growing().grow()
    best, last = cloned_state(source), None
    save_weights(source, "w.pt")
    checkpoints.save("run/checkpoints", 1, {"problem": best, "best": {"weights": None}, "optimizer": {}}, best=True)
    change_weights(source)
    last = cloned_state(source)
    checkpoints.save("run/checkpoints", 2, {"problem": last, "best": {"weights": best}})
    torch.save(best, "bare.pt")
    lightning = {
        "state_dict": {f"problem.{name}": value for name, value in best.items()},
        "epoch": 3,
        "loops": {"a": [1]},
    }
    torch.save(lightning, "lit.ckpt")
    cases = {
        "w.pt": best,
        "run": best,
        "run/checkpoints": best,
        "run/checkpoints/step-000000001.ckpt": best,
        "run/checkpoints/step-000000002.ckpt": last,
        "bare.pt": best,
        "lit.ckpt": best,
    }
    for path, expected in cases.items():
        fresh = Growing()
        assert not same(cloned_state(fresh), expected)
        assert load_weights(fresh, path) is fresh
        assert same(cloned_state(fresh), expected), path
    os.remove("run/checkpoints/best")  # a run that monitored nothing keeps its last
    assert same(cloned_state(load_weights(Growing(), "run")), best)  # that is in "best"
    checkpoints.save("plain/checkpoints", 2, {"problem": last})
    assert same(cloned_state(load_weights(Growing(), "plain")), last)


def test_the_best_of_a_run_survives_the_damage_of_its_file() -> None:
    source = nn.Linear(2, 2)
    best = cloned_state(source)
    checkpoints.save("c", 1, {"problem": best, "best": {"weights": None}}, best=True)
    change_weights(source)
    checkpoints.save("c", 2, {"problem": cloned_state(source), "best": {"weights": best}})
    checkpoints.step_path("c", 1).write_bytes(b"PK\x03\x04 damaged")
    with pytest.warns(UserWarning, match=r"step-000000001.ckpt is damaged"):
        loaded = load_weights(nn.Linear(2, 2), "c")
    assert same(cloned_state(loaded), best)


def unchanged(module: nn.Module, error: type[Exception], message: str, *args: Any, **kwargs: Any) -> None:
    before = cloned_state(module)
    with pytest.raises(error, match=message):
        load_weights(module, *args, **kwargs)
    assert same(cloned_state(module), before)


def test_weights_that_do_not_fit_are_named_with_the_file_and_change_nothing() -> None:
    archive.write("step-0300.ckpt", {"problem": nn.Sequential(nn.Linear(2, 64), nn.Linear(64, 1)).state_dict()})
    wide = nn.Sequential(nn.Linear(2, 128), nn.Linear(128, 1))
    unchanged(
        wide,
        ValueError,
        r"step-0300.ckpt has 0.weight of shape \(64, 2\), this problem has \(128, 2\)",
        "step-0300.ckpt",
    )
    unchanged(wide, ValueError, r"0.weight of shape", "step-0300.ckpt", strict=False)
    half = nn.Sequential(nn.Linear(2, 64))
    unchanged(
        half, ValueError, r"step-0300.ckpt does not fit.*lacks nothing and has 1.weight, 1.bias", "step-0300.ckpt"
    )
    more = nn.Sequential(nn.Linear(2, 64), nn.Linear(64, 1), nn.Linear(1, 1))
    unchanged(more, ValueError, r"lacks 2.weight, 2.bias and has nothing", "step-0300.ckpt")
    unchanged(nn.Bilinear(1, 1, 1), ValueError, "lacks weight, bias", "step-0300.ckpt", strict=False)
    norm = nn.BatchNorm1d(4, affine=False)
    save_weights(nn.BatchNorm1d(3, affine=False), "n.pt")
    unchanged(norm, ValueError, r"n.pt has running_mean of shape \(3,\), this problem has \(4,\)", "n.pt")
    archive.write("numbers.pt", {"epoch": 3})
    unchanged(half, CheckpointError, "numbers.pt holds no weights", "numbers.pt")
    unchanged(half, CheckpointError, "nothing.pt does not exist", "nothing.pt")


def test_strict_false_loads_what_fits_and_warns_of_the_rest() -> None:
    source, target = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), nn.Sequential(nn.Linear(2, 3))
    save_weights(source, "w.pt")
    with pytest.warns(UserWarning, match=r"w.pt: not in it.* nothing; not used: 1.weight, 1.bias"):
        load_weights(target, "w.pt", strict=False)
    assert same(cloned_state(target[0]), cloned_state(source[0]))


def test_match_loads_parts_under_new_names_many_from_one() -> None:
    source = nn.ModuleDict({"net": nn.Linear(2, 2), "other": nn.Linear(5, 5)})
    target = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "ab": nn.Linear(2, 2)})
    untouched = cloned_state(target["ab"])
    save_weights(source, "w.pt")
    load_weights(target, "w.pt", match={"a": "net", "b": "net"})
    assert same(cloned_state(target["a"]), cloned_state(source["net"])) and same(
        cloned_state(target["b"]), cloned_state(source["net"])
    )
    assert same(cloned_state(target["ab"]), untouched)  # not "a": prefixes end at a dot
    whole = nn.Linear(2, 2)
    assert same(cloned_state(load_weights(whole, "w.pt", match={"": "net"})), cloned_state(source["net"]))
    load_weights(target, "w.pt", match={"ab.bias": "net.bias"})
    assert target["ab"].bias.equal(source["net"].bias) and target["ab"].weight.equal(untouched["weight"])
    unchanged(target, ValueError, r"this problem has nothing under 'c'", "w.pt", match={"c": "net"})
    unchanged(target, ValueError, r"w.pt has nothing under 'nett'", "w.pt", match={"a": "nett"})
    unchanged(target, ValueError, r"w.pt has a.weight of shape \(5, 5\)", "w.pt", match={"a": "other"})
    unchanged(target, ValueError, r"'' does not fit 'a'", "w.pt", match={"a": ""})


def test_weights_of_a_net_and_of_the_problem_around_it_name_the_match() -> None:
    net, problem = nn.Linear(2, 2), nn.ModuleDict({"net": nn.Linear(2, 2)})
    save_weights(problem, "problem.pt")
    save_weights(net, "net.pt")
    unchanged(net, ValueError, r"problem.pt holds net.weight, net.bias.* load it with match={'': 'net'}", "problem.pt")
    unchanged(problem, ValueError, r"net.pt holds weight, bias.* load it with match={'net': ''}", "net.pt")
    assert same(
        cloned_state(load_weights(nn.Linear(2, 2), "problem.pt", match={"": "net"})), cloned_state(problem["net"])
    )
    assert same(cloned_state(load_weights(problem, "net.pt", match={"net": ""})["net"]), cloned_state(net))
    unchanged(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), ValueError, "does not fit this problem", "net.pt")


def test_a_module_that_resizes_in_its_own_loading_is_left_to_it() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.zeros(3, 3))

        def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
            self.table = torch.zeros_like(state_dict[prefix + "table"])
            super()._load_from_state_dict(state_dict, prefix, *args)

    source = nn.Sequential(Own(), nn.Linear(1, 1))
    source[0].table = torch.ones(5)
    save_weights(source, "w.pt")
    target = nn.Sequential(Own(), nn.Linear(1, 1))
    assert same(cloned_state(load_weights(target, "w.pt")), cloned_state(source))
    source[1] = nn.Linear(2, 1)
    save_weights(source, "w.pt")
    fresh = nn.Sequential(Own(), nn.Linear(1, 1))
    unchanged(fresh, ValueError, r"1.weight of shape \(1, 2\), this problem has \(1, 1\)", "w.pt")


def test_a_lightning_file_that_holds_more_than_data_is_refused_by_name(tmp_path: Path) -> None:
    torch.save(
        {"state_dict": {"problem.weight": torch.ones(1, 1)}, "hyper_parameters": {"path": Path("a")}}, "lit.ckpt"
    )
    unchanged(
        nn.Linear(1, 1, bias=False), CheckpointError, r"lit.ckpt cannot be loaded safely: it holds pathlib", "lit.ckpt"
    )
