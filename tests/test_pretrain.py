"""`fedsplit pretrain`: it learns, survives a kill, keeps to its budget, and leaves what its card says."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fedsplit import pretrain
from fedsplit.data import sources
from fedsplit.front.models import SHIPPED_MEAN, SHIPPED_STD, Backbone, load_weights
from fedsplit.pretrain import probe, recipe
from fedsplit.pretrain.recipe import Pretrain
from fedsplit.pretrain.views import mix, views
from fedsplit.settings import Data
from fedsplit.types import FedsplitError

CONFIGS = Path(__file__).parents[1] / "configs" / "pretrain"
BRIEF = ("model=fedsplit_nano", "limit=64", "batch-size=16", "epochs=2", "flip=false")


class Killed(Exception):
    pass


def stop_after(count: int):
    def hook(step: int) -> None:
        if step == count:
            raise Killed

    return hook


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return safetensors.torch.load_file(file)


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def log(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open(newline="") as source:
        return list(csv.DictReader(source))


@pytest.fixture(autouse=True)
def quick_probe(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card's probe takes seconds; only the smoke run pays for it."""
    if "smoke" not in request.node.name:
        monkeypatch.setattr("fedsplit.pretrain.card._digits", lambda settings, training: ("", ""))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of four steps without a break."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedsplit.pretrain.card._digits", lambda settings, training: ("", ""))
        torch.set_num_threads(1)
        return pretrain.run(pretrain.load(pairs=BRIEF), tmp_path_factory.mktemp("straight") / "run")


def test_smoke_learns_and_writes_everything(tmp_path: Path) -> None:
    settings = pretrain.load([CONFIGS / "smoke.toml"], ["epochs=3", "lr=4e-3", "patch-drop=0", "mixup=0"])
    folder = pretrain.run(settings, tmp_path / "run")
    names = {file.name for file in folder.iterdir()}
    assert names == {"card.md", "checkpoint", "config.toml", "log.csv", "smoke.safetensors"}
    rows = log(folder)
    assert list(rows[0]) == ["step", "epoch", "lr", "loss", "images_per_s", "val_accuracy"]
    assert [float(row["epoch"]) for row in rows] == [1, 2, 3]
    assert float(rows[-1]["val_accuracy"]) > 0.2
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    card = (folder / "card.md").read_text()
    assert hashlib.sha256((folder / "smoke.safetensors").read_bytes()).hexdigest() in card
    assert f"{100 * float(rows[-1]['val_accuracy']):.1f} %" in card
    assert str(tmp_path) not in card
    trained, random = map(float, re.search(r"linear probe.*\| ([\d.]+) % \| ([\d.]+) %", card).groups())
    assert min(trained, random) > 20
    assert pretrain.load([folder / "config.toml"]) == settings


@pytest.mark.parametrize("step", [2, 4, 6])
def test_resumed_run_ends_in_the_same_weights(tmp_path: Path, straight: Path, step: int) -> None:
    settings = pretrain.load(pairs=[*BRIEF, "checkpoint-minutes=0"])
    with pytest.raises(Killed):
        pretrain.run(settings, tmp_path / "run", after_step=stop_after(step))
    done: list[int] = []
    pretrain.run(settings, tmp_path / "run", after_step=done.append)
    assert done[0] == step + 1
    assert same(straight, tmp_path / "run")
    columns = ("step", "epoch", "lr", "loss", "val_accuracy")
    one, other = ([[row[name] for name in columns] for row in log(run)] for run in (straight, tmp_path / "run"))
    assert one == other


def test_steps_after_the_last_checkpoint_are_done_again(tmp_path: Path, straight: Path) -> None:
    settings = pretrain.load(pairs=[*BRIEF, "checkpoint-minutes=60"])
    with pytest.raises(Killed):
        pretrain.run(settings, tmp_path / "run", after_step=stop_after(5))
    assert len(log(tmp_path / "run")) == 1
    pretrain.run(settings, tmp_path / "run")
    assert len(log(tmp_path / "run")) == 2
    assert same(straight, tmp_path / "run")


def test_kill_9_then_the_same_command(tmp_path: Path, straight: Path) -> None:
    out = tmp_path / "run"
    pairs = [*BRIEF, "checkpoint-minutes=0"]
    slow = (
        "import sys, time; from fedsplit import pretrain\n"
        "pretrain.run(pretrain.load(pairs=sys.argv[2:]), sys.argv[1], after_step=lambda step: time.sleep(0.2))"
    )
    process = subprocess.Popen([sys.executable, "-c", slow, str(out), *pairs], stderr=subprocess.DEVNULL)
    try:
        limit = time.monotonic() + 60
        while not (out / "checkpoint" / "state.safetensors").exists():
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (out / "card.md").exists()
    pretrain.run(pretrain.load(pairs=pairs), out)
    assert same(straight, out)


