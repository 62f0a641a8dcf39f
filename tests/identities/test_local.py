"""What a client does on its own: the local phase and the choice of samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import MODELS, SMALL, job_of, tensors_of

from fedsplit import experiment
from fedsplit.client import client_round
from fedsplit.config import Config, resolve
from fedsplit.runtime.inprocess import runner
from fedsplit.types import FedsplitError, Scalar, Tensors
from fedsplit.wire.frame import unpack
from fedsplit.world import World, world

PHASE: dict[str, Scalar] = {"local.phases": "self-update", "local.self-update.epochs": 2, "train": "tail,prompts"}
PROMPTS: dict[str, Scalar] = {"front.edits": "prompts", "front.prompts.count": 3, "cut.front": 0}
KEEP_HALF: dict[str, Scalar] = {"data.select": "el2n", "data.el2n.keep": 0.5}


def changed(kind: str = "avg", *groups: dict[str, Scalar]) -> Config:
    merged: dict[str, Scalar] = {**SMALL, **MODELS[kind], **PROMPTS}
    for group in groups:
        merged |= group
    return resolve(merged)


def fresh(config: Config) -> World:
    built = world(config)
    built.load(built.initial)
    return built


def logits(built: World, x: torch.Tensor) -> torch.Tensor:
    built.train(False)
    with torch.inference_mode():
        found: torch.Tensor = built.short(built.parts.front(x))
    built.train(True)
    return found


@pytest.mark.parametrize("head", ["auto", "auxiliary"])
@pytest.mark.parametrize("kind", ["cls", "avg"])
def test_logits_without_the_body_depend_on_the_image_at_every_cut(kind: str, head: str) -> None:
    depth = world(changed(kind, PHASE)).cut.depth
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    fronts = range(depth) if head == "auto" else (0, depth - 1)
    for front, tail in [*((front, 0) for front in fronts), (0, 1), (0, depth - 1), (1, 1)]:
        built = fresh(changed(kind, PHASE, {"cut.front": front, "cut.tail": tail, "local.head": head}))
        one, other = logits(built, x)
        assert not torch.allclose(one, other, atol=1e-4), (front, tail)


def test_a_class_token_that_met_no_image_is_refused_and_would_not_see_it() -> None:
    built = fresh(changed("cls", PHASE, {"local.head": "tail"}))
    one, other = logits(built, torch.randn(2, 3, 32, 32))
    assert torch.equal(one, other), "the trap that local.head=auto avoids"
    with pytest.raises(FedsplitError, match=r"class token has met no image"):
        experiment.check(built.config, built)


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "vit_wee_patch16_reg1_gap_256"])
def test_heads_of_other_models_see_the_image(name: str) -> None:
    built = fresh(changed("cls", PHASE, {"model.name": name, "model.image-size": 64}))
    one, other = logits(built, torch.randn(2, 3, 64, 64))
    assert not torch.allclose(one, other, atol=1e-5)


def test_auto_reads_the_mean_of_the_patches_and_not_the_prompts() -> None:
    built = fresh(changed("cls", PHASE, {"front.prompts.side": "server"}))
    vit: Any = built.backbone.vit
    x = torch.randn(2, 3, 32, 32)
    h = vit._pos_embed(vit.patch_embed(x))
    wanted = vit.head(vit.norm(h)[:, 1:].mean(1))
    assert torch.allclose(logits(built, x), wanted, atol=1e-5), "all patches, whichever side the prompts are on"
    client = fresh(changed("cls", PHASE))
    assert torch.allclose(logits(client, x), logits(built, x), atol=1e-6)


def test_the_local_phase_sends_nothing() -> None:
    built = fresh(changed("avg", PHASE, {"local.epochs": 0}))
    taken: list[str] = []
    update = client_round(built, job_of(built), tap=lambda stream, _: taken.append(stream))
    report = update.report
    assert report.local_steps == 2 * 8 and report.steps == 0 and report.local_loss is not None
    assert {stream for stream, size in report.bytes.items() if size} == {"parameters-up", "parameters-down"}
    assert not taken, "the server saw no activations and no gradients"
    assert any(not torch.equal(value, built.initial[name]) for name, value in unpack(update.up).items())


def test_the_local_phase_is_plain_training_of_front_and_tail() -> None:
    """Two epochs by hand: the same batches, SGD, cross-entropy, body left out."""
    settings = changed("avg", PHASE, {"local.epochs": 0, "optimizer.momentum": 0.0, "local.self-update.rate": 0.5})
    got = unpack(client_round(fresh(settings), job_of(world(settings))).up)
    built = fresh(settings)
    from fedsplit.data.batches import batches, to_batch

    optimizer = torch.optim.SGD(built.client.values(), lr=0.5 * settings.optimizer.lr)
    for epoch in range(2):
        order = built.key("batches", "local", "self-update", 1, 0, epoch)
        for indices in batches(built.shards[0], 8, order):
            batch = to_batch(built.data.train, indices, kind="none", stream=0, **built.look)
            optimizer.zero_grad()
            F.cross_entropy(built.short(built.parts.front(batch.x)), batch.y).backward()
            optimizer.step()
    assert all(torch.equal(got[name], value) for name, value in built.client.items())


def test_it_trains_what_it_may_and_nothing_else() -> None:
    built = fresh(changed("cls", PHASE, KEEP_HALF, {"cut.front": 1}))
    old = built.model_state()
    old = {name: value.clone() for name, value in old.items()}
    client_round(built, job_of(built))
    moved = {name for name, value in built.model_state().items() if not torch.equal(value, old[name])}
    assert moved == set(built.trains.names)


def el2n_by_hand(built: World) -> np.ndarray[Any, Any]:
    """The definition of Paul et al., in NumPy, with the parameters as they are."""
    shard = built.shards[0]
    pixels = built.data.train.pixels[shard].astype(np.float32) / 255
    x = torch.from_numpy(((pixels - built.backbone.mean) / built.backbone.std).astype(np.float32)).permute(0, 3, 1, 2)
    z = logits(built, x.contiguous()).double().numpy()
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(shard)), built.data.train.labels[shard]] -= 1
    scores: np.ndarray[Any, Any] = np.sqrt((p**2).sum(1))
    return scores


def test_el2n_keeps_the_hardest_by_the_updated_parameters() -> None:
    settings = changed("avg", PHASE, {"local.epochs": 0, "data.local-test": 0.0})
    trained = unpack(client_round(fresh(settings), job_of(world(settings))).up)
    built = fresh(settings)
    before = el2n_by_hand(built)
    built.load(trained)
    after = el2n_by_hand(built)
    wanted = set(built.shards[0][np.argsort(-after)[:30]].tolist())
    assert wanted != set(built.shards[0][np.argsort(-before)[:30]].tolist()), "the phase changed the choice"
    split = changed("avg", PHASE, KEEP_HALF, {"local.max-steps": 0})
    assert kept_by(split) == wanted


def kept_by(settings: Config, memory: bytes = b"") -> set[int]:
    """The samples of a client's split steps."""
    from fedsplit import client

    built = fresh(settings)
    taken: set[int] = set()
    original = client.plan_batches

    def spy(world: World, job: Any, kept: Any) -> Any:
        taken.update(kept.tolist())
        return original(world, job, kept)

    patch = pytest.MonkeyPatch()
    patch.setattr(client, "plan_batches", spy)
    try:
        client_round(built, replace(job_of(built), memory=memory))
    finally:
        patch.undo()
    return taken


