"""`fedsplit harden`: what it leaves, that a kill changes nothing, that a run takes it, and what it refuses."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fedsplit import config as config_module
from fedsplit import experiment, front, harden
from fedsplit.cli.main import main
from fedsplit.config import Config, resolve
from fedsplit.front import models
from fedsplit.harden.training import Training
from fedsplit.metrics.quality import evaluate
from fedsplit.plan import account
from fedsplit.rng import torch_rng
from fedsplit.runtime.inprocess import Loop
from fedsplit.types import FedsplitError, Scalar, knob
from fedsplit.world import ghost, world

BRIEF: dict[str, Scalar] = {
    "model.name": "fedsplit_micro",
    "model.image-size": 16,
    "model.dropout": 0.1,
    "data.limit": 60,
    "data.test-limit": 40,
    "data.classes": 3,
    "cut.front": 3,
    "front.penalties": "toy",
    "optimizer.lr": 0.002,
    "harden.epochs": 2,
    "harden.finetune-epochs": 2,
    "harden.batch-size": 8,
    "harden.images": 48,
    "harden.keep-heads": 0.5,
    "harden.keep-mlp": 0.3,
    "harden.keep-blocks": 0.7,
}
RUN: dict[str, Scalar] = {"devices.count": 2, "rounds": 1, "local.max-steps": 1, "local.batch-size": 8}


@dataclass(frozen=True)
class Toy:
    """Pulls the activations to their running mean, with noise: whoever forgets its memory or its key is found out."""

    weight: float = knob(0.002, "weight")

    def penalty(self, front: Any, x: Tensor, h: Tensor, memory: Any, key: int) -> tuple[Tensor, Any]:
        assert len(x) == len(h) and x.shape[1:] == (3, 16, 16)
        mean, steps = (h.detach().mean(), 0) if memory is None else (memory["mean"], memory["steps"])
        noise = torch.rand((), generator=torch_rng(key))
        term = self.weight * (h - mean - noise).square().mean() * (1 + steps / 10)
        return term, {"mean": 0.9 * mean + 0.1 * h.detach().mean(), "steps": steps + 1}


@pytest.fixture(scope="module", autouse=True)
def toy() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(front.PENALTIES, "toy", Toy)
        config_module.keys.cache_clear()
        yield
    config_module.keys.cache_clear()


def brief(**changes: Scalar) -> Config:
    return resolve(BRIEF).replace(**changes)


def weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = safetensors.torch.load_file(folder / "model.safetensors")
    return found


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "epochs.csv").open(newline="") as source:
        return list(csv.DictReader(source))


SHORT: dict[str, Any] = {"harden__epochs": 1, "harden__finetune_epochs": 0, "harden__images": 16}


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs with masks and two after the removal, without a break."""
    return harden.run(brief(), tmp_path_factory.mktemp("straight") / "run", quiet=True)


