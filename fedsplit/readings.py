"""What a cost is compared with, and the ways in which one may count it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedsplit.config import Config, read_toml, resolve
from fedsplit.plan import Account, account
from fedsplit.types import Scalar

FLOAT_BYTES = 4
# Keys of federated full fine-tuning; all others stay, so that data, shards, rounds and sampling are the same.
WHOLE: dict[str, Scalar] = {
    "name": "fedavg",
    "train": "all",
    "cut.shape": "none",
    "cut.front": 0,
    "cut.tail": 0,
    "cut.pool": "tail",
    "server.schedule": "splitfed-v1",
    "server.optimizer": "keep",
    "local.head": "auto",
    "share.merge": "fedavg",
}
RUN = ("seed", "rounds", "local.epochs", "local.batch-size", "local.max-steps")
# The other way to pool: its name, its value of `cut.pool`, and what it means.
POOLS = {
    "tail": ("pooled at the body", "body", "cut.pool=body: down come, and up go back, only what the classifier reads"),
    "body": ("pooled at the tail", "tail", "cut.pool=tail: all tokens come down, and their gradients go back up"),
}
OFF = (
    *("data.select", "local.phases", "front.edits", "front.penalties", "body.edits", "body.plans"),
    *("share.proximal", "share.partial", "control.tune"),
)


@dataclass(frozen=True)
class Reading:
    """One way to count: what it is, and both ratios to the baseline; None where the baseline has nothing."""

    name: str
    note: str
    client_flops_ratio: float | None
    bytes_ratio: float | None


def full_fine_tuning(config: Config) -> Config:
    """FedAvg of the whole model over the same run: no split, no piece, no codec, as many passes as `local.epochs`."""
    wires = (name for name in config.values if name.startswith("wire.") and name.count(".") == 1)
    off = dict.fromkeys((*OFF, *wires), "")
    return resolve({**config.values, **WHOLE, **off})


def baseline(config: Config, file: str | Path) -> Config:
    """The config in `file`; seed, rounds, data, model, devices and passes are those of `config` where it has none.

    Raises:
        FedsplitError: the file is missing or wrong.
    """
    places = ("data.", "model.", "devices.")
    same = {key: value for key, value in config.values.items() if key in RUN or key.startswith(places)}
    return resolve({**same, "data.select": "", **read_toml(Path(file))})


def readings(own: Account, base: Account) -> list[Reading]:
    """The ratios of `own` to `base` as run and as one may also count; only the first without a split."""
    config, cut = own.config, own.config.cut
    made = [_reading("as run", "what fedsplit counts", own.client_flops, own.total_bytes, base)]
    if cut.shape == "none":
        return made
    bare = own
    if own.keeps:
        bare = account(config.replace(front__cache=False), fits=False)
        note = "front.cache=false: every pass computes the frozen front anew"
        made.append(_reading("nothing kept", note, bare.client_flops, bare.total_bytes, base))
    epochs = sum(phase.epochs for phase in config.pieces("local.phases"))
    if epochs:
        longer = account(base.config.replace(local__epochs=base.config.local.epochs + epochs), fits=False)
        note = f"nothing kept, against a baseline of {epochs} more passes over the data a round, as in the local phase"
        made.append(_reading("as many passes", note, bare.client_flops, bare.total_bytes, longer))
    if epochs or own.counts["scored_samples"]:
        note = "the kept samples' split steps, nothing kept; local phase and scoring left out of the count"
        made.append(_reading("split steps alone", note, own.split_flops, own.total_bytes, base))
    tokens, channels = own.tokens
    parameters = own.bytes["parameters-up"] + own.bytes["parameters-down"]
    tensors = 4 * FLOAT_BYTES * tokens * channels * own.visits + parameters
    note = f"4 float32 tensors ({tokens}, {channels}) for each sample of a split step, whatever need not cross"
    made.append(_reading("four full tensors", note, own.client_flops, tensors, base))
    if cut.shape == "u-shape" and not cut.tail and own.pools:
        name, pool, note = POOLS["tail" if cut.pool == "tail" else "body"]
        other = account(config.replace(cut__pool=pool), fits=False)
        made.append(_reading(name, note, other.client_flops, other.total_bytes, base))
    return made


def ratio(part: float, whole: float) -> float | None:
    """`part / whole`; None where `whole` is nothing."""
    return part / whole if whole else None


def _reading(name: str, note: str, flops: int, sent: int, base: Account) -> Reading:
    return Reading(name, note, ratio(flops, base.client_flops), ratio(sent, base.total_bytes))
