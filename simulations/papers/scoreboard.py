"""What a paper's scoreboard is made of, as data: arms, partitions, ablations, claims; and the runs it asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedsplit.config import Config, load
from fedsplit.types import FedsplitError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

# A folder of images with a file of this name has queries and a gallery of classes of their own.
SPLIT = "retrieval_split.json"

Pairs = tuple[str, ...]


@dataclass(frozen=True)
class Sizes:
    """The scale of the runs, as `key=value`: for a folder of images, for the built-in digits, and for --quick."""

    images: Pairs = (
        "devices.count=50",
        "devices.per-round=5",
        "rounds=25",
        "data.limit=5000",
        "data.test-limit=2000",
    )
    digits: Pairs = ("devices.count=10", "devices.per-round=5", "rounds=10")
    quick: Pairs = (
        "devices.count=6",
        "devices.per-round=3",
        "rounds=2",
        "data.limit=240",
        "data.test-limit=100",
    )


@dataclass(frozen=True)
class Arm:
    """One line of a table: a config of `configs/` with changes.

    `pairs` make the arm what it is; `tuned` are values searched for it, such as its learning rate. Its ratios
    are to arm `reference`; empty is the scoreboard's. With `harden` it begins with the front that
    `fedsplit harden` makes by the same pairs and these; None is the backbone as it is. `front` is the arm whose
    hardened front it begins with instead of one of its own. One that sends what another arm sends need not be
    `audited`; `audit` are pairs of its audit beside the scoreboard's, which --quick leaves out.
    """

    name: str
    title: str
    config: str
    pairs: Pairs = ()
    tuned: Pairs = ()
    reference: str = ""
    harden: Pairs | None = None
    front: str = ""
    audited: bool = True
    audit: Pairs = ()


@dataclass(frozen=True)
class Partition:
    """One way to deal the samples to the devices."""

    name: str
    title: str
    pairs: Pairs


@dataclass(frozen=True)
class Claim:
    """What the paper says of one figure of arm `arm` beside arm `against`.

    `figure` is a name of `papers.figures.FIGURES`. `low` and `high` are bounds that still hold, `above`
    one that does not. `source` says where the number comes from, `published_for` the backbone it is
    published for. It is judged on every partition, or on those of `partitions`.
    """

    text: str
    source: str
    figure: str
    arm: str
    against: str
    low: float | None = None
    above: float | None = None
    high: float | None = None
    published_for: str = ""
    partitions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scoreboard:
    """One paper's arms and claims.

    Every ratio is to arm `reference` (or the arm's own) on the same partition with the same seed. `pairs`
    hold for every arm. Ablations run on the partitions `ablated_on`, beside `reference` and the arms `ablated`.
    `columns` are those of its tables, names of `papers.show.COLUMNS`; `notes` stand below them. With
    `every_round` the global model is tested after every round, not the last alone: then there is a time to
    `target`, a fraction of the reference's last accuracy. --quick runs `quick_arms`, if there are any, alone.
    `hardening` holds for every hardening. With `audit`, keys of that section, every finished run that sends
    activations is audited. With `retrieval` they are ranked, too, where --data has a split for it (`papers.rank`).
    """

    name: str
    title: str
    arms: tuple[Arm, ...]
    partitions: tuple[Partition, ...]
    ablations: tuple[Arm, ...]
    claims: tuple[Claim, ...]
    reference: str
    ablated: tuple[str, ...]
    ablated_on: tuple[str, ...]
    quick_partitions: tuple[str, ...]
    quick_ablations: tuple[str, ...]
    quick_arms: tuple[str, ...] = ()
    columns: tuple[str, ...] = ("client_flops_ratio", "bytes_ratio", "kept_samples")
    notes: tuple[str, ...] = ()
    every_round: bool = False
    target: float = 0.95
    pairs: Pairs = ()
    hardening: Pairs = ()
    quick_hardening: Pairs = ()
    audit: Pairs = ()
    quick_audit: Pairs = ()
    retrieval: bool = False
    sizes: Sizes = field(default_factory=Sizes)
    minutes: float | None = None

    def arm(self, name: str) -> Arm:
        """The arm or ablation of that name."""
        return next(arm for arm in (*self.arms, *self.ablations) if arm.name == name)

    def against(self, arm: str) -> str:
        """The name of the arm that an arm's ratios are to."""
        return self.arm(arm).reference or self.reference

    def partition(self, name: str) -> Partition:
        """The partition of that name."""
        return next(partition for partition in self.partitions if partition.name == name)


@dataclass(frozen=True)
class Request:
    """What the command line asks of a scoreboard.

    `only` is 'main', 'ablations' or empty; `arms` are those of the main table to run, and there is no other table
    then; `pairs` are the user's, and win over everything but what the scoreboard is about; `data` and `model` are
    values of `data.source` and `model.name`. With `known`, runs that `papers.kept` has are not run again.
    """

    out: Path
    seeds: int = 3
    quick: bool = False
    only: str = ""
    data: str = ""
    model: str = "fedsplit_micro"
    device: str = "cpu"
    pairs: Pairs = ()
    arms: tuple[str, ...] = ()
    known: bool = False


@dataclass(frozen=True)
class Run:
    """One training run of a table: an arm on a partition with a seed; what comes before it, and what after.

    `audit` are pairs of its audit, `retrieval` is the folder of a split; empty is none.
    """

    arm: str
    partition: str
    seed: int
    config: Config
    hardening: Config | None = None
    audit: Pairs = ()
    retrieval: str = ""

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.partition}-{self.arm}-s{self.seed}"


