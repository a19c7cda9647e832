"""One line that says how far training is.

    epoch 12/200 ━─────────  0:03 < 0:41  train_loss 0.0123  dev_loss 0.0130  best 0.0129 (epoch 9)  812 steps/s

with the time passed and the time left. In a terminal and in a notebook the line is rewritten in place; elsewhere (a log
file) plain lines are printed now and then. It shows only floats that are there anyway: it never waits for the device.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, TextIO

from weft.events import Hook
from weft.loop.streams import Lasting

Mode = Literal["terminal", "notebook", "plain"]
MODES: tuple[Mode, ...] = ("terminal", "notebook", "plain")
REFRESH_SECONDS = 0.1  # drawing costs 0.1 ms
PLAIN_SECONDS = 10.0
BAR_WIDTH = 10
PLAIN_LINES = 10  # a line at each tenth of the epochs


class ProgressLine(Hook):
    """The progress line of a fit, in the first process only.

    `mode`: "terminal" (rewritten), "notebook" (an updating display) or "plain" (a line at each tenth of the epochs, and
    after 10 s without one); None finds out which fits. `file` is stderr unless given; `clock` gives seconds.
    """

    def __init__(
        self, mode: Mode | None = None, *, file: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if mode not in (None, *MODES):
            raise ValueError(f"ProgressLine: mode={mode!r}; expected one of {MODES} or None.")
        self._mode: Mode | None = mode
        self._file = file
        self._clock = clock
        self._screen: _Terminal | _Notebook | _Plain | None = None
        self._due = math.inf
        self._metrics: dict[str, float] = {}

    def on_fit_start(self, trainer: Any) -> None:
        """Open the line."""
        run = trainer.run
        self._metrics = {}
        self._due = math.inf
        if not run.is_global_zero:
            return
        if (self._file or sys.stderr) is None:  # started without a stderr
            return
        file = Lasting(self._file or sys.stderr)
        self._screen = _open_screen(self._mode or _find_mode(file), file)
        self._started = self._last_time = self._clock()
        self._first_step = self._last_step = run.progress.step
        self._first_epoch = trainer.current_epoch
        self._speed = 0.0
        self._shares, self._paused = 0, 0.0
        self._due = self._started + self._screen.seconds
        self._total = _num_epochs(trainer)

    def on_step_end(self, trainer: Any, batch: Any, loss: Any) -> None:
        """Redraw if it is time to; `loss` is not read, that would wait for the device."""
        if self._clock() >= self._due:
            self._draw(trainer, trainer.current_epoch - self._first_epoch)

    def on_epoch_end(self, trainer: Any, metrics: Mapping[str, float]) -> None:
        """Take the epoch's floats and redraw if it is time to."""
        self._metrics.update(metrics)  # an epoch without validation keeps the last dev_loss
        if self._screen is None:
            return
        done = trainer.current_epoch - self._first_epoch + 1
        planned = _num_epochs(trainer) - self._first_epoch
        share = PLAIN_LINES * done // max(1, planned)
        is_due = self._clock() >= self._due or (self._screen.by_share and share > self._shares)
        if is_due and done < planned:  # the last one is drawn when the fit ends
            self._draw(trainer, done)
        self._shares = share

    def told_of(self, what: str, has_ended: bool) -> None:
        """Say that something slow begins, or how long it took; its seconds count neither as speed nor for what is left.

        Called where a graph is compiled, say (`RunState.telling`).
        """
        if self._screen is None:
            return
        now = self._clock()
        if not has_ended:
            self._began, text = now, f"{what} ..."
        else:
            self._paused, self._last_time = self._paused + now - self._began, now
            self._due, text = now + self._screen.seconds, f"{what}: {now - self._began:.0f} s"
        self._screen.show(_head(self._first_epoch, self._total), 0.0, f"{duration(now - self._started)}  {text}")

    def on_fit_end(self, trainer: Any, result: Any) -> None:
        """Leave one last line, with the reason why training ended."""
        if self._screen is None:
            return
        screen, self._screen, self._due = self._screen, None, math.inf
        reason = getattr(result, "stop_reason", "epochs")
        seconds = self._clock() - self._started
        steps = trainer.run.progress.step - self._first_step
        speed = f"{steps / seconds:,.0f} steps/s" if steps and seconds > 0 else ""
        parts = [duration(seconds), *self._values(trainer), speed, f"stopped: {reason}" if reason != "epochs" else ""]
        screen.close(_head(trainer.run.progress.epoch, _num_epochs(trainer)), "  ".join(part for part in parts if part))

    def _draw(self, trainer: Any, num_done: int) -> None:
        assert self._screen is not None
        now, step = self._clock(), trainer.run.progress.step
        if now > self._last_time and step > self._last_step:
            speed = (step - self._last_step) / (now - self._last_time)
            self._speed = 0.7 * self._speed + 0.3 * speed if self._speed else speed
            self._last_time, self._last_step = now, step
        self._due = now + self._screen.seconds
        elapsed, total, done = now - self._started, _num_epochs(trainer), self._first_epoch + num_done
        left = f" < {duration((elapsed - self._paused) / num_done * max(0, total - done))}" if num_done else ""
        speed = [f"{self._speed:,.0f} steps/s"] if self._speed else []
        text = "  ".join([duration(elapsed) + left, *self._values(trainer), *speed])
        self._screen.show(_head(done, total), done / total if total else 0.0, text)

    def _values(self, trainer: Any) -> list[str]:
        config, best = trainer.run.state.config, trainer.run.best
        names = dict.fromkeys([config.train_metric, config.dev_metric, best.name])
        values = [f"{name} {self._metrics[name]:.4g}" for name in names if name in self._metrics]
        return values if best.epoch is None else [*values, f"best {best.value:.4g} (epoch {best.epoch})"]


