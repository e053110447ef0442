"""SIGTERM and Ctrl-C: finish the step, save, leave."""

import signal
import threading

import jax
from absl import logging
from jax.experimental import multihost_utils

EXIT_CODES = {"SIGTERM": 128 + signal.SIGTERM, "SIGINT": 128 + signal.SIGINT}


class StopSignals:
    """While entered, the first SIGTERM or SIGINT is noted; a second one acts as usual.

    On several hosts JAX's preemption service is asked instead, so that all of them stop after the
    same step (a host's own signal handler would let the others wait for it forever).
    """

    def __init__(self):
        self._received: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        # Python lets only the main thread set handlers.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc) -> None:
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        self._received = signal.Signals(number).name
        self._restore()

    def received(self, step: int) -> str | None:
        """The name of the signal that asks the run to stop after this step, or None.

        Args:
          step: optimiser steps taken; the same on all hosts.
        """
        several = jax.process_count() > 1
        if several and multihost_utils.reached_preemption_sync_point(step):
            self._received = "SIGTERM"
        if self._received:
            logging.info("%s received: saving at step %d, then leaving", self._received, step)
        return self._received
