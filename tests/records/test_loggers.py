"""What is logged stands in the files: read back with pandas, csv and TensorBoard's own reader."""

from __future__ import annotations

import csv
import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

import weft
from tests.helpers.patience import timed
from tests.helpers.problems import Clock
from weft.loggers import Logging, hyperparameters, learning_rates, make_loggers
from weft.loggers.csv import CSVLogger, read_history, read_rows
from weft.loggers.tensorboard import TensorBoardLogger, tag_of

TIMES = ("seconds", "steps_per_second", "examples_per_second", "wait_seconds")


def events_in(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def scalar_points(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events_in(folder).Scalars(tag)]


# ---------------------------------------------------------------------------------------------------- metrics.csv


def test_every_logged_number_is_one_row_that_pandas_reads(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "runs" / "metrics.csv", clock=lambda: 1_760_000_000.1234)
    logger.log_metrics({"train_loss": 0.1, "dev_loss": 1 / 3, "epoch": 0}, step=79)
    logger.log_metrics({"train_loss": math.nan, "epoch": 1}, step=158)
    logger.save()
    frame = pandas.read_csv(logger.path)
    assert list(frame.columns) == ["step", "epoch", "name", "value", "time"]
    assert frame["name"].tolist() == ["train_loss", "dev_loss", "train_loss"]
    assert frame["step"].tolist() == [79, 79, 158]
    assert frame["epoch"].tolist() == [0, 0, 1]
    assert frame["value"].tolist()[:2] == [0.1, 1 / 3]
    assert math.isnan(frame["value"].tolist()[2])
    assert frame["time"].tolist() == [1_760_000_000.123] * 3


@given(
    st.dictionaries(
        st.text(st.characters(exclude_characters="\r"), min_size=1, max_size=8), st.floats(), min_size=1, max_size=4
    )
)
def test_names_and_values_round_trip_to_the_last_bit(tmp_path_factory: pytest.TempPathFactory, metrics: dict) -> None:
    metrics.pop("epoch", None)
    path = tmp_path_factory.mktemp("csv") / "metrics.csv"
    logger = CSVLogger(path)
    logger.log_metrics({**metrics, "epoch": 3}, step=5)
    logger.finalize("success")
    assert [(row.name, repr(row.value)) for row in read_rows(path)] == [(k, repr(v)) for k, v in metrics.items()]


def test_nothing_is_written_before_something_is_saved(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "a" / "metrics.csv")
    logger.log_metrics({"x": 1.0}, step=0)
    assert not (tmp_path / "a").exists()
    logger.save()
    assert len(read_rows(logger.path)) == 1


def test_rows_are_appended_and_never_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    before = b""
    for step in range(5):
        logger = CSVLogger(path)  # a new process would make a new one
        logger.log_metrics({"loss": float(step), f"new_name_{step}": 1.0, "epoch": step}, step)
        logger.save()
        now = path.read_bytes()
        assert now.startswith(before) and len(now) > len(before)
        before = now
    assert [row.step for row in read_rows(path)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_torn_last_line_is_left_out_and_the_next_run_goes_on_after_it(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.csv"
    logger = CSVLogger(path)
    for step in range(3):
        logger.log_metrics({"loss": float(step), "epoch": step}, step)
    logger.save()
    path.write_bytes(path.read_bytes()[:-cut])
    assert [row.step for row in read_rows(path)] == [0, 1]
    logger = CSVLogger(path)
    logger.log_metrics({"loss": 2.0, "epoch": 2}, step=2)
    logger.save()
    assert [row.step for row in read_rows(path)] == [0, 1, 2]
    with path.open(newline="") as file:
        assert all(len(fields) == 5 for fields in csv.reader(file))


def logged_epochs(path: Path) -> CSVLogger:
    """Three epochs of 10 steps, with a step value every 5 steps."""
    logger = CSVLogger(path)
    for epoch in range(3):
        for step in (10 * epoch + 5, 10 * epoch + 10):
            logger.log_metrics({"train_loss_step": 0.0, "epoch": epoch}, step)
        logger.log_metrics({"train_loss": 0.0, "dev_loss": 0.0, "epoch": epoch}, 10 * epoch + 10)
    logger.save()
    return logger


@pytest.mark.parametrize(
    ("step", "epoch", "num_means", "num_step_values"),
    [(20, 2, 2, 4), (20, 1, 1, 4), (15, 1, 1, 3), (14, 1, 1, 2), (30, 3, 3, 6), (0, 0, 0, 0)],
    ids=["closed", "all steps done but not closed", "middle", "before a value", "nothing to drop", "start"],
)
def test_rewinding_leaves_what_the_checkpoint_had_seen(
    tmp_path: Path, step: int, epoch: int, num_means: int, num_step_values: int
) -> None:
    path = tmp_path / "metrics.csv"
    logger = logged_epochs(path)
    logger.rewind(step, epoch)
    names = [row.name for row in read_rows(path)]
    assert names.count("train_loss") == names.count("dev_loss") == num_means
    assert names.count("train_loss_step") == num_step_values
    assert list(tmp_path.iterdir()) == [path]
    logger.log_metrics({"train_loss": 9.0, "epoch": epoch}, step + 1)
    logger.save()
    assert read_rows(path)[-1].value == 9.0


def test_a_file_of_another_kind_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,loss\n0,1.0\n")
    logger = CSVLogger(path)
    logger.log_metrics({"loss": 1.0}, 0)
    with pytest.raises(ValueError, match="not a metrics.csv of weft"):
        logger.save()
    with pytest.raises(ValueError, match="not a metrics.csv of weft"):
        logger.rewind(0, 0)
    assert path.read_text() == "epoch,loss\n0,1.0\n"


def test_a_broken_row_is_an_error_that_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,epoch,name,value,time\n1,0,loss,0.5,1.0\none,0,loss,0.5,1.0\n2,0,loss,0.5,1.0\n")
    with pytest.raises(ValueError, match=r"metrics.csv, line 3: found 'one,0,loss,0.5,1.0'"):
        read_rows(path)


# ---------------------------------------------------------------------------------------------------- TensorBoard


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("train_loss", "loss/train"),
        ("dev_loss", "loss/dev"),
        ("train_f_violation", "f_violation/train"),
        ("test_inner", "inner/test"),
        ("train_loss_step", "loss_step/train"),
        ("steps_per_second", "steps_per_second"),
        ("lr/actor", "lr/actor"),
        ("train", "train"),
        ("training_noise", "training_noise"),
    ],
)
def test_tags_put_the_quantity_first_and_the_split_last(name: str, tag: str) -> None:
    assert tag_of(name) == tag


def test_event_file_reads_back(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path / "run")
    for epoch in range(3):
        logger.log_metrics({"train_loss": 1.5 - epoch, "dev_loss": 2.0, "lr": 0.25, "epoch": epoch}, 10 * (epoch + 1))
    logger.finalize("success")
    tags = events_in(tmp_path / "run").Tags()["scalars"]
    assert sorted(tags) == ["epoch", "loss/dev", "loss/train", "lr"]
    assert scalar_points(tmp_path / "run", "loss/train") == [(10, 1.5), (20, 0.5), (30, -0.5)]
    assert scalar_points(tmp_path / "run", "epoch") == [(10, 0.0), (20, 1.0), (30, 2.0)]


def test_points_are_on_disk_after_save_without_closing(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"train_loss": 1.0}, 1)
    logger.save()
    assert scalar_points(tmp_path, "loss/train") == [(1, 1.0)]
    logger.finalize("success")