def test_once_keeps_the_first_choice_and_scores_no_more() -> None:
    settings = changed("avg", PHASE, KEEP_HALF, {"data.el2n.once": True, "front.cache": False})
    built = fresh(settings)
    first = client_round(built, job_of(built))
    assert first.report.scored_samples == 60
    built = fresh(settings)
    later = client_round(built, replace(job_of(built, number=2), memory=first.memory))
    assert later.report.scored_samples == 0 and later.memory == first.memory
    assert kept_by(settings) == kept_by(settings, first.memory)


def test_scores_are_averaged_over_the_last_epochs() -> None:
    counts = {}
    for epochs in (1, 2, 5):
        built = fresh(changed("avg", PHASE, KEEP_HALF, {"data.el2n.epochs": epochs}))
        counts[epochs] = client_round(built, job_of(built)).report.scored_samples
    assert counts == {1: 60, 2: 120, 5: 120}, "there are two local epochs"


def test_selection_works_alone_and_without_a_split() -> None:
    for more in ({}, {"cut.shape": "none", "front.edits": "", "train": "head"}):
        built = fresh(changed("avg", {"train": "tail,prompts"}, KEEP_HALF, more, {"local.max-steps": 0}))
        report = client_round(built, job_of(built)).report
        assert report.kept_samples == 30 and report.steps == 4 and report.scored_samples == 60
        assert report.local_accuracy is not None and report.local_steps == 0


