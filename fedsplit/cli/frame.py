"""One frame of `fedsplit watch`. What devices wrote is shown as plain text: no markup, no control codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

MOST_ROWS = 24
SHOWN = ("time", "event")
Row = Mapping[str, Any]


def frame(found: Row) -> Group:
    """A snapshot as it is shown."""
    parts: list[RenderableType] = [Text(_head(found), style="bold", overflow="fold")]
    if found["devices"]:
        parts.append(_plain(_devices(found["devices"])))
    if found["sessions"]:
        parts.append(_sessions(found["sessions"]))
    if found["latest_rounds"]:
        parts.append(_rounds(found["latest_rounds"]))
    if found["clients"] and not found["sessions"]:
        parts.append(_clients(found["clients"]))
    parts += [_plain(_event(event)) for event in found["events"]]
    if error := found["last_error"]:
        who = f"client {error['client']}" if "client" in error else "run"
        when = f", round {error['round']}" if "round" in error else ""
        parts.append(_plain(f"last error: {who}{when}: {error['reason']}", "red"))
    return Group(*parts)


def _head(found: Row) -> str:
    state = "finished" if found["finished"] else "failed" if found["failed"] else ""
    accuracy = f"accuracy {100 * found['accuracy']:.1f} %" if _is_number(found["accuracy"]) else "not tested yet"
    quiet = f"no news for {_clock(found['silent_s'])}" if found["silent_s"] >= 10 else ""
    words = [str(found["name"]), f"round {found['round']} of {found['rounds']}", accuracy]
    words += [_clock(found["elapsed_s"]), state or quiet]
    return _clean("  ".join(word for word in words if word))


def _devices(devices: Sequence[Row]) -> str:
    away = [str(row.get("number", "?")) for row in devices if not row.get("connected")]
    here = len(devices) - len(away)
    return f"{here} of {len(devices)} devices connected" + (f"; not: {', '.join(away[:MOST_ROWS])}" if away else "")


def _sessions(sessions: Sequence[Row]) -> Table:
    names = ("node", "client", "round", "state", "trips/s", "MB up", "MB down", "MB/s", "server s", "silent")
    shown = _table("sessions", names, len(sessions))
    for row in sessions[:MOST_ROWS]:
        megabytes = (f"{row[name] / 1e6:.2f}" for name in ("up_bytes", "down_bytes"))
        is_open = row["state"] == "open"
        shown.add_row(
            *(_cell(row[name]) for name in ("node", "client", "round", "state")),
            f"{row['round_trips_per_s']:.1f}" if is_open else "",
            *megabytes,
            f"{row['mb_per_s']:.2f}" if is_open else "",
            f"{row['server_s']:.1f}",
            _clock(row["silent_s"]) if row["state"] in ("open", "away", "expected") else "",
        )
    return shown


def _rounds(rounds: Sequence[Row]) -> Table:
    names = ("round", "accuracy", "train loss", "clients", "failed", "MB up", "MB down", "wall s")
    shown = _table("rounds", names, len(rounds))
    for row in rounds:
        accuracy = f"{100 * row['accuracy']:.1f} %" if _is_number(row["accuracy"]) else ""
        loss, wall = (_fixed(row[name]) for name in ("train_loss", "wall_s"))
        megabytes = (_fixed(row[f"bytes_{way}"], 1e6) for way in ("up", "down"))
        counts = (_cell(row[name]) for name in ("clients", "failures"))
        shown.add_row(_cell(row["round"]), accuracy, loss, *counts, *megabytes, wall)
    return shown


def _clients(clients: Sequence[Row]) -> Table:
    names = ("client", "samples", "steps", "train loss", "wall s", "failure")
    shown = _table(f"clients of round {clients[-1]['round']}", names, len(clients))
    for row in clients[:MOST_ROWS]:
        figures = (_fixed(row[name]) for name in ("train_loss", "wall_s"))
        shown.add_row(*(_cell(row[name]) for name in names[:3]), *figures, _cell(row["failure"]))
    return shown


def _table(title: str, names: Sequence[str], count: int) -> Table:
    more = f" (the first {MOST_ROWS} of {count})" if count > MOST_ROWS else ""
    shown = Table(title=f"{title}{more}", title_justify="left")
    for name in names:
        shown.add_column(name, justify="left" if name in ("state", "failure") else "right")
    return shown


def _event(event: Row) -> str:
    facts = "  ".join(f"{name} {value}" for name, value in event.items() if name not in SHOWN)
    return f"{str(event.get('time', ''))[11:19]}  {event['event']:<20} {facts}"


def _plain(text: str, style: str = "") -> Text:
    return Text(_clean(text), style=style, overflow="ellipsis", no_wrap=True)


def _cell(value: Any) -> Text:
    return Text(_clean(str(value)))


def _clean(text: str) -> str:
    return "".join(sign if sign.isprintable() else " " for sign in text)


def _fixed(value: Any, unit: float = 1.0) -> Text:
    return Text(f"{value / unit:.2f}") if _is_number(value) else _cell(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=int(min(seconds, 1e9))))
