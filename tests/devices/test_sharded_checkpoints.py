"""Checkpoints in parts: whole or not there, verified and safe to load, and bit for bit what the run needs to go on."""

from __future__ import annotations

import io
import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import state_dict_saver

import weft
from tests.helpers.bitwise import same
from tests.helpers.patience import patience, timed
from tests.helpers.problems import points
from tests.helpers.shards import Fit, in_shards, in_two, options, shard_all, shard_net, start, state
from weft.checkpoint import archive
from weft.checkpoint import folder as checkpoints
from weft.checkpoint import parts as shardfiles
from weft.checkpoint.archive import CheckpointError
from weft.devices.seeding import seed_everything

CLOCKS = {"seconds", "examples_per_second"}


class NoisyFit(Fit):
    """With noise in each process of its own, and a running mean."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        if self.training:
            noise = 0.1 * torch.randn_like(batch["x"])
            self.mean.mul_(0.9).add_(0.1 * noise.mean())
            batch = {**batch, "x": batch["x"] + noise}
        return super().forward(batch)


def fit_noisy(given: dict[str, Any], folder: Path, resume: str | None = None, after: Callable | None = None) -> Any:
    seed_everything(0)
    problem = NoisyFit()
    given = given | {"root_dir": str(folder.parent), "run_name": folder.name, "resume": resume}
    data = weft.Data(points(51), points(13, 1), batch_size=8)
    result = weft.Trainer(**given).fit(problem, data)
    return state(problem), result.last_weights, result.history, after(problem) if after else None


def stored(folder: Path, which: str = "last") -> dict[str, Any]:
    state = checkpoints.load(folder, which)[0]
    return {**state, "progress": {k: v for k, v in state["progress"].items() if k not in CLOCKS}}


def scheduled(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


# ---- resuming


@pytest.mark.parametrize("parallelize", [shard_net, shard_all])
@pytest.mark.parametrize("cut", ["after epoch 2", "within epoch 1"])
def test_a_resumed_run_in_shards_ends_bitwise_where_the_undisturbed_one_does(
    parallelize: Callable, cut: str, tmp_path: Path
) -> None:
    given = in_shards(parallelize, scheduler=scheduled, checkpoint={"every_n_steps": 6, "keep": 9}, clip=0.5)
    straight = in_two(fit_noisy, given | {"epochs": 4}, tmp_path / "straight")
    if cut == "after epoch 2":
        in_two(fit_noisy, given | {"epochs": 2}, tmp_path / "cut")
        resumed = in_two(fit_noisy, given | {"epochs": 4}, tmp_path / "cut", "last")
        folder = tmp_path / "cut"
    else:
        path = tmp_path / "straight" / "checkpoints" / "step-000000006.ckpt"
        assert stored(path)["progress"]["batch"] == 2
        resumed = in_two(fit_noisy, given | {"epochs": 4}, tmp_path / "straight", str(path))
        folder = tmp_path / "straight"
    assert same(resumed, straight)
    if cut == "after epoch 2":
        one, two = stored(folder), stored(tmp_path / "straight")
        assert not [part for part in one if not same(one[part], two[part])]
    if parallelize is shard_all and cut == "after epoch 2":
        assert not same(in_two(fit_noisy, given | {"epochs": 4, "seed": 2}, tmp_path / "other"), straight)


def test_forgetting_the_random_state_of_the_second_process_would_be_noticed(tmp_path: Path) -> None:
    given = in_shards(checkpoint=True)
    straight = in_two(fit_noisy, given | {"epochs": 3}, tmp_path / "straight")
    in_two(fit_noisy, given | {"epochs": 2}, tmp_path / "cut")
    path = checkpoints.find(tmp_path / "cut")
    state = shardfiles.read_parts(path)
    state["other_processes"][0]["random"] = state["random"]
    files = {name: shardfiles._size_and_checksum(path / name) for name in (".metadata", "__0_0.distcp", "__1_0.distcp")}
    archive.write(path / "state.ckpt", {**state, shardfiles.MARK: files})
    assert not same(in_two(fit_noisy, given | {"epochs": 3}, tmp_path / "cut", "last"), straight)


def test_another_number_of_processes_is_refused_and_one_process_loads_the_weights(tmp_path: Path) -> None:
    told = in_two(fit_noisy, in_shards(checkpoint=True), tmp_path / "run")
    with pytest.raises(ValueError, match="processes: 2 there, 1 here.*weft.load_weights"):
        fit_noisy(options(epochs=5), tmp_path / "run", "last")
    best, last, history, _ = told[0]
    loaded = weft.load_weights(NoisyFit(), tmp_path / "run")
    assert same(state(loaded), best)
    assert same(state(weft.load_weights(NoisyFit(), checkpoints.find(tmp_path / "run"))), dict(last))
    result = weft.load_result(tmp_path / "run")
    assert same(dict(result.last_weights), dict(last)) and result.history["train_loss"] == history["train_loss"]
    with pytest.raises(ValueError, match="problem: None there, in shards here|cannot be resumed"):
        whole = options(epochs=1, checkpoint=True, strategy="ddp", devices=2, timeout=patience())
        in_two(fit_noisy, whole, tmp_path / "whole")
        in_two(fit_noisy, in_shards(epochs=2), tmp_path / "whole", "last")


def test_two_processes_that_hold_everything_go_on_from_shards(tmp_path: Path) -> None:
    given = {"epochs": 2, "checkpoint": True}
    straight = in_two(fit_noisy, in_shards(**given | {"epochs": 4}), tmp_path / "straight")
    in_two(fit_noisy, in_shards(shard_all, **given), tmp_path / "cut")

    def whole() -> Any:
        with (
            pytest.warns(UserWarning, match="Changed since: .*strategy")
            if os.environ["RANK"] == "0"
            else pytest.warns()
        ):
            return fit_noisy(
                options(epochs=4, strategy="ddp", devices=2, timeout=patience(), checkpoint=True),
                tmp_path / "cut",
                "last",
            )

    for name, value in in_two(whole)[0][0].items():
        torch.testing.assert_close(value, straight[0][0][name], rtol=0, atol=1e-10)


# ---- the files


def test_a_checkpoint_in_parts_holds_a_shard_of_each_process_and_keeps_to_its_number(tmp_path: Path) -> None:
    in_two(fit_noisy, in_shards(epochs=4, checkpoint={"every_n_epochs": 1, "keep": 2}), tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    found = sorted(path.name for path in folder.iterdir())
    assert {"best", "last"} < set(found) and not [name for name in found if name.endswith(".tmp")]
    assert len(found) <= 5
    path = checkpoints.find(folder)
    assert sorted(file.name for file in path.iterdir()) == [".metadata", "__0_0.distcp", "__1_0.distcp", "state.ckpt"]
    assert {tuple(part.shape) for part in own_shards(path, "problem/net.0.weight")} == {(4, 2), (3, 2)}


def own_shards(path: Path, name: str) -> list[Tensor]:
    """The pieces of one tensor, read from the files by hand."""
    places = shardfiles.read_metadata(path / ".metadata").storage_data
    found = []
    for index, place in places.items():
        if index.fqn == name:
            data = (path / place.relative_path).read_bytes()[place.offset : place.offset + place.length]
            found.append(torch.load(io.BytesIO(data), weights_only=True))
    return found


@pytest.mark.parametrize("name", [".metadata", "__1_0.distcp", "state.ckpt"])
@pytest.mark.parametrize("how", ["one bit", "cut off", "missing"])
def test_a_damaged_file_is_noticed_and_the_checkpoint_before_is_used(name: str, how: str, tmp_path: Path) -> None:
    folder = made(tmp_path)
    path, before = checkpoints.find(folder), sorted(folder.glob("step-*"))[-2]
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 1
    if how == "missing":
        (path / name).unlink()
    else:
        (path / name).write_bytes(data if how == "one bit" else data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=path.name):
        shardfiles.read_parts(path)
    with pytest.warns(UserWarning, match=f"{before.name} is used instead"):
        state, found = checkpoints.load(folder)
    assert found == before and same(state, checkpoints.load(before)[0])


def test_what_was_put_there_by_others_is_noticed(tmp_path: Path) -> None:
    path = checkpoints.find(made(tmp_path))
    (path / "__2_0.distcp").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="does not belong there"):
        checkpoints.load(path)


MADE: dict[str, Path] = {}


def made(tmp_path: Path) -> Path:
    """A folder of checkpoints in parts, made once and copied."""
    import shutil
    import tempfile

    if "folder" not in MADE:
        MADE["folder"] = Path(tempfile.mkdtemp(prefix="weft-test-")) / "run"
        in_two(fit_noisy, in_shards(epochs=3, checkpoint={"every_n_epochs": 1, "keep": 3}), MADE["folder"])
    shutil.copytree(MADE["folder"], tmp_path / "copy", symlinks=True)
    return tmp_path / "copy" / "checkpoints"


class Harm:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_metadata_that_would_run_code_runs_nothing(tmp_path: Path) -> None:
    path = made(tmp_path) / "../checkpoints"
    metadata = checkpoints.find(path) / ".metadata"
    entries = shardfiles.read_metadata(metadata)  # a good one is read
    assert "problem/net.0.weight" in entries.state_dict_metadata
    entries.planner_data = Harm(tmp_path / "harm")
    metadata.write_bytes(pickle.dumps(entries))
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be loaded safely: it holds .*Path.touch|getattr"):
        shardfiles.read_metadata(metadata)
    assert not (tmp_path / "harm").exists()
    pickle.loads(metadata.read_bytes())  # as torch's own reader would
    assert (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "value", [os.system, eval, pickle.loads, torch.load, Path.unlink, torch.nn.Linear, print, getattr]
)
def test_metadata_may_name_no_other_function_or_class(value: Any, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"x": value}))
    with pytest.raises(CheckpointError, match="cannot be loaded safely: it holds"):
        shardfiles.read_metadata(tmp_path / ".metadata")


def test_metadata_may_not_point_out_of_its_folder(tmp_path: Path) -> None:
    metadata = checkpoints.find(made(tmp_path)) / ".metadata"
    entries = shardfiles.read_metadata(metadata)
    next(iter(entries.storage_data.values())).relative_path = "../../other"
    metadata.write_bytes(pickle.dumps(entries))
    with pytest.raises(CheckpointError, match="tells of ../../other; not read"):
        shardfiles.read_metadata(metadata)


def test_a_folder_that_torch_wrote_gives_its_weights(tmp_path: Path) -> None:
    weights = start().state_dict()
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(dict(weights), storage_writer=dcp.FileSystemWriter(tmp_path / "dcp"), no_dist=True)
    torch.manual_seed(5)
    other = Fit()
    assert not same(state(other), dict(weights))
    assert same(state(weft.load_weights(other, tmp_path / "dcp")), dict(weights))


# ---- interrupted writes


@pytest.mark.parametrize("where", ["save", "_commit", "replace"])
def test_a_kill_while_saving_leaves_the_checkpoint_before(where: str, tmp_path: Path, monkeypatch: Any) -> None:
    straight, seconds = timed(lambda: in_two(fit_noisy, in_shards(epochs=3), tmp_path / "straight"))

    def killed() -> None:
        count = 0
        target, name = {
            "save": (state_dict_saver, "save"),
            "_commit": (shardfiles, "_commit"),
            "replace": (os, "replace"),
        }[where]
        real = getattr(target, name)

        def dies(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if name != "replace" or str(args[0]).endswith(".tmp") and Path(args[0]).is_dir():
                count += 1
            if count == 2:
                if name == "save" and os.environ["RANK"] == "1":  # its file is there, that of the first is not
                    real(*args, **kwargs)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(target, name, dies)
        given = in_shards(epochs=4, checkpoint={"every_n_epochs": 1, "best": False})
        fit_noisy(given | {"timeout": max(3.0, seconds)}, tmp_path / "run")

    with pytest.raises((AssertionError, RuntimeError)):
        in_two(killed)
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in folder.iterdir() if path.suffix == ".tmp"]
    assert checkpoints.load(folder)[0]["progress"]["epoch"] == 1
    resumed = in_two(fit_noisy, in_shards(epochs=3, checkpoint=True), tmp_path / "run", "auto")
    assert same(resumed, straight)
    assert not [path.name for path in folder.iterdir() if path.suffix == ".tmp"]


@pytest.mark.parametrize(
    "exchange", [shardfiles._exchange, lambda one, other: False], ids=["at one instant", "in two steps"]
)
def test_a_step_that_is_saved_again_replaces_what_was_there(
    exchange: Callable, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(shardfiles, "_exchange", exchange)
    path = tmp_path / "step-000000001.ckpt"
    for number in (1, 2):
        temporary = tmp_path / f".{path.name}.{os.getpid()}-1@host.tmp"
        temporary.mkdir()
        (temporary / "__0_0.distcp").write_bytes(bytes([number]))
        shardfiles._commit(temporary, path, {"number": number})
        assert shardfiles.read_parts(path) == {"number": number}
        assert (path / "__0_0.distcp").read_bytes() == bytes([number])
        assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_disk_that_is_full_for_one_process_is_an_error_in_both(tmp_path: Path) -> None:
    def full() -> str:
        if os.environ["RANK"] == "1":
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            fit_noisy(in_shards(epochs=1, checkpoint=True), tmp_path / "run")
        except OSError as error:
            return str(error)
        finally:
            if os.environ["RANK"] == "1":
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return ""

    for message in in_two(full):
        assert "could not be written" in message
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp"))


@pytest.mark.parametrize("kind", ["raise", "kill"])
def test_a_process_that_fails_ends_both_and_leaves_the_last_checkpoint(kind: str, tmp_path: Path) -> None:
    _, seconds = timed(lambda: in_two(fit_noisy, in_shards(epochs=1), tmp_path / "whole"))

    def fails() -> None:
        def trouble(trainer: Any, batch: Any, loss: Any) -> None:
            if os.environ["RANK"] == "1" and trainer.global_step == 6:
                if kind == "raise":
                    raise ValueError("this is the cause")
                os.kill(os.getpid(), signal.SIGKILL)

        given = in_shards(checkpoint={"every_n_steps": 2}, hooks={"on_step_end": trouble})
        fit_noisy(given | {"timeout": max(3.0, seconds)}, tmp_path / "run")

    error, message = (
        (ValueError, "this is the cause") if kind == "raise" else (RuntimeError, "lost contact|Connection|timed out")
    )
    with pytest.raises(error, match=message) as raised:
        in_two(fails)
    if kind == "raise":
        assert "No checkpoint was written at this error" in raised.value.__notes__[-1]
    assert checkpoints.load(tmp_path / "run")[0]["progress"]["step"] == 4
