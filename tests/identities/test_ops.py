"""The executor of plans equals the masked block, and saves what it leaves out."""

from __future__ import annotations

import copy
import random
from itertools import pairwise
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import GluMlp, SwiGLU, SwiGLUPacked
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fedsplit.body.lora import Lora
from fedsplit.body.ops import execute, idle, runs_of, units
from fedsplit.metrics.memory import Meter
from fedsplit.types import Cut, FedsplitError, Op

SKIP, FORWARD, FULL = (int(op) for op in Op)
BLOCKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"init_values": 0.3},
    "normed heads": {"qk_norm": True},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "uneven": {"mlp_ratio": 1.6},  # 38 hidden units over 4 heads: 10, 10, 9, 9
    "residual after the norm": {"block_fn": ResPostBlock, "init_values": 0.3},
    "gated, gate last": {"mlp_layer": GluMlp, "mlp_ratio": 3.5},  # twice 42 over 4
    "gated, gate first": {"mlp_layer": SwiGLUPacked},
    "gated, in two layers": {"mlp_layer": SwiGLU, "mlp_ratio": 1.6},
    "unfused": {"fused": False},
    "unfused, normed heads": {"fused": False, "qk_norm": True},
    "lora": {"lora": "attn.qkv,attn.proj,mlp.fc1,mlp.fc2"},
    "lora, some layers": {"lora": "attn.qkv,mlp.fc2", "mlp_ratio": 1.6},
    "lora, others": {"lora": "attn.proj,mlp.fc1", "block_fn": ResPostBlock},
    "lora, gated": {"lora": "mlp.fc1,mlp.fc2", "mlp_layer": SwiGLUPacked},
    "lora, beside trained weights": {"lora": "attn.qkv,attn.proj,mlp.fc1,mlp.fc2", "thaw": True},
}
LORA = [name for name in BLOCKS if name.startswith("lora")]


def block_of(
    name: str = "plain", dtype: torch.dtype = torch.float64, heads: int = 4, width: int = 24, **more: Any
) -> nn.Module:
    """A block with every parameter drawn at random, so that no zero hides a fault."""
    torch.manual_seed(7)
    options = {**BLOCKS[name], **more}
    lora, fused, thaw = options.pop("lora", ""), options.pop("fused", True), options.pop("thaw", False)
    vit = VisionTransformer(
        img_size=8, patch_size=4, embed_dim=width, depth=1, num_heads=heads, num_classes=2, **options
    )
    if lora:
        vit.requires_grad_(thaw)
        Lora(rank=3, targets=lora, dropout=options.get("proj_drop_rate", 0.0)).edit(vit, Cut(0, 0, 1), 0)
    block = vit.blocks[0]
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for module in block.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    return block.to(dtype).train()


def tokens(dtype: torch.dtype = torch.float64, width: int = 24, batch: int = 3) -> Tensor:
    return torch.randn(batch, 5, width, dtype=dtype, generator=torch.Generator().manual_seed(3)).requires_grad_()


def rows_of(heads: int, count: int = 6) -> list[tuple[int, ...]]:
    """Seeded mixed rows, at least one unit of them FULL."""
    draw = random.Random(11)
    rows: list[tuple[int, ...]] = [(FULL,) + (SKIP,) * (heads - 1), (FORWARD,) * (heads - 1) + (FULL,)]
    while len(rows) < count:
        row = tuple(draw.choice((SKIP, FORWARD, FULL)) for _ in range(heads))
        if FULL in row and len(set(row)) > 1:
            rows.append(row)
    return rows


