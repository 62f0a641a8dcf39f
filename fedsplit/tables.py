"""The rows of a run's tables, its summary and its plot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedsplit import runs
from fedsplit.config import Config
from fedsplit.control import steer
from fedsplit.devices.clock import PHASES, Cost
from fedsplit.devices.cohort import Lost
from fedsplit.metrics.quality import Quality
from fedsplit.round import Outcome
from fedsplit.runs import RunFolder
from fedsplit.types import STREAMS, Failure, Report, Update
from fedsplit.world import World

SUMS = (
    *(f"bytes_{way}" for way in ("up", "down", "activations", "gradients", "parameters", "raw")),
    "client_flops", "server_flops", "virtual_s", "energy_j", "wall_s", "kept_samples", "failures",
    "late", "waited_s", "wasted_bytes", "wasted_flops", "wasted_j",
)  # fmt: skip


def summarise(config: Config, built: World, folder: RunFolder) -> dict[str, Any]:
    """The figures of a finished run, derived from its tables."""
    rows, clients = folder.rows("rounds"), folder.rows("clients")
    last = rows[-1]
    peaks = {
        side: max((int(row[f"{side}_peak_bytes"]) for row in clients if row[f"{side}_peak_bytes"]), default=0)
        for side in ("client", "server")
    }
    stored = max((int(row["stored_bytes"]) for row in clients if row["stored_bytes"]), default=0)
    personal = last["personal_accuracy"]
    own = [float(row["accuracy"]) for row in folder.rows("personal") if row["accuracy"]]
    return {
        "accuracy": float(last["accuracy"]),
        "loss": float(last["loss"]),
        "personal_accuracy": float(personal) if personal else None,
        "personal_accuracy_all": sum(own) / len(own) if own else None,
        "rounds": len(rows),
        "seed": config.seed,
        **runs.totals(rows, SUMS),
        **to_accuracy(rows, config.eval.target),
        **{name: _column_mean(rows, name) for name in ("workload_variance", "gradient_cosine")},
        "client_peak_bytes": peaks["client"],
        "server_peak_bytes": peaks["server"],
        "client_stored_bytes": stored,
        "cuda_peak_bytes": torch.cuda.max_memory_allocated(built.device) if built.device.type == "cuda" else None,
        "trainable_params": sum(p.numel() for p in (*built.client.values(), *built.server.values())),
        "client_trainable_params": sum(p.numel() for p in built.client.values()),
        "weights_sha256": runs.sha256(built.model_state()),
        "ledger_sha256": runs.sha256_text((folder.path / "ledger.csv").read_text()),
        "device": str(built.device),
        "provenance": runs.provenance(config),
    }


def to_accuracy(rows: Sequence[Mapping[str, str]], target: float) -> dict[str, float | None]:
    """Virtual seconds, joules and bytes until a round's test accuracy first met `target`; None where it never did."""
    columns = {"seconds": ("virtual_s",), "joules": ("energy_j",), "bytes": ("bytes_up", "bytes_down")}
    met = next((n for n, row in enumerate(rows, 1) if row["accuracy"] and float(row["accuracy"]) >= target), 0)
    if not (target and met):
        return {f"{name}_to_accuracy": None for name in columns}
    sums = {name: runs.totals(rows[:met], names) for name, names in columns.items()}
    return {f"{name}_to_accuracy": sum(sums[name].values()) for name in columns}


def _column_mean(rows: Sequence[Mapping[str, str]], name: str) -> float | None:
    """The mean of a column's cells that are not empty; None where all are."""
    there = [float(row[name]) for row in rows if row[name]]
    return sum(there) / len(there) if there else None


def draw(config: Config, folder: RunFolder) -> Path:
    """Plot test accuracy against rounds and against bytes, and what controllers chose; returns the first's path."""
    from fedsplit.report import style

    rows = [row for row in folder.rows("rounds") if row["accuracy"]]
    accuracy = [100 * float(row["accuracy"]) for row in rows]
    sent = np.cumsum([float(row["bytes_up"]) + float(row["bytes_down"]) for row in folder.rows("rounds")]) / 1e6
    picture = style.picture()
    left, right = picture.subplots(1, 2, sharey=True)
    left.plot([int(row["round"]) for row in rows], accuracy, **style.look(0))
    right.plot([sent[int(row["round"]) - 1] for row in rows], accuracy, **style.look(0))
    style.dress(left, x="round", y="test accuracy (%)", whole="x")
    style.dress(right, x="bytes on the wire, all clients, both ways (MB)")
    path = folder.path / "accuracy.png"
    picture.save(path)
    draw_choices(config, folder)
    return path


