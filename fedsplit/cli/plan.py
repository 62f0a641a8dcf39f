"""`fedsplit plan`: the cost account of a config beside that of its baseline, as tables or as one document."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table

from fedsplit.config import Config
from fedsplit.plan import account
from fedsplit.readings import baseline, full_fine_tuning, ratio, readings
from fedsplit.types import STREAMS

GIGA, MEGA = 1e9, 1e6


def document(config: Config, against: str | None = None) -> dict[str, Any]:
    """The account of `config`, that of the config file `against` (FedAvg full fine-tuning if None), and their ratios.

    Raises:
        FedsplitError: whatever is wrong with either config.
    """
    own = account(config)
    base = account(baseline(config, against) if against else full_fine_tuning(config), fits=False)
    return {
        **own.figures(),
        "client_flops_ratio": ratio(own.client_flops, base.client_flops),
        "bytes_ratio": ratio(own.total_bytes, base.total_bytes),
        "baseline": {**base.figures(), "same_run": against is None},
        "readings": [dataclasses.asdict(reading) for reading in readings(own, base)],
    }


def show(found: dict[str, Any], console: Console | None = None) -> None:
    """Print what `document` gave."""
    console = console or Console()
    base = found["baseline"]
    counts = found["parameters"]
    console.print(
        f"{found['name']}: {found['model']}, {counts['total']:,} parameters ({counts['client']:,} train at a client, "
        f"{counts['server']:,} at the server); {found['rounds']} rounds, {found['clients_per_round']:g} of "
        f"{found['devices']} devices a round, {found['samples_per_client']:g} samples each.",
        soft_wrap=True, highlight=False,
    )  # fmt: skip
    console.print(_costs(found, base))
    console.print(
        f"Against {_what(base)}, the clients compute {_percent(found['client_flops_ratio'])} "
        f"and the wire carries {_times(found['bytes_ratio'])}.",
        soft_wrap=True, highlight=False,
    )  # fmt: skip
    if len(found["readings"]) > 1:
        console.print(_readings(found["readings"]))
    for reason in found["estimated"]:
        console.print(f"Estimated: {reason}.", soft_wrap=True, highlight=False)
    console.print(
        "Counted as if no client fails. Memory is weights, gradients, optimiser state, what the backward pass of a "
        "step keeps, and the front outputs kept in memory.", soft_wrap=True, highlight=False,
    )  # fmt: skip


def _costs(own: dict[str, Any], base: dict[str, Any]) -> Table:
    table = Table(title="Means a client and round; peaks of the run", title_justify="left")
    table.add_column("")
    for title in (own["name"], base["name"]):
        table.add_column(title, justify="right")
    rows = [
        ("client compute (GFLOPs)", "client_flops", GIGA),
        ("server compute (GFLOPs)", "server_flops", GIGA),
        ("up (MB)", "bytes_up", MEGA),
        ("down (MB)", "bytes_down", MEGA),
        *((f"  {name} (MB)", f"bytes_{name.replace('-', '_')}", MEGA) for name in STREAMS),
        ("samples kept for the split steps", "kept_samples", 1.0),
    ]
    for title, key, unit in rows:
        table.add_row(title, *(_number(side["per_client_round"][key] / unit) for side in (own, base)))
    for name in ("client", "server"):
        peaks = (f"{side[f'{name}_peak_bytes'] / MEGA:,.1f}" for side in (own, base))
        table.add_row(f"{name} memory, about (MB)", *peaks)
    if own["client_stored_bytes"] or base["client_stored_bytes"]:
        stored = (_number(side["client_stored_bytes"] / MEGA) for side in (own, base))
        table.add_row("kept front outputs, memory and disk (MB)", *stored)
    table.add_section()
    whole = [side["total"] for side in (own, base)]
    table.add_row("run: clients' compute (TFLOPs)", *(_number(total["client_flops"] / 1e12) for total in whole))
    table.add_row("run: wire (GB)", *(_number((total["bytes_up"] + total["bytes_down"]) / GIGA) for total in whole))
    if any(total["virtual_s"] for total in whole):
        table.add_row("run: virtual time (s)", *(_number(total["virtual_s"]) for total in whole))
    if any(total["energy_j"] for total in whole):
        table.add_row("run: clients' energy (J)", *(_number(total["energy_j"]) for total in whole))
    return table


def _readings(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="The same, counted in other ways", title_justify="left")
    table.add_column("reading")
    table.add_column("client compute", justify="right")
    table.add_column("wire", justify="right")
    table.add_column("what it is")
    for row in rows:
        table.add_row(row["name"], _percent(row["client_flops_ratio"]), _times(row["bytes_ratio"]), row["note"])
    return table


def _what(base: dict[str, Any]) -> str:
    if base["same_run"]:
        return "FedAvg full fine-tuning of the same run (same data, devices, rounds and local.epochs; float32)"
    return f"'{base['name']}'"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1e4 or value == round(value) else f"{value:,.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.3g} %"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}x"
