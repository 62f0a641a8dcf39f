"""`fedsplit audit`: the transcript is the wire's, attackers get what they are granted, and verdicts gate."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from fedsplit.attacks import ATTACKS
from fedsplit.attacks.base import Knowledge, Transcript
from fedsplit.attacks.work import Work, adam
from fedsplit.audit import scene as scenes
from fedsplit.audit.hijack import Misled
from fedsplit.cli.main import main
from fedsplit.config import Config, keys, resolve
from fedsplit.metrics import privacy
from fedsplit.types import Scalar, knob
from fedsplit.world import World, world

TINY: dict[str, Scalar] = {
    "data.limit": 60,
    "data.test-limit": 40,
    "data.partition": "iid",
    "devices.count": 3,
    "model.image-size": 16,
    "cut.front": 1,
    "rounds": 2,
    "local.batch-size": 8,
    "local.max-steps": 2,
    "audit.victims": 12,
    "audit.uploads": 2,
    "audit.images": 32,
}


@dataclass(frozen=True)
class Toy:
    """Descends from grey to the mean of the attacker's images plus a little of its key."""

    needs: ClassVar[tuple[str, ...]] = ("auxiliary",)
    finds: ClassVar[str] = "images"
    steps: int = knob(3, "steps", low=1)

    def run(self, transcript: Transcript, knowledge: Knowledge, key: int, work: Work) -> Tensor:
        """See the class."""
        assert knowledge.auxiliary is not None
        goal = knowledge.auxiliary.mean(0) + (key % 7) / 100
        found = torch.full((len(transcript.last), *transcript.shape), 0.5, requires_grad=True)
        work.descend("toy", {"x": found}, lambda _: (found - goal).square().sum(), self.steps, adam(0.05))
        return found


@dataclass(frozen=True)
class Guess:
    """Says that every label is 0."""

    needs: ClassVar[tuple[str, ...]] = ("hijack",)
    finds: ClassVar[str] = "labels"

    def run(self, transcript: Transcript, knowledge: Knowledge, key: int, work: Work) -> Tensor:
        """See the class."""
        return torch.zeros(len(transcript.last), dtype=torch.int64)


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(ATTACKS, "toy", Toy)
    monkeypatch.setitem(ATTACKS, "guess", Guess)
    keys.cache_clear()
    yield
    keys.cache_clear()


