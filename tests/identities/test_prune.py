"""Pruning: a masked model, the smaller one that comes of it, and the one that is built from its file."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from small import job_of, small, tensors_of, unsplit
from timm.layers import GluMlp
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn

from fedsplit.body.ops import execute, units
from fedsplit.client import client_round
from fedsplit.front import prune
from fedsplit.front.masks import Masks
from fedsplit.front.models import create
from fedsplit.front.vit import split
from fedsplit.metrics.flops import count, counting_copy
from fedsplit.settings import Model
from fedsplit.types import Cut, FedsplitError, Op
from fedsplit.wire.frame import pack
from fedsplit.world import world

WIDTH, HEADS, SIZE, HIDDEN = 24, 4, 6, 40
SHAPES: dict[str, dict[str, Any]] = {
    "average": {"class_token": False, "global_pool": "avg"},
    "class token": {"class_token": True, "init_values": 0.5, "qk_norm": True},
    "no biases": {"qkv_bias": False, "proj_bias": False},
}
KEEP = {"heads": 1.0, "mlp": 1.0, "blocks": 1.0}


def vit_of(kind: str = "average", dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    """A small ViT of 5 blocks with every parameter drawn at random, so that no zero hides a fault."""
    torch.manual_seed(5)
    shape = {"embed_dim": WIDTH, "depth": 5, "num_heads": HEADS, "mlp_ratio": HIDDEN / WIDTH, "num_classes": 3}
    vit = VisionTransformer(img_size=8, patch_size=4, **shape, **SHAPES.get(kind, {}), **more)
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.3)
    return vit.to(dtype).eval()


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 3, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(3))


def masked(vit: Any, numbers: range = range(3)) -> Masks:
    """Masks between 0.3 and 1.5, some of them 0; block 1 is masked out as a whole."""
    masks = Masks(vit, numbers)
    torch.manual_seed(9)
    for name, mask in masks.values.items():
        mask.data.uniform_(0.3, 1.5)
        if not name.endswith("blocks"):
            mask.data[1::3] = 0
    masks.values["1.blocks"].data.zero_()
    return masks


def gradients(vit: Any, x: Tensor) -> dict[str, Tensor]:
    names, leaves = zip(*vit.named_parameters(), strict=True)
    found = torch.autograd.grad(vit(x).square().sum(), leaves, allow_unused=True)
    return {name: g for name, g in zip(names, found, strict=True) if g is not None}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_pruned_model_computes_what_the_masked_one_did(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    vit, x = vit_of(kind, dtype), images(dtype).requires_grad_()
    masks = masked(vit)
    before = vit(x)
    slope = torch.autograd.grad(before.sum(), x)[0]
    plain = copy.deepcopy(vit)
    shape = prune.remove(vit, masks)
    assert shape == prune.Shape((0, 2, 3, 4), (3, 3, 4, 4), (27, 27, 40, 40)) and prune.shape_of(vit) == shape
    after = vit(x)
    torch.testing.assert_close(after, before, atol=tolerance * float(before.detach().abs().max()), rtol=0)
    at_x = torch.autograd.grad(after.sum(), x)[0]
    torch.testing.assert_close(at_x, slope, atol=tolerance * float(slope.abs().max()), rtol=0)
    assert [name for name, _ in vit.named_parameters()] == [
        name for name, _ in plain.named_parameters() if not name.startswith("blocks.4.")
    ]


def test_the_gradients_of_what_stays_are_those_of_the_masked_model() -> None:
    vit, x = vit_of("class token"), images()
    masks = masked(vit)
    theirs = gradients(vit, x)
    prune.remove(vit, masks)
    ours = gradients(vit, x)
    stays = {0: 0, 2: 1, 3: 2, 4: 3}
    heads, hidden = (torch.tensor([at for at in range(size) if at % 3 != 1]) for size in (HEADS, HIDDEN))
    columns = (heads[:, None] * SIZE + torch.arange(SIZE)).flatten()
    rows = torch.cat([group * HEADS * SIZE + columns for group in range(3)])
    for old, new in stays.items():
        cut = old in masks.numbers
        of_heads, of_hidden, whole = masks.of(old) if cut else (torch.ones(HEADS), torch.ones(HIDDEN), torch.ones(1))
        at = {"attn.qkv.weight": rows, "attn.qkv.bias": rows, "mlp.fc1.weight": hidden, "mlp.fc1.bias": hidden}
        for name, index in at.items():
            theirs_here = theirs[f"blocks.{old}.{name}"]
            wanted = theirs_here[index] if cut else theirs_here
            torch.testing.assert_close(ours[f"blocks.{new}.{name}"], wanted, atol=1e-9, rtol=1e-9)
        # What is folded into a weight divides its gradient.
        for name, mask, index in (
            ("attn.proj", of_heads.repeat_interleave(SIZE), columns),
            ("mlp.fc2", of_hidden, hidden),
        ):
            wanted = theirs[f"blocks.{old}.{name}.weight"]
            found = ours[f"blocks.{new}.{name}.weight"] * (mask[index] * whole if cut else 1)
            torch.testing.assert_close(found, wanted[:, index] if cut else wanted, atol=1e-9, rtol=1e-9)
            bias = ours[f"blocks.{new}.{name}.bias"] * whole
            torch.testing.assert_close(bias, theirs[f"blocks.{old}.{name}.bias"], atol=1e-9, rtol=1e-9)
    others = [name for name in theirs if not name.startswith("blocks.")]
    assert others and all(torch.allclose(ours[name], theirs[name], atol=1e-9, rtol=1e-9) for name in others)


@pytest.mark.parametrize("kind", SHAPES)
def test_nothing_to_keep_out_changes_nothing(kind: str) -> None:
    vit, x = vit_of(kind, torch.float32), images(torch.float32)
    plain = copy.deepcopy(vit)
    masks = Masks(vit, range(3))
    assert torch.equal(vit(x), plain(x))  # masks of 1 scale nothing
    assert vit.state_dict().keys() == plain.state_dict().keys()
    prune.settle(vit, masks, KEEP, 0)
    assert masks.left() == {"heads": 12, "mlp": 120, "blocks": 3}
    prune.remove(vit, masks)
    state = plain.state_dict()
    assert torch.equal(vit(x), plain(x))
    assert all(torch.equal(value, state[name]) for name, value in vit.state_dict().items())


def test_masks_come_off() -> None:
    vit, x = vit_of(), images()
    before = vit(x)
    masks = masked(vit)
    assert not torch.allclose(vit(x), before)
    masks.off()
    assert torch.equal(vit(x), before)


def test_a_mask_step_is_a_soft_threshold_clipped_at_zero() -> None:
    masks = Masks(vit_of(), range(1), ("heads",))
    mask = masks.values["0.heads"]
    mask.data = torch.tensor([1.0, 0.5, 0.02, 0.0], dtype=torch.float64)
    mask.grad = torch.tensor([0.25, -0.25, 0.0, -0.25], dtype=torch.float64)  # 1 / 4 heads
    assert masks.norm() == pytest.approx(1.52 / 4)
    masks.step(lr=0.1, l1=0.5)
    assert mask.tolist() == pytest.approx([0.85, 0.55, 0.0, 0.05]) and mask[2] == 0
    assert masks.values["0.mlp"].eq(1).all() and not masks.values["0.mlp"].requires_grad
    mask.grad = None  # nothing flowed: the threshold alone
    masks.step(lr=0.1, l1=0.5)
    assert mask.tolist() == pytest.approx([0.8, 0.5, 0.0, 0.0])


@pytest.mark.parametrize("kind", ["average", "class token"])
def test_parameters_and_flops_fall_by_what_left(kind: str) -> None:
    vit = vit_of(kind)
    before = size(vit)
    masks = Masks(vit, range(2))
    masks.values["0.heads"].data[2:] = 0
    masks.values["1.mlp"].data[:30] = 0
    prune.remove(vit, masks)
    after = size(vit)
    tokens = 4 + (kind == "class token")
    rows = 2 * SIZE  # of two heads
    per_head = 3 * rows * (WIDTH + 1) + WIDTH * rows
    per_unit = 2 * WIDTH + 1
    assert before["parameters"] - after["parameters"] == per_head + 30 * per_unit
    products = 2 * tokens * (3 * WIDTH * rows + 2 * tokens * rows + WIDTH * rows)  # qkv, the two of attention, proj
    assert before["flops"] - after["flops"] == products + 2 * tokens * 2 * WIDTH * 30


def test_a_block_that_leaves_takes_its_parameters_and_flops_along() -> None:
    vit = vit_of()
    before, one = size(vit), sum(p.numel() for p in vit.blocks[1].parameters())
    masks = Masks(vit, range(2))
    masks.values["1.blocks"].data.zero_()
    prune.remove(vit, masks)
    after = size(vit)
    assert len(vit.blocks) == 4 and before["parameters"] - after["parameters"] == one
    tokens = 4
    block = 2 * tokens * (4 * WIDTH * WIDTH + 2 * tokens * WIDTH + 2 * WIDTH * HIDDEN)
    assert before["flops"] - after["flops"] == block


def size(vit: Any) -> dict[str, int]:
    ghost = counting_copy(vit)
    with torch.no_grad():
        flops = count(lambda: ghost(torch.empty(1, 3, 8, 8, device="meta", dtype=torch.float64)))[1]
    return {"parameters": sum(p.numel() for p in vit.parameters()), "flops": flops}


def test_fractions_keep_the_best_and_one_of_each_block() -> None:
    vit = vit_of("class token")
    masks = Masks(vit, range(3))
    with torch.no_grad():
        vit.blocks[0].attn.proj.weight.mul_(100)  # block 0 has the best heads, block 2 the best units
        vit.blocks[2].ls2.gamma.mul_(100)
    prune.settle(vit, masks, {"heads": 0.5, "mlp": 0.25, "blocks": 1.0}, 0)
    assert masks.left() == {"heads": 6, "mlp": 30, "blocks": 3}
    heads, hidden = ([int((masks.of(n)[k] != 0).sum()) for n in range(3)] for k in (0, 1))
    assert heads[0] == 4 and sorted(heads[1:]) == [1, 1]
    assert hidden == [1, 1, 28]
    norms = vit.blocks[1].attn.proj.weight.mul(vit.blocks[1].ls1.gamma[:, None]).unflatten(1, (HEADS, SIZE))
    assert int(masks.of(1)[0].argmax()) == int(norms.square().sum((0, 2)).argmax())
    prune.settle(vit, masks, {"heads": 1.0, "mlp": 1.0, "blocks": 0.3}, 0)
    assert masks.left()["blocks"] == 1


def test_a_block_without_heads_and_units_leaves_whole_and_one_without_heads_keeps_one_that_adds_nothing() -> None:
    vit, x = vit_of(), images()
    masks = Masks(vit, range(2))
    for name in ("0.heads", "0.mlp", "1.heads"):
        masks.values[name].data.zero_()
    prune.settle(vit, masks, KEEP, 0)
    before = vit(x)
    shape = prune.remove(vit, masks)
    assert shape.blocks == (1, 2, 3, 4) and shape.heads[0] == 1 and vit.blocks[0].attn.proj.weight.eq(0).all()
    torch.testing.assert_close(vit(x), before, atol=1e-10, rtol=1e-10)


def test_a_model_is_never_left_without_blocks() -> None:
    vit = vit_of()
    masks = Masks(vit, range(5))
    for number in range(5):
        masks.values[f"{number}.blocks"].data.zero_()
    with pytest.raises(FedsplitError, match="every block"):
        prune.remove(vit, masks)


@pytest.mark.parametrize(
    "options",
    [{"block_fn": ParallelScalingBlock}, {"mlp_layer": GluMlp}, {"scale_attn_norm": True}, {"scale_mlp_norm": True}],
    ids=["block", "mlp", "norm over heads", "norm over units"],
)
def test_what_cannot_be_pruned_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(FedsplitError, match="Block 1 cannot be pruned"):
        Masks(vit_of(**options), range(1, 3))


def pruned_file(folder: Path, kind: str = "fedsplit_nano", **more: Any) -> tuple[Path, nn.Module]:
    vit = create(Model(name=kind, pretrained=False, **more), 10, 0).vit
    masks = Masks(vit, range(2))
    masks.values["0.blocks"].data.zero_()
    masks.values["1.heads"].data[1] = 0
    masks.values["1.mlp"].data[5:] = 0
    shape = prune.remove(vit, masks)
    path = folder / "model.safetensors"
    path.write_bytes(pack(vit.state_dict(), shape.metadata()))
    return path, vit


@pytest.mark.parametrize("kind", ["fedsplit_nano", "vit_tiny_patch16_224"])
def test_a_checkpoint_builds_the_model_that_it_was_saved_from(tmp_path: Path, kind: str) -> None:
    more = {} if kind.startswith("fedsplit") else {"image_size": 32, "drop_path": 0.2}
    path, vit = pruned_file(tmp_path, kind, **more)
    settings = Model(name=kind, checkpoint=str(path), **more)
    built, x = create(settings, 10, 1), torch.randn(2, 3, 32, 32)
    assert torch.equal(built.vit.eval()(x), vit.eval()(x))
    assert built.metadata == prune.shape_of(vit).metadata()
    drops = [[getattr(block.drop_path1, "drop_prob", 0.0) for block in v.blocks] for v in (vit, built.vit)]
    assert drops[0] == drops[1]
    hollow = create(settings, 10, 1, hollow=True)
    state = vit.state_dict()
    assert {n: p.shape for n, p in hollow.vit.state_dict().items()} == {n: p.shape for n, p in state.items()}
    assert all(p.is_meta for p in hollow.vit.parameters())


def test_a_pruned_model_can_be_pruned_again(tmp_path: Path) -> None:
    path, _ = pruned_file(tmp_path, "fedsplit_micro")
    again = create(Model(checkpoint=str(path)), 10, 0).vit
    masks = Masks(again, range(3))
    masks.values["1.blocks"].data.zero_()
    masks.values["0.heads"].data[0] = 0
    shape = prune.remove(again, masks)
    assert shape == prune.Shape((1, 3, 4, 5, 6, 7), (4, 6, 6, 6, 6, 6), (5, 384, 384, 384, 384, 384))
    path.write_bytes(pack(again.state_dict(), shape.metadata()))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(create(Model(checkpoint=str(path)), 10, 0).vit.eval()(x), again.eval()(x))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"blocks": [0], "heads": [9], "mlp": [1]}', "another block 0"),
        ('{"blocks": [0, 7], "heads": [1, 1], "mlp": [1, 1]}', "other blocks than this model's 3"),
        ('{"blocks": [1, 0], "heads": [1, 1], "mlp": [1, 1]}', "other blocks"),
        ('{"blocks": [], "heads": [], "mlp": []}', "that is none"),
        ('{"blocks": [0], "heads": [1]}', "that is none"),
        ("[1]", "that is none"),
        ("{", "that is none"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path, _ = pruned_file(tmp_path)
    path.write_bytes(pack(safetensors.torch.load_file(path), {prune.METADATA: text}))
    with pytest.raises(FedsplitError, match=says):
        create(Model(name="fedsplit_nano", checkpoint=str(path)), 10, 0)


def test_without_its_shape_a_pruned_model_does_not_fit(tmp_path: Path) -> None:
    path, vit = pruned_file(tmp_path)
    path.write_bytes(pack(vit.state_dict()))
    assert prune.read_shape(path) is None and json.loads(prune.shape_of(vit).metadata()["fedsplit"])["heads"] == [2, 3]
    with pytest.raises(FedsplitError, match="does not fit the model"):
        create(Model(name="fedsplit_nano", checkpoint=str(path)), 10, 0)


def test_split_equals_unsplit_and_a_head_left_out_equals_the_masked_one() -> None:
    vit, x = vit_of("class token"), images()
    prune.remove(vit, masked(vit))
    for front in range(5):
        parts = split(vit, Cut(front, 0, 4))
        parts.train(False)
        torch.testing.assert_close(parts(x), vit(x), atol=1e-12, rtol=1e-12)
    block = vit.blocks[0]
    assert [units(block) for block in vit.blocks] == [3, 3, 4, 4]
    tokens = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    out = execute(block, tokens, (Op.FULL, Op.SKIP, Op.FORWARD))
    twin = copy.deepcopy(block)
    with torch.no_grad():
        twin.attn.proj.weight[:, SIZE : 2 * SIZE] = 0
        twin.mlp.fc2.weight[:, 9:18] = 0  # 27 units over 3 heads
    torch.testing.assert_close(out, twin(tokens), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("front", [0, 1])
def test_a_pruned_model_trains_split_as_unsplit(tmp_path: Path, front: int) -> None:
    path, vit = pruned_file(tmp_path, image_size=16)
    config = small(
        model__name="fedsplit_nano",
        model__image_size=16,
        model__checkpoint=str(path),
        model__dropout=0.1,
        cut__front=front,
        local__max_steps=3,
    )
    reference = unsplit(config, lambda parameters: torch.optim.SGD(parameters, lr=0.03, momentum=0.9))
    trained = tensors_of(client_round(world(config), job_of(world(config))))
    assert len(trained) == len(vit.state_dict()) and trained["blocks.0.attn.qkv.weight"].shape == (2 * 3 * 16, 48)
    for name, value in reference.vit.named_parameters():
        assert torch.equal(trained[name], value), name