def test_two_selectors_that_agree_on_nothing_keep_what_either_keeps() -> None:
    built = fresh(
        changed(
            "avg",
            {
                "train": "tail",
                "data.limit": 10,
                "data.allow-missing-classes": True,
                "data.select": "el2n,random",
                "data.el2n.keep": 0.1,
                "data.random.keep": 0.1,
            },
        )
    )
    kept = {
        client_round(fresh(built.config), job_of(built, number=number)).report.kept_samples for number in range(1, 6)
    }
    assert kept <= {1, 2} and 2 in kept


@pytest.mark.parametrize("labels", [[3], [3] * 7])
def test_small_and_one_class_devices_keep_something(labels: list[int]) -> None:
    from fedsplit.data import SELECTORS

    for name in SELECTORS:
        built = fresh(changed("avg", PHASE, {"data.select": name, f"data.{name}.keep": 0.01}))
        chosen = np.flatnonzero(built.data.train.labels == 3)[: len(labels)]
        alone = replace(built, shards=(chosen,), cache=None)
        assert client_round(alone, job_of(built)).report.kept_samples == 1, name


def test_labels_never_enter_the_transcript() -> None:
    built = fresh(changed("avg", PHASE, KEEP_HALF))
    seen: list[Tensors] = []
    client_round(built, job_of(built), tap=lambda _, tensors: seen.append(tensors))
    assert seen and all(set(tensors) == {"x"} and tensors["x"].is_floating_point() for tensors in seen)


@pytest.mark.parametrize("kind", ["cls", "avg"])
def test_off_equals_absent(kind: str) -> None:
    off: dict[str, Scalar] = {"local.phases": "self-update", "local.self-update.epochs": 0, "data.select": "el2n"}
    off |= {"local.head": "auxiliary"}  # no phase trains it: it is not there
    both = [
        tensors_of(client_round(fresh(settings), job_of(world(settings))))
        for settings in (
            changed(kind, {"train": "tail,prompts"}),
            changed(kind, {"train": "tail,prompts"}, off, {"data.el2n.keep": 1.0}),
        )
    ]
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])


def test_the_prompts_gradient_alone_comes_down() -> None:
    """A frozen front whose prompts come last needs the gradient at the prompts only, and learns the same."""
    counted, trained = {}, {}
    for at, front in (("input", 0), ("cut", 2), ("input", 2)):
        built = fresh(changed("avg", {"train": "tail,prompts", "cut.front": front, "front.prompts.at": at}))
        update = client_round(built, job_of(built))
        counted[at, front], trained[at, front] = update.report.bytes["gradients-down"], tensors_of(update)
        whole = fresh(built.config)
        object.__setattr__(whole, "open", slice(None))
        again = client_round(whole, job_of(whole))
        assert all(torch.equal(value, trained[at, front][name]) for name, value in tensors_of(again).items())
        world.__globals__["_world"].cache_clear()
    rows = 5 * 8 * 96 * 4
    assert 3 * rows < counted["input", 0] < 3 * rows + 5 * 200 and counted["cut", 2] == counted["input", 0]
    assert counted["input", 2] > 67 * rows


@pytest.mark.parametrize("kind", ["cls", "avg"])
def test_pooling_at_the_server_trains_the_same_and_sends_less(kind: str) -> None:
    reports, trained = [], []
    for pool in ("tail", "body"):
        built = fresh(changed(kind, PHASE, KEEP_HALF, {"cut.pool": pool}))
        update = client_round(built, job_of(built))
        reports.append(update.report)
        trained.append(tensors_of(update))
    for name, value in trained[0].items():
        assert torch.allclose(value, trained[1][name], atol=1e-6), name
    for stream in ("activations-down", "gradients-up"):
        assert reports[1].bytes[stream] < reports[0].bytes[stream] / 3
    assert reports[1].bytes["activations-up"] == reports[0].bytes["activations-up"]