def duration(seconds: float) -> str:
    """Seconds as "m:ss", or "h:mm:ss" from an hour on."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _num_epochs(trainer: Any) -> int:
    return trainer.run.progress.last_epoch


def _head(done: int, total: int) -> str:
    return f"epoch {done}/{total}"


def _bar(share: float) -> tuple[str, str]:
    done = round(BAR_WIDTH * min(1.0, share))
    return "━" * done, "─" * (BAR_WIDTH - done)


def _find_mode(file: Any) -> Mode:
    if "IPython" in sys.modules:
        from weft.loop.cells import in_notebook

        if in_notebook():
            return "notebook"
    try:
        return "terminal" if file.isatty() else "plain"
    except (AttributeError, ValueError):  # an object of the user's, a closed file
        return "plain"


def _open_screen(mode: Mode, file: Any) -> _Terminal | _Notebook | _Plain:
    if mode == "terminal":
        return _Terminal(file)
    return _Notebook() if mode == "notebook" else _Plain(file)


class _Plain:
    """Lines for a file or a pipe."""

    seconds = PLAIN_SECONDS
    by_share = True

    def __init__(self, file: Any) -> None:
        self._file = file

    def show(self, head: str, share: float, text: str) -> None:
        print(f"{head}  {text}", file=self._file, flush=True)

    def close(self, head: str, text: str) -> None:
        self.show(head, 1.0, text)


class _Terminal:
    """A line that rich rewrites in place; what the user's code prints appears above it."""

    seconds = REFRESH_SECONDS
    by_share = False

    def __init__(self, file: Any) -> None:
        from rich.console import Console
        from rich.live import Live

        console = Console(file=file, force_terminal=True)
        self._live = Live(console=console, auto_refresh=False)  # no thread
        self._live.start()
        console.show_cursor(True)  # a killed process leaves the terminal as it was

    def show(self, head: str, share: float, text: str) -> None:
        from rich.text import Text

        done, rest = _bar(share)
        parts = [f"{head} ", (done, "green"), (rest, "bright_black"), f"  {text}"]
        self._live.update(Text.assemble(*parts, no_wrap=True, overflow="ellipsis"), refresh=True)

    def close(self, head: str, text: str) -> None:
        from rich.text import Text

        self._live.update(Text(f"{head}  {text}", no_wrap=True, overflow="ellipsis"))
        self._live.stop()  # draws once more


class _Notebook:
    """One updating output of a Jupyter cell."""

    seconds = REFRESH_SECONDS
    by_share = False

    def __init__(self) -> None:
        from weft.loop.cells import Output

        self._output = Output()

    def show(self, head: str, share: float, text: str) -> None:
        self._output.show(text_plain=f"{head} {''.join(_bar(share))}  {text}")

    def close(self, head: str, text: str) -> None:
        self._output.show(text_plain=f"{head}  {text}")
