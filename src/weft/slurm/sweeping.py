"""The workers of a sweep as an array of jobs: each takes trials from the shared folder; nobody coordinates them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft.records.folders import made
from weft.slurm import events
from weft.slurm.freezing import freeze
from weft.slurm.script import batch_script
from weft.slurm.submitting import Submitted, send
from weft.sweeps.study import Study


@dataclass(frozen=True)
class SubmittedSweep(Submitted):
    """A sweep whose workers were submitted. `result()` waits for its end, `found()` is what there is so far."""

    study: Study = field(kw_only=True)

    @property
    def state(self) -> str:
        """ "queued", "running", "finished", "failed", "cancelled", or "lost": no worker is left, but trials are."""
        if self.study.too_many_failures():
            return "failed"
        if len(self._done()) >= self.study.num_trials:
            return "finished"
        said = super().state
        return "running" if said == "queued" and self.study.trials() else said

    def _done(self) -> list[Any]:
        return self.study.trials(self.study.State.COMPLETE, self.study.State.PRUNED)

    def found(self) -> Any:
        """The SweepResult of the trials that are over."""
        return self.study.result()

    def result(self, timeout: float | None = None) -> Any:
        """Wait until all trials are over, at most `timeout` seconds, and return the SweepResult.

        Raises RuntimeError if too many trials failed or no worker is left, TimeoutError where it takes longer.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while (state := self.state) not in (*events.ENDS, "lost"):
            if until is not None and time.monotonic() > until:
                raise TimeoutError(f"{len(self._done())} of {self.study.num_trials} trials are done after {timeout} s.")
            time.sleep(1.0)
        if self.study.too_many_failures():
            raise RuntimeError(f"{len(self.study.errors())} trials failed; the first said:\n{self.study.errors()[0]}")
        if state != "finished":
            raise RuntimeError(f"job {self.job} is {state}; the end of its log:\n{self.log()[-2000:]}")
        return self.study.result()


def submit_workers(study: Study) -> SubmittedSweep:
    """Submit an array of `workers` jobs for the sweep, running a copy of the code as it is now."""
    config, place = study.config, study.folder / events.FOLDER
    number, code = 1, place / "code-1"
    while not made(code):  # more workers may join from anywhere at the same time
        number, code = number + 1, place / f"code-{number + 1}"
    script = place / f"job-{number}.sh"
    script.write_text(
        batch_script(
            ["-m", "weft.sweeps.worker", str(study.folder)],
            name=config.name,
            logs=place,
            code=code,
            slurm=config.slurm or {},
            array=config.workers,
            setup=config.setup or (),
            grace=config.grace,
        )
    )
    freeze(Path.cwd(), code, leave_out=study.folder.parent)
    return SubmittedSweep(study.folder, send(script, study.folder), study=study)
