"""FlowerRunner against a grid of our own, and the mended pool against a pool of our own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, RecordDict

from fedsplit.runtime import flower_ray, ray_pool
from fedsplit.runtime.flower_ray import (
    FlowerRunner,
    device_count,
    read_job,
    read_reply,
    short_reason,
    wait_for_nodes,
    write_job,
    write_update,
)
from fedsplit.types import Failure, FedsplitError, Job, Report, Update

CONFIG: Any = SimpleNamespace(values={"seed": 1, "name": "x"}, engine=SimpleNamespace(timeout_s=1.0))
Answer = Callable[[Job], RecordDict | Error | None]


class FakeMessage:
    """What the runner uses of Flower's Message, which cannot be built outside a run."""

    def __init__(self, content: RecordDict, node: int, kind: str) -> None:
        self.content, self.node = content, node
        assert kind == flower_ray.MESSAGE_TYPE


class FakeReply:
    """A reply to a message."""

    def __init__(self, answer: RecordDict | Error, to: str) -> None:
        self.metadata = SimpleNamespace(reply_to_message_id=to)
        self.content = self.error = answer

    def has_error(self) -> bool:
        return isinstance(self.content, Error)


class FakeGrid:
    """Answers every message by `answer` when it is polled for the second time; None never."""

    def __init__(self, answer: Answer, nodes: Iterable[int] = (30, 10, 20), refuse: Iterable[int] = ()) -> None:
        self.answer, self.nodes, self.refuse = answer, list(nodes), set(refuse)
        self.sent: dict[str, Any] = {}
        self.polls = self.most = 0

    def get_node_ids(self) -> list[int]:
        return self.nodes

    def push_messages(self, messages: list[FakeMessage]) -> list[str]:
        [message] = messages
        client = job_of(message).client
        if client in self.refuse:
            return []
        self.sent[f"m{client}"] = message
        return [f"m{client}"]

    def pull_messages(self, ids: Iterable[str]) -> list[FakeReply]:
        self.polls += 1
        asked = list(ids)
        self.most = max(self.most, len(asked))
        if self.polls % 2:
            return []
        found = ((name, self.answer(job_of(self.sent[name]))) for name in reversed(asked))
        return [FakeReply(answer, name) for name, answer in found if answer is not None]


def job_of(message: Any) -> Job:
    return Job(**flower_ray.plain_fields(Job, message.content["job"]))


def jobs(count: int) -> list[Job]:
    return [Job(client, 1, 1, b"down", b"server") for client in range(count)]


def echo(job: Job) -> RecordDict:
    return write_update(Update(job.client, 5, job.down, job.server, Report(steps=2, bytes={"parameters-up": 4})))


@pytest.fixture(autouse=True)
def _fake_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower_ray, "Message", FakeMessage)


def runner(grid: Any, **more: Any) -> FlowerRunner:
    return FlowerRunner(grid, CONFIG, grid.get_node_ids(), poll_s=0.001, **more)


def test_every_job_has_one_result() -> None:
    grid = FakeGrid(echo)
    results = list(runner(grid).run(jobs(150)))
    assert sorted(result.client for result in results) == list(range(150))
    expected = Update(7, 5, b"down", b"server", Report(steps=2, bytes={"parameters-up": 4}))
    assert expected in results
    assert grid.most == flower_ray.IN_FLIGHT


def test_a_client_keeps_its_node() -> None:
    grid = FakeGrid(echo)
    list(runner(grid).run(jobs(6)))
    assert [grid.sent[f"m{client}"].node for client in range(6)] == [10, 20, 30, 10, 20, 30]


def test_errors_and_silence_fail_one_client() -> None:
    def answer(job: Job) -> RecordDict | Error | None:
        if job.client == 1:
            return Error(2, "<class 'ValueError'>:<'boom'>")
        return None if job.client == 2 else echo(job)

    results = {result.client: result for result in runner(FakeGrid(answer, refuse=[3]), timeout_s=0.05).run(jobs(5))}
    assert results[1] == Failure(1, "ValueError: boom")
    assert results[2] == Failure(2, "no reply within 0.05 s")
    assert results[3] == Failure(3, "Flower did not accept its message")
    assert isinstance(results[0], Update) and isinstance(results[4], Update)


