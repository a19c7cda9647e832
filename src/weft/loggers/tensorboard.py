"""TensorBoard event files, with tags that TensorBoard groups well.

    logger = TensorBoardLogger("runs/a")
    logger.log_metrics({"train_loss": 0.5, "dev_loss": 0.6, "epoch": 0}, step=79)     # loss/train, loss/dev, epoch
    logger.save()

then `tensorboard --logdir runs`. The tab *Custom Scalars* shows train and dev in one chart.
"""

# pyright: reportAttributeAccessIssue=false
# (the classes of a protobuf module are made at run time)
from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor
    from torch.utils.tensorboard import SummaryWriter

SPLITS = ("train", "dev", "test")
FINAL = "final/"


def tag_of(name: str) -> str:
    """The tag of a metric: `train_loss` is "loss/train", `dev_f_violation` "f_violation/dev"; others as they are."""
    split, _, rest = name.partition("_")
    return f"{rest}/{split}" if split in SPLITS and rest else name


class TensorBoardLogger:
    """Writes event files into `folder`; a Lightning logger by its methods.

    The file is opened by the first thing that is logged and closed by `finalize`. Values are float32, as TensorBoard
    keeps them. `writer` is torch's SummaryWriter, for everything else that TensorBoard can show.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = os.fspath(folder)
        self._writer: SummaryWriter | None = None
        self._purge_step: int | None = None
        self._hyperparams: dict[str, Any] | None = None
        self._problem: Any = None
        self._are_layouts_written = False

    @property
    def writer(self) -> SummaryWriter:
        """The open SummaryWriter."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            _wait_for_a_later_name(Path(self.folder))
            self._writer = SummaryWriter(self.folder, purge_step=self._purge_step)
            self._purge_step = None
        return self._writer

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Add one point at `step` for each of `metrics`."""
        values = {tag_of(name): float(value) for name, value in metrics.items() if not self._repeats(name)}
        if not self._are_layouts_written:
            self._write_layouts(values)
        self._add_scalars(values, step)

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Keep `params` for the HParams tab; they are written with the first metrics, which become its columns.

        Values that are not numbers or text are written as text.
        """
        self._hyperparams = {
            name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in params.items()
        }

    def log_problem(self, problem: Any) -> None:
        """Keep `problem`: its graph of nodes and terms is for the Graphs tab, its description for the Text tab."""
        self._problem = problem if hasattr(problem, "show") else None

    def _repeats(self, name: str) -> bool:
        """Whether a metric says what the loss says: the two sums of a problem without constraints."""
        no_constraints = hasattr(self._problem, "objectives") and not len(getattr(self._problem, "constraints", [0]))
        return no_constraints and name.partition("_")[2] in ("objective_loss", "penalty_loss")

    def log_final(self, metrics: Mapping[str, float], step: int) -> None:
        """Write what the run ended with, as tags `final/...`, which are columns of the HParams tab."""
        self._add_scalars({FINAL + name: float(value) for name, value in metrics.items()}, step)

    def add_figure(self, tag: str, figure: Figure, step: int) -> None:
        """Show a matplotlib figure under `tag` in the Images tab. The figure is left open."""
        self.writer.add_figure(tag, figure, step, close=False)

    def add_histogram(self, tag: str, values: Tensor, step: int) -> None:
        """Show the distribution of all entries of `values` under `tag`."""
        self.writer.add_histogram(tag, values.detach(), step)

    def save(self) -> None:
        """Flush to disk."""
        if self._writer is not None:
            self._writer.flush()

    def rewind(self, step: int, epoch: int, in_epoch: bool = False) -> bool:
        """Make TensorBoard forget what a run that goes on from a checkpoint at `step` will log again.

        That is every point after `step`; those at `step` too if the checkpoint is from the middle of an epoch
        (`in_epoch`), whose means may have been logged there. Returns whether they are.
        """
        self._close()
        self._purge_step = step if in_epoch else step + 1
        return in_epoch

    def finalize(self, status: str) -> None:
        """Write how the run ended ("success", "failed" or "aborted") and close the file.

        The logger can be used again.
        """
        if self._writer is not None and self._hyperparams is not None:
            self._write_session_end(status)
        self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _add_scalars(self, values: Mapping[str, float], step: int) -> None:
        from tensorboard.compat.proto import summary_pb2

        # One event for all tags: one by one, 12 of them cost 330 us.
        points = [summary_pb2.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._add_summary(summary_pb2.Summary(value=points), step)

    def _add_summary(self, summary: Any, step: int | None = None) -> None:
        self.writer._get_file_writer().add_summary(summary, step)

    def _write_layouts(self, tags: Iterable[str]) -> None:
        """What the Custom Scalars and HParams tabs show, from the tags of the first metrics."""
        quantities = [tag.rpartition("/")[0] for tag in tags if tag.endswith("/train")]
        charts = {name: ["Multiline", [f"^{re.escape(name)}/({'|'.join(SPLITS)})$"]] for name in quantities}
        if charts:
            self.writer.add_custom_scalars({"train and dev": charts})
        if self._hyperparams is not None:
            from torch.utils.tensorboard.summary import hparams

            columns = dict.fromkeys([*tags, FINAL + "best_metric"])
            experiment, start, _ = hparams(self._hyperparams, columns)
            self._add_summary(experiment)
            self._add_summary(start)
        if self._problem is not None:
            self._write_graph(self._problem)
        self._are_layouts_written = True

    def _write_graph(self, problem: Any) -> None:
        from tensorboard.compat.proto import config_pb2, graph_pb2, node_def_pb2, step_stats_pb2

        drawing, nodes = problem.show(), []
        names = {"data": "data", **{name: name.replace(" ", "_") for name, _, _, _ in drawing.parts}}
        for name, kind, reads, _ in [("data", "data", [], []), *drawing.parts]:
            sources = dict.fromkeys(names[a] for a, _, b in drawing.edges if b == name and a != name)
            what = f"{kind} ({', '.join(reads)})" if reads else kind
            nodes.append(node_def_pb2.NodeDef(name=names[name], op=what, input=sources))
        metadata = config_pb2.RunMetadata(step_stats=step_stats_pb2.StepStats())
        self.writer._get_file_writer().add_graph((graph_pb2.GraphDef(node=nodes), metadata))
        if hasattr(problem, "describe"):
            self.writer.add_text("problem", "```\n" + problem.describe() + "\n```")

    def _write_session_end(self, status: str) -> None:
        from tensorboard.compat.proto import summary_pb2
        from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

        name = "STATUS_SUCCESS" if status == "success" else "STATUS_FAILURE"
        end = plugin_data_pb2.SessionEndInfo(status=api_pb2.Status.Value(name), end_time_secs=time.time())
        value = summary_pb2.Summary.Value(
            tag=metadata.SESSION_END_INFO_TAG,
            metadata=metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=end)),
            tensor=metadata.NULL_TENSOR,
        )
        self._add_summary(summary_pb2.Summary(value=[value]))


def _wait_for_a_later_name(folder: Path) -> None:
    """Let the second pass in which another event file of the folder was named.

    TensorBoard reads files by their names, in which a number without leading zeros follows the second: of two of one
    second the tenth would come before the ninth, and the points that it takes back would stay.
    """
    names = [path.name.split(".") for path in folder.glob("events.out.tfevents.*")]
    newest = max((name[3] for name in names if len(name) > 3), default="")
    while newest == f"{int(time.time()):010d}":
        time.sleep(0.02)
