"""Files that weft wrote before its own files were moved still load, and runs that it began end where they would have.

tests/files/before_house/ was written by commit 8c2d83b. Each run there was cut off in the middle of its third epoch; a
resumed one must end, to the last bit where torch and processor are the same, where the undisturbed one ended then.

    python tests/house/test_files_of_before.py --write FOLDER     # how they were made; never over the old ones
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import weft
from tests.house.bits import REPO, elsewhere, graphs_run_themselves, machine, own_folder, sha256

DATA = REPO / "tests" / "files" / "before_house"
COMMIT = "8c2d83b"
CUT = 16  # of 24 steps, 6 an epoch: saved after step 15, in the middle of the third epoch


# ---- what was trained ------------------------------------------------------------------------------------------------


class Rows(Dataset):
    """22 rows with noise from the global random state of torch, numpy and python."""

    def __len__(self) -> int:
        return 22

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        noise = torch.rand(2) + random.random() + float(np.random.rand())
        return {"p": points(22, 1)[i] + 0.1 * noise, "index": torch.tensor(i)}


def points(count: int, seed: int) -> Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))


def problem(seed: int, loss: Any = None) -> weft.Problem:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 1))
    return weft.Problem(
        [weft.Node(net, ["p"], ["x"], name="net")],
        [weft.objective(lambda x, p: (x - p[:, :1] * p[:, 1:]).square(), name="f")],
        [weft.less_equal("x", 0.1, weight=2.0, name="c")],
        loss=loss,
    )


def cosine(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7)


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.02)


class Cut(Exception):
    """The end of a run that was not foreseen."""


class Fuse(weft.Hook):
    """Ends a run after so many steps; 0: never."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer: Any, batch: Any, loss: Any) -> None:
        if trainer.global_step == self.step:
            raise Cut


def through_loader() -> tuple[Any, Any]:
    loader = DataLoader(Rows(), batch_size=4, shuffle=True, num_workers=0)
    dev = weft.DictDataset({"p": points(9, 2)})
    return weft.Data(loader, dev, batch_size=9), weft.AugmentedLagrangian(every=1)


def in_memory() -> tuple[Any, Any]:
    train, dev = weft.DictDataset({"p": points(22, 1)}), weft.DictDataset({"p": points(9, 2)})
    return weft.Data(train, dev, batch_size=4), None


RUNS: dict[str, tuple[Callable[[], tuple[Any, Any]], dict[str, Any]]] = {
    "eager": (through_loader, {"log_every": 4}),
    "compiled": (in_memory, {"compile": True, "clip": 0.5, "seed": 3}),
}
"""By the name of its folder: its data and loss, and the options that only it has."""


def fit(name: str, root: Path, cut: int, resume: str | None = None) -> tuple[weft.FitResult, dict[str, Any]]:
    """Its result, and everything that has a digest."""
    make, options = RUNS[name]
    data, loss = make()
    trained = problem(0 if resume is None else 9, loss)
    random.seed(cut), np.random.seed(cut), torch.manual_seed(cut)  # a new process has other random numbers
    if resume is None:
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
    trainer = weft.Trainer(
        epochs=4,
        optimizer=adam,
        scheduler=cosine,
        hooks=[weft.hooks.EMA(0.9), Fuse(cut)],
        accelerator="cpu",
        progress=False,
        root_dir=str(root),
        run_name=name,
        resume=resume,
        checkpoint={"every_n_steps": 15, "best": False},
        **options,
    )
    with graphs_run_themselves() as ran:
        result = trainer.fit(trained, data)
    assert bool(ran) == (name == "compiled")
    return result, {
        "weights": {"end": trained.state_dict(), "last": result.last_weights},
        "optimizers": {key: optimizer.state_dict() for key, optimizer in trainer.optimizers.items()},
        "history": [result.history, result.epochs, result.steps, result.best_metric, result.best_epoch],
        "random": torch.get_rng_state(),
    }


def lit_setup() -> tuple[Any, Any, None, int]:
    return weft.DictDataset({"p": points(22, 1)}), weft.DictDataset({"p": points(9, 2)}), None, 4


# ---- how the files were made -----------------------------------------------------------------------------------------


