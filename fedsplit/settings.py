"""Every key of the core: its type, default, range and one-line help.

A field `per_round` of section `devices` is the key `devices.per-round`. The keys of the pieces are
the fields of the piece itself (`fedsplit/places.py`); `fedsplit keys` prints both.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fedsplit.types import knob


@dataclass(frozen=True)
class Data:
    """What the devices hold."""

    source: str = knob("digits", "'digits', a folder with train.parquet and test.parquet, or a Hugging Face data set name")
    partition: str = knob("dirichlet", "how samples are dealt to devices: a name of fedsplit.data.partitions.PARTITIONS")
    alpha: float = knob(0.3, "Dirichlet concentration; smaller is less equal", low=1e-6)
    classes_per_device: int = knob(2, "classes a device holds (partition 'pathological')", low=1)
    shards_per_device: int = knob(2, "label-sorted shards a device holds (partition 'shard')", low=1)
    sizes: str = knob("", "samples per device, comma-separated (partition 'size')")
    min_samples: int = knob(2, "fewest training samples a device may hold", low=1)
    long_tail: float = knob(1.0, "imbalance factor IF: class c keeps n_max * IF^(-c/(K-1)) samples; 1.0 is off", low=1.0)
    allow_missing_classes: bool = knob(False, "go on when no device holds a class of the test set")
    classes: int = knob(0, "use only the first so many classes; 0 is all", low=0)
    limit: int = knob(0, "use only the first so many training samples; 0 is all", low=0)
    test_limit: int = knob(0, "use only the first so many test samples; 0 is all", low=0)
    resize: bool = knob(True, "scale images to the model's input size; false refuses another size")
    augment: str = knob("none", "training augmentation", choices=("none", "flip", "crop-flip"))
    local_test: float = knob(0.0, "fraction of a device's samples held out for its personalised accuracy", low=0.0, high=0.9)
    select: str = knob("", "sample selectors, combined by 'and'; empty keeps all")
    cache: str = knob("", "folder for decoded images; empty is the user's cache folder")


@dataclass(frozen=True)
class Model:
    """The backbone."""

    name: str = knob("fedsplit_micro", "a model shipped with fedsplit or a timm ViT name (vit_*, deit_*)")
    pretrained: bool = knob(True, "start from pre-trained weights (shipped, or timm's from the hub)")
    checkpoint: str = knob("", "a .safetensors or .pth state dict to start from; the classifier may differ")
    image_size: int = knob(0, "input height and width in pixels; 0 is the model's own", low=0)
    pool: str = knob("", "pooling before the classifier; empty is the model's own", choices=("", "token", "avg"))
    dropout: float = knob(0.0, "dropout after position embedding and in every projection", low=0.0, high=0.99)
    drop_path: float = knob(0.0, "stochastic depth rate of the last block", low=0.0, high=0.99)


@dataclass(frozen=True)
class CutKeys:
    """Where the model is cut, and who holds which part."""

    front: int = knob(2, "blocks at the client before the body", low=0)
    tail: int = knob(0, "blocks at the client after the body", low=0)
    shape: str = knob(
        "u-shape",
        "'u-shape' keeps labels and tail at the client, 'vanilla' gives both to the server, 'none' does not split",
        choices=("u-shape", "vanilla", "none"),
    )
    pool: str = knob(
        "tail",
        "who pools the tokens before the classifier: 'tail', or 'body', which then sends down only what the classifier reads; 'auto' is the body where it can",
        choices=("tail", "body", "auto"),
    )


@dataclass(frozen=True)
class Server:
    """The server's side of the split."""

    schedule: str = knob(
        "splitfed-v1",
        "'splitfed-v1' a body per client, averaged; 'splitfed-v2' one body, clients in turn; 'sequential' clients in turn, all handed over",
        choices=("splitfed-v1", "splitfed-v2", "sequential"),
    )
    optimizer: str = knob(
        "keep",
        "state of the shared server optimiser of v2 and sequential: 'keep' it, or start anew every 'round' or 'step'",
        choices=("keep", "round", "step"),
    )


