"""What a run's folder says about the run: `config.yaml`, `environment.yaml`, and at the end `report.html`.

`config.yaml` holds the config as it was resolved (of a run described by a file, it starts the same run again);
`environment.yaml` has one entry each time training was begun or resumed: when, how, where, and with what.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from weft import yamlfile
from weft.events import Hook
from weft.surroundings import config_of, surroundings


class RunFolder(Hook):
    """Describes the run in its folder, in the first process only."""

    def on_fit_start(self, trainer: Any) -> None:
        """Write what is run, and in which surroundings."""
        run = trainer.run
        if run.run_dir is None or not run.is_global_zero:
            return
        folder = Path(run.run_dir)
        text = yamlfile.dump(config_of(trainer))
        sessions = read_sessions(folder)
        session = surroundings(trainer)
        if (folder / "config.yaml").is_file() and sessions:
            before = (folder / "config.yaml").read_text(encoding="utf-8")
            session["config_before"] = yamlfile.load(before) if before != text else "the same"
        (folder / "config.yaml").write_text(text, encoding="utf-8")
        (folder / "environment.yaml").write_text(yamlfile.dump({"sessions": [*sessions, session]}), encoding="utf-8")

    def on_fit_end(self, trainer: Any, result: Any) -> None:
        """Write the report. A report that fails costs a warning, never the run."""
        run = trainer.run
        if run.run_dir is None or not run.is_global_zero or not run.begun:
            return
        from weft import report

        try:
            report.write(run.run_dir)
        except Exception as error:  # noqa: BLE001 - the result matters more than its picture
            warnings.warn(f"No report.html was written to {run.run_dir}: {error!r}", stacklevel=2)


def read_sessions(folder: Path) -> list[dict[str, Any]]:
    """The entries of `environment.yaml`, oldest first; [] if there is none."""
    path = folder / "environment.yaml"
    if not path.is_file():
        return []
    found = yamlfile.load_file(path)
    return found.get("sessions", []) if isinstance(found, dict) else []