def test_timeout_is_never_under_a_minute() -> None:
    assert runner(FakeGrid(echo))._timeout_s == flower_ray.LEAST_TIMEOUT_S


def test_waiting_for_an_actor_is_not_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """One actor, client 0 hangs on it: it loses its process, and the others have their turn."""
    actors = ray_pool.Actors()
    ended: list[str] = []
    monkeypatch.setattr(actors, "end", ended.append)
    actors.begin("m0", "actor")

    def answer(job: Job) -> RecordDict | None:
        return echo(job) if ended and job.client else None

    results = list(runner(FakeGrid(answer), actors=actors, timeout_s=0.1).run(jobs(4)))
    assert ended == ["m0"] and isinstance(results[0], Failure)
    assert [type(result) for result in results[1:]] == [Update] * 3


def test_nothing_moves_at_all() -> None:
    results = list(runner(FakeGrid(lambda job: None), actors=ray_pool.Actors(), timeout_s=0.05).run(jobs(3)))
    assert [type(result) for result in results] == [Failure] * 3


def test_device_count() -> None:
    assert [device_count(7, 2), device_count(0, 2), device_count(0, 3), device_count(0, 40)] == [7, 10, 3, 40]


def test_wait_for_nodes() -> None:
    assert wait_for_nodes(FakeGrid(echo)) == [10, 20, 30]  # type: ignore[arg-type]
    with pytest.raises(FedsplitError, match="No SuperNode"):
        wait_for_nodes(FakeGrid(echo, nodes=[]), 0.02, 0.01)  # type: ignore[arg-type]


def test_job_round_trip() -> None:
    from fedsplit.config import resolve

    config = resolve({"seed": 3, "devices.count": 12})
    job = Job(5, 2, 1, b"\x00down", b"")
    assert read_job(write_job(config, job)) == (config, job)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"samples": 1.5}, "samples"),
        ({"up": "text"}, "up"),
        ({"client": 9}, "client 9"),
        ({"report": "{"}, "malformed"),
        ({"report": json.dumps({"client_flops": -1})}, "malformed"),
        ({"report": json.dumps({"bytes": {"activations-up": -1}})}, "malformed"),
        ({"report": "[" * 100000}, "malformed"),
        ({"report": json.dumps({"steps": "many"})}, "steps"),
        ({"report": json.dumps({"bytes": {"parameters-up": 0.5}})}, "bytes"),
        ({"report": json.dumps({"unknown": 1})}, "unknown"),
    ],
)
def test_malformed_replies_are_failures(change: dict[str, Any], word: str) -> None:
    content = echo(jobs(1)[0])
    content["update"].update(change)
    result = read_reply(FakeReply(content, "m0"), jobs(1)[0])  # type: ignore[arg-type]
    assert isinstance(result, Failure) and word in result.reason and len(result.reason) < 300


def test_an_empty_reply_is_a_failure() -> None:
    result = read_reply(FakeReply(RecordDict({"other": ConfigRecord()}), "m0"), jobs(1)[0])  # type: ignore[arg-type]
    assert isinstance(result, Failure)


RAY_TEXT = """<class 'ray.exceptions.RayTaskError(ClientAppException)'>:<'\
\x1b[36mray::ClientAppActor.run()\x1b[39m (pid=1)
  File "/a.py", line 3, in train
    boom()
ValueError: bad
second line

The above exception was the direct cause of the following exception:

ray::ClientAppActor.run() (pid=1)
flwr.clientapp.client_app.ClientAppException:
Exception ClientAppException occurred. Message: bad'>"""


@pytest.mark.parametrize(
    ("code", "reason", "expected"),
    [
        (2, RAY_TEXT, "ValueError: second line"),
        (2, RAY_TEXT.replace("\nsecond line", ""), "ValueError: bad"),
        (0, "<class 'ray.exceptions.ActorDiedError'>:<'The actor\n died'>", "its process died (ActorDiedError)"),
        (2, "<class 'ValueError'>:<'boom'>", "ValueError: boom"),
        (8, "ClientApp stopped responding.", "error 8: ClientApp stopped responding."),
        (5, None, "error 5"),
    ],
)
def test_short_reason(code: int, reason: str | None, expected: str) -> None:
    assert short_reason(Error(code, reason)) == expected