@dataclass(frozen=True)
class Optimizer:
    """The optimiser of every part that trains; its state starts anew every round."""

    name: str = knob("adamw", "optimiser", choices=("sgd", "adam", "adamw"))
    lr: float = knob(0.001, "learning rate", low=0.0)
    momentum: float = knob(0.9, "momentum (sgd) or beta1 (adam, adamw)", low=0.0, high=0.9999)
    weight_decay: float = knob(0.0, "weight decay", low=0.0)
    schedule: str = knob("constant", "learning rate over rounds: a name of fedsplit.control.SCHEDULES")
    warmup: int = knob(0, "rounds of linear warm-up", low=0)


@dataclass(frozen=True)
class Local:
    """What a client does in one round."""

    epochs: int = knob(1, "passes over the kept samples", low=0)
    batch_size: int = knob(16, "samples per step", low=1)
    max_steps: int = knob(0, "at most so many split steps a round; 0 is no limit", low=0)
    phases: str = knob("", "pieces that train front and tail without the server, before the split steps")
    head: str = knob(
        "auto",
        "what classifies the front's own tokens: the 'tail', the tail on the mean of the 'patches', an 'auxiliary' head that local.phases trains; 'auto' is the tail unless its class token has not met the image",
        choices=("auto", "tail", "patches", "auxiliary"),
    )


@dataclass(frozen=True)
class Front:
    """Pieces of the client's first part."""

    edits: str = knob("", "pieces that change the front at build, in order")
    penalties: str = knob("", "pieces that add a term to the loss of the front, summed")
    cache: bool = knob(True, "keep what a frozen front computes of an image for later epochs and rounds")
    cache_memory_bytes: int = knob(256_000_000, "memory for kept front outputs, in bytes", low=0)
    cache_disk_bytes: int = knob(4_000_000_000, "disk for those that do not fit into memory, in bytes", low=0)


@dataclass(frozen=True)
class Body:
    """Pieces of the server's part."""

    edits: str = knob("", "pieces that change the backbone at build, in order (lora)")
    plans: str = knob("", "pieces that say which units run, combined by minimum; empty runs all")
    scope: str = knob("body", "blocks that may be planned: the 'body', or 'all' of the model, the client's too", choices=("body", "all"))
    cosine: bool = knob(False, "compare the gradient at the cut with the exact one, on one planned step of every client and round")


@dataclass(frozen=True)
class Wire:
    """Codecs of the six streams, chained in order; empty is identity."""

    activations_up: str = knob("", "codecs for activations, client to server")
    activations_down: str = knob("", "codecs for activations, server to client")
    gradients_up: str = knob("", "codecs for gradients, client to server")
    gradients_down: str = knob("", "codecs for gradients, server to client")
    parameters_up: str = knob("", "codecs for parameters, client to server")
    parameters_down: str = knob("", "codecs for parameters, server to client")


@dataclass(frozen=True)
class Share:
    """How client parts become one model."""

    merge: str = knob("fedavg", "aggregation rule: a name of fedsplit.share.MERGES")
    proximal: str = knob("", "pieces that pull local weights to the round's global ones (fedprox)")
    partial: str = knob("", "pieces that say which parameters a client shares, combined by 'and'; the rest stays its own (ptls); empty shares all")
    quorum: float = knob(0.5, "fraction of a round's clients that must succeed", low=0.0, high=1.0)
    below_quorum: str = knob("repeat", "'repeat' the round with other clients or 'stop' the run, which can be resumed", choices=("repeat", "stop"))
    attempts: int = knob(3, "attempts at one round before the run stops", low=1)
    max_update_bytes: int = knob(0, "largest update accepted, in bytes; 0 is twice the honest size", low=0)


@dataclass(frozen=True)
class Control:
    """Controllers that set keys anew every round."""

    tune: str = knob("", "pieces that choose the values of other keys for the clients of a round")