def test_no_event_file_without_something_to_log(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path / "run")
    logger.log_hyperparams({"lr": 1.0})
    logger.save()
    logger.finalize("success")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("in_epoch", [False, True])
def test_a_rewound_run_has_each_point_once(tmp_path: Path, in_epoch: bool) -> None:
    first = TensorBoardLogger(tmp_path)
    for step in range(1, 6):
        first.log_metrics({"train_loss": float(step)}, step)
    first.save()  # and is killed: no finalize
    second = TensorBoardLogger(tmp_path)
    second.rewind(3, 0, in_epoch)
    for step in range(3 if in_epoch else 4, 8):
        second.log_metrics({"train_loss": float(step)}, step)
    second.finalize("success")
    first._close()
    assert scalar_points(tmp_path, "loss/train") == [(step, float(step)) for step in range(1, 8)]


def test_event_files_are_named_in_the_order_in_which_they_were_made(tmp_path: Path) -> None:
    for step in range(12):  # the number behind the second gets another digit
        logger = TensorBoardLogger(tmp_path / "other" if step % 4 else tmp_path / "run")
        logger.log_metrics({"train_loss": float(step)}, step)
        logger.finalize("success")
    assert scalar_points(tmp_path / "run", "loss/train") == [(step, float(step)) for step in (0, 4, 8)]
    files = sorted(path.name for path in (tmp_path / "run").glob("events.*"))
    assert len({name.split(".")[3] for name in files}) == len(files) == 3


