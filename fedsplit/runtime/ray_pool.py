"""Flower's pool of Ray actors, mended: a dead client process costs one client one round.

Flower 1.41 puts the actor of a failed message back into its pool, dead or alive, and takes the one
that came back last: after one kill every later client fails, while the run "completes"
(`BasicActorPool.add_actor_back_to_pool`, `RayBackend.process_message`). A ServerApp lives in the
process of that pool, so it wraps two of the pool's methods:

- `fetch_result_and_return_actor_to_pool`: where Ray, not the client's code, failed, the message's
  actor is replaced by a fresh one, which Flower then puts back;
- `submit`: notes when a message started, and on which actor, so that a hung one can be ended.

`max_restarts`, Ray's own way, would need options that `flwr run` does not pass on, and would leave
the message that is sent to an actor while it restarts to chance.
"""

from __future__ import annotations

import functools
import inspect
import time
from contextlib import suppress
from typing import Any

import flwr
from flwr.serverapp import Grid

from fedsplit.types import FedsplitError

SUPPORTED = "1.41"


class Actors:
    """What Flower's Ray actors are doing, by message id. Times are `time.monotonic` seconds."""

    def __init__(self) -> None:
        self._running: dict[str, tuple[float, Any]] = {}
        self.last_start = 0.0

    def started(self, message_id: str) -> float | None:
        """When the client of a message started to work; None while it waits, or once it is done."""
        entry = self._running.get(message_id)
        return entry[0] if entry else None

    def end(self, message_id: str) -> None:
        """Kill the process that works on a message, if any; a fresh one takes its place."""
        import ray

        entry = self._running.get(message_id)
        if entry:
            ray.kill(entry[1])

    def begin(self, message_id: str, actor: Any) -> None:
        """Note that an actor took a message."""
        self.last_start = time.monotonic()
        self._running[message_id] = (self.last_start, actor)

    def done(self, message_id: str) -> None:
        """Forget a message."""
        self._running.pop(message_id, None)


def is_simulation(grid: Grid) -> bool:
    """Whether the grid is that of a simulation, in whose process Flower's actor pool lives."""
    return type(grid).__name__ == "InMemoryGrid"


def mend_actor_pool(pool_class: type[Any] | None = None) -> Actors:
    """Wrap Flower's actor pool, once per process; call before the first message is sent.

    Raises:
        FedsplitError: this Flower is not one whose pool is known to be mended this way.
    """
    if pool_class is None:
        if not flwr.__version__.startswith(f"{SUPPORTED}."):
            raise FedsplitError(
                f"Simulations need flwr {SUPPORTED}, found {flwr.__version__}: "
                f"pip install 'flwr[simulation]=={SUPPORTED}.*'."
            )
        from flwr.simulation.ray_transport.ray_actor import BasicActorPool

        pool_class = BasicActorPool
    known: Actors | None = pool_class.__dict__.get("fedsplit_actors")
    if known is None:
        _check(pool_class)
        known = Actors()
        _wrap(pool_class, known)
        setattr(pool_class, "fedsplit_actors", known)  # noqa: B010
    return known


def _wrap(pool_class: Any, actors: Actors) -> None:
    import ray
    from ray.exceptions import RayError, RayTaskError

    submit = pool_class.submit
    fetch = pool_class.fetch_result_and_return_actor_to_pool
    messages: dict[Any, str] = {}

    @functools.wraps(submit)
    def submit_noted(self: Any, actor_fn: Any, job: tuple[Any, ...]) -> Any:
        future = submit(self, actor_fn, job)
        messages[future] = job[1].metadata.message_id
        actors.begin(messages[future], self._future_to_actor[future])
        return future

    @functools.wraps(fetch)
    def fetch_mended(self: Any, future: Any) -> Any:
        try:
            return fetch(self, future)
        except RayTaskError:  # the client's own exception: its process is well
            raise
        except RayError:
            # Flower's handler returns the actor of this future to the pool: let that be a new one.
            with suppress(Exception):
                ray.kill(self._future_to_actor[future])  # it may be unreachable rather than dead
            self._future_to_actor[future] = self.create_actor_fn()
            raise
        finally:
            actors.done(messages.pop(future, ""))

    pool_class.submit = submit_noted
    pool_class.fetch_result_and_return_actor_to_pool = fetch_mended


def _check(pool_class: type[Any]) -> None:
    """Try, without Ray, that the pool works as the wrappers take for granted."""
    wanted = {
        "submit": ["self", "actor_fn", "job"],
        "fetch_result_and_return_actor_to_pool": ["self", "future"],
        "add_actor_back_to_pool": ["self", "future"],
    }
    try:
        good = all(
            list(inspect.signature(getattr(pool_class, name)).parameters) == args for name, args in wanted.items()
        )
        pool = object.__new__(pool_class)
        pool.pool, pool._future_to_actor = ["actor"], {}
        future = pool.submit(lambda *_: "future", ("app", "message", "node", "context"))
        good = good and pool._future_to_actor == {future: "actor"} and pool.pool == []
        pool._future_to_actor[future] = "fresh"
        pool.add_actor_back_to_pool(future)
        good = good and pool.pool == ["fresh"] and "create_actor_fn" in inspect.getsource(pool_class.__init__)
    except Exception as error:
        raise FedsplitError(f"Flower's actor pool is not as in flwr {SUPPORTED} ({error!r}).") from error
    if not good:
        raise FedsplitError(f"Flower's actor pool is not as in flwr {SUPPORTED}; install that version.")
