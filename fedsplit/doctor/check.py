"""One finding of `fedsplit doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Check:
    """One finding: a warning does not stop a run, an error does; `mend` is empty when all is well."""

    name: str
    level: Level
    found: str
    mend: str = ""

    @property
    def ok(self) -> bool:
        """Whether there is nothing to mend."""
        return self.level == "ok"