def test_it_leaves_a_smaller_front_and_says_so(straight: Path) -> None:
    assert {file.name for file in straight.iterdir()} == {
        "config.toml", "checkpoint", "epochs.csv", "model.safetensors", "card.json", "card.md"
    }  # fmt: skip
    table = rows(straight)
    names = ["epoch", "phase", "loss", "task_loss", "penalty.toy", "l1", "heads", "mlp", "blocks", "accuracy"]
    assert list(table[0]) == names and [row["phase"] for row in table] == ["masks"] * 2 + ["finetune"] * 2
    assert [row["epoch"] for row in table] == ["1", "2", "3", "4"]
    for row in table:
        total = float(row["task_loss"]) + float(row["penalty.toy"])
        assert float(row["loss"]) == pytest.approx(total, abs=2e-6) and float(row["penalty.toy"]) > 0
    assert (table[0]["heads"], table[0]["mlp"], table[0]["blocks"]) == ("18", "1152", "3")
    assert (table[2]["heads"], table[2]["mlp"], table[2]["blocks"]) == ("9", "346", "2")
    assert float(table[1]["l1"]) < float(table[0]["l1"]) and float(table[2]["l1"]) == 0
    card = json.loads((straight / "card.json").read_text())
    assert card["sha256"] == hashlib.sha256((straight / "model.safetensors").read_bytes()).hexdigest()
    before, pruned, after = (card[name] for name in ("before", "pruned", "after"))
    assert before["front"] == 3 and card["front"] == after["front"] == 2 and after["depth"] == 7
    assert sum(after["heads"]) == 9 and sum(after["mlp"]) == 346
    assert card["removed"] == {"blocks": 1, "heads": 9, "mlp": 806}
    assert after["front_flops"] == pruned["front_flops"] < 0.5 * before["front_flops"]
    assert after["parameters"] == sum(value.numel() for value in weights(straight).values()) < before["parameters"]
    assert before["flops"] - after["flops"] == before["front_flops"] - after["front_flops"]
    assert after["accuracy"] == pytest.approx(float(table[-1]["accuracy"]), abs=1e-5)
    assert after["accuracy"] > card["chance"] and card["data"]["images"] == 48
    assert card["penalties"] == {"toy": {"weight": 0.002}} and "fresh decoders" in card["threat_model"]
    text = (straight / "card.md").read_text()
    assert card["sha256"] in text and "cut.front = 2" in text and str(straight) not in text
    assert "toy (weight = 0.002)" in text and f"{100 * after['accuracy']:.1f} %" in text


