"""What a report shows of runs: figures in sections, each with its caption, or the sentence why it is left out."""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fedsplit.report import figures, style
from fedsplit.report.captions import AUDITED, AUDITED_CAPTION, BAND, CAPTIONS, SECTIONS, Caption
from fedsplit.report.groups import Group
from fedsplit.report.reading import Absent, Run

PNG = b"\x89PNG\r\n\x1a\n"
Tell = Callable[[str], None]
Draw = Callable[[], style.Picture | bytes]


@dataclass(frozen=True)
class Image:
    """A picture of the page, also a file beside it; `note` says what it leaves out."""

    name: str
    caption: Caption
    png: bytes
    alt: str
    note: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        width, height = struct.unpack(">II", self.png[16:24])
        return width, height

    @property
    def uri(self) -> str:
        """The picture itself as an address."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


@dataclass(frozen=True)
class Section:
    """A part of the page: pictures, and of those that do not apply titles and reason; `table` is the audit's."""

    anchor: str
    title: str
    images: Sequence[Image]
    absent: Sequence[tuple[str, str]] = ()
    lead: str = ""
    table: dict[str, Any] = field(default_factory=dict)


def compared(found: Sequence[Group], tell: Tell) -> list[Section]:
    """The sections of several groups."""
    trade = {"flops": "client_flops", "memory": "client_peak_bytes", "ssim": "worst_ssim"}
    points: dict[str, Draw] = {f"trade-{end}": partial(figures.compare, found, x=name) for end, name in trade.items()}
    return [_accuracy(found, tell), _section("trade", points, "", tell)]


def of_run(run: Run, tell: Tell, prefix: str = "") -> list[Section]:
    """The sections of one run; names of files and anchors begin with `prefix`, without which accuracy is the first."""
    controllers = list(dict.fromkeys(run.choices.text("controller"))) if "controller" in run.choices else []
    several = {f"choices-{name}": partial(figures.choices, run, name) for name in controllers}
    chosen: dict[str, Draw] = {"choices": partial(figures.choices, run)} if len(several) < 2 else {**several}
    parts: dict[str, dict[str, Draw]] = {
        "wire": {"ledger": partial(figures.ledger, run)},
        "time": {"gantt": partial(figures.gantt, run), "phases": partial(figures.phases, run)},
        "body": {"plans": partial(figures.plans, run)},
        "control": chosen,
        "data": {"partition": partial(_partition, run)},
        "fairness": {"classes": partial(figures.classes, run), "personal": partial(figures.personal, run)},
        "privacy": {"audit": partial(figures.audit, run), "reconstructions": partial(_reconstructions, run)},
    }
    tables = {"privacy": _audit_table(run)}
    made = [_section(name, draws, prefix, tell, table=tables.get(name, {})) for name, draws in parts.items()]
    return made if prefix else [_accuracy(run, tell), *made]


def _accuracy(shown: Run | Sequence[Group], tell: Tell) -> Section:
    costs = {"round": "round", "bytes": "bytes", "virtual": "virtual_s", "energy": "energy_j"}
    draws: dict[str, Draw] = {f"accuracy-{end}": partial(figures.accuracy, shown, cost) for end, cost in costs.items()}
    banded = not isinstance(shown, Run) and any(len(group.runs) > 1 for group in shown)
    return _section("accuracy", draws, "", tell, lead=BAND if banded else "")


def _section(name: str, draws: dict[str, Draw], prefix: str, tell: Tell, **more: Any) -> Section:
    """The figures drawn; of those that are absent for one and the same reason, one line."""
    images, reasons = [], dict[str, list[str]]()
    for figure, draw in draws.items():
        caption = CAPTIONS.get(figure) or CAPTIONS[figure.partition("-")[0]]
        if figure not in CAPTIONS:
            caption = Caption(f"{caption.title} of {figure.partition('-')[2]}", caption.text, caption.source)
        tell(f"{prefix}{figure}")
        try:
            made = draw()
        except Absent as reason:
            reasons.setdefault(str(reason), []).append(caption.title)
            continue
        if isinstance(made, bytes):
            images.append(Image(f"{prefix}{figure}", caption, made, f"{caption.title}: {caption.text}"))
        else:
            images.append(Image(f"{prefix}{figure}", caption, made.png(style.FILE_DPI), made.alt, made.note))
    absent = [(", ".join(titles), reason) for reason, titles in reasons.items()]
    return Section(f"{prefix}{name}", SECTIONS[name], images, absent, **more)


def _audit_table(run: Run) -> dict[str, Any]:
    """Headings and rows of audit.json's attacks, strongest first; empty where there is none."""
    attacks = sorted(run.audit.get("attacks", []), key=lambda row: -row.get("ssim", -1.0))
    names = [name for name in AUDITED if any(name in row for row in attacks)]
    rows = [[_cell(row.get(name, "")) for name in names] for row in attacks]
    table = {"headings": [AUDITED[name] for name in names], "rows": rows, "caption": AUDITED_CAPTION}
    return table if attacks else {}


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _partition(run: Run) -> style.Picture | bytes:
    """The counts as a picture, or of an earlier version the picture that it drew."""
    try:
        return figures.partition(run)
    except Absent as reason:
        return _file(run, "partition.png", reason)


def _reconstructions(run: Run) -> bytes:
    return _file(run, "audit/audit.png", Absent("The run was not audited: fedsplit audit RUN writes RUN/audit."))


def _file(run: Run, name: str, otherwise: Absent) -> bytes:
    """A picture of the run folder, if it is one."""
    file = run.file(name)
    data = file.read_bytes() if file else b""
    if len(data) < 24 or not data.startswith(PNG):
        raise otherwise
    return data


def slug(text: str) -> str:
    """A text as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "run"


def write_images(sections: Sequence[Section], folder: Path) -> None:
    """The pictures as files."""
    for section in sections:
        for image in section.images:
            (folder / f"{image.name}.png").write_bytes(image.png)