def test_without_rewinding_points_would_be_doubled(tmp_path: Path) -> None:
    for steps in (range(1, 6), range(4, 8)):
        logger = TensorBoardLogger(tmp_path)
        for step in steps:
            logger.log_metrics({"train_loss": float(step)}, step)
        logger.finalize("success")
    assert len(scalar_points(tmp_path, "loss/train")) == 9


@pytest.mark.parametrize(("status", "code"), [("success", 1), ("failed", 2), ("aborted", 2)])
def test_hyperparameters_come_with_their_metrics_and_status(tmp_path: Path, status: str, code: int) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.log_hyperparams({"epochs": 5, "lr": 0.5, "compile": False, "optimizer": "Adam", "clip": None})
    logger.log_metrics({"train_loss": 1.0, "epoch": 0}, 10)
    logger.log_final({"best_metric": 0.75}, 10)
    logger.finalize(status)
    events = events_in(tmp_path)
    assert scalar_points(tmp_path, "final/best_metric") == [(10, 0.75)]
    read = plugin_data_pb2.HParamsPluginData.FromString  # pyright: ignore[reportAttributeAccessIssue]
    content = {tag: read(data) for tag, data in events.PluginTagToContent("hparams").items()}
    experiment = content["_hparams_/experiment"].experiment
    assert {info.name.tag for info in experiment.metric_infos} == {"loss/train", "epoch", "final/best_metric"}
    assert {info.name for info in experiment.hparam_infos} == {"epochs", "lr", "compile", "optimizer", "clip"}
    started = content["_hparams_/session_start_info"].session_start_info.hparams
    assert (started["epochs"].number_value, started["lr"].number_value) == (5, 0.5)
    assert (started["optimizer"].string_value, started["clip"].string_value) == ("Adam", "None")
    assert content["_hparams_/session_end_info"].session_end_info.status == code


def test_train_and_dev_share_one_custom_chart(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"train_loss": 1.0, "train_f": 1.0, "lr": 1.0}, 1)
    logger.finalize("success")
    (layout,) = events_in(tmp_path).Tensors("custom_scalars__config__")
    text = layout.tensor_proto.string_val[0].decode("utf-8", "replace")
    assert "^loss/(train|dev|test)$" in text and "^f/(train|dev|test)$" in text and "lr" not in text


def test_figures_and_histograms_are_kept(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    logger = TensorBoardLogger(tmp_path)
    figure = Figure(figsize=(2, 1))
    figure.add_subplot().plot([0, 1])
    logger.add_figure("map", figure, 3)
    logger.add_histogram("weights", torch.linspace(-1, 1, 11, requires_grad=True), 3)
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "histograms": 0}).Reload()
    assert [image.step for image in events.Images("map")] == [3]
    (histogram,) = events.Histograms("weights")
    assert (histogram.histogram_value.num, histogram.histogram_value.min) == (11, -1.0)


# ---------------------------------------------------------------------------------------------------- the option