def test_a_hardening_that_is_killed_again_and_again_ends_in_the_same_weights(
    tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each epoch (the removal follows the second), and in the middle of the third."""
    out, seen = tmp_path / "run", list[int]()

    def stop(done: int) -> None:
        seen.append(done)
        raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            harden.run(brief(), out, quiet=True, after_epoch=stop)
        assert not (out / "model.safetensors").exists() and not (out / "card.md").exists()
    step: Callable[..., dict[str, float]] = Training._step
    steps: list[int] = []

    def breaks(self: Training, *arguments: Any) -> dict[str, float]:
        steps.append(self.position.epoch)
        if len(steps) == 5:
            raise Killed
        return step(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Training, "_step", breaks)
        harden.run(brief(), out, quiet=True)
    assert steps == [2] * 5 and len(rows(out)) == 2
    for _ in range(2):
        with pytest.raises(Killed):
            harden.run(brief(), out, quiet=True, after_epoch=stop)
    assert not (out / "model.safetensors").exists()
    harden.run(brief(), out, quiet=True, after_epoch=stop)  # nothing is left to train
    assert seen == [1, 2, 3, 4] and same(out, straight) and rows(out) == rows(straight)
    ours, theirs = ((folder / "card.json").read_text() for folder in (out, straight))
    assert ours == theirs


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def settled(training: Training) -> None:
    """In the place of a check: whatever a few steps made of the model is good enough."""
    training.position.figures["after"] = training.size() | {"accuracy": 0.0}


def test_a_finished_one_is_left_alone_and_another_seed_gives_other_weights(
    tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamp = (straight / "model.safetensors").stat().st_mtime_ns
    assert harden.run(brief(), straight, quiet=True) == straight
    assert (straight / "model.safetensors").stat().st_mtime_ns == stamp
    monkeypatch.setattr("fedsplit.harden.train.check_outcome", settled)
    other = harden.run(brief(seed=1, **SHORT), tmp_path / "run", quiet=True)
    assert [row["phase"] for row in rows(other)] == ["masks"]
    assert weights(other)["head.weight"].ne(weights(straight)["head.weight"]).any()


def loaded(straight: Path, **changes: Scalar) -> Config:
    """A run on the hardened front, which is frozen."""
    run: dict[str, Scalar] = {"model.checkpoint": str(straight / "model.safetensors"), "cut.front": 2}
    run |= {"front.penalties": "", "train": "body,tail", "model.dropout": 0.0, "data.augment": "none"}
    return resolve({**BRIEF, **run, **RUN}).replace(**changes)


def test_a_run_takes_the_hardened_front(tmp_path: Path, straight: Path) -> None:
    config = loaded(straight)
    built = world(config)
    card = json.loads((straight / "card.json").read_text())
    assert (
        built.cut.depth == 7
        and [block.attn.num_heads for block in built.backbone.vit.blocks][:2] == card["after"]["heads"]
    )
    test = built.data.test
    found = evaluate(built.parts, test, range(len(test)), 3, batch_size=256, **built.look)  # type: ignore[arg-type]
    assert found.accuracy == card["after"]["accuracy"]
    hollow = ghost(config)
    assert hollow.flops == built.flops and hollow.trains == built.trains
    path = experiment.run(config.replace(out=str(tmp_path / "run")), Loop(config))
    summary = json.loads((path / "summary.json").read_text())
    assert summary["failures"] == 0
    before, after = weights(straight), weights(path)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any(name.startswith(("blocks.0.", "blocks.1.", "patch_embed", "pos")) for name in changed)
    with safetensors.safe_open(path / "model.safetensors", "pt") as one:
        assert json.loads(one.metadata()["fedsplit"]) == card["shape"]
    again = models.create(loaded(path).model, 3, 0)  # what the run wrote is a checkpoint too
    assert all(torch.equal(value, after[name]) for name, value in again.vit.state_dict().items())


PLANS: list[dict[str, Scalar]] = [
    {"body.plans": "knapsack", "body.knapsack.budget": 0.6, "body.knapsack.calibrate": 1},
    {"body.plans": "knapsack,layerdrop", "body.scope": "all", "body.knapsack.units": "block", "train": "all"},
    {"body.edits": "lora", "train": "lora,head", "body.plans": "layerdrop", "body.scope": "all"},
    {"front.edits": "prompts", "front.prompts.deep": True, "train": "prompts,tail"},
]


@pytest.mark.parametrize("pieces", PLANS, ids=lambda pieces: ",".join(map(str, pieces.values())))
def test_blocks_of_unequal_width_are_planned_and_counted(
    tmp_path: Path, straight: Path, pieces: dict[str, Scalar]
) -> None:
    config = resolve({**loaded(straight).values, "local.max-steps": 2, "devices.count": 1, **pieces})
    planned = account(config).figures()
    path = experiment.run(config.replace(out=str(tmp_path / "run")), Loop(config))
    summary = json.loads((path / "summary.json").read_text())
    assert summary["failures"] == 0
    if not planned["estimated"]:
        assert {side: planned["total"][f"{side}_flops"] for side in ("client", "server")} == {
            side: summary[f"{side}_flops"] for side in ("client", "server")
        }
    if "knapsack" in str(pieces.get("body.plans")):
        with (path / "units.csv").open(newline="") as source:
            units = list(csv.DictReader(source))
        per_block = 6 if pieces.get("body.scope") is None else 1
        assert len(units) == 7 * per_block
        left_out = {int(row["block"]) for row in units if int(row["full"]) == 0 or int(row["skip"]) > 0}
        assert left_out and (per_block == 1 or min(left_out) == 2)


def test_heads_of_unequal_blocks_cannot_be_planned_together(straight: Path) -> None:
    config = loaded(straight, body__plans="knapsack", body__scope="all", train="all")
    with pytest.raises(FedsplitError, match=r"same number of heads.*body\.scope=body"):
        experiment.check(config, world(config))


def test_what_edits_add_stays_as_drawn_and_is_no_part_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsplit.harden.train.check_outcome", settled)
    config = brief(front__edits="prompts", front__prompts__at="cut", **{**SHORT, "harden__finetune_epochs": 1})
    prompts: list[Tensor] = []

    def look(self: Training) -> None:
        prompts.extend(value.clone() for name, value in self.parts.front.named().items() if "prompt" in name)
        save(self)

    save = Training.save
    monkeypatch.setattr(Training, "save", look)
    found = weights(harden.run(config, tmp_path / "run", quiet=True))
    assert len(prompts) == 2 and torch.equal(*prompts)  # after each epoch, the second on another block
    assert not any("prompt" in name for name in found)
    state = models.create(brief().model, 3, 0).vit.state_dict()
    assert set(found) == {name for name in state if not name.startswith("blocks.7.")}
    assert not torch.equal(found["pos_embed"], state["pos_embed"])


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit code and errors of `fedsplit harden` with the brief config."""
    pairs = [f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in BRIEF.items()]
    code = main(["harden", "--quiet", *(word for pair in pairs for word in ("--set", pair)), *words])
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        (("cut.front=0",), "harden.keep-heads=0.5 has nothing to prune"),
        (("harden.structures=heads,tails",), "names no 'tails'"),
        (("model.checkpoint=/nowhere/model.safetensors",), "there is no file /nowhere/model.safetensors"),
        (("front.penalties=nobody",), "names no piece 'nobody'"),
        (("harden.epochs=-1",), "harden.epochs must be at least 0"),
        (("optimizer.lr=1e9", "optimizer.name=sgd"), "the defence diverged"),
        (("front.toy.weight=1e38",), r"\(penalty.toy first\): the defence diverged"),
        (("harden.l1=1000000", "harden.epochs=1", "harden.images=8", "cut.shape=none"), "every block"),
    ],
    ids=["no block", "structure", "file", "piece", "range", "loss", "penalty", "nothing left"],
)
def test_a_mistake_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pairs: tuple[str, ...], says: str
) -> None:
    out = tmp_path / "run"
    code, err = answer(capsys, *(word for pair in pairs for word in ("--set", pair)), "--out", str(out))
    assert code == 2 and err.startswith("fedsplit: ") and len(err.splitlines()) == 1
    assert says.replace("\\", "") in err
    assert not (out / "model.safetensors").exists() and not (out / "card.md").exists()