def test_ctrl_c_leaves_a_resumable_folder(tmp_path: Path, straight: Path) -> None:
    settings = pretrain.load(pairs=BRIEF)

    def press(step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        pretrain.run(settings, tmp_path / "run", after_step=press)
    assert signal.getsignal(signal.SIGINT) is before
    done: list[int] = []
    pretrain.run(settings, tmp_path / "run", after_step=done.append)
    assert done[0] == 5
    assert same(straight, tmp_path / "run")


def test_runs_outside_the_main_thread(tmp_path: Path, straight: Path) -> None:
    thread = threading.Thread(target=pretrain.run, args=(pretrain.load(pairs=BRIEF), tmp_path / "run"))
    thread.start()
    thread.join()
    assert same(straight, tmp_path / "run")


def test_finished_run_is_left_alone(straight: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in straight.rglob("*")}
    assert pretrain.run(pretrain.load(pairs=[*BRIEF, "checkpoint-minutes=1"]), straight) == straight
    assert {file: file.stat().st_mtime_ns for file in straight.rglob("*")} == before


def test_another_config_is_refused(straight: Path) -> None:
    with pytest.raises(FedsplitError, match=r"another config \(lr 0\.002, now 0\.1\); choose another 'out'\.$"):
        pretrain.run(pretrain.load(pairs=[*BRIEF, "lr=0.1"]), straight)


def test_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FedsplitError, match="no pre-training run"):
        pretrain.run(pretrain.load(pairs=BRIEF), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_broken_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    settings = pretrain.load(pairs=[*BRIEF, "checkpoint-minutes=0"])
    with pytest.raises(Killed):
        pretrain.run(settings, tmp_path / "run", after_step=stop_after(1))
    (tmp_path / "run" / "checkpoint" / "state.safetensors").write_bytes(b"torn")
    with pytest.raises(FedsplitError, match="not a checkpoint of this run"):
        pretrain.run(settings, tmp_path / "run")


def test_missing_data_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    settings = pretrain.load(pairs=[*BRIEF, f"data={tmp_path}/absent"])
    with pytest.raises(FedsplitError, match=r"absent") as caught:
        pretrain.run(settings, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("pairs", "match"),
    [
        ([], "set epochs or minutes"),
        (["epochs=1", "image-size=30"], "multiple"),
        (["epochs=1", "scale-size=16"], "scale-size"),
        (["epochs=1", "name=a/b"], "without folders"),
        (["epochs=1", "model=vit_huge"], "must be one of"),
        (["epochs=1", "learning-rate=1"], "Unknown config key"),
    ],
)
def test_bad_keys_are_refused(pairs: list[str], match: str) -> None:
    with pytest.raises(FedsplitError, match=match):
        pretrain.load(pairs=pairs)


def test_diverging_run_stops_before_it_spoils_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = pretrain.load(pairs=[*BRIEF, "checkpoint-minutes=0"])
    with monkeypatch.context() as patch:
        patch.setattr("fedsplit.pretrain.training.F.cross_entropy", lambda logits, target: logits.sum() * math.nan)
        with pytest.raises(FedsplitError, match="smaller lr"):
            pretrain.run(settings, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_half_precision_file_loads(tmp_path: Path) -> None:
    settings = pretrain.load(pairs=[*BRIEF, "epochs=1", "half=true"])
    folder = pretrain.run(settings, tmp_path / "run")
    state = weights(folder)
    assert {value.dtype for value in state.values()} == {torch.float16}
    vit = recipe.network(settings, 10, "other")
    load_weights(vit, folder / "fedsplit_nano.safetensors")
    assert all(torch.equal(value, state[name].float()) for name, value in vit.state_dict().items())
    test = sources.load(Data(limit=1), 32).test
    accuracy = probe.top1(Backbone(vit, 32, SHIPPED_MEAN, SHIPPED_STD), test)
    assert f"{100 * accuracy:.1f} %" in (folder / "card.md").read_text()


def test_time_budget_ends_the_run_with_no_learning_rate_left(tmp_path: Path) -> None:
    budget = 0.8
    settings = pretrain.load(pairs=[*BRIEF, "limit=0", "epochs=0", f"minutes={budget / 60}"])
    folder = pretrain.run(settings, tmp_path / "run")
    with safetensors.safe_open(folder / "checkpoint" / "state.safetensors", "pt") as source:
        position = json.loads(source.metadata()["position"])
    assert budget <= position["trained_s"] < budget + 1
    assert float(log(folder)[-1]["lr"]) < 0.02 * settings.lr
    assert position["step"] > 4


def test_schedule() -> None:
    settings = Pretrain(epochs=10, lr=1.0, warmup=0.1)
    assert recipe.rate(settings, 0.0) == 0
    assert recipe.rate(settings, 0.05) == pytest.approx(0.5)
    assert recipe.rate(settings, 0.1) == pytest.approx(1.0)
    assert recipe.rate(settings, 0.55) == pytest.approx(0.5)
    assert recipe.rate(settings, 1.0) == pytest.approx(0.0)
    both = Pretrain(epochs=10, minutes=1.0)
    assert recipe.progress(both, 50, 10, 15.0) == 0.5
    assert recipe.progress(both, 50, 10, 45.0) == 0.75
    assert recipe.progress(both, 200, 10, 0.0) == 1.0


def test_patches_are_dropped_first_and_not_last() -> None:
    settings = Pretrain(epochs=1, model="fedsplit_nano")
    model = recipe.network(settings, 10)
    optimizer = recipe.optimizer(settings, model)
    tokens = []
    model.norm_pre.register_forward_hook(lambda module, inputs, output: tokens.append(output.shape[1]))
    for done in (0.0, 0.79, 0.8, 0.99):
        recipe.schedule(settings, model, optimizer, done)
        model(torch.zeros(2, 3, 32, 32))
    assert tokens == [32, 32, 64, 64]


def test_only_matrices_decay() -> None:
    settings = Pretrain(epochs=1)
    model = recipe.network(settings, 10)
    groups = recipe.optimizer(settings, model).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.05 if name.endswith("weight") and "norm" not in name else 0.0), name


def test_views() -> None:
    pixels = torch.randint(0, 256, (16, 36, 36, 3), dtype=torch.uint8)
    settings = Pretrain(epochs=1)
    x = views(pixels, settings, 1)
    assert x.shape == (16, 3, 32, 32) and x.dtype == torch.float32
    assert float(x.min()) >= -1 and float(x.max()) <= 1
    assert torch.equal(x, views(pixels, settings, 1)) and not torch.equal(x, views(pixels, settings, 2))
    plain = Pretrain(epochs=1, scale_size=32, flip=False, jitter=0.0)
    whole = pixels[:, :32, :32].contiguous()
    assert torch.equal(views(whole, plain, 0), whole.permute(0, 3, 1, 2).float() / 127.5 - 1)
    mirrored = views(whole, Pretrain(epochs=1, scale_size=32, jitter=0.0), 0)
    flips = [torch.equal(m, p.flip(-1)) for m, p in zip(mirrored, views(whole, plain, 0), strict=True)]
    assert 0 < sum(flips) < 16


def test_mixup_keeps_targets_distributions() -> None:
    x, y = torch.randn(8, 3, 4, 4), torch.arange(8)
    mixed, target = mix(x, y, 10, Pretrain(epochs=1), 3)
    assert torch.allclose(target.sum(1), torch.ones(8))
    share = ((target[0, 0] - 0.01) / 0.9).item()
    assert torch.allclose(mixed, share * x + (1 - share) * x.flip(0), atol=1e-5)
    same_x, plain = mix(x, y, 10, Pretrain(epochs=1, mixup=0.0, smoothing=0.0), 3)
    assert same_x is x and torch.equal(plain, torch.nn.functional.one_hot(y, 10).float())


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.toml")), ids=lambda file: file.stem)
def test_every_config_builds(file: Path) -> None:
    settings = pretrain.load([file])
    count = sum(p.numel() for p in recipe.network(settings, 200).parameters())
    assert count * (2 if settings.half else 4) < 12e6


def test_probe_reads_shipped_and_own_weights(straight: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shipped = probe.open_backbone("fedsplit_micro")
    assert (shipped.image_size, shipped.depth, shipped.vit.num_classes) == (32, 8, 100)
    own = str(straight / "fedsplit_nano.safetensors")
    assert probe.main(["--weights", own, "--own-head", "--test-limit", "50"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["test"] == 50 and 0 <= facts["top1"] <= 1
    assert probe.main(["--weights", own, "--limit", "60", "--test-limit", "40"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["train"] == 60 and {"linear", "random_weights"} <= facts.keys()
    assert probe.main(["--weights", "fedsplit_micro", "--own-head"]) == 2
    assert "100 classes" in capsys.readouterr().err
