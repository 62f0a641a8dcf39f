"""Scores of units equal sums by hand over the weights that belong to them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from timm.layers import GluMlp, SwiGLU
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn

from fedsplit.body.lora import Lora
from fedsplit.body.scores import contributions
from fedsplit.types import Cut

Array = npt.NDArray[np.float64]


def block_of(lora: bool = False, **options: Any) -> Any:
    """A block of 4 heads with random weights and the gradients of one step; with LoRA only adapters train."""
    torch.manual_seed(5)
    vit: Any = VisionTransformer(img_size=8, patch_size=4, embed_dim=24, depth=1, num_heads=4, num_classes=2, **options)
    if lora:
        Lora(rank=3).edit(vit, Cut(0, 0, 1), 0)
    block = vit.blocks[0]
    for name, parameter in block.named_parameters():
        nn.init.normal_(parameter, std=0.3)
        parameter.requires_grad_("lora_" in name or not lora)
    block(torch.randn(3, 5, 24)).square().sum().backward()
    return block


def by_metric(w: Array, g: Array) -> dict[str, float]:
    return {
        "magnitude": float(np.abs(w).sum()),
        "gradient": float(np.abs(g).sum()),
        "fisher": float((g * g).sum()),
        "taylor": float(np.abs(g * w).sum()),
    }


def arrays(parameter: nn.Parameter) -> tuple[Array, Array]:
    grad: Tensor = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return parameter.detach().double().numpy(), grad.double().numpy()


def of_unit(block: nn.Module, unit: int, groups: dict[str, int]) -> dict[str, float]:
    """By hand: cut every layer's arrays into groups, each group into 4 parts, and take one of each."""
    total = dict.fromkeys(("magnitude", "gradient", "fisher", "taylor"), 0.0)
    for name, parameter in block.named_parameters():
        layer = next((layer for layer in groups if name.startswith(layer)), None)
        first = layer is not None and layer.split(".")[1] not in ("proj", "fc2")
        if layer is None or ("lora_A" in name and first) or ("lora_B" in name and not first):
            continue
        if not first and name.endswith("bias"):
            continue
        pairs = zip(
            *(np.split(array, groups[layer], axis=0 if first else 1) for array in arrays(parameter)), strict=True
        )
        for w, g in pairs:
            mine = (np.array_split(array, 4, axis=0 if first else 1)[unit] for array in (w, g))
            for metric, value in by_metric(*mine).items():
                total[metric] += value
    return total


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({}, {"mlp.fc1": 1}),
        ({"mlp_ratio": 1.6}, {"mlp.fc1": 1}),
        ({"qkv_bias": False}, {"mlp.fc1": 1}),
        ({"lora": True}, {"mlp.fc1": 1}),
        ({"mlp_layer": GluMlp, "mlp_ratio": 3.5}, {"mlp.fc1": 2}),
        ({"mlp_layer": SwiGLU}, {"mlp.fc1_g": 1, "mlp.fc1_x": 1}),
    ],
)
def test_scores_equal_sums_by_hand(options: dict[str, Any], first: dict[str, int]) -> None:
    block = block_of(**options)
    scores = contributions(block)
    groups = {"attn.qkv": 3, "attn.proj": 1, "mlp.fc2": 1} | first
    for metric, score in scores.items():
        assert score.dtype == torch.float32 and score.shape == (4,)
        wanted = [of_unit(block, unit, groups)[metric] for unit in range(4)]
        np.testing.assert_allclose(score.numpy(), wanted, rtol=1e-6)
        assert len(set(score.tolist())) == 4 and score.min() > 0


@pytest.mark.parametrize("lora", [False, True])
def test_units_and_the_rest_are_the_whole_block(lora: bool) -> None:
    block = block_of(lora)
    scores = contributions(block)
    whole = dict.fromkeys(scores, 0.0)
    rest = dict.fromkeys(scores, 0.0)
    shared = ("norm", "proj.bias", "fc2.bias", "proj.base_layer.bias", "fc2.base_layer.bias")
    shared += ("qkv.lora_A", "fc1.lora_A", "proj.lora_B", "fc2.lora_B")
    for name, parameter in block.named_parameters():
        for metric, value in by_metric(*arrays(parameter)).items():
            whole[metric] += value
            rest[metric] += value if any(part in name for part in shared) else 0.0
    for metric, score in scores.items():
        assert 0 < rest[metric] < whole[metric]
        assert float(score.double().sum()) + rest[metric] == pytest.approx(whole[metric], rel=1e-6)


def test_without_gradients_only_the_magnitude_counts() -> None:
    block = block_of()
    before = contributions(block)
    block.zero_grad()
    after = contributions(block)
    assert torch.equal(after.pop("magnitude"), before["magnitude"])
    assert len(after) == 3 and not any(score.any() for score in after.values())


def test_a_frozen_weight_counts_by_magnitude_only() -> None:
    block = block_of()
    with_all = contributions(block)
    block.attn.qkv.requires_grad_(False)  # its gradient is left over
    without = contributions(block)
    assert torch.equal(without["magnitude"], with_all["magnitude"])
    assert all((without[metric] < with_all[metric]).all() for metric in ("gradient", "fisher", "taylor"))


def test_a_block_of_one_unit_is_scored_as_a_whole() -> None:
    torch.manual_seed(1)
    block: Any = ParallelScalingBlock(24, 4)
    block.prompt_before = nn.Linear(2, 2)
    block(torch.randn(2, 5, 24)).square().sum().backward()
    totals = dict.fromkeys(contributions(block), 0.0)
    for name, parameter in block.named_parameters():
        if not name.startswith("prompt"):
            for metric, value in by_metric(*arrays(parameter)).items():
                totals[metric] += value
    for metric, score in contributions(block).items():
        assert score.shape == (1,) and float(score) == pytest.approx(totals[metric], rel=1e-6)


def test_low_precision_gradients_are_summed_in_double() -> None:
    block = block_of().bfloat16()
    for parameter in block.parameters():
        parameter.grad = torch.full_like(parameter, 3e-3)
    scores = contributions(block)
    entries = (3 * 24 * 24 + 3 * 24 + 24 * 24 + 2 * 96 * 24 + 96) // 4
    g = float(torch.tensor(3e-3, dtype=torch.bfloat16).double())
    torch.testing.assert_close(scores["fisher"], torch.full((4,), entries * g * g), rtol=1e-6, atol=0)