def test_a_folder_that_holds_something_else_is_refused(
    tmp_path: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    code, err = answer(capsys, "--out", str(tmp_path))
    assert code == 2 and "is no hardening" in err and len(err.splitlines()) == 1
    code, err = answer(capsys, "--out", str(straight), "--set", "harden.l1=0.2")
    assert code == 2 and "another config (harden.l1 0.05, now 0.2)" in err
    code, err = answer(capsys, "--config", str(tmp_path / "none.toml"), "--out", str(tmp_path / "new"))
    assert code == 2 and "Cannot read the config file" in err


def test_a_model_that_is_ruined_at_the_end_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Training, "accuracy", lambda self: self.chance())
    monkeypatch.setattr(Training, "_step", lambda *_: {"loss": 1.0, "task_loss": 1.0})
    code, err = answer(capsys, "--out", str(tmp_path / "run"), "--set", "front.penalties=")
    assert code == 2 and "naming the commonest class every time has" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "run" / "model.safetensors").exists()
    code, _ = answer(capsys, "--out", str(tmp_path / "run"), "--set", "front.penalties=")
    assert code == 2, "the same command does not take it for finished"


def test_memory_that_is_not_plain_is_refused_or_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keeps = Toy.penalty
    monkeypatch.setattr(Toy, "penalty", lambda *a: (keeps(*a[:4], None, a[5])[0], {1, 2}))
    longer = brief(**{**SHORT, "harden__epochs": 2})
    with pytest.raises(FedsplitError, match="'toy' remembers cannot be kept"):
        harden.run(longer, tmp_path / "one", quiet=True)
    monkeypatch.setattr(Toy, "pack", lambda self, memory: sorted(memory), raising=False)
    monkeypatch.setattr(Toy, "unpack", lambda self, plain: set(plain), raising=False)
    seen: list[Any] = []

    def stop(done: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        harden.run(longer, tmp_path / "two", quiet=True, after_epoch=stop)
    monkeypatch.setattr(Toy, "penalty", lambda *a: seen.append(a[4]) or (keeps(*a[:4], None, a[5])[0], a[4]))
    with pytest.raises(Killed):
        harden.run(longer, tmp_path / "two", quiet=True, after_epoch=stop)
    assert seen[0] == {1, 2}