def test_the_option_makes_the_loggers_it_names(tmp_path: Path) -> None:
    own = CSVLogger(tmp_path / "own.csv")
    assert make_loggers(None, tmp_path) == make_loggers(False, tmp_path) == make_loggers([], None) == []
    assert [type(logger) for logger in make_loggers(True, tmp_path)] == [CSVLogger]
    assert make_loggers("csv", str(tmp_path))[0].path == tmp_path / "metrics.csv"
    made = make_loggers(["csv", "tensorboard", own], tmp_path)
    assert [type(logger) for logger in made] == [CSVLogger, TensorBoardLogger, CSVLogger]
    assert made[2] is own and make_loggers(own, None) == [own]
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_option_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'tensorboard'"):
        make_loggers(["csv", "tensorbord"], tmp_path)
    with pytest.raises(ValueError, match="needs a folder"):
        make_loggers("csv", None)
    with pytest.raises(TypeError, match="missing: log_metrics, log_hyperparams, save, finalize"):
        make_loggers([object()], tmp_path)
    with pytest.raises(TypeError, match="make an instance"):
        make_loggers([CSVLogger], tmp_path)
    with pytest.raises(TypeError, match="expected a name"):
        make_loggers({"csv": True}, tmp_path)


# ---------------------------------------------------------------------------------------------------- the hook