def test_a_run_with_memory_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Clients that remember (kept outputs, a choice made once): two rounds and two more equal four."""
    values = {**SMALL, **MODELS["avg"], **PROMPTS, **PHASE, **KEEP_HALF, "data.el2n.once": True, "devices.count": 3}
    values |= {"devices.per-round": 2, "data.min-samples": 2}
    whole = resolve({**values, "rounds": 4, "out": str(tmp_path / "whole")})
    part = resolve({**values, "rounds": 2, "out": str(tmp_path / "part")})
    for settings in (whole, part, part.replace(resume=str(tmp_path / "part"), rounds=4)):
        experiment.run(settings, runner(settings))
    one, other = ((tmp_path / name / "clients.csv").read_text() for name in ("whole", "part"))

    def plain(text: str) -> list[list[str]]:
        rows = [line.split(",") for line in text.splitlines()]
        place = rows[0].index("wall_s")
        return [row[:place] + row[place + 1 :] for row in rows]

    assert plain(one) == plain(other)
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "part/model.safetensors").read_bytes()


REFUSED: list[tuple[dict[str, Scalar], str]] = [
    (
        {**PHASE, "cut.shape": "none", "train": "head", "front.edits": ""},
        r"cut\.shape=none there is none after the last",
    ),
    ({**PHASE, "cut.shape": "vanilla"}, r"local\.phases needs the classifier at the client"),
    ({**KEEP_HALF, "cut.shape": "vanilla", "train": "all"}, r"data\.select needs the classifier at the client"),
    ({**PHASE, "train": "body"}, r"names nothing at the client"),
    ({**PHASE, "local.head": "auxiliary", "train": "prompts"}, r"leaves the head out"),
]


@pytest.mark.parametrize("values, words", REFUSED, ids=[words for _, words in REFUSED])
def test_what_cannot_be_is_said_at_the_start(values: dict[str, Scalar], words: str) -> None:
    settings = changed("avg", values)
    with pytest.raises(FedsplitError, match=words):
        experiment.check(settings, world(settings))


@pytest.mark.parametrize(
    "values", [{"cut.tail": 1}, {"cut.shape": "none", "front.edits": ""}, {"model.pool": "map"}], ids=str
)
def test_pooling_at_the_server_is_refused_where_the_tail_needs_all_tokens(values: dict[str, Scalar]) -> None:
    with pytest.raises(FedsplitError, match=r"cut\.pool=body needs"):
        if "model.pool" in values:
            values = {"model.name": "vit_base_patch16_siglip_224", "model.pretrained": False, "model.image-size": 32}
        world(changed("avg", {"cut.pool": "body"}, values))
    assert not world(changed("avg", {"cut.pool": "auto"}, values)).parts.body.pools
    assert world(changed("avg", {"cut.pool": "auto"})).parts.body.pools


def test_an_embedding_alone_can_be_inverted() -> None:
    """What the server receives of a front without blocks is the image: one least-squares solve per patch."""
    built = fresh(changed("avg", {"train": "tail,prompts"}))
    taken: list[torch.Tensor] = []
    client_round(built, job_of(built), tap=lambda stream, x: stream == "activations-up" and taken.append(x["x"]))
    vit: Any = built.backbone.vit
    weight = vit.patch_embed.proj.weight.detach().flatten(1).double()
    z = taken[0][:, built.parts.front.prefix :].double() - vit.patch_embed.proj.bias.double() - vit.pos_embed.double()
    patches = torch.linalg.lstsq(weight.expand(len(z), -1, -1), z.transpose(1, 2)).solution
    images = F.fold(patches, (32, 32), 4, stride=4).float().detach()
    mean, std = torch.tensor(built.backbone.mean), torch.tensor(built.backbone.std)
    pixels = (images.permute(0, 2, 3, 1) * std + mean) * 255
    known = torch.from_numpy(np.array(built.data.train.pixels)).float()
    nearest = torch.cdist(pixels.flatten(1), known.flatten(1)).min(1).values / pixels[0].numel() ** 0.5
    assert nearest.max() < 0.5, "each is a training image to within half a grey level"
