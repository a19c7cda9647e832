"""The table of `docs/lightning.md`, of the installed Lightning: `python -m tests.helpers.trainer_table` writes it."""

from __future__ import annotations

import inspect
from pathlib import Path

import lightning.pytorch as pl

PAGE = Path(__file__).parents[2] / "docs" / "lightning.md"
BEGIN, END = "<!-- made by tests/helpers/trainer_table.py -->\n", "<!-- end -->\n"

OTHER = {
    "strategy": "one device and `ddp` in all its forms are the same; what cuts a module into pieces (`fsdp`, "
    "`deepspeed`, `model_parallel`) is refused: weft's loop has whole modules",
    "profiler": "`training_step`, validation, loaders and hooks of the epoch are timed under Lightning's names; "
    "hooks around a batch and the optimizer's step are not timed on their own",
    "fit": "weft's loop and update; a `training_step(self, dataloader_iter)` is refused",
    "fit_loop": "counters, limits and files are Lightning's; `run` is weft's loop, changing `epoch_loop.advance` or "
    "`automatic_optimization.run` has no effect",
}
"""What is not the same, by keyword, method or attribute, and how."""
OURS = {"weft_run": "weft's run of the last fit; `weft_run.result` has the history by epoch"}


def table() -> str:
    """Every keyword of Lightning's Trainer, then its public methods and attributes: same, or other and how."""
    keywords = [name for name in inspect.signature(pl.Trainer.__init__).parameters if name != "self"]
    members = [name for name in dir(pl.Trainer(barebones=True)) if not name.startswith("_")]
    lines = ["| keyword | |", "|---|---|", *(f"| `{name}` | {as_told(name)} |" for name in keywords)]
    lines += ["", "| method or attribute | |", "|---|---|"]
    lines += [f"| `{name}` | {as_told(name)} |" for name in members if name not in keywords]
    lines += [f"| `{name}` | weft's own: {what} |" for name, what in OURS.items()]
    return "\n".join(lines) + "\n"


def as_told(name: str) -> str:
    """ "same", or how it is other."""
    return f"other: {OTHER[name]}" if name in OTHER else "same"


if __name__ == "__main__":
    head, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(head + BEGIN + table() + END + rest.split(END)[1])