def write(folder: Path) -> None:
    if folder.exists():
        raise SystemExit(f"{folder} is there already.")
    folder.mkdir(parents=True)
    digests: dict[str, Any] = {}
    with own_folder(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in RUNS:
            with contextlib.suppress(Cut):
                fit(name, Path("cut"), CUT)
            left_out = shutil.ignore_patterns("exception.ckpt", "report.html", "result.json")
            shutil.copytree(Path("cut") / name, folder / name, ignore=left_out)
            result, parts = fit(name, Path("whole"), 0)
            digests[name] = {part: sha256(value) for part, value in parts.items()}
            finished = problem(9)
            finished.load_state_dict({k: v for k, v in result.last_weights.items() if not k.startswith("loss.")})
            weft.save_weights(finished, folder / name / "ended.pt")
        ended = folder / "ended"
        ended.mkdir()
        for file in ("config.yaml", "environment.yaml", "metrics.csv", "result.json"):
            shutil.copy(Path("whole") / "eager" / file, ended / file)
        lit_problem = problem(4)
        trainer = weft.LitTrainer(epochs=3, weight_name="lit", accelerator="cpu", seed=2, progress=False)
        trainer.fit(lit_problem, lit_setup)
        shutil.copy("lit.ckpt", folder / "lit.ckpt")
        digests["lit.ckpt"] = sha256(lit_problem.state_dict())
        weft.save_weights(problem(6), folder / "weights.pt")
        digests["weights.pt"] = sha256(problem(6).state_dict())
    for path in folder.rglob("environment.yaml"):
        path.write_text(scrubbed(path.read_text()))
    written = {"commit": COMMIT, "machine": here(), "digests": digests}
    (folder / "digests.json").write_text(json.dumps(written, indent=1) + "\n")


SCRUBBED = {"command": "train.py", "folder": "/home/user/work", "host": "machine", "system": "Linux"}


def scrubbed(text: str) -> str:
    """Without what says where and by whom a run was made."""
    for name, value in SCRUBBED.items():
        text = re.sub(rf"^( +-? ?{name}:).*$", rf"\1 {value}", text, flags=re.MULTILINE)
    return re.sub(r"^  git:.*\n(    .*\n)*", "  git: null\n", text, flags=re.MULTILINE)


# ---- the laws --------------------------------------------------------------------------------------------------------


def about() -> dict[str, Any]:
    return json.loads((DATA / "digests.json").read_text(encoding="utf-8"))


def here() -> dict[str, str]:
    """What a resumed run compares: another python is named in its warning, too."""
    return {**machine(), "python": ".".join(map(str, sys.version_info[:2]))}


def same_machine() -> bool:
    return not elsewhere(about()["machine"], here())


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A copy of the files, as a run writes into its folder."""
    shutil.copytree(DATA, tmp_path / "before")
    yield tmp_path / "before"


def resume(name: str, folder: Path, which: str) -> tuple[weft.FitResult, dict[str, Any]]:
    with warnings.catch_warnings():
        # Another torch or processor is named in a warning; here nothing may have changed.
        warnings.filterwarnings("error" if same_machine() else "ignore", message="Resuming")
        return fit(name, folder, 0, which)


@pytest.mark.parametrize("which", ["last", "auto", "by its path"])
@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_before_is_resumed_and_ends_where_it_would_have(name: str, which: str, folder: Path) -> None:
    path = next((folder / name / "checkpoints").glob("step-*.ckpt"))
    result, parts = resume(name, folder, str(path) if which == "by its path" else which)
    assert (result.epochs, result.steps) == (4, 24)
    weights = weft.load_weights(problem(9), folder / name / "ended.pt").state_dict()
    for key, value in weights.items():
        torch.testing.assert_close(result.last_weights[key], value, rtol=1e-3, atol=1e-4)
    if same_machine():
        assert {part: sha256(value) for part, value in parts.items()} == about()["digests"][name]


@pytest.mark.long
@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_before_that_forgets_its_averages_would_be_noticed(name: str, folder: Path) -> None:
    path = next((folder / name / "checkpoints").glob("step-*.ckpt"))
    state = torch.load(path, weights_only=True)
    averaging = [own for own in state["hooks"].values() if "averages" in own]
    assert len(averaging) == 1
    averaging[0] |= {"count": 0, "averages": {}}
    torch.save(state, path)
    _, parts = resume(name, folder, str(path))
    assert sha256(parts["weights"]) != about()["digests"][name]["weights"]


@pytest.mark.parametrize("name", RUNS)
def test_the_weights_of_a_checkpoint_of_before_load(name: str, folder: Path) -> None:
    path = next((folder / name / "checkpoints").glob("step-*.ckpt"))
    state = torch.load(path, weights_only=True)
    for place in (path, folder / name, folder / name / "checkpoints"):
        loaded = problem(9, RUNS[name][0]()[1])
        weft.load_weights(loaded, place)
        best = state["best"]["weights"] or state["problem"]
        expected = state["problem"] if place == path else best
        assert sha256(loaded.state_dict()) == sha256(expected)


@pytest.mark.parametrize("file", ["lit.ckpt", "weights.pt"])
def test_a_weights_file_of_before_loads(file: str) -> None:
    loaded = problem(9)
    assert weft.load_weights(loaded, DATA / file) is loaded
    assert sha256(loaded.state_dict()) == about()["digests"][file]


def test_the_weights_file_of_a_littrainer_of_before_loads_through_a_littrainer() -> None:
    loaded = weft.LitTrainer(save_weights=False).load_state_dict_lightning(problem(9), DATA / "lit.ckpt")
    assert sha256(loaded.state_dict()) == about()["digests"]["lit.ckpt"]


def test_the_result_of_a_run_of_before_loads() -> None:
    result = weft.load_result(DATA / "ended")
    assert (result.epochs, result.steps, result.stop_reason, result.monitor) == (4, 24, "epochs", "dev_loss")
    assert result.best_epoch is not None and result.best_metric == result.history["dev_loss"][result.best_epoch]
    assert all(len(values) == 4 for values in result.history.values())
    assert all(math.isfinite(v) for v in result.history["train_loss"])
    written = [result.history, result.epochs, result.steps, result.best_metric, result.best_epoch]
    assert sha256(written) == about()["digests"]["eager"]["history"]  # as files they hold every bit


def test_files_of_before_say_nothing_about_where_they_were_made() -> None:
    files = [path for path in DATA.rglob("*") if path.is_file()]
    assert len(files) >= 15 and sum(path.stat().st_size for path in files) < 150_000
    for path in files:
        found = re.findall(rb"/(?:home|root|tmp|work|Users|usr|opt|var)\b[\w/.-]*", path.read_bytes())
        assert set(found) <= {SCRUBBED["folder"].encode()}, f"{path.name}: {found}"
    for path in DATA.rglob("environment.yaml"):
        assert scrubbed(text := path.read_text()) == text


if __name__ == "__main__":
    if sys.argv[1:2] != ["--write"] or len(sys.argv) != 3:
        raise SystemExit(__doc__)
    write(Path(sys.argv[2]).resolve())