@dataclass(frozen=True)
class Devices:
    """The fleet: profiles by `devices.fleet`, or one uniform profile, in which 0 means infinitely fast, or free."""

    count: int = knob(0, "number of devices; 0 is 10 in process and Flower's num-supernodes when that is set", low=0)
    per_round: int = knob(0, "devices sampled a round; 0 is all", low=0)
    flops_per_s: float = knob(0.0, "training rate of a device in FLOP/s, for the virtual clock; 0 is infinite", low=0.0)
    server_flops_per_s: float = knob(0.0, "training rate of the server in FLOP/s; 0 is infinite", low=0.0)
    up_bytes_per_s: float = knob(0.0, "upload bandwidth of a device in bytes/s; 0 is infinite", low=0.0)
    down_bytes_per_s: float = knob(0.0, "download bandwidth of a device in bytes/s; 0 is infinite", low=0.0)
    latency_s: float = knob(0.0, "one-way latency of a message in seconds", low=0.0)
    active_w: float = knob(0.0, "power of a device while it computes or transmits, in watts", low=0.0)
    fleet: str = knob("", "profiles of the devices and their weights, e.g. 'pi4:6,orin-nano:3,phone:1'; names of configs/devices or paths of .toml files; empty is the uniform rates above, which a fleet replaces but for the server's")
    jitter: float = knob(0.0, "standard deviation of the logarithm of a seeded factor on each device's compute, down and up rates; 0 is off", low=0.0)
    precision: str = knob("fp32", "which rates of a profile the virtual clock takes: fp32 or fp16; no result depends on it", choices=("fp32", "fp16"))
    availability: str = knob("always", "which devices are there when a round begins: a name of fedsplit.devices.AVAILABILITY; the clock waits until enough are")
    dropout: float = knob(0.0, "probability that a client drops out in the middle of a round", low=0.0, high=1.0)
    straggle: float = knob(0.0, "probability that a device is slow in a round", low=0.0, high=1.0)
    straggle_factor: float = knob(5.0, "how many times as long a slow device takes", low=1.0)
    server_workers: int = knob(0, "clients that the server serves at once, each at server-flops-per-s, the others queue; 0 is no limit", low=0)
    deadline_s: float = knob(0.0, "virtual seconds after which a round takes no more updates; 0 is none", low=0.0)
    over_select: float = knob(1.0, "ask so many times devices.per-round clients, and take the first devices.per-round updates; 1.0 is off", low=1.0)


@dataclass(frozen=True)
class Eval:
    """What is measured."""

    every: int = knob(1, "evaluate the global model on the central test set every so many rounds (and after the last)", low=1)
    per_client: bool = knob(False, "also test each client's own model on its held-out samples (needs data.local-test)")
    batch_size: int = knob(256, "samples per evaluation step", low=1)
    target: float = knob(0.0, "test accuracy (0 to 1) to which virtual seconds, joules and bytes are reported; 0 is none", low=0.0, high=1.0)


@dataclass(frozen=True)
class Audit:
    """How `fedsplit audit` attacks a finished run; no part of the run itself."""

    attacks: str = knob("", "attacks, comma-separated; empty is those of the suite")
    victims: int = knob(16, "training samples that are attacked", low=2)
    uploads: int = knob(4, "uploads of every sample that the server saw; attacks that average use all of them", low=1)
    seeds: int = knob(1, "seeds of every attack that draws at random", low=1)
    auxiliary: str = knob(
        "distribution",
        "the attacker's images: 'distribution' is the test set, 'same' the victims' own data (an upper bound), "
        "'other' is audit.other, 'none'",
        choices=("distribution", "same", "other", "none"),
    )
    other: str = knob("", "data source of audit.auxiliary=other, as data.source")
    images: int = knob(1000, "at most so many images of the attacker's", low=16)
    knows: str = knob("front,rest,query", "what the attacker knows beside its images: front, rest, query, hijack; comma-separated")


@dataclass(frozen=True)
class Harden:
    """How `fedsplit harden` prunes and trains a front offline; no part of a run."""

    epochs: int = knob(20, "passes over the images while the masks train", low=0)
    finetune_epochs: int = knob(10, "passes over the images after the removal", low=0)
    batch_size: int = knob(64, "images per step", low=1)
    lr: float = knob(0.0, "learning rate of the weights; 0 is optimizer.lr", low=0.0)
    finetune_lr: float = knob(0.0, "learning rate after the removal; 0 is that before", low=0.0)
    images: int = knob(0, "at most so many training images, drawn at random; 0 is all", low=0)
    structures: str = knob("heads,mlp,blocks", "what trains a mask: heads, mlp (hidden units) and blocks of the front; comma-separated")
    mask_lr: float = knob(0.05, "learning rate of the masks; a step lowers each by mask-lr * l1, so 1 / (mask-lr * l1) steps are what it takes to thin out", low=0.0)
    l1: float = knob(0.05, "weight of the masks' L1 norm; 0 is off", low=0.0)
    keep_heads: float = knob(1.0, "fraction of the front's heads that stays at most; 1.0 is off", above=0.0, high=1.0)
    keep_mlp: float = knob(1.0, "fraction of the front's MLP hidden units that stays at most; 1.0 is off", above=0.0, high=1.0)
    keep_blocks: float = knob(1.0, "fraction of the front's blocks that stays at most; 1.0 is off", above=0.0, high=1.0)


