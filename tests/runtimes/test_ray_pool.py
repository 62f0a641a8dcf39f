"""The mended actor pool: on a copy of Flower's own class, with futures of our own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import flwr
import pytest

from fedsplit.runtime.ray_pool import mend_actor_pool
from fedsplit.types import FedsplitError

ray = pytest.importorskip("ray")
from flwr.simulation.ray_transport import ray_actor  # noqa: E402


@pytest.fixture
def pool_class(monkeypatch: pytest.MonkeyPatch) -> type[Any]:
    def get(future: Any) -> Any:
        if isinstance(future, Exception):
            raise future
        return "cid", "reply", "context"

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "kill", lambda actor: None)
    return type("Copy", (ray_actor.BasicActorPool,), {})


def pool_of(pool_class: type[Any]) -> Any:
    pool = object.__new__(pool_class)
    pool.pool, pool._future_to_actor, pool.create_actor_fn = ["old"], {}, lambda: "fresh"
    return pool


def work(pool: Any, future: Any) -> None:
    """What RayBackend.process_message does with its pool."""
    job = ("app", SimpleNamespace(metadata=SimpleNamespace(message_id="m")), "0", "context")
    given = pool.submit(lambda *_: future, job)
    try:
        pool.fetch_result_and_return_actor_to_pool(given)
    except Exception:
        pool.add_actor_back_to_pool(given)


def test_flower_as_it_is_returns_the_dead(pool_class: type[Any]) -> None:
    """If this fails, Flower has mended its pool: drop ours."""
    pool = pool_of(pool_class)
    work(pool, ray.exceptions.ActorDiedError())
    assert pool.pool == ["old"]


def test_the_dead_is_replaced(pool_class: type[Any]) -> None:
    actors = mend_actor_pool(pool_class)
    for error in (ray.exceptions.ActorDiedError(), ray.exceptions.OutOfMemoryError("x")):
        pool = pool_of(pool_class)
        work(pool, error)
        assert pool.pool == ["fresh"] and not pool._future_to_actor
    assert actors.started("m") is None


def test_the_living_stays(pool_class: type[Any]) -> None:
    mend_actor_pool(pool_class)
    for future in ("good", ray.exceptions.RayTaskError("run", "traceback", ValueError("boom"))):
        pool = pool_of(pool_class)
        work(pool, future)
        assert pool.pool == ["old"]


def test_once_per_class(pool_class: type[Any]) -> None:
    assert mend_actor_pool(pool_class) is mend_actor_pool(pool_class)


def test_a_running_message_can_be_ended(pool_class: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[Any] = []
    monkeypatch.setattr(ray, "kill", killed.append)
    actors = mend_actor_pool(pool_class)
    job = ("app", SimpleNamespace(metadata=SimpleNamespace(message_id="m")), "0", "context")
    pool_of(pool_class).submit(lambda *_: "future", job)
    assert actors.started("m") is not None and actors.last_start > 0
    actors.end("m")
    actors.end("unknown")
    assert killed == ["old"]


def test_another_flower_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flwr, "__version__", "1.50.0")
    with pytest.raises(FedsplitError, match="1.50.0"):
        mend_actor_pool()


def test_another_pool_is_refused() -> None:
    class Other:
        def submit(self, job: Any) -> None: ...

    with pytest.raises(FedsplitError, match="pool"):
        mend_actor_pool(Other)
