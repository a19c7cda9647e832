"""What a run's folder says about the run: `config.yaml`, `environment.yaml`, and at the end `report.html`.

`config.yaml` holds the config as it was resolved (of a run described by a file, it starts the same run again);
`environment.yaml` has one entry each time training was begun or resumed: when, how, where, and with what.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from weft import yamlfile
from weft.checkpoint import folder as checkpoints
from weft.checkpoint.archive import put
from weft.events import Hook
from weft.records.environment import config_of, read_sessions, surroundings


class RunFolder(Hook):
    """Describes the run in its folder, in the first process only."""

    def on_fit_start(self, trainer: Any) -> None:
        """Write what is run, and in which surroundings."""
        run = trainer.run
        if run.run_dir is None or not run.is_global_zero:
            return
        folder = Path(run.run_dir)
        checkpoints.clean(folder)
        text = yamlfile.dump(config_of(trainer))
        sessions = read_sessions(folder)
        session = surroundings(trainer)
        if (folder / "config.yaml").is_file() and sessions:
            before = (folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
            session["config_before"] = _config_in(before) if before != text else "the same"
        put(folder / "config.yaml", text.encode())  # whole at any moment: a run that is killed here must still resume
        put(folder / "environment.yaml", yamlfile.dump({"sessions": [*sessions, session]}).encode())

    def on_fit_end(self, trainer: Any, result: Any) -> None:
        """Write the report. A report that fails costs a warning, never the run."""
        run = trainer.run
        if run.run_dir is None or not run.is_global_zero or not run.state.control.begun:
            return
        from weft.records import report

        try:
            report.write(run.run_dir)
        except Exception as error:  # noqa: BLE001 - the result matters more than its picture
            warnings.warn(f"No report.html was written to {run.run_dir}: {error!r}", stacklevel=2)


def _config_in(text: str) -> Any:
    """What the YAML says; the text itself if it is damaged."""
    try:
        return yamlfile.load(text)
    except ValueError:
        return text