@dataclass(frozen=True)
class Engine:
    """How the work is run; none of these changes a result."""

    workers: int = knob(1, "processes that run clients in process; 1 is this process", low=1)
    timeout_s: float = knob(3600.0, "seconds of silence after which a client in another process counts as failed (at least 60 under Flower)", low=1.0)
    checkpoint_every: int = knob(1, "rounds between checkpoints", low=1)
    faults: str = knob("", "inject faults for testing: kind:client[@round], comma-separated; kinds: fedsplit.runtime.faults.KINDS")


@dataclass(frozen=True)
class LinkKeys:
    """Where real devices reach the body, and what a peer may take; none of these changes a result."""

    listen: str = knob("127.0.0.1:9444", "host:port on which the ServerApp serves the body to devices; port 0 takes a free one")
    address: str = knob("", "host:port by which devices reach it, where that is not `link.listen`")
    certificate: str = knob("", "PEM file of the server's certificate chain, made by fedsplit certify; its file is at the server")
    key: str = knob("", "PEM file of the certificate's private key")
    plaintext: bool = knob(False, "serve without TLS; devices refuse it unless their node config says plaintext=true")
    nodes: int = knob(0, "SuperNodes to wait for at the start; 0 is as many as their node config says (num-partitions)", low=0)
    wait_s: float = knob(120.0, "seconds to wait for them", low=0.0)
    sessions: int = knob(64, "sessions with the body at once", low=1)
    packet_bytes: int = knob(2**28, "longest packet in bytes", low=4096)
    idle_s: float = knob(120.0, "seconds without a packet after which a session is ended, and its client left out of the round", above=0.0)
    patience_s: float = knob(60.0, "seconds for which a device tries to reach the server again after its connection broke", low=0.0)
    bytes_per_s: float = knob(0.0, "bytes a second that the server takes of one session; 0 is no limit", low=0.0)
    packets_per_s: float = knob(0.0, "packets a second that the server takes of one session; 0 is no limit", low=0.0)


@dataclass(frozen=True)
class Settings:
    """A whole run, without the keys of the pieces."""

    name: str = knob("run", "name of the run, part of its folder")
    seed: int = knob(0, "decides every random draw", low=0)
    rounds: int = knob(5, "rounds of the run", low=1)
    out: str = knob("", "run folder; empty is runs/<time>-<name>, under the user's home for flwr run")
    resume: str = knob("", "run folder to continue")
    train: str = knob("all", "what trains: all, front, body, tail, head, norms, biases, lora, prompts; comma-separated")
    track: str = knob("", "who is told of every round beside the CSV files: tensorboard; comma-separated names of fedsplit.track.TRACKERS; empty is nobody")
    device: str = knob("cpu", "where tensors live: cpu, cuda or auto", choices=("cpu", "cuda", "auto"))
    compile: str = knob("", "backend of torch.compile for blocks that run whole, e.g. inductor; results differ in the last bits; empty is off")
    threads: int = knob(1, "torch threads of every process; results depend on it", low=1)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    cut: CutKeys = field(default_factory=CutKeys)
    server: Server = field(default_factory=Server)
    optimizer: Optimizer = field(default_factory=Optimizer)
    local: Local = field(default_factory=Local)
    front: Front = field(default_factory=Front)
    body: Body = field(default_factory=Body)
    wire: Wire = field(default_factory=Wire)
    share: Share = field(default_factory=Share)
    control: Control = field(default_factory=Control)
    devices: Devices = field(default_factory=Devices)
    eval: Eval = field(default_factory=Eval)
    audit: Audit = field(default_factory=Audit)
    harden: Harden = field(default_factory=Harden)
    engine: Engine = field(default_factory=Engine)
    link: LinkKeys = field(default_factory=LinkKeys)
