"""Batches on their way into the steps: counted and timed, so that it can be said what training waits for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from weft.data.batches import num_examples


class Throughput:
    """Counts the examples of an epoch and the seconds spent waiting for them. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.begin()

    def begin(self) -> None:
        """Start an epoch at zero."""
        self.examples, self.waited, self.seconds = 0, 0.0, 0.0

    def timed(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same batches. `seconds` is the time from the first to the last, the steps between them included."""
        clock, iterator = self._clock, iter(batches)
        began = asked = clock()
        for batch in iterator:
            self.waited += clock() - asked
            self.examples += num_examples(batch)
            yield batch
            asked = clock()
            self.seconds += asked - began
            began = asked

    def report(self, gather: Callable[[Any], list[Any]]) -> dict[str, float]:
        """`examples_per_second` and `wait_seconds` of the epoch, of all processes and of each.

        Every process must call.
        """
        told = gather((self.examples, self.waited, self.seconds))
        rates = [examples / seconds if seconds else 0.0 for examples, _, seconds in told]
        report = {"examples_per_second": sum(rates), "wait_seconds": sum(waited for _, waited, _ in told)}
        if len(told) > 1:
            for rank, (rate, (_, waited, _)) in enumerate(zip(rates, told, strict=True)):
                report |= {f"examples_per_second/process_{rank}": rate, f"wait_seconds/process_{rank}": waited}
        return report
