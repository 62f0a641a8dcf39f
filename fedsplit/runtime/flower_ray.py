"""Flower as the runner: one message per client and round, results as they come.

Flower's strategies are not used: one NaN poisons its FedAvg, and it waits for a whole round. The
messages hold plain numbers, text and bytes; nothing received is unpickled.
"""

from __future__ import annotations

import json
import re
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, get_type_hints

from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid

from fedsplit.config import Config, resolve
from fedsplit.runtime.ray_pool import Actors
from fedsplit.types import Failure, FedsplitError, Job, Report, Update
from fedsplit.world import DEFAULT_DEVICES

ACTION = "split"
MESSAGE_TYPE = f"train.{ACTION}"
FLOWER_DEFAULT_NODES = 2
LEAST_TIMEOUT_S = 60.0
IN_FLIGHT = 64
"""Messages under way at once at most, or one per node: bounds memory, and Flower's work per poll."""


class FlowerRunner:
    """Runs jobs as Flower messages; `Runner` of `fedsplit.round`.

    Clients are dealt to `nodes` by their id, so that a client keeps its node for the whole run.
    A client fails `timeout_s` seconds after it started to work. Where the start cannot be seen
    (on devices: `actors` is None) that is when it was sent its job.
    """

    def __init__(
        self,
        grid: Grid,
        config: Config,
        nodes: Sequence[int],
        *,
        actors: Actors | None = None,
        timeout_s: float | None = None,
        poll_s: float = 0.01,
    ) -> None:
        # Below this the start of Ray and the first import of torch in an actor would count as failures.
        self._timeout_s = max(config.engine.timeout_s, LEAST_TIMEOUT_S) if timeout_s is None else timeout_s
        self._grid = grid
        self._config = config
        self._nodes = sorted(nodes)
        self._actors = actors
        self._poll_s = poll_s

    def run(self, jobs: Sequence[Job]) -> Iterator[Update | Failure]:
        """One result per job, in the order in which they arrive."""
        waiting = deque(jobs)
        sent: dict[str, tuple[Job, float]] = {}
        moved = time.monotonic()
        while waiting or sent:
            while waiting and len(sent) < max(IN_FLIGHT, len(self._nodes)):
                job = waiting.popleft()
                sending = self._send(job)
                if isinstance(sending, Failure):
                    yield sending
                else:
                    sent[sending] = (job, time.monotonic())
            replies = list(self._grid.pull_messages(list(sent)))
            for reply in replies:
                entry = sent.pop(reply.metadata.reply_to_message_id, None)
                if entry:
                    yield self._received(reply, entry[0])
            if replies:
                moved = time.monotonic()
                continue
            for message_id, (job, _) in list(sent.items()):
                if lost := self._given_up(job):
                    del sent[message_id]
                    yield lost
            overdue = self._overdue(sent, moved)
            for message_id in overdue:
                job, _ = sent.pop(message_id)
                moved = time.monotonic()
                yield Failure(job.client, f"no reply within {self._timeout_s:g} s")
            time.sleep(self._poll_s)

    def _send(self, job: Job) -> str | Failure:
        """Send a job off; the message's id, or why there is none."""
        node = self._nodes[job.client % len(self._nodes)]
        return self._push(job, Message(write_job(self._config, job), node, MESSAGE_TYPE))

    def _push(self, job: Job, message: Message) -> str | Failure:
        accepted = next(iter(self._grid.push_messages([message])), None)
        return accepted or Failure(job.client, "Flower did not accept its message")

    def _received(self, reply: Message, job: Job) -> Update | Failure:
        return read_reply(reply, job)

    def _given_up(self, job: Job) -> Failure | None:
        """Why nothing more is to be expected of a client that has not replied, if so."""
        return None

    def _overdue(self, sent: dict[str, tuple[Job, float]], moved: float) -> list[str]:
        """Messages past their time; a simulated client among them loses its process."""
        now = time.monotonic()
        if self._actors is None:
            return [message_id for message_id, (_, at) in sent.items() if now - at > self._timeout_s]
        started = {message_id: self._actors.started(message_id) for message_id in sent}
        late = [name for name, at in started.items() if at is not None and now - at > self._timeout_s]
        for message_id in late:
            self._actors.end(message_id)
        # A client that waits for an actor is not late; all are when nothing moves any more.
        moved = max(moved, self._actors.last_start)
        if late or now - moved <= self._timeout_s:
            return late
        return [name for name, at in started.items() if at is None]