def draw_choices(config: Config, folder: RunFolder) -> None:
    """Plot what each controller chose: choices.png, or where there are several a choices-NAME.png each."""
    controllers, rows = steer.controllers(config), folder.rows("choices")
    for name, piece in controllers.items():
        if own := [row for row in rows if row["controller"] == name]:
            picture = "choices.png" if len(controllers) == 1 else f"choices-{name}.png"
            piece.draw([{column: row[column] for column in piece.columns} for row in own], folder.path / picture)


def round_row(built: World, outcome: Outcome, quality: Quality | None, failures: int, wall_s: float) -> dict[str, Any]:
    """A row of rounds.csv; not tested leaves empty cells."""
    reports = [update.report for update in outcome.updates]
    seen = sum(report.kept_samples for report in reports)
    tested = sum(report.personal_samples for report in reports)
    personal = sum((report.personal_accuracy or 0.0) * report.personal_samples for report in reports)
    streams = by_stream(outcome)
    return {
        "round": outcome.state.round,
        "accuracy": quality.accuracy if quality else "",
        "loss": quality.loss if quality else "",
        "personal_accuracy": personal / tested if tested else "",
        "train_loss": sum(r.train_loss * r.kept_samples for r in reports) / max(1, seen),
        "local_loss": _mean([(update.report.local_loss, update.samples) for update in outcome.updates]),
        "local_accuracy": _mean([(update.report.local_accuracy, update.samples) for update in outcome.updates]),
        "clients": len(reports),
        "failures": failures,
        "kept_samples": seen,
        **{f"bytes_{way}": sum(v for k, v in streams.items() if k.endswith(f"_{way}")) for way in ("up", "down")},
        **{
            f"bytes_{kind}": sum(v for k, v in streams.items() if k.startswith(kind))
            for kind in ("activations", "gradients", "parameters")
        },
        "bytes_raw": sum(raw_by_stream(outcome).values()),
        "client_flops": sum(report.client_flops for report in outcome.reports),
        "server_flops": sum(report.server_flops for report in outcome.reports),
        "late": sum(not lost.reason for lost in outcome.lost),
        "wasted_bytes": sum(sum(lost.report.bytes.values()) for lost in outcome.lost),
        "wasted_flops": sum(lost.report.client_flops + lost.report.server_flops for lost in outcome.lost),
        "wasted_j": sum((lost.cost.joules for lost in outcome.lost), 0.0),
        "waited_s": outcome.waited_s,
        "probe_steps": sum(report.probe_steps for report in reports),
        "workload_variance": _mean([(report.workload_variance, 1) for report in reports]),
        "gradient_cosine": _mean([(report.gradient_cosine, 1) for report in reports]),
        "recover_error": _mean([(report.recover_error, 1) for report in reports]),
        "stale_error": _mean([(report.stale_error, 1) for report in reports]),
        "learning_rate": built.learning_rate(outcome.state.round),
        "virtual_s": outcome.cost.seconds,
        "energy_j": outcome.cost.joules,
        "wall_s": round(wall_s, 4),
    }


def client_rows(number: int, outcome: Outcome, failures: Sequence[Failure]) -> list[dict[str, Any]]:
    """Rows of clients.csv: who took part, then who was lost on the way, then who failed otherwise and why."""
    rows = [
        _client_row(number, update, cost, outcome) for update, cost in zip(outcome.updates, outcome.costs, strict=True)
    ]
    empty = dict.fromkeys(rows[0], "") if rows else {}
    rows += [{**empty, **_lost_row(number, lost, outcome)} for lost in outcome.lost]
    told = {(lost.client, lost.reason) for lost in outcome.lost}
    others = [failure for failure in failures if (failure.client, failure.reason) not in told]
    return rows + [{**empty, "round": number, "client": f.client, "failure": f.reason} for f in others]