class Scripted(torch.nn.Module):
    """A problem with constant losses: 1 for train, 2 for dev."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        name = batch["name"]
        return {f"{name}_loss": self.weight.sum() * 0.0 + (1.0 if name == "train" else 2.0)}


def drive(hook: Logging, clock: Clock, **options: Any) -> weft.Trainer:
    """A fit of 2 epochs with 4 steps, in which a step lasts half a second and the learning rate falls after each."""

    def tick(trainer: weft.Trainer, batch: Any, loss: torch.Tensor) -> None:
        clock.now += 0.5

    options = {
        "epochs": 2,
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        "scheduler": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1),
        "hooks": [{"on_step_end": tick}, hook],
        "progress": False,
        "log_every": hook.log_every,
    } | options
    trainer = weft.Trainer(**options)
    rows = torch.zeros(4, 1)
    trainer.fit(Scripted(), weft.Data(weft.DictDataset({"p": rows}), weft.DictDataset({"p": rows}), batch_size=1))
    return trainer


def test_each_epoch_is_logged_with_the_rate_it_was_trained_with_its_speed_and_time(tmp_path: Path) -> None:
    clock, logger = Clock(), CSVLogger(tmp_path / "metrics.csv")
    _, seconds_of_all = timed(lambda: drive(Logging([logger], clock=clock), clock))
    found = {(row.step, row.epoch, row.name): row.value for row in read_rows(logger.path)}
    assert all(found[step, epoch, "examples_per_second"] > 0 for step, epoch in ((4, 0), (8, 1)))
    assert all(0 < found[step, epoch, "wait_seconds"] < seconds_of_all for step, epoch in ((4, 0), (8, 1)))
    rows = {key: value for key, value in found.items() if key[2] not in ("examples_per_second", "wait_seconds")}
    expected = {}
    for step, epoch, lr, seconds in ((4, 0, 0.5, 2.0), (8, 1, 0.05, 4.0)):
        values = {"train_loss": 1.0, "dev_loss": 2.0, "lr": lr, "steps_per_second": 2.0, "seconds": seconds}
        expected |= {(step, epoch, name): value for name, value in values.items()}
    assert rows == expected


def test_the_history_is_read_back_without_what_logging_added(tmp_path: Path) -> None:
    clock, logger = Clock(), CSVLogger(tmp_path / "metrics.csv")
    trainer = drive(Logging([logger], log_every=1, clock=clock), clock)
    assert trainer.run is not None and trainer.run.result is not None
    assert (
        read_history(logger.path, 2) == trainer.run.result.history == {"train_loss": [1.0] * 2, "dev_loss": [2.0] * 2}
    )
    logger.log_metrics({"dev_extra": 0.1, "epoch": 1}, 8)
    logger.save()
    extra = read_history(logger.path, 2)["dev_extra"]
    assert math.isnan(extra[0]) and extra[1] == 0.1


def test_a_metric_of_the_users_wins_over_what_logging_adds(tmp_path: Path) -> None:
    clock, logger = Clock(), CSVLogger(tmp_path / "metrics.csv")
    own = {"on_epoch_start": lambda trainer: trainer.log("seconds", -1.0)}
    drive(Logging([logger], clock=clock), clock, hooks=[own, Logging([logger], clock=clock)])
    assert [row.value for row in read_rows(logger.path) if row.name == "seconds"] == [-1.0, -1.0]


def test_step_values_are_logged_every_so_many_steps(tmp_path: Path) -> None:
    clock, logger = Clock(), CSVLogger(tmp_path / "metrics.csv")
    drive(Logging([logger], log_every=3, clock=clock), clock)
    steps = [(row.step, row.epoch, row.value) for row in read_rows(logger.path) if row.name == "train_loss_step"]
    assert steps == [(3, 0, 1.0), (6, 1, 1.0)]


def test_only_the_first_process_writes_but_all_take_part_in_the_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(weft.Run, "is_global_zero", property(lambda run: False))
    monkeypatch.setattr(weft.Run, "step_metrics", lambda run: calls.append(run.progress.step) or {})
    clock, logger = Clock(), CSVLogger(tmp_path / "metrics.csv")
    drive(Logging([logger], log_every=4, clock=clock), clock)
    assert calls == [4, 8] and not logger.path.exists()


def train_with_files(folder: Path, *, die_at_step: int | None = None, **options: Any) -> None:
    """A fit of 5 epochs with 4 steps that writes into folder/run; it dies when step `die_at_step` begins."""

    def die(trainer: weft.Trainer, batch: Any) -> None:
        if trainer.global_step == die_at_step:
            raise OSError("killed")

    torch.manual_seed(0)
    net = torch.nn.Linear(1, 1)
    problem = weft.Problem([weft.Node(net, ["p"], ["x"])], objectives=[weft.objective(lambda x, p: (x - p**2) ** 2)])
    rows = torch.linspace(-1, 1, 8)[:, None]
    data = weft.Data(weft.DictDataset({"p": rows}), weft.DictDataset({"p": rows}), batch_size=2)
    trainer = weft.Trainer(
        epochs=5,
        seed=1,
        root_dir=str(folder),
        run_name="run",
        loggers=["csv", "tensorboard"],
        log_every=1,
        progress=False,
        hooks={"on_step_start": die},
        **options,
    )
    trainer.fit(problem, data)


@pytest.mark.parametrize(
    "when",
    [{"every_n_steps": 3}, {"every_n_steps": 4}, {"every_n_steps": 5}, {"every_n_epochs": 1}, {"every_n_epochs": 2}],
    ids=lambda when: f"{next(iter(when))}={next(iter(when.values()))}",
)
def test_the_files_of_a_resumed_run_are_those_of_one_that_never_stopped(tmp_path: Path, when: dict[str, Any]) -> None:
    def numbers(folder: Path) -> list[tuple[int, int, str, float]]:
        return [row[:4] for row in read_rows(folder / "run" / "metrics.csv") if row.name not in TIMES]

    when["best"] = False
    train_with_files(tmp_path / "whole", checkpoint=when)
    with pytest.raises(OSError, match="killed"):
        train_with_files(tmp_path / "parts", checkpoint=when, die_at_step=14)
    died_with = numbers(tmp_path / "parts")
    train_with_files(tmp_path / "parts", checkpoint=when, resume="last")
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole") != died_with
    for tag in ("loss/train", "loss/dev", "loss_step/train", "lr"):
        whole, parts = (scalar_points(tmp_path / name / "run", tag) for name in ("whole", "parts"))
        assert parts == whole, tag


def test_learning_rates_are_named_by_optimizer_and_group() -> None:
    a, b, c = (torch.nn.Parameter(torch.zeros(1)) for _ in range(3))
    one = torch.optim.SGD([a], lr=0.1)
    two = torch.optim.SGD([{"params": [b], "lr": 0.2}, {"params": [c], "lr": 0.3}], lr=0.1)
    assert learning_rates({"default": one}) == {"lr": 0.1}
    assert learning_rates({"default": two}) == {"lr/0": 0.2, "lr/1": 0.3}
    assert learning_rates({"g": one, "d": two}) == {"lr/g": 0.1, "lr/d/0": 0.2, "lr/d/1": 0.3}


@pytest.mark.parametrize(
    ("error", "status"), [(None, "success"), (OSError(), "failed"), (KeyboardInterrupt(), "aborted")]
)
def test_loggers_are_told_how_the_run_ended(tmp_path: Path, error: BaseException | None, status: str) -> None:
    class Told(CSVLogger):
        def finalize(self, status: str) -> None:
            told.append(status)

    def fail(trainer: weft.Trainer) -> None:
        if error is not None:
            raise error

    told: list[str] = []
    clock = Clock()
    hook = Logging([Told(tmp_path / "metrics.csv")], clock=clock)
    with pytest.raises(type(error)) if error is not None else nullcontext():
        drive(hook, clock, hooks=[{"on_epoch_start": fail}, hook])
    assert told == [status]


def test_hyperparameters_are_plain_values_by_dotted_name() -> None:
    clock = Clock()
    trainer = drive(Logging([], clock=clock), clock, checkpoint={"keep": 3}, fast_dev_run=True)
    settings = hyperparameters(trainer)
    assert all(isinstance(value, bool | int | float | str | None) for value in settings.values())
    assert (settings["epochs"], settings["checkpoint.keep"]) == (2, 3)
    assert not {"patience", "accelerator", "clip", "compile"} & settings.keys()  # as they are by default
    assert (settings["optimizer"], settings["scheduler"]) == ("SGD", "ExponentialLR, each epoch")
    assert settings["lr"] == pytest.approx(0.05)
    assert settings["hooks"] == "on_step_end, Logging"


def test_lightning_loggers_are_accepted_as_they_are(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger as LightningCSV
    from lightning.pytorch.loggers import TensorBoardLogger as LightningTensorBoard

    clock = Clock()
    theirs = LightningCSV(str(tmp_path), name="csv", version="a")
    board = LightningTensorBoard(str(tmp_path), name="tb", version="a")
    drive(Logging(make_loggers([theirs, board], None), clock=clock), clock)
    frame = pandas.read_csv(tmp_path / "csv" / "a" / "metrics.csv")
    assert frame["train_loss"].tolist() == [1.0, 1.0] and frame["step"].tolist() == [4, 8]
    assert frame["epoch"].tolist() == [0, 1]
    assert "epochs: 2" in (tmp_path / "csv" / "a" / "hparams.yaml").read_text()
    assert scalar_points(tmp_path / "tb" / "a", "dev_loss") == [(4, 2.0), (8, 2.0)]


def test_fabrics_csv_logger_which_refuses_hyperparameters_is_accepted(tmp_path: Path) -> None:
    from lightning.fabric.loggers.csv_logs import CSVLogger as FabricCSV

    clock = Clock()
    theirs = FabricCSV(str(tmp_path), name="csv", version="a")
    with pytest.warns(UserWarning, match="does not record hyperparameters"):
        drive(Logging([theirs], clock=clock), clock)
    assert pandas.read_csv(tmp_path / "csv" / "a" / "metrics.csv")["dev_loss"].tolist() == [2.0, 2.0]


def test_tensorboard_and_csv_hold_the_same_numbers(tmp_path: Path) -> None:
    clock, began = Clock(), time.time()
    drive(Logging(make_loggers(["csv", "tensorboard"], tmp_path), clock=clock), clock)
    rows = read_rows(tmp_path / "metrics.csv")
    assert began - 1 <= rows[0].time <= time.time() + 1  # written with fewer digits
    for name in ("train_loss", "lr", "steps_per_second", "seconds"):
        mine = [(row.step, row.value) for row in rows if row.name == name]
        assert dict(scalar_points(tmp_path, tag_of(name))) == pytest.approx(dict(mine), rel=1e-6), name
    assert scalar_points(tmp_path, "final/best_metric") == [(8, 2.0)]
