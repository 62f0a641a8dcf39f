"""Backbones: shipped and timm's, cut, refused, and loaded from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

from fedsplit.front import models
from fedsplit.front.trainable import resolve as train_set
from fedsplit.front.vit import split
from fedsplit.settings import Model
from fedsplit.types import Cut, FedsplitError

VITS = [  # class token, distillation token, register tokens, average and attention pooling, pre-norm, layer scale
    "vit_tiny_patch16_224",
    "vit_base_patch32_clip_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch16_siglip_224",
    "vit_little_patch16_reg4_gap_256",
    "vit_small_r26_s32_224",
    "deit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
]


@pytest.mark.parametrize("name", VITS)
def test_the_parts_of_a_timm_vit_compute_what_it_computes(name: str) -> None:
    backbone = models.create(Model(name=name, pretrained=False), 7, 0)
    backbone.vit.eval()
    parts = split(backbone.vit, Cut(backbone.depth // 3, 1, backbone.depth))
    parts.train(False)
    x = torch.randn(2, 3, backbone.image_size, backbone.image_size)
    with torch.no_grad():
        assert torch.allclose(parts(x), backbone.vit(x), atol=1e-5)
        assert parts(x).shape == (2, 7)
    names = [set(part.named()) for part in (parts.front, parts.body, parts.tail)]
    assert set.union(*names) == {name for name, _ in backbone.vit.named_parameters()}
    assert sum(map(len, names)) == len(set.union(*names)), "a parameter belongs to one part"


@pytest.mark.slow
def test_every_timm_vit_is_cut_or_refused_with_a_sentence() -> None:
    accepted = 0
    for name in timm.list_models(["vit_*", "deit*"]):
        try:
            backbone = models.create(Model(name=name), 3, 0, hollow=True)  # shapes without data, even of the giants
        except FedsplitError as refusal:
            assert "no plain ViT" in str(refusal) or "BatchNorm" in str(refusal), name
            continue
        blocks: Any = backbone.vit.blocks
        kinds = {
            (*map(type, block.modules()), *((key, value.shape) for key, value in block.named_parameters()))
            for block in blocks
        }
        assert len(kinds) == 1, f"{name}: three of its blocks do not stand for all"
        backbone.vit.blocks = torch.nn.Sequential(blocks[0], blocks[backbone.depth // 2], blocks[-1])
        parts = split(backbone.vit, Cut(1, 1, 3))
        x = torch.empty(1, 3, backbone.image_size, backbone.image_size, device="meta")
        with torch.no_grad():
            assert parts(x).shape == (1, 3), name
        accepted += 1
    assert accepted > 150


def test_the_micro_backbone_is_the_shipped_one_with_a_new_classifier() -> None:
    one = models.create(Model(), 10, 0)
    assert one.image_size == 32 and one.depth == 8 and one.vit.head.out_features == 10
    shipped = models.read_weights(models.assets.locate("fedsplit_micro.safetensors"))
    own = one.vit.state_dict()
    assert all(torch.equal(own[name], value) for name, value in shipped.items() if not name.startswith("head."))
    again, other = models.create(Model(), 10, 0), models.create(Model(), 10, 1)
    assert torch.equal(one.vit.head.weight, again.vit.head.weight)
    assert not torch.equal(one.vit.head.weight, other.vit.head.weight)
    random = models.create(Model(pretrained=False), 10, 0)
    assert not torch.equal(random.vit.pos_embed, one.vit.pos_embed)


def test_a_checkpoint_loads_and_its_position_embedding_is_resampled(tmp_path: Path) -> None:
    source = models.create(Model(), 10, 0).vit
    file = tmp_path / "a.safetensors"
    safetensors.torch.save_file(source.state_dict(), file)
    same = models.create(Model(checkpoint=str(file)), 10, 5).vit
    assert torch.equal(same.head.weight, source.head.weight)
    fewer = models.create(Model(checkpoint=str(file)), 3, 5).vit
    assert fewer.head.out_features == 3 and torch.equal(fewer.pos_embed, source.pos_embed)
    larger = models.create(Model(checkpoint=str(file), image_size=48), 10, 0).vit
    assert larger.pos_embed.shape[1] == 144
    torch.save({"state_dict": source.state_dict()}, tmp_path / "a.pth")
    assert torch.equal(
        models.create(Model(checkpoint=str(tmp_path / "a.pth")), 10, 5).vit.head.weight, source.head.weight
    )


def test_a_torch_file_with_code_in_it_is_refused(tmp_path: Path) -> None:
    torch.save({"model": Path("x")}, tmp_path / "evil.pth")
    with pytest.raises(FedsplitError, match="not a readable checkpoint"):
        models.create(Model(checkpoint=str(tmp_path / "evil.pth")), 10, 0)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (Model(name="vit_relpos_small_patch16_224", pretrained=False), "no plain ViT"),
        (Model(name="resnet18", pretrained=False), "no plain ViT"),
        (Model(name="vit_small_resnet26d_224", pretrained=False), "BatchNorm"),
        (Model(name="fedsplit_mikro"), "did you mean fedsplit_micro"),
        (Model(pool="token"), "no class token"),
        (Model(image_size=30), "multiple of its patch size"),
        (Model(name="vit_tiny_patch16_224"), "could not be had"),
        (Model(checkpoint="no/such.safetensors"), "there is no file"),
    ],
)
def test_refusals_are_one_sentence(settings: Model, sentence: str) -> None:
    with pytest.raises(FedsplitError, match=sentence) as caught:
        models.create(settings, 10, 0)
    assert "\n" not in str(caught.value)


def test_input_size_is_known_without_building() -> None:
    assert models.input_size(Model()) == 32
    assert models.input_size(Model(image_size=64)) == 64
    assert models.input_size(Model(name="vit_base_patch16_384")) == 384


def test_train_words_choose_parameters() -> None:
    vit = models.create(Model(), 10, 0).vit
    parts = split(vit, Cut(2, 1, 8))
    assert train_set("head", vit, parts).names == ("head.weight", "head.bias")
    assert set(train_set("front,body,tail", vit, parts).names) == set(train_set("all", vit, parts).names)
    norms = train_set("norms", vit, parts).names
    assert "blocks.0.norm1.weight" in norms and not any("attn" in name for name in norms)
    assert {name for name, p in vit.named_parameters() if p.requires_grad} == set(norms)
    with pytest.raises(FedsplitError, match="names no parameter"):
        train_set("prompts", vit, parts)
    with pytest.raises(FedsplitError, match="train is empty"):
        train_set("", vit, parts)
