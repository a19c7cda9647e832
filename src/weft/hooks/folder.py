"""What a run's folder says about the run: `config.yaml`, `environment.yaml`, and at the end `report.html`.

`config.yaml` holds the config as it was resolved (of a run described by a file, it starts the same run again);
`environment.yaml` has one entry each time training was begun or resumed: when, how, where, and with what.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from weft import checkpoint, yamlfile
from weft.archive import put
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
        checkpoint.clean(folder)
        text = yamlfile.dump(config_of(trainer))
        sessions = read_sessions(folder)
        session = surroundings(trainer)
        if (folder / "config.yaml").is_file() and sessions:
            before = (folder / "config.yaml").read_text(encoding="utf-8")
            session["config_before"] = _loaded(before) if before != text else "the same"
        put(folder / "config.yaml", text.encode())  # whole at any moment: a run that is killed here must still resume
        put(folder / "environment.yaml", yamlfile.dump({"sessions": [*sessions, session]}).encode())

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
    """The entries of `environment.yaml`, oldest first; [] if there is none, with a warning if it is damaged."""
    path = folder / "environment.yaml"
    if not path.is_file():
        return []
    found = _loaded(path.read_text(encoding="utf-8", errors="replace"))
    sessions = found.get("sessions") if isinstance(found, dict) else None
    if not isinstance(sessions, list):
        warnings.warn(f"{path} is damaged: earlier sessions of this run are not known any more.", stacklevel=2)
        return []
    return sessions


def _loaded(text: str) -> Any:
    """What the YAML says; the text itself if it is damaged."""
    try:
        return yamlfile.load(text)
    except ValueError:
        return text