class Masked:
    """The block by hand, every unit computed alone, in full: an output times 0 or 1, detached where FORWARD.

    What is FORWARD must not train: it reads detached weights and a detached input.
    """

    def __init__(self, block: Any, row: tuple[int, ...]) -> None:
        self.block, self.row, self.heads = block, row, len(row)

    def __call__(self, x: Tensor) -> Tensor:
        block: Any = self.block
        ls1, ls2 = getattr(block, "ls1", nn.Identity()), getattr(block, "ls2", nn.Identity())
        if isinstance(block, ResPostBlock):
            x = x + block.norm1(self.sum(self.head, x, block.attn.proj))
            return x + block.norm2(self.sum(self.hidden, x, block.mlp.fc2))
        x = x + ls1(self.sum(self.head, block.norm1(x), block.attn.proj))
        return x + ls2(self.sum(self.hidden, block.norm2(x), block.mlp.fc2))

    def sum(self, unit: Any, x: Tensor, last: Any) -> Tensor:
        bias = getattr(last, "base_layer", last).bias
        total = torch.zeros_like(x) if bias is None else bias.expand_as(x)
        for number, op in enumerate(self.row):
            out = unit(x, number)
            total = total + (out if op == FULL else out.detach()) * (0.0 if op == SKIP else 1.0)
        return total

    @staticmethod
    def weight(layer: Any) -> Tensor:
        if not hasattr(layer, "base_layer"):
            return layer.weight
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        return layer.base_layer.weight + layer.scaling["default"] * b @ a

    def head(self, x: Tensor, number: int) -> Tensor:
        attn: Any = self.block.attn
        qkv = F.linear(x, self.weight(attn.qkv), getattr(attn.qkv, "base_layer", attn.qkv).bias)
        q, k, v = (part.chunk(self.heads, -1)[number] for part in qkv.chunk(3, -1))
        scores = attn.q_norm(q) @ attn.k_norm(k).transpose(1, 2) / q.shape[-1] ** 0.5
        return F.linear(scores.softmax(-1) @ v, self.weight(attn.proj).chunk(self.heads, 1)[number])

    def hidden(self, x: Tensor, number: int) -> Tensor:
        mlp: Any = self.block.mlp

        def first(layer: Any) -> Tensor:
            return F.linear(x, self.weight(layer), getattr(layer, "base_layer", layer).bias)

        if isinstance(mlp, SwiGLU):
            h = mlp.act(first(mlp.fc1_g)) * first(mlp.fc1_x)
        elif isinstance(mlp, GluMlp):
            one, two = first(mlp.fc1).chunk(2, -1)
            h = one * mlp.act(two) if mlp.gate_last else mlp.act(one) * two
        else:
            h = mlp.act(first(mlp.fc1))
        mine, weight = (t.tensor_split(self.heads, -1)[number] for t in (h, self.weight(mlp.fc2)))
        return F.linear(mine, weight)


