"""A device's log: a line of key=value text for every round."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from contextlib import suppress
from pathlib import Path

from fedsplit.types import Scalar

PLAIN = re.compile(r"[\w.:/+-]+")


def keyed(what: str, **facts: Scalar) -> str:
    """`event=what name=value …`; text that is not a plain word stands in JSON's quotes."""
    return " ".join(f"{name}={_value(value)}" for name, value in {"event": what, **facts}.items())


def show() -> None:
    """Lines of the package's log on standard error, with the time (UTC), for a process that nobody has set up."""
    log = logging.getLogger("fedsplit")
    if log.handlers:
        return
    formatter = logging.Formatter("time=%(asctime)sZ level=%(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def peak_rss_bytes() -> int:
    """The most memory that this process has held (VmHWM); 0 where the system does not say."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return 0


def _value(value: Scalar) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    text = str(value)
    return text if PLAIN.fullmatch(text) else json.dumps(text)
