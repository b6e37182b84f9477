"""How long JAX has spent making programs, as its own events tell it."""

import functools
import time

import jax

COMPILE = "/jax/core/compile/backend_compile_duration"
MAKING = ("/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/jaxpr_to_mlir_module_duration", COMPILE)


class Clock:
    """Adds up the events of JAX. compiling: seconds in the compiler. making: those, and tracing and lowering before them.

    Programs are traced inside one another, so of events that overlap each moment counts once.
    """

    def __init__(self):
        self.compiling, self.making = 0.0, 0.0
        self._spans: list[tuple[float, float]] = []  # apart from one another, in order

    def listen(self, event: str, seconds: float, **_) -> None:
        """An event that has just ended."""
        if event == COMPILE:
            self.compiling += seconds
        if event in MAKING:
            self._add(time.perf_counter() - seconds, time.perf_counter())

    def _add(self, start: float, end: float) -> None:
        while self._spans and self._spans[-1][1] > start:
            first, last = self._spans.pop()
            self.making -= last - first
            start, end = min(start, first), max(end, last)
        self._spans.append((start, end))
        self.making += end - start


@functools.cache
def clock() -> Clock:
    """The clock of this process; it runs from the first call on."""
    one = Clock()
    jax.monitoring.register_event_duration_secs_listener(one.listen)
    return one