def gradients(run: Any, block: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and all gradients of a fixed weighting of it; None as zero."""
    block.zero_grad()
    x = x.detach().requires_grad_()
    y = run(x)
    (y * torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape).cos()).sum().backward()
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in block.named_parameters()}
    return y.detach(), {"input": torch.zeros_like(x) if x.grad is None else x.grad} | found


def assert_masked(block: nn.Module, x: Tensor, row: tuple[int, ...], tolerance: float) -> None:
    """Output and gradients within `tolerance` of the largest entry, at least 1."""
    y, found = gradients(lambda x: execute(block, x, row), block, x)
    expected, wanted = gradients(Masked(block, row), block, x)
    assert (y - expected).abs().max() <= tolerance * max(1, expected.abs().max())
    for name, gradient in found.items():
        assert (gradient - wanted[name]).abs().max() <= tolerance * max(1, wanted[name].abs().max()), name


@pytest.mark.parametrize("name", BLOCKS)
def test_mixed_rows_equal_the_masked_block(name: str) -> None:
    block, x = block_of(name), tokens()
    assert units(block) == 4
    for row in rows_of(4):
        assert_masked(block, x, row, 1e-10)


@pytest.mark.parametrize("name", ["plain", "uneven", "lora", "residual after the norm", "gated, gate first"])
def test_single_precision_is_as_close_as_it_can_be(name: str) -> None:
    block, x = block_of(name, torch.float32), tokens(torch.float32)
    for row in rows_of(4, 4):
        assert_masked(block, x, row, 1e-5)


@pytest.mark.parametrize("name", BLOCKS)
def test_idle_names_what_gets_no_gradient(name: str) -> None:
    block, x = block_of(name), tokens()
    for row in rows_of(4, 4):
        _, found = gradients(lambda x, row=row: execute(block, x, row), block, x)
        off = idle(block, row)
        assert all(found[key].index_select(dim, index).count_nonzero() == 0 for key, (dim, index) in off.items())
        for key, parameter in block.named_parameters():  # and everything else does, where it trains
            used = torch.ones_like(parameter, dtype=torch.bool)
            if key in off:
                used.index_fill_(off[key][0], off[key][1], False)
            if parameter.requires_grad and not key.endswith("k_norm.bias"):  # softmax does not see a key's shift
                assert found[key][used].count_nonzero() >= 0.6 * used.sum(), key
            elif not parameter.requires_grad:
                assert parameter.grad is None
    layers = {key.split(".lora_")[0].split(".base_layer")[0].rsplit(".weight")[0].rsplit(".bias")[0] for key in off}
    assert layers >= {"attn.qkv", "attn.proj", "mlp.fc2"}


def test_idle_is_empty_where_units_do_the_same() -> None:
    block = block_of()
    for row in ((FULL,) * 4, (SKIP,) * 4, (FORWARD,) * 4, (SKIP, FORWARD, SKIP, SKIP), (FULL,), (SKIP,)):
        assert idle(block, row) == {}


@pytest.mark.parametrize("name", ["plain", "residual after the norm", "lora"])
def test_rows_of_one_op_are_exact(name: str) -> None:
    block, x = block_of(name, torch.float32), tokens(torch.float32)
    plain, wanted = gradients(block.forward, block, x)
    for row in (None, (FULL,), (FULL,) * 4):
        y, found = gradients(lambda x, row=row: execute(block, x, row), block, x)
        assert torch.equal(y, plain) and all(torch.equal(found[key], wanted[key]) for key in wanted)
    for row in ((FORWARD,), (FORWARD,) * 4):
        block.zero_grad()
        y = execute(block, x, row)
        assert torch.equal(y, x + (block.forward(x) - x).detach())
        (upstream,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(upstream, torch.ones_like(x))
        assert all(parameter.grad is None for parameter in block.parameters())
    for row in ((SKIP,), (SKIP,) * 4):
        assert execute(block, x, row) is x


def test_without_a_full_unit_only_the_residual_passes_the_gradient() -> None:
    block, x, row = block_of(), tokens(), (FORWARD, SKIP, FORWARD, SKIP)
    meter = Meter()
    with meter:
        y = execute(block, x, row)
    torch.testing.assert_close(y, Masked(block, (FULL, SKIP, FULL, SKIP))(x), atol=1e-10, rtol=0)
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.ones_like(x))
    assert meter.saved_bytes == 0 and all(parameter.grad is None for parameter in block.parameters())


@pytest.mark.parametrize("row", [None, (FORWARD,), (SKIP,), (FULL, SKIP, FORWARD, FULL), (SKIP, SKIP, FORWARD, SKIP)])
def test_scale_multiplies_what_the_block_adds(row: tuple[int, ...] | None) -> None:
    block, x = block_of(), tokens()
    y, z = execute(block, x, row), execute(block, x, row, 0.25)
    torch.testing.assert_close(z - x, 0.25 * (y - x), atol=1e-12, rtol=0)
    one, other = (torch.autograd.grad(out.sum(), x)[0] for out in (y, z))
    torch.testing.assert_close(other - 1, 0.25 * (one - 1), atol=1e-12, rtol=0)


def test_without_autograd_a_row_gives_the_same_output() -> None:
    block, x, row = block_of(), tokens(), (FULL, SKIP, FORWARD, FULL)
    with torch.no_grad():
        y = execute(block, x, row)
    assert torch.equal(y, execute(block, x, row)) and not y.requires_grad


@pytest.mark.parametrize("row", [(), (FULL, SKIP), (FULL,) * 5])
def test_a_row_that_fits_no_unit_is_refused(row: tuple[int, ...]) -> None:
    with pytest.raises(FedsplitError, match="4 units"):
        execute(block_of(), tokens(), row)


def ghost(name: str, **options: Any) -> Any:
    with torch.device("meta"):
        return timm.create_model(name, depth=1, num_classes=0, **options)


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "vit_base_patch16_clip_quickgelu_224",
        "vit_base_patch16_rpn_224",
        "vit_base_patch32_siglip_256",
        "vit_giant_patch14_dinov2",
        "vit_small_patch14_reg4_dinov2",
        "deit3_small_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "vit_little_patch16_reg4_gap_256",
    ],
)
def test_a_timm_model_is_sliced(name: str) -> None:
    torch.manual_seed(0)
    vit: Any = timm.create_model(name, depth=1, img_size=32, embed_dim=36, num_heads=3, num_classes=0)
    block = vit.blocks[0].double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    assert units(block) == 3
    for row in rows_of(3, 4):
        assert_masked(block, tokens(width=36), row, 1e-10)


@pytest.mark.parametrize("cls", [ParallelScalingBlock, ParallelThingsBlock, DiffParallelScalingBlock])
def test_another_block_is_one_unit(cls: type[nn.Module]) -> None:
    block, x = cls(24, 4).double(), tokens()  # type: ignore[call-arg]
    assert units(block) == 1
    assert torch.equal(execute(block, x, (FULL,)), block.forward(x)) and execute(block, x, (SKIP,)) is x
    with pytest.raises(FedsplitError, match="1 units"):
        execute(block, x, (FULL, SKIP, SKIP, FULL))


@pytest.mark.parametrize("option", ["scale_attn_norm", "scale_mlp_norm", "diff", "gated", "hidden", "dora", "merged"])
def test_what_units_would_share_is_one_unit(option: str) -> None:
    block: Any = Block(24, 4)
    if option in ("scale_attn_norm", "scale_mlp_norm"):
        block = Block(24, 4, **{option: True})  # type: ignore[arg-type]
    elif option == "diff":
        block = Block(24, 4, attn_layer="diff")
    elif option == "gated":
        block.attn.gate = nn.Linear(24, 24)
    elif option == "hidden":
        block = Block(24, 4, mlp_ratio=0.1)
    else:
        block = block_of("lora")
        if option == "dora":
            block.attn.qkv.lora_variant["default"] = object()
        else:
            block.attn.qkv.merge()
    assert units(block) == 1


def test_every_vit_of_timm_is_sliced_or_one_unit() -> None:
    seen = set()
    for name in timm.list_models(["vit_tiny*", "vit_d*", "vit_*xp*", "vit_*rpn*", "vit_small*18x2*", "deit_tiny*"]):
        vit = ghost(name)
        block = vit.blocks[0]
        sliced = type(block) in (Block, ResPostBlock) and type(block.attn).__name__ == "Attention"
        if type(block).__module__ == "timm.models.vision_transformer":
            assert units(block) == (block.attn.num_heads if sliced else 1), name
            seen.add((type(block).__name__, units(block) > 1))
        else:
            assert units(block) == 1, name
    assert len(seen) >= 5


def test_a_head_size_of_its_own() -> None:
    block: Any = Block(24, 4)
    block.attn = type(block.attn)(24, num_heads=4, attn_head_dim=5, qkv_bias=True)
    block = block.double()
    for row in rows_of(4, 4):
        assert_masked(block, tokens(), row, 1e-10)


@pytest.mark.parametrize("count", [1, 3, 6, 7])
@pytest.mark.parametrize("size", [42, 44, 60])
@pytest.mark.parametrize("groups", [1, 2])
def test_units_share_a_dimension_as_tensor_split_deals_it(count: int, size: int, groups: int) -> None:
    parts = [group.tensor_split(count) for group in torch.arange(size).chunk(groups)]
    for which in ((0,), tuple(range(count)), tuple(range(0, count, 2))):
        runs = runs_of(which, count, size, groups)
        found = [place for start, length in runs for place in range(start, start + length)]
        assert found == [int(place) for part in parts for unit in which for place in part[unit]]
        assert all(a + n < b for (a, n), (b, _) in pairwise(runs))  # neighbours are one run


def flops_of(block: nn.Module, row: tuple[int, ...]) -> tuple[int, int]:
    """Forward and backward FLOPs, on tensors without data."""
    block = copy.deepcopy(block).to("meta")
    x = torch.empty(2, 16, 48, device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        y = execute(block, x, row)
    if not y.grad_fn:
        return forward.get_total_flops(), 0
    with FlopCounterMode(display=False) as backward:
        y.backward(torch.empty_like(y))
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("full", [1, 2, 3, 5])
def test_flops_are_those_of_the_units_that_run(full: int) -> None:
    block = block_of("unfused", torch.float32, heads=6, width=48)
    forward, backward = flops_of(block, (FULL,) * 6)
    sixth, back = forward // 6, backward // 6
    assert (sixth * 6, back * 6) == (forward, backward) and backward == 2 * forward
    assert flops_of(block, (FULL,) * full + (SKIP,) * (6 - full)) == (full * sixth, full * back)
    assert flops_of(block, (FULL,) * full + (FORWARD,) * (6 - full)) == (forward, full * back)
    assert flops_of(block, (FORWARD,) * full + (SKIP,) * (6 - full)) == (full * sixth, 0)


def test_adapters_leave_the_frozen_weights_out_of_the_backward_pass() -> None:
    options = {"heads": 6, "width": 48}
    plain = flops_of(block_of("unfused", torch.float32, **options), (FULL, SKIP) * 3)
    lora = flops_of(block_of("lora", torch.float32, fused=False, **options), (FULL, SKIP) * 3)
    assert plain[1] == 2 * plain[0] and lora[1] < 1.4 * lora[0]


@pytest.mark.parametrize("name", ["plain", "lora"])
def test_memory_is_that_of_the_units_that_train(name: str) -> None:
    block, x = block_of(name, heads=6, width=48), tokens(width=48)

    def saved(row: tuple[int, ...]) -> int:
        meter = Meter()
        meter.ignore(block.parameters())
        with meter:
            execute(block, x, row)
        return meter.saved_bytes

    # Of 16 tensors of the block's width 12 belong to units: qkv 3, attention 1, before and after GELU 4 + 4.
    whole = saved((FULL,) * 6)
    assert saved((FULL, SKIP) * 3) == pytest.approx((4 + 12 / 2) / 16 * whole, rel=0.04)
    assert saved((FULL, FORWARD) * 3) == saved((FULL, SKIP) * 3)
    assert saved((SKIP,) * 5 + (FULL,)) == pytest.approx((4 + 12 / 6) / 16 * whole, rel=0.08)
    assert saved((FORWARD,) * 6) == saved((SKIP, FORWARD) * 3) == 0


@pytest.mark.parametrize("name", ["plain", "unfused", "lora"])
def test_dropout_is_drawn_from_torchs_stream_and_only_in_training(name: str) -> None:
    block = block_of(name, attn_drop_rate=0.2, proj_drop_rate=0.3, drop_path_rate=0.4)
    block.drop_path1.drop_prob = block.drop_path2.drop_prob = 0.4  # type: ignore[union-attr]
    x, row = tokens(batch=8), (FULL, SKIP, FORWARD, FULL)
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(execute(block, x, row))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    block.eval()
    assert_masked(block, x, row, 1e-10)


def test_dropout_keeps_the_mean() -> None:
    block: Any = block_of("plain", attn_drop_rate=0.1, proj_drop_rate=0.1)
    x, row = tokens().detach()[:1], (FULL, SKIP, FORWARD, FULL)
    nn.init.zeros_(block.mlp.fc2.weight)  # attention and the bias are linear in what is dropped
    torch.manual_seed(0)
    mean = execute(block, x.expand(4000, -1, -1), row).mean(0)
    block.eval()
    torch.testing.assert_close(mean, execute(block, x, row)[0], atol=0.05, rtol=0)


def test_bfloat16_and_autocast_are_near() -> None:
    block, x, row = block_of("lora", torch.float32), tokens(torch.float32), (FULL, SKIP, FORWARD, FULL)
    y, found = gradients(lambda x: execute(block, x, row), block, x)

    def cast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return execute(block, x, row)

    half = copy.deepcopy(block).bfloat16()
    for run, of in ((cast, block), (lambda x: execute(half, x.bfloat16(), row).float(), half)):
        near, rough = gradients(run, of, x)
        assert near.dtype == torch.float32 and F.cosine_similarity(near.flatten(), y.flatten(), 0) > 0.999
        for key, gradient in rough.items():
            assert (
                F.cosine_similarity(gradient.flatten().float(), found[key].flatten(), 0) > 0.98 or not found[key].any()
            )


def test_a_second_derivative_is_right() -> None:
    block, row = block_of("unfused", heads=3, width=12), (FULL, SKIP, FULL)
    x = tokens(batch=1, width=12)
    assert torch.autograd.gradgradcheck(lambda x: execute(block, x, row), (x,), fast_mode=True)


def test_frozen_weights_and_input_leave_only_adapters_to_train() -> None:
    block, x = block_of("lora"), tokens()
    y, found = gradients(lambda x: execute(block, x, (FULL, SKIP, FORWARD, FULL)), block, x)
    block.zero_grad()
    execute(block, x.detach(), (FULL, SKIP, FORWARD, FULL)).mul(
        torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape).cos()
    ).sum().backward()
    for name, parameter in block.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, found[name], atol=1e-12, rtol=0)


@pytest.mark.parametrize("row", [None, (FORWARD,), (SKIP,), (FULL, SKIP, FORWARD, FULL)])
def test_hooks_of_the_block_do_not_run(row: tuple[int, ...] | None) -> None:
    block, calls = block_of(), []
    block.register_forward_hook(lambda *_: calls.append("after"))
    block.register_forward_pre_hook(lambda *_: calls.append("before"))
    execute(block, tokens(), row)
    assert not calls


@pytest.mark.parametrize("count", [1, 2, 3])
def test_two_blocks_of_one_model_do_not_share_what_is_cached(count: int) -> None:
    """Blocks of other widths, in turn, and on tensors without data."""
    row = (FULL,) * count + (SKIP,) * (3 - count) + (FULL,)
    for width in (24, 48, 24):
        block = block_of(width=width)
        if count < 3:
            assert_masked(block, tokens(width=width), row, 1e-10)
        ghosts = copy.deepcopy(block).to("meta")
        assert execute(ghosts, tokens(width=width).to("meta"), row).shape == (3, 5, width)


@pytest.mark.parametrize("row", [(FULL, SKIP, FORWARD, FULL), (SKIP, FORWARD, SKIP, FORWARD)])
@pytest.mark.parametrize("name", ["plain", "unfused", "lora"])
def test_every_dropout_has_its_place(name: str, row: tuple[int, ...]) -> None:
    block: Any = block_of(name)
    x = tokens()

    def out(**rates: float) -> Tensor:
        """With dropout rates of 0 or 1, which need no draw."""
        dropouts = {"attn": block.attn.attn_drop, "proj": block.attn.proj_drop}
        dropouts |= {"hidden": block.mlp.drop1, "last": block.mlp.drop2}
        for place, dropout in dropouts.items():
            dropout.p = rates.get(place, 0.0)
        for module in block.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = nn.Dropout(rates.get("adapter", 0.0))
        return execute(block, x, row)

    def bias(layer: Any) -> Tensor:
        return getattr(layer, "base_layer", layer).bias

    plain = out()
    assert torch.equal(out(proj=1.0, last=1.0), x)
    torch.testing.assert_close(out(attn=1.0, last=1.0), x + bias(block.attn.proj))
    if name != "lora":
        torch.testing.assert_close(out(hidden=1.0, proj=1.0), x + bias(block.mlp.fc2))
    assert torch.equal(out(adapter=1.0), plain) == (name != "lora")
