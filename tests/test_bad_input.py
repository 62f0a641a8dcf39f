"""Whatever a user gets wrong is one sentence on standard error, exit code 2, and no run folder."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fedsplit import runs
from fedsplit.cli.main import main

BASE = (
    "data.limit=60",
    "data.test-limit=20",
    "data.partition=iid",
    "devices.count=3",
    "rounds=1",
    "local.max-steps=1",
)
TIMM = "model.name=vit_tiny_patch16_224"


def arguments(pairs: Sequence[str], *more: str) -> list[str]:
    """`fedsplit run` of a tiny run with these keys changed."""
    return ["run", *(word for pair in (*BASE, *pairs) for word in ("--set", pair)), *more]


def sentence(code: int, out: str, err: str) -> str:
    """The one sentence of a refused command."""
    lines = err.splitlines()
    assert code == 2, (code, err)
    assert out == ""
    assert len(lines) == 1, err
    assert lines[0].startswith("fedsplit: ") and len(lines[0]) < 600
    assert "Traceback" not in err and "Error(" not in err
    return lines[0]


def refused(capsys: pytest.CaptureFixture[str], command: Sequence[str]) -> str:
    """Run the command in this process; its sentence."""
    capsys.readouterr()
    try:
        code = main(command)
    except SystemExit as end:  # argparse
        code = int(end.code or 0)
    return sentence(code, *capsys.readouterr())


def check(capsys: pytest.CaptureFixture[str], folder: Path, pairs: Sequence[str], *words: str) -> None:
    """A run that is refused with a sentence that holds `words`, and leaves no folder."""
    out = folder / "out" / "run"
    said = refused(capsys, arguments(pairs, "--out", str(out)))
    for word in words:
        assert word in said, said
    assert not out.parent.exists()


KEYS = [
    # A key, a type, a range, a pair.
    ("optimizer.lrr=1", "optimizer.lrr", "did you mean 'optimizer.lr'"),
    ("epochs=3", "Unknown config key 'epochs'", "fedsplit keys"),
    ("=3", "Unknown config key"),
    ("seed", "'seed' is not key=value"),
    ("rounds=ten", "rounds must be a whole number", "'ten'"),
    ("rounds=1.5", "rounds must be a whole number"),
    ("rounds=1e3", "rounds must be a whole number"),
    ("optimizer.lr=0,1", "optimizer.lr must be a number", "'0,1'"),
    ("data.resize=yes", "data.resize must be true or false"),
    ("rounds=0", "rounds must be at least 1"),
    ("seed=-1", "seed must be at least 0"),
    ("threads=0", "threads must be at least 1"),
    ("share.quorum=2", "share.quorum must be at most 1"),
    ("data.long-tail=0.5", "data.long-tail must be at least 1"),
    ("data.local-test=0.95", "data.local-test must be at most 0.9"),
    ("local.batch-size=0", "local.batch-size must be at least 1"),
    ("engine.workers=0", "engine.workers must be at least 1"),
    ("optimizer.lr=nan", "optimizer.lr must be finite"),
    ("data.alpha=inf", "data.alpha must be finite"),
    ("cut.shape=v-shape", "cut.shape must be one of", "'vanilla'"),
    ("server.schedule=v2", "server.schedule must be one of", "splitfed-v2"),
    ("optimizer.name=sdg", "optimizer.name must be one of", "'sgd'"),
    # Names of pieces.
    ("front.edits=lora", "front.edits names no piece 'lora'"),
    ("body.edits=lorra", "body.edits names no piece 'lorra'", "did you mean 'lora'"),
    ("body.plans=nope", "body.plans names no piece 'nope'"),
    ("wire.activations-up=haf", "wire.activations-up names no piece", "did you mean 'half'"),
    ("data.select=nope", "data.select names no piece 'nope'"),
    ("optimizer.schedule=nope", "optimizer.schedule names no piece 'nope'", "cosine"),
    ("share.merge=", "share.merge must name exactly one"),
    ("share.merge=fedavg,uniform", "share.merge must name exactly one"),
    ("body.edits=lora,lora", "body.edits names 'lora' more than once"),
    ("body.lora.rank=0", "body.lora.rank must be at least 1"),
    ("body.edits=lora body.lora.targets=attn.nope", "body.lora.targets", "blocks.0.attn.nope"),
]
CUTS = [
    ("cut.front=9", "cut.front=9", "8 blocks", "between 0 and 8"),
    ("cut.front=4 cut.tail=5", "do not fit a model of 8 blocks"),
    ("cut.front=4 cut.tail=4", "leave the server none of 8 blocks", "cut.shape=none"),
    ("cut.shape=vanilla cut.tail=2", "cut.shape=vanilla", "set cut.tail=0"),
    ("train=lora", "'lora' names no parameter", "body.edits=lora"),
    ("train=prompts", "'prompts' names no parameter"),
    ("train=head,heads", "train names no 'heads'", "norms"),
    ("train=", "train is empty"),
    ("cut.shape=none train=body", "'body' names no parameter", "at this cut"),
]
ALONE = [
    ("data.select=el2n data.el2n.keep=0", "data.el2n.keep must be more than 0, got 0"),
    ("data.select=el2n data.el2n.keep=1.1", "data.el2n.keep must be at most 1"),
    ("data.select=random data.random.keep=-0.5", "data.random.keep must be more than 0"),
    ("data.select=el2n data.el2n.keep=0.7 data.el2n.offset=0.4", "data.el2n", "must add up to at most 1"),
    ("data.select=el2n cut.shape=vanilla", "data.select needs the classifier at the client", "cut.shape=u-shape"),
    ("local.phases=self-update cut.shape=none", "with cut.shape=none there is none after the last block"),
    ("local.phases=self-update cut.front=8", "leave the server none of 8 blocks"),
    ("local.phases=self-update cut.shape=vanilla", "local.phases needs the classifier at the client"),
    ("local.phases=self-update train=body", "train='body' names nothing at the client", "add 'tail'"),
    ("local.phases=self-updat", "local.phases names no piece", "did you mean 'self-update'"),
    ("local.self-update.epochs=-1", "local.self-update.epochs must be at least 0"),
    ("front.edits=prompts model.name=resnet18", "'resnet18' is no plain ViT"),
    ("front.edits=prompts front.prompts.count=-1", "front.prompts.count must be at least 0"),
    ("front.edits=prompts front.prompts.side=server", "front.prompts.side=server", "set front.prompts.at=cut"),
    ("front.edits=prompts front.prompts.deep=true front.prompts.at=cut", "front.prompts.deep=true", "at=input"),
    ("cut.pool=body cut.tail=1", "cut.pool=body needs", "set cut.pool=tail"),
    ("front.cache-memory-bytes=-1", "front.cache-memory-bytes must be at least 0"),
]
MODELS = [
    ("model.image-size=30", "model.image-size=30", "multiple of its patch size, 4"),
    ("model.image-size=2", "model.image-size=2", "multiple of its patch size, 4"),
    (f"{TIMM} model.pretrained=false model.image-size=40", "multiple of its patch size, 16"),
    (f"{TIMM} model.pretrained=false model.image-size=8", "multiple of its patch size, 16"),
    ("data.resize=false", "8 x 8 pixels", "data.resize=true"),
    ("data.resize=false model.image-size=16", "8 x 8 pixels", "16 x 16"),
    ("model.name=nope", "'nope' is neither ours (fedsplit_nano, fedsplit_micro, fedsplit_tiny)"),
    ("model.name=vit_tinyy_patch16_224", "did you mean vit_tiny_patch16_224"),
    ("model.name=resnet18", "'resnet18' is no plain ViT"),
    ("model.name=resnet18 model.pretrained=false model.image-size=32", "'resnet18' is no plain ViT"),
    ("model.name=swin_tiny_patch4_window7_224", "is no plain ViT"),
    ("model.name=vit_relpos_small_patch16_224", "is no plain ViT"),
    (TIMM, "pre-trained weights", "could not be had", "model.pretrained=false"),
    ("model.pool=token", "has no class token", "model.pool"),
    (f"{TIMM} model.pretrained=false model.pool=max", "model.pool must be one of"),
    ("model.checkpoint=FOLDER/nowhere.pth", "model.checkpoint: there is no file", "nowhere.pth"),
    ("model.checkpoint=FOLDER", "model.checkpoint: there is no file"),
    ("model.checkpoint=FOLDER/garbage.pth", "not a readable checkpoint", "state dict"),
    ("model.checkpoint=FOLDER/garbage.safetensors", "not a readable checkpoint", "state dict"),
    ("model.checkpoint=FOLDER/list.pth", "holds no state dict of tensors"),
    ("model.checkpoint=FOLDER/other.safetensors", "does not fit the model", "set model.name"),
]
DATA = [
    ("data.source=/nowhere", "'/nowhere' is no folder", "train.parquet"),
    ("data.source=digit", "data.source='digit'", "data.source=digits"),
    ("data.source=owner/name", "data.source='owner/name'", "Hugging Face"),
    ("data.source=FOLDER/garbage.pth", "is a file", "give the folder"),
    ("data.source=FOLDER", "holds no train.parquet"),
    ("data.source=FOLDER/no-test", "holds no test.parquet"),
    ("data.source=FOLDER/no-label", "has no column 'label'", "rename or add"),
    ("data.source=FOLDER/no-image", "has no column 'image'", "rename or add"),
    ("data.source=FOLDER/text-label", "column label has type string", "integers"),
    ("data.source=FOLDER/broken", "row 1"),
    ("data.source=FOLDER/empty", "image"),
    ("data.source=FOLDER/garbage", "not a readable Parquet file"),
    ("devices.count=100", "100 devices", "60 training samples", "use fewer devices"),
    ("data.min-samples=25", "at least 25 samples", "data.min-samples"),
    ("data.partition=linear data.min-samples=15", "gives device 0 only", "lower data.min-samples"),
    ("data.partition=exponential devices.count=6", "cannot deal 60 samples to 6 devices", "fewer devices"),
    ("data.partition=pathological devices.count=2", "No device holds class", "data.allow-missing-classes=true"),
    ("data.limit=5 devices.count=2", "No device holds class", "data.limit"),
    ("data.partition=pathological data.classes-per-device=20", "lower data.classes-per-device"),
    ("data.partition=shard data.shards-per-device=100", "lower data.shards-per-device"),
    ("data.partition=iiid", "'iiid' is unknown", "did you mean 'iid'"),
    ("data.partition=natural-id", "no column named group"),
    ("data.partition=size", "data.sizes=''", "one whole number a device"),
    ("data.partition=size data.sizes=10,10", "data.sizes names 2 devices"),
    ("data.partition=size data.sizes=a,b,c", "not a list of whole numbers"),
    ("data.partition=size data.sizes=1000", "asks for 3000 samples"),
    ("eval.per-client=true data.local-test=0.5 data.min-samples=15", "at least 29 samples"),
    ("eval.per-client=true", "eval.per-client=true", "set data.local-test"),
]
RUN = [
    ("devices.per-round=9", "devices.per-round=9 is more than the 3 devices", "raise devices.count"),
    ("engine.faults=boom:1", "'boom:1' is not kind:client", "kinds: raise"),
    ("engine.faults=nan", "'nan' is not kind:client"),
    ("engine.faults=nan:3", "never happens to client 3", "clients are 0 to 2"),
    ("engine.faults=nan:0@2", "never happens to client 0", "rounds 1 to 1"),
    ("engine.faults=nan:0@0", "never happens to client 0", "rounds 1 to 1"),
    ("resume=FOLDER", "is not a run folder"),
]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of broken files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("broken files")
    for name in ("garbage.pth", "garbage.safetensors"):
        (folder / name).write_bytes(b"no weights" * 9)
    torch.save([1, 2], folder / "list.pth")
    save_file({"blocks.0.norm1.weight": torch.ones(7)}, folder / "other.safetensors")
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    good: list[dict[str, Any]] = [{"bytes": buffer.getvalue(), "path": None}] * 4
    labels = [0, 1, 0, 1]

    def write(name: str, split: str, **columns: list[Any]) -> None:
        (folder / name).mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), folder / name / f"{split}.parquet")

    broken = [good[0], {"bytes": b"no picture", "path": None}, *good[2:]]
    empty = [good[0], {"bytes": b"", "path": None}, *good[2:]]
    write("no-test", "train", image=good, label=labels)
    for name, columns in {
        "no-label": {"image": good, "class": labels},
        "no-image": {"picture": good, "label": labels},
        "text-label": {"image": good, "label": ["a", "b", "a", "b"]},
        "broken": {"image": broken, "label": labels},
        "empty": {"image": empty, "label": labels},
    }.items():
        write(name, "train", **columns)
        write(name, "test", image=good, label=labels)
    (folder / "garbage").mkdir()
    for split in ("train", "test"):
        (folder / "garbage" / f"{split}.parquet").write_bytes(b"no table" * 9)
    return folder


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache of this file's own: nothing that an earlier run has decoded hides a broken file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize(
    "case", [*KEYS, *CUTS, *ALONE, *MODELS, *DATA, *RUN], ids=lambda case: case[0].replace("/", ":") or "empty"
)
def test_key(case: tuple[str, ...], capsys: pytest.CaptureFixture[str], shelf: Path, tmp_path: Path) -> None:
    begun = time.monotonic()
    pairs = [pair.replace("FOLDER", str(shelf)) for pair in case[0].split(" ")]
    check(capsys, tmp_path, pairs, *case[1:])
    assert time.monotonic() - begun < 20, "a refusal waits for no network"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    check(capsys, tmp_path, ["device=cuda"], "torch sees no CUDA device", "device=cpu")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rounds = ", ("is not valid TOML",)),
        ("[data\n", ("is not valid TOML",)),
        ("\xff\xfe", ("is not valid TOML",)),
        ("rounds = [1, 2]", ("rounds must be a whole number", "[1, 2]")),
        ("name = 3", ("name must be text", "got 3")),
        ("rounds = true", ("rounds must be a whole number", "True")),
        ("[optimizer]\nlr = '0.1'", ("optimizer.lr must be a number", "'0.1'")),
        ("[optimizer]\nlr = nan", ("optimizer.lr must be finite",)),
        ("[data]\nresize = 1", ("data.resize must be true or false",)),
        ("[data]\nsource = 2020-01-01", ("data.source must be text",)),
        ("[optimiser]\nlr = 0.1", ("Unknown config key 'optimiser.lr'", "did you mean 'optimizer.lr'")),
        ("data = 'digits'", ("Unknown config key 'data'",)),
        ("[rounds]\nmany = 1", ("Unknown config key 'rounds.many'",)),
    ],
)
def test_config_file(text: str, words: tuple[str, ...], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(text, encoding="latin-1")
    out = tmp_path / "run"
    for command in (["run", "--config", str(file), "--out", str(out)], ["map", str(file)]):
        said = refused(capsys, command)
        assert all(word in said for word in words), said
    assert not out.exists()


def test_config_file_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    said = refused(capsys, ["run", "--config", str(tmp_path / "nowhere.toml"), "--out", str(out)])
    assert "Cannot read the config file" in said and "nowhere.toml: No such file" in said
    assert "Is a directory" in refused(capsys, ["run", "--config", str(tmp_path), "--out", str(out)])
    assert not out.exists()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["runn"], ("'runn'", "fedsplit --help")),
        ([], ("COMMAND",)),
        (["run", "--bogus"], ("--bogus",)),
        (["run", "demo.toml"], ("demo.toml",)),
        (["run", "--workers", "two"], ("--workers", "'two'", "fedsplit run --help")),
        (["run", "--workers", "0"], ("engine.workers must be at least 1",)),
        (["run", "--workers", "-1"], ("engine.workers must be at least 1",)),
        (["run", "--config"], ("--config",)),
        (["resume"], ("run",)),
        (["keys", "optimiser"], ("No config key starts with 'optimiser'",)),
        (["map", "nowhere.toml"], ("Cannot read the config file nowhere.toml",)),
        (["map", "--set", "train"], ("'train' is not key=value",)),
        (["pretrain", "--set", "nope=1"], ("Unknown config key 'nope'",)),
    ],
    ids=" ".join,
)
def test_command_line(command: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, command)
    assert all(word in said for word in words), said


def test_out_that_is_taken_stays_untouched(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    before = os.stat(tmp_path).st_mtime_ns
    said = refused(capsys, arguments((), "--out", str(tmp_path)))
    assert "exists and is not empty" in said and f"fedsplit resume {tmp_path}" in said
    assert os.stat(tmp_path).st_mtime_ns == before and (tmp_path / "mine.txt").read_text() == "mine"
    said = refused(capsys, arguments((), "--out", str(tmp_path / "mine.txt")))
    assert "exists and is not empty" in said and (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["file/run", "x" * 300])
def test_out_that_cannot_be_written(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = refused(capsys, arguments((), "--out", str(tmp_path / name)))
    assert "Cannot write the run folder" in said and "set 'out' to a writable place" in said


def test_out_without_permission(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def deny(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(runs.Path, "mkdir", deny)
    said = refused(capsys, arguments(["data.cache="], "--out", str(tmp_path / "run")))
    assert "Permission denied; set 'out' to a writable place" in said


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run to copy and damage."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main(arguments((), "--quiet", "--out", str(folder))) == 0
    return folder


def _edit(folder: Path, old: str, new: str) -> None:
    file = folder / "config.toml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


DAMAGES = {
    "no config": (lambda run: (run / "config.toml").unlink(), "is not a run folder"),
    "config is no TOML": (lambda run: (run / "config.toml").write_text("rounds = "), "is not valid TOML"),
    "config has an unknown key": (lambda run: _edit(run, "rounds = ", "runds = "), "did you mean 'rounds'"),
    "config is of another model": (lambda run: _edit(run, "image-size = 0", "image-size = 16"), "is not of the model"),
    "config trains something else": (lambda run: _edit(run, 'train = "all"', 'train = "head"'), "is not of the model"),
    "config has a bad fault": (lambda run: _edit(run, 'faults = ""', 'faults = "boom:1"'), "'boom:1' is not kind"),
    "checkpoint is cut short": (
        lambda run: _checkpoint(run).write_bytes(_checkpoint(run).read_bytes()[:-9]),
        "is damaged",
    ),
    "checkpoint is garbage": (lambda run: _checkpoint(run).write_bytes(b"garbage" * 9), "is damaged"),
    "checkpoint has other values": (lambda run: _flip(_checkpoint(run)), "is damaged"),
    "checkpoint has no tensors": (lambda run: _checkpoint(run).unlink(), "is damaged"),
    "checkpoint has no round": (lambda run: (_checkpoint(run).parent / "round.json").unlink(), "is damaged"),
    "checkpoint's round is garbage": (
        lambda run: (_checkpoint(run).parent / "round.json").write_text("[]"),
        "is damaged",
    ),
}


def _checkpoint(run: Path) -> Path:
    return next((run / "checkpoint").glob("round-*/state.safetensors"))


def _flip(file: Path) -> None:
    state = load_file(file)
    next(iter(state.values())).view(-1)[0] += 1
    save_file(state, file)


@pytest.mark.parametrize("damage", DAMAGES)
def test_resume_of_a_damaged_run(
    damage: str, finished: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    spoil, word = DAMAGES[damage]
    spoil(run)
    tables = {file.name: file.read_bytes() for file in run.glob("*.csv")}
    for command in (["resume", str(run)], ["run", "--set", f"resume={run}"]):
        assert word in refused(capsys, command)
    assert {file.name: file.read_bytes() for file in run.glob("*.csv")} == tables, "nothing is lost by trying"


def test_resume_of_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "is not a run folder: it has no config.toml" in refused(capsys, ["resume", str(tmp_path)])
    assert "is not a run folder" in refused(capsys, ["resume", str(tmp_path / "nowhere")])
    assert not (tmp_path / "nowhere").exists() and not any(tmp_path.iterdir())


@pytest.mark.parametrize("rounds", ["0", "-3"])
def test_resume_to_no_rounds(rounds: str, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "rounds must be at least 1" in refused(capsys, ["resume", str(finished), "--rounds", rounds])


@pytest.mark.parametrize(
    ("command", "word"),
    [
        (["-m", "fedsplit.cli.main", *arguments(["rounds=ten"])], "rounds must be a whole number"),
        (["-m", "fedsplit.cli.main", *arguments(["cut.front=9"])], "do not fit a model of 8 blocks"),
        (["-m", "fedsplit.cli.main", "runn"], "'runn'"),
    ],
    ids=["key", "world", "command"],
)
def test_real_exit_code(command: list[str], word: str, tmp_path: Path, repository: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert word in sentence(done.returncode, done.stdout, done.stderr)
    assert not any(tmp_path.iterdir()), "no runs/ folder appears"


def test_the_finished_run_was_whole(finished: Path) -> None:
    """The damages above are the only reason for their refusals."""
    assert main(["resume", str(finished), "--quiet"]) == 0
    assert json.loads((finished / "summary.json").read_text())["rounds"] == 1
