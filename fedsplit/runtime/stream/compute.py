"""The one thread in which bodies compute: every thread that computes with torch opens an OpenMP team of its own."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)


class Compute:
    """Runs jobs one after another, in the order in which they came."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="fedsplit-compute", daemon=True)

    def start(self) -> None:
        """Begin with the jobs."""
        self._thread.start()

    def put(self, job: Callable[[], None]) -> None:
        """A job for later; one that raises is logged."""
        self._jobs.put(job)

    def stop(self) -> None:
        """Do the jobs that wait, then end."""
        self._jobs.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:
                log.exception("A job of the compute thread failed.")
            del job  # it may hold a packet