def built(**changes: Scalar) -> World:
    config: Config = resolve(TINY).replace(**changes)
    return replace(world(config), config=config)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of seconds."""
    folder = tmp_path_factory.mktemp("audited") / "run"
    pairs = [f"--set={name}={value}" for name, value in TINY.items()]
    assert main(["run", *pairs, "--out", str(folder), "--quiet"]) == 0
    return folder


def audit(run: Path, out: Path, *more: str) -> int:
    return main(["audit", str(run), "--out", str(out), "--set", "audit.attacks=toy", *more])


def test_the_transcript_is_what_crossed_the_wire() -> None:
    plain, halved = built(), built(wire__activations_up="half")
    found, coded = scenes.scene(plain), scenes.scene(halved)
    x = (found.originals - 0.5) / 0.5
    with torch.no_grad():
        expected = plain.parts.front(x)
    assert found.transcript.activations.shape == (2, 12, 16, 96)
    assert torch.allclose(found.transcript.last, expected, atol=1e-5)
    assert torch.equal(coded.transcript.last, found.transcript.last.half().float())
    assert coded.sample_bytes["activations-up"] < 0.6 * found.sample_bytes["activations-up"]
    assert found.transcript.gradients is not None and found.transcript.gradients.shape == (2, 12, 16, 96)


def test_neither_labels_nor_images_enter_a_transcript_of_the_u_shape() -> None:
    found, vanilla = scenes.scene(built()), scenes.scene(built(cut__shape="vanilla"))
    assert found.transcript.labels is None and set(found.shapes) == {"activations-up.x", "gradients-up.x"}
    assert torch.equal(vanilla.transcript.labels, vanilla.labels), "a vanilla split sends them, and the audit says so"
    assert vanilla.transcript.gradients is None


def test_watching_moves_no_weight() -> None:
    here = built(optimizer__name="adamw", optimizer__weight_decay=0.1)
    before = {name: value.clone() for name, value in here.model_state().items()}
    scenes.scene(here)
    assert all(torch.equal(value, before[name]) for name, value in here.model_state().items())


def test_uploads_differ_only_by_what_is_random() -> None:
    still, dropping = scenes.scene(built()), scenes.scene(built(model__dropout=0.2))
    assert torch.equal(still.transcript.activations[0], still.transcript.activations[1])
    assert not torch.equal(dropping.transcript.activations[0], dropping.transcript.activations[1])


def test_what_an_attacker_is_granted() -> None:
    everything = scenes.knowledge(built(audit__knows="front,rest,query,hijack"))
    assert everything.lacks(["front", "rest", "body", "tail", "query", "auxiliary", "labels", "hijack"]) == []
    nothing = scenes.knowledge(built(audit__knows="", audit__auxiliary="none"))
    assert len(nothing.lacks(["front", "rest", "query", "auxiliary", "labels", "hijack"])) == 6
    assert everything.auxiliary is not None and everything.auxiliary.shape == (32, 3, 16, 16)
    assert float(everything.auxiliary.min()) >= 0 and float(everything.auxiliary.max()) <= 1


def test_the_attackers_copy_is_the_model_and_gradients_reach_the_image() -> None:
    here = built(wire__activations_up="half")
    known, found = scenes.knowledge(here), scenes.scene(here)
    assert known.query is not None and known.front is not None and known.rest is not None
    assert torch.equal(known.query(found.originals, 1), found.transcript.last)
    image = found.originals.clone().requires_grad_()
    z = known.front(image)
    assert torch.allclose(z, found.transcript.last, atol=1e-2)
    z.sum().backward()
    assert image.grad is not None and image.grad.abs().sum() > 0
    x = (found.originals - 0.5) / 0.5
    with torch.no_grad():
        here.train(False)
        assert torch.allclose(known.rest(known.front(found.originals)), here.parts(x), atol=1e-5)
        here.train(True)


def test_victims_are_training_samples_and_the_attackers_images_are_not() -> None:
    here = built()
    ids = scenes.victims(here)
    assert set(ids) <= {int(index) for shard in here.shards for index in shard} and len(set(ids)) == 12
    originals = scenes.pixels(here.data.train, ids)
    for kind, known in (("distribution", False), ("same", True)):
        images, _ = scenes.auxiliary(built(audit__auxiliary=kind).config, here)
        assert images is not None
        met = [any(torch.equal(one, other) for other in images) for one in originals]
        assert all(met) if known else not any(met)


def test_a_hijacked_front_moves_and_a_frozen_one_does_not() -> None:
    for train, moves in (("all", True), ("head", False)):
        here = built(train=train)
        before = {name: value.clone() for name, value in here.model_state().items()}
        misled = Misled(here, scenes.victims(here))
        first = misled.victims()
        for _ in range(9):  # more than an epoch
            misled.answer(torch.randn_like(misled.upload()))
        assert torch.equal(misled.victims(), first) != moves
        assert all(torch.equal(value, before[name]) for name, value in here.model_state().items())


def test_an_audit_writes_its_findings(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit(run, tmp_path / "a", "--set", "audit.seeds=2") == 0
    out = capsys.readouterr().out
    assert "toy" in out and "Worst: toy" in out and "mean image" in out
    found = json.loads((tmp_path / "a" / "audit.json").read_text())
    assert found["worst_attack"] == "toy" and found["attacks"][0]["seeds"] == 2 and found["passed"] is None
    assert found["worst_ssim"] == pytest.approx(found["attacks"][0]["ssim"])
    exposure = found["exposure"]
    assert exposure["devices_seen"] == 3 and exposure["rounds_most"] == 2 and not exposure["labels_sent"]
    assert exposure["uploads_per_sample_mean"] == pytest.approx(2 * 16 / 20)
    with (tmp_path / "a" / "audit.csv").open() as source:
        rows = list(csv.DictReader(source))
    assert [row["seed"] for row in rows] == ["0", "1"] and "ssim_low_is_safer" in rows[0]
    with (tmp_path / "a" / "images.csv").open() as source:
        assert len(list(csv.DictReader(source))) == 3 * 16, "two seeds and the mean image; victims by the suite"
    assert (tmp_path / "a" / "audit.png").stat().st_size > 1000
    assert sum(1 for _ in (tmp_path / "a" / "exposure.csv").open()) == 4


def test_gates_decide_the_exit_code(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for bound, code in (("1.0", 0), ("-1.0", 3)):
        assert audit(run, tmp_path / "a", "--max-ssim", bound, "--json") == code
        found = json.loads(capsys.readouterr().out)
        assert found["passed"] == (code == 0) and found["gates"][0]["bound"] == float(bound)
    assert audit(run, tmp_path / "b", "--max-labels", "0.5") == 2
    assert "--max-labels has nothing to judge" in capsys.readouterr().err
    assert not (tmp_path / "b").exists(), "said before an attack begins"


def test_label_attacks_are_scored_by_labels(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--set", "audit.attacks=guess", "--set", "audit.knows=hijack", "--max-labels", "0.9", "--json")
    assert audit(run, tmp_path, *more) == 0
    found = json.loads(capsys.readouterr().out)
    labels = scenes.scene(built()).labels
    assert found["worst_labels_right"] == pytest.approx(float((labels == 0).float().mean()))
    assert found["worst_ssim"] is None and found["worst_attack"] is None


def test_results_that_are_there_are_taken_and_others_made_anew(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    plain = Toy.run

    def counted(self: Toy, transcript: Transcript, knowledge: Knowledge, key: int, work: Work) -> Tensor:
        calls.append(self.steps)
        return plain(self, transcript, knowledge, key, work)

    monkeypatch.setattr(Toy, "run", counted)
    for more, wanted in (((), [3]), ((), [3]), (("--set", "audit.toy.steps=4"), [3, 4])):
        assert audit(run, tmp_path, *more) == 0 and calls == wanted
    assert audit(run, tmp_path, "--set", "audit.victims=5") == 0 and calls == [3, 4, 3]


def test_a_stopped_audit_goes_on_to_the_same_result(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = ("--set", "audit.toy.steps=12", "--set", "audit.seeds=2")
    assert audit(run, tmp_path / "whole", *more) == 0
    monkeypatch.setattr("fedsplit.attacks.work.EVERY", 5)
    plain = Work.descend

    def killed(self: Work, what: str, parameters: Any, loss: Any, steps: int, make: Any, after: Any = None) -> None:
        def until(step: int) -> Tensor:
            if step == 8:
                raise KeyboardInterrupt
            return loss(step)

        plain(self, what, parameters, until, steps, make, after)

    monkeypatch.setattr(Work, "descend", killed)
    assert audit(run, tmp_path / "half", *more) == 130
    begun: list[int] = []

    def watched(self: Work, what: str, parameters: Any, loss: Any, steps: int, make: Any, after: Any = None) -> None:
        plain(self, what, parameters, lambda step: (begun.append(step), loss(step))[1], steps, make, after)

    monkeypatch.setattr(Work, "descend", watched)
    assert audit(run, tmp_path / "half", *more) == 0
    assert begun[0] == 5, "it goes on where it had written down how far it was"
    for seed in (0, 1):
        one, other = ((tmp_path / f / "attacks" / f"toy-s{seed}.safetensors") for f in ("whole", "half"))
        from safetensors.torch import load_file

        assert torch.equal(load_file(one)["found"], load_file(other)["found"])
    assert not list((tmp_path / "half" / "attacks").glob(".*.pt")), "nothing is left behind"


def test_a_config_with_weights_is_audited_too(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("\n".join(f"{name} = {json.dumps(value)}" for name, value in TINY.items()))
    command = ["audit", "--config", str(file), "--out", str(tmp_path / "a"), "--set", "audit.attacks=toy"]
    assert main([*command, "--set", f"model.checkpoint={run / 'model.safetensors'}"]) == 0
    assert json.loads((tmp_path / "a" / "audit.json").read_text())["exposure"]["devices"] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["/nowhere"], "is not a run folder"),
        (["RUN", "--suite", "huge"], "no audit suite 'huge'"),
        (["RUN", "--set", "audit.attacks=sorcery"], "names no piece 'sorcery'"),
        (["RUN", "--set", "rounds=9"], "only keys of 'audit.' can be set"),
        (["RUN", "--set", "audit.attacks=toy", "--set", "audit.auxiliary=other"], "set audit.other"),
        (
            ["RUN", "--set", "audit.attacks=toy", "--set", "audit.auxiliary=other", "--set", "audit.other=/nowhere"],
            "/nowhere",
        ),
        (["RUN", "--set", "audit.auxiliary=none", "--set", "audit.attacks=toy"], "toy needs auxiliary"),
        (["RUN", "--set", "audit.knows=thoughts", "--set", "audit.attacks=toy"], "names no 'thoughts'"),
        (["RUN", "--config", "x.toml"], "not both"),
        ([], "Name what is audited"),
        (["--config", "x.toml"], "give --out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_audited_is_said_in_one_sentence(
    words: list[str], said: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["audit", *(str(run) if word == "RUN" else word for word in words)]
    assert main(command if "--out" in said or not words else [*command, "--out", str(tmp_path / "a")]) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "a" / "audit.json").exists()


def test_runs_that_show_the_server_nothing_or_have_not_ended_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.toml").write_bytes((run / "config.toml").read_bytes())
    assert audit(half, tmp_path / "a") == 2
    assert "has not ended" in capsys.readouterr().err
    text = (run / "config.toml").read_text().replace('shape = "u-shape"', 'shape = "none"')
    (half / "config.toml").write_text(text)
    (half / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    assert audit(half, tmp_path / "a") == 2
    assert "cut.shape=none sends no activations" in capsys.readouterr().err


def test_scores_have_the_direction_that_they_claim() -> None:
    original = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for name, high_is_safer in privacy.SAFER_HIGH.items():
        if name == "lpips":
            continue
        score = getattr(privacy, name)
        exact, near, far = (score((original + s * noise).clamp(0, 1), original).mean() for s in (0, 0.05, 0.5))
        assert (exact < near < far) if high_is_safer else (exact > near > far)
    assert privacy.ssim(original, original).tolist() == pytest.approx([1.0] * 4)
    assert privacy.psnr(original, original).tolist() == [privacy.PSNR_MOST] * 4
    assert privacy.psnr(original, (original - 0.1)).tolist() == pytest.approx([20.0] * 4, abs=1e-3)


def test_an_interval_holds_the_mean_and_shrinks_with_more_images() -> None:
    values = torch.rand(400, generator=torch.Generator().manual_seed(0))
    few, many = privacy.interval(values[:20], 1), privacy.interval(values, 1)
    assert few[0] < float(values[:20].mean()) < few[1] and many[0] < float(values.mean()) < many[1]
    assert many[1] - many[0] < 0.5 * (few[1] - few[0])
    assert privacy.interval(values, 1) == many