def main_cells(board: Scoreboard, request: Request) -> list[tuple[str, str]]:
    """(partition, arm) of the main table, in its order."""
    if request.only == "ablations":
        return []
    names = board.quick_partitions if request.quick else [partition.name for partition in board.partitions]
    asked = request.arms or (request.quick and board.quick_arms) or [arm.name for arm in board.arms]
    wanted = {board.reference, *asked, *(board.against(arm) for arm in asked)}
    arms = [arm.name for arm in board.arms if arm.name in wanted]
    return [(partition, arm) for partition in names for arm in arms]


def ablation_cells(board: Scoreboard, request: Request) -> list[tuple[str, str]]:
    """(partition, arm) of the ablation table, in its order, the arms they are compared with first."""
    if request.only == "main" or request.arms:
        return []
    names = board.quick_ablations if request.quick else [arm.name for arm in board.ablations]
    return [(partition, arm) for partition in board.ablated_on for arm in (board.reference, *board.ablated, *names)]


def runs(board: Scoreboard, request: Request) -> list[Run]:
    """Every run that the tables need, once, seed by seed, so that an early stop leaves whole tables of fewer seeds.

    Raises:
        FedsplitError: a pair that is wrong, or that would undo what sets the arms apart; or an arm that there is not.
    """
    refuse(board, request.pairs)
    known = [arm.name for arm in board.arms]
    if unknown := [name for name in request.arms if name not in known]:
        raise FedsplitError(f"The scoreboard {board.name} has no arm '{unknown[0]}'; known: {', '.join(known)}.")
    cells = dict.fromkeys((*main_cells(board, request), *ablation_cells(board, request)))
    audit = board.quick_audit if request.quick else board.audit
    ranked = request.data if board.retrieval and request.data and (Path(request.data) / SPLIT).is_file() else ""
    wanted = []
    for seed in range(request.seeds):
        for partition, arm in cells:
            config = configure(board, request, arm, partition, seed)
            its = board.arm(arm)
            before = hardening(board, request, its.front or arm, seed)
            attacks = (*audit, *its.audit) if not request.quick else audit
            attacked = config.cut.shape != "none" and its.audited  # else there is nothing to attack
            wanted.append(Run(arm, partition, seed, config, before, attacks if attacked else (), ranked))
    return wanted


def configure(board: Scoreboard, request: Request, arm: str, partition: str, seed: int) -> Config:
    """The config of one run; it tests the global model after the last round, or after every one.

    Raises:
        FedsplitError: a pair that is wrong.
    """
    chosen = board.arm(arm)
    size, common = scale(board, request)
    if chosen.front or chosen.harden is not None:
        front = hardened(request, chosen.front or arm, seed)
        common.append(f"model.checkpoint={front / 'model.safetensors'}")
    fixed = [*board.partition(partition).pairs, f"seed={seed}", f"out={request.out / f'{partition}-{arm}-s{seed}'}"]
    pairs = [*size, *common, *board.pairs, *chosen.tuned, *chosen.pairs, *request.pairs, *fixed]
    config = load([CONFIGS / chosen.config], pairs)
    return config.replace(eval__every=1 if board.every_round else config.rounds)


def hardening(board: Scoreboard, request: Request, arm: str, seed: int) -> Config | None:
    """What `fedsplit harden` is given for an arm, if it has a hardened front; all partitions share it.

    Raises:
        FedsplitError: a pair that is wrong.
    """
    chosen = board.arm(arm)
    if chosen.harden is None:
        return None
    common = scale(board, request)[1]
    size = board.quick_hardening if request.quick else board.hardening
    fixed = [f"seed={seed}", f"out={hardened(request, arm, seed)}"]
    pairs = [*common, *board.pairs, *chosen.tuned, *chosen.pairs, *size, *chosen.harden, *fixed]
    return load([CONFIGS / chosen.config], pairs)


def hardened(request: Request, arm: str, seed: int) -> Path:
    """The folder of an arm's hardened front."""
    return request.out / f"hardened-{arm}-s{seed}"


def scale(board: Scoreboard, request: Request) -> tuple[Pairs, list[str]]:
    """How large the runs are, and what data, model and device are the same in all."""
    sizes = board.sizes
    size = sizes.quick if request.quick else sizes.images if request.data else sizes.digits
    common = [f"data.source={request.data or 'digits'}", f"model.name={request.model}", f"device={request.device}"]
    return size, common


def refuse(board: Scoreboard, pairs: Sequence[str]) -> None:
    """Keys that a user may not set, because the table would no longer be what it says.

    Raises:
        FedsplitError: one of them is among `pairs`.
    """
    own = {"seed": "use --seeds", "out": "use --out", "data.source": "use --data", "model.name": "use --model"}
    own |= {"resume": "use --out with the same folder", "eval.every": "the scoreboard says which rounds are tested"}
    own |= dict.fromkeys(keys(*board.partitions), "the partitions are the scoreboard's")
    own |= dict.fromkeys(keys(*board.arms, *board.ablations), "it is what sets the arms apart")
    for pair in pairs:
        key = pair.partition("=")[0].strip()
        if key in own:
            raise FedsplitError(f"--set {key} does not go with a scoreboard: {own[key]}.")


def keys(*items: Arm | Partition) -> list[str]:
    """The keys that the items' pairs set."""
    return [pair.partition("=")[0] for item in items for pair in item.pairs]