def wait_for_nodes(grid: Grid, timeout_s: float = LEAST_TIMEOUT_S, poll_s: float = 0.1) -> list[int]:
    """The ids of the SuperNodes, sorted, as soon as there is one.

    Raises:
        FedsplitError: none within `timeout_s` seconds.
    """
    deadline = time.monotonic() + timeout_s
    while not (nodes := sorted(grid.get_node_ids())):
        if time.monotonic() > deadline:
            raise FedsplitError(f"No SuperNode connected within {timeout_s:g} s; start at least one.")
        time.sleep(poll_s)
    return nodes


def device_count(configured: int, nodes: int) -> int:
    """Number of devices: `configured` (`devices.count`) if set, else as many as SuperNodes.

    Flower's own default of 2 SuperNodes counts as "not said".
    """
    if configured:
        return configured
    return DEFAULT_DEVICES if nodes == FLOWER_DEFAULT_NODES else nodes


def write_job(config: Config, job: Job) -> RecordDict:
    """A job and the whole resolved config as message content: a client needs no other state."""
    return RecordDict({"config": ConfigRecord(dict(config.values)), "job": ConfigRecord(vars(job))})


def read_job(content: RecordDict) -> tuple[Config, Job]:
    """What `write_job` wrote.

    Raises:
        FedsplitError: an unknown key or a wrong type in the config.
        KeyError, TypeError: a malformed job.
    """
    return resolve(dict(content["config"])), Job(**plain_fields(Job, content["job"]))


def write_update(update: Update) -> RecordDict:
    """An update as message content."""
    fields = {**vars(update), "report": json.dumps(update.report.as_dict())}
    return RecordDict({"update": ConfigRecord(fields)})


def read_reply(reply: Message, job: Job) -> Update | Failure:
    """A client's reply to `job`: its update, or why there is none; never raises for bad content."""
    if reply.has_error():
        return Failure(job.client, short_reason(reply.error))
    try:
        record = reply.content["update"]
        fields = plain_fields(Update, record)
        report = Report(**_report_fields(json.loads(str(record["report"]))))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        return Failure(job.client, f"malformed reply: {type(error).__name__}: {_last_line(str(error))}")
    if fields["client"] != job.client:
        return Failure(job.client, f"malformed reply: it is about client {fields['client']}")
    return Update(**fields, report=report)


def short_reason(error: Error) -> str:
    """Flower's error as one short line: exception type and last line of its message.

    Flower's reason is `<class 'TYPE'>:<'TEXT'>`, in a simulation with Ray's chain of tracebacks for
    its text. A client process that died comes as code 0 with one of Ray's errors for its type.
    """
    text = re.sub(r"\x1b\[[0-9;]*m", "", error.reason or "")
    found = re.match(r"<class '(.+?)'>:<'(.*)'>\s*\Z", text, re.DOTALL)
    kind, text = (found[1].rpartition(".")[2], found[2]) if found else (f"error {error.code}", text)
    if kind in ("ActorDiedError", "ActorUnavailableError", "RayActorError", "OutOfMemoryError"):
        return f"its process died ({kind})"
    chain = re.split(r"\n\n(?:The above exception was|During handling of)[^\n]*\n\n", text)
    if len(chain) > 1:  # the last one is only Flower's wrapper around the client's own exception
        text = chain[-2]
        kinds = re.findall(r"^(?:\w+\.)*([A-Z]\w*)(?:: .*)?$", text, re.MULTILINE)
        kind = kinds[-1] if kinds else kind
    last = re.sub(rf"^(?:\w+\.)*{re.escape(kind)}(?:: |$)", "", _last_line(text))
    return f"{kind}: {last}" if last else kind


def _last_line(text: str, most: int = 200) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:most] if lines else ""


def plain_fields(cls: type[Any], record: Any) -> dict[str, Any]:
    """The int, str and bytes fields of a dataclass out of a record, with exactly these types."""
    found = {}
    for name, kind in get_type_hints(cls).items():
        if kind in (int, str, bytes):
            if type(record[name]) is not kind:
                raise TypeError(f"{name} is {type(record[name]).__name__}, not {kind.__name__}")
            found[name] = record[name]
    return found


def _report_fields(found: Any) -> dict[str, Any]:
    """A received report's fields, checked: numbers, or a mapping of text to whole numbers; none of these below 0."""
    honest = Report().as_dict()
    if not isinstance(found, dict) or found.keys() - honest.keys():
        raise TypeError("the report has unknown fields")
    for name, value in found.items():
        default = honest[name]
        if isinstance(default, dict):
            good = isinstance(value, dict) and all(type(count) is int and count >= 0 for count in value.values())
        elif type(default) is int:
            good = type(value) is int and value >= 0
        else:
            good = type(value) in (int, float) or (value is None and default is None)
        if not good:
            raise TypeError(f"the report's {name} is {type(value).__name__} {str(value)[:40]}")
    return found
