"""Where the time of a step and of an epoch goes: a stopwatch that every part of the training is timed with.

    result = weft.Trainer(epochs=20, profiler="simple").fit(problem, data)
    print(result.profile)                       # a table
    result.profile.slowest_node                 # "plant"
    result.profile.to_dict()["parts"]["data"]   # seconds, share, ...

One clock is read whenever a part begins or ends and the time since the last reading is given to the part that was
running, so the parts add up to the whole. A reading costs about 0.2 us. On a GPU the times are the host's: a part that
launches kernels returns before they are done, and who waits for them (often the optimizer's check) has their time;
`profiler="pytorch"` shows both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, TypeVar

T = TypeVar("T")
TOP = ("data", "forward", "backward", "optimizer", "evaluation", "hooks", "checkpoint", "loop")
"""The parts of the whole, in the order of the table; "loop" is what is left: slicing, counting, best weights."""
ALWAYS_TOP = ("evaluation", "checkpoint")  # wherever they are called


@dataclass
class Timed:
    """The time of one part: its own and that of the parts it called."""

    name: str
    own_seconds: float = 0.0
    calls: int = 0
    parts: dict[str, Timed] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """With the parts it called."""
        return self.own_seconds + sum(part.seconds for part in self.parts.values())

    def add(self, other: Timed) -> None:
        """Count `other`, a part of the same name, as one with this."""
        self.own_seconds += other.own_seconds
        self.calls += other.calls
        for name, part in other.parts.items():
            self.parts.setdefault(name, Timed(name)).add(part)

    def walk(self, depth: int = 0) -> Iterator[tuple[int, Timed]]:
        """This part and all it called, with their depths; the longest first."""
        yield depth, self
        for part in sorted(self.parts.values(), key=lambda p: -p.seconds):
            yield from part.walk(depth + 1)


@dataclass
class TimeProfile:
    """Where the time went. `parts` add up to `seconds`; `nodes` are parts of forward and evaluation, by their path."""

    seconds: float
    epochs: int
    steps: int
    parts: dict[str, Timed]
    nodes: dict[str, Timed]

    @property
    def slowest_node(self) -> str | None:
        """The node with the most time of its own; None if there are no nodes."""
        return max(self.nodes, key=lambda name: self.nodes[name].own_seconds, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers: `seconds, epochs, steps, slowest_node`; for `parts` and `nodes`: seconds, calls, share."""

        def row(timed: Timed) -> dict[str, float]:
            share = timed.seconds / self.seconds if self.seconds else 0.0
            return {"seconds": timed.seconds, "own_seconds": timed.own_seconds, "calls": timed.calls, "share": share}

        return {
            "seconds": self.seconds,
            "epochs": self.epochs,
            "steps": self.steps,
            "slowest_node": self.slowest_node,
            "parts": {name: row(part) for name, part in self.parts.items()},
            "nodes": {name: row(node) for name, node in self.nodes.items()},
        }

    def __str__(self) -> str:
        """The table, and below it what to look at first."""
        epochs, steps, whole = max(1, self.epochs), max(1, self.steps), self.seconds or 1.0
        head = f"{'where the time goes':34}{'calls':>9}{'s':>10}{'ms/epoch':>11}{'ms/step':>10}{'share':>8}"
        lines = [f"{self.epochs} epochs, {self.steps} steps, {self.seconds:.2f} s", head, "-" * len(head)]
        for top in self.parts.values():
            for depth, part in top.walk():
                if part.calls == 0 and part.seconds == 0:
                    continue
                s, name = part.seconds, "  " * depth + part.name
                per_epoch, per_step = f"{1000 * s / epochs:11.2f}", f"{1000 * s / steps:10.3f}"
                lines.append(f"{name:34.34}{part.calls or '':>9}{s:10.3f}{per_epoch}{per_step}{100 * s / whole:7.1f}%")
        longest = max(self.parts.values(), key=lambda p: p.seconds, default=None)
        if longest is not None:
            lines += [
                "",
                f"Most time goes into {longest.name!r}"
                + (f"; the slowest node is {n!r}." if (n := self.slowest_node) else "."),
            ]
        return "\n".join(lines)


class SimpleProfiler:
    """A stopwatch for the parts of the training.

    `profile` is the table so far. See `weft.hooks.timing`.
    """

    def __init__(self) -> None:
        self._root = self._current = Timed("loop")
        self._running, self._last, self._steps, self._epochs = False, 0.0, 0, 0

    def start(self) -> None:
        """Begin anew."""
        self._root = self._current = Timed("loop")
        self._steps, self._epochs, self._running, self._last = 0, 0, True, perf_counter()

    def step(self) -> None:
        """Count an optimizer step."""
        self._steps += 1

    def epoch(self) -> None:
        """Count an epoch."""
        self._epochs += 1

    def stop(self) -> None:
        """Stop the watch; what is called from here on is not counted."""
        if self._running:
            self._current.own_seconds += perf_counter() - self._last
            self._running = False

    def watch(self, name: str, function: Callable[..., T]) -> Callable[..., T]:
        """`function`, timed as the part `name` of what called it. To call the problem is to go forward.

        What a "loop" calls are parts of the whole: the closure of a Lightning step is called by its optimizer.
        """
        name = "forward" if name == "problem" else name
        always_top, clock = name in ALWAYS_TOP, perf_counter

        def timed(*args: Any, **kwargs: Any) -> T:
            if not self._running or self._current.name == name:  # a step that calls the problem
                return function(*args, **kwargs)
            outer = self._current
            parts = self._root.parts if always_top else outer.parts
            self._current = part = (
                self._root if name == "loop" else parts.get(name) or parts.setdefault(name, Timed(name))
            )
            part.calls += 1
            now = clock()
            outer.own_seconds += now - self._last
            self._last = now
            try:
                return function(*args, **kwargs)
            finally:
                now = clock()
                part.own_seconds += now - self._last
                self._last, self._current = now, outer

        return timed

    @property
    def profile(self) -> TimeProfile:
        """What was found so far."""
        parts = {name: Timed(name) for name in TOP}
        for name, part in self._root.parts.items():
            if name in parts:
                parts[name].add(part)
            else:  # a hook; or a node called from a loop or update of the user's own
                group = parts["hooks" if name.startswith("hook ") else "forward"]
                part = Timed(name.removeprefix("hook "), part.own_seconds, part.calls, part.parts)
                group.parts.setdefault(part.name, Timed(part.name)).add(part)
                group.calls += part.calls
        parts["loop"].own_seconds += self._root.own_seconds
        nodes: dict[str, Timed] = {}
        for top in parts.values():
            for _, part in top.walk():
                if part.name.startswith("node "):
                    name = part.name.removeprefix("node ")
                    nodes.setdefault(name, Timed(name)).add(part)
        return TimeProfile(self._root.seconds, self._epochs, self._steps, parts, nodes)