def class_rows(number: int, quality: Quality, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of classes.csv: accuracy by class."""
    return [
        {"round": number, "class": name, "samples": int(total), "accuracy": float(right / total) if total else ""}
        for name, total, right in zip(classes, quality.class_samples, quality.class_correct, strict=True)
    ]


def unit_rows(built: World, number: int, outcome: Outcome) -> list[dict[str, Any]]:
    """Rows of units.csv: of all steps of a round, how many ran each unit in full, forward only, or not."""
    if not built.config.names("body.plans"):
        return []
    ran: Counter[str] = Counter()
    for update in outcome.updates:
        ran.update(update.report.units)
    steps = sum(update.report.steps for update in outcome.updates)
    rows = []
    for block, unit in product(range(built.cut.depth), range(built.plan_flops.units)):
        full, forward = ran[f"{block}.{unit}.full"], ran[f"{block}.{unit}.forward"]
        skip = steps - full - forward
        rows.append({"round": number, "block": block, "unit": unit, "full": full, "forward": forward, "skip": skip})
    return rows


def choice_rows(config: Config, number: int, control: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of choices.csv: what controllers chose in a round, and what it brought.

    The columns are those of all controllers; a cell is empty where a controller has no such column.
    """
    controllers = steer.controllers(config)
    empty = dict.fromkeys(("controller", *(column for piece in controllers.values() for column in piece.columns)), "")
    return [
        {**empty, "controller": name, **row}
        for name, piece in controllers.items()
        for row in piece.rows(control.get(name, {}), number)
    ]


def by_stream(outcome: Outcome) -> dict[str, int]:
    """Bytes of a round by stream: columns of ledger.csv."""
    return {name.replace("-", "_"): sum(report.bytes.get(name, 0) for report in outcome.reports) for name in STREAMS}


def raw_by_stream(outcome: Outcome) -> dict[str, int]:
    """What the bytes of a round would be without codecs, by stream: the other columns of ledger.csv."""
    return {
        f"raw_{name.replace('-', '_')}": sum(report.raw_bytes.get(name, 0) for report in outcome.reports)
        for name in STREAMS
    }


def _mean(figures: Sequence[tuple[float | None, int]]) -> float | str:
    """The weighted mean of those there are; an empty cell where there are none."""
    there = [(figure, weight) for figure, weight in figures if figure is not None]
    return sum(figure * weight for figure, weight in there) / sum(weight for _, weight in there) if there else ""


def _lost_row(number: int, lost: Lost, outcome: Outcome) -> dict[str, Any]:
    """What a client had sent, computed and cost that dropped out, or of which `late` says how far it came in time."""
    return {
        "round": number,
        "client": lost.client,
        **_spent(lost.report, lost.cost, outcome, lost.client),
        "failure": lost.reason,
        "late": "" if lost.reason else lost.fraction,
    }


def _spent(report: Report, cost: Cost, outcome: Outcome, client: int) -> dict[str, Any]:
    return {
        **{f"bytes_{name.replace('-', '_')}": report.bytes.get(name, 0) for name in STREAMS},
        "messages": report.messages,
        "client_flops": report.client_flops,
        "server_flops": report.server_flops,
        "profile": outcome.profiles[client],
        "begins_s": outcome.begins_s + cost.begins_s,
        **{name: getattr(cost, name) for name in PHASES},
        "virtual_s": cost.seconds,
        "energy_j": cost.joules,
    }


def _client_row(number: int, update: Update, cost: Cost, outcome: Outcome) -> dict[str, Any]:
    report = update.report
    return {
        "round": number,
        "client": update.client,
        "samples": update.samples,
        "kept_samples": report.kept_samples,
        "steps": report.steps,
        "train_loss": report.train_loss,
        "local_steps": report.local_steps,
        "local_loss": "" if report.local_loss is None else report.local_loss,
        "local_accuracy": "" if report.local_accuracy is None else report.local_accuracy,
        "scored_samples": report.scored_samples,
        "computed_samples": report.computed_samples,
        "personal_accuracy": "" if report.personal_accuracy is None else report.personal_accuracy,
        "personal_samples": report.personal_samples,
        **_spent(report, cost, outcome, update.client),
        "client_peak_bytes": report.client_peak_bytes,
        "server_peak_bytes": report.server_peak_bytes,
        "stored_bytes": report.stored_bytes,
        "probe_steps": report.probe_steps,
        "workload_variance": "" if report.workload_variance is None else report.workload_variance,
        "gradient_cosine": "" if report.gradient_cosine is None else report.gradient_cosine,
        "recover_error": "" if report.recover_error is None else report.recover_error,
        "stale_error": "" if report.stale_error is None else report.stale_error,
        "wall_s": round(report.wall_s, 4),
        "failure": "",
        "late": "",
    }
