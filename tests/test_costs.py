"""FLOPs against formulas, memory against what must be kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedsplit.config import resolve
from fedsplit.experiment import start
from fedsplit.front import models
from fedsplit.front.trainable import resolve as train_set
from fedsplit.front.vit import split
from fedsplit.metrics.flops import step_flops
from fedsplit.metrics.memory import Meter, weight_bytes
from fedsplit.round import run_round
from fedsplit.runtime.inprocess import Loop
from fedsplit.settings import Model
from fedsplit.types import Cut
from fedsplit.world import world


def block_flops(n: int, c: int, ratio: int = 4) -> int:
    """Forward FLOPs of a ViT block by the textbook: qkv, two attention products, projection, MLP."""
    return 2 * n * c * 3 * c + 2 * (2 * n * n * c) + 2 * n * c * c + 2 * (2 * n * c * ratio * c)


@pytest.mark.parametrize(
    "settings, n, c, patch",
    [(Model(), 64, 96, 4), (Model(name="vit_tiny_patch16_224", pretrained=False, image_size=64), 17, 192, 16)],
)
def test_flops_follow_the_formulas(settings: Model, n: int, c: int, patch: int) -> None:
    backbone = models.create(settings, 10, 0)
    cut = Cut(2, 1, backbone.depth)
    patches = (backbone.image_size // patch) ** 2
    block, embed, head = block_flops(n, c), 2 * patches * 3 * patch**2 * c, 2 * c * 10
    train_set("all", backbone.vit, split(backbone.vit, cut))
    flops = step_flops(backbone.vit, cut, backbone.image_size)
    # Backward costs twice the forward; the embedding needs no gradient of the image.
    assert flops.front == 3 * 2 * block + 2 * embed
    assert flops.body == 3 * (backbone.depth - 3) * block
    assert flops.tail == 3 * (block + head)
    assert flops.total == flops.front + flops.body + flops.tail
    train_set("head", backbone.vit, split(backbone.vit, cut))
    frozen = step_flops(backbone.vit, cut, backbone.image_size)
    assert frozen.front == 2 * block + embed
    assert frozen.body == (backbone.depth - 3) * block
    assert frozen.tail == block + 2 * head
    train_set("tail", backbone.vit, split(backbone.vit, cut))
    tail = step_flops(backbone.vit, cut, backbone.image_size)
    assert tail.body == frozen.body and tail.tail == 3 * (block + head), "its first norm waits for the gradient of qkv"


def test_flops_leave_the_model_alone() -> None:
    backbone = models.create(Model(), 10, 0)
    before = {name: value.clone() for name, value in backbone.vit.state_dict().items()}
    step_flops(backbone.vit, Cut(2, 0, 8), 32)
    assert all(value.device.type == "cpu" for value in backbone.vit.state_dict().values())
    assert all(torch.equal(before[name], value) for name, value in backbone.vit.state_dict().items())


def test_the_meter_counts_what_autograd_keeps_once_and_no_weights() -> None:
    layer = nn.Linear(64, 128)
    meter = Meter()
    meter.ignore(layer.parameters())
    x = torch.randn(32, 64)
    with meter:
        y = layer(x).relu()
    # The layer keeps its input for the weight's gradient, relu keeps its output.
    assert meter.saved_bytes == x.nbytes + y.nbytes
    with meter:
        z = layer(x).relu()
    assert meter.saved_bytes == x.nbytes + y.nbytes + z.nbytes, "the same input is kept once"
    meter.close()
    with meter:
        layer(torch.randn(1000, 64)).relu()
    assert meter.saved_bytes == x.nbytes + y.nbytes + z.nbytes
    nothing = Meter()
    with nothing, torch.no_grad():
        layer(x)
    assert nothing.saved_bytes == 0


def test_a_round_measures_the_memory_of_one_step() -> None:
    peaks = {}
    for shape in ("u-shape", "vanilla"):
        for steps in (1, 3):
            values = {"cut.shape": shape, "data.limit": 60, "data.test-limit": 20, "data.partition": "iid"}
            config = resolve({**values, "devices.count": 1, "local.max-steps": steps})
            built = world(config)
            report = run_round(built, start(built), 0, Loop(config), lambda _: None).updates[0].report
            peaks[shape, steps] = (report.client_peak_bytes, report.server_peak_bytes)
    assert peaks["u-shape", 1] == peaks["u-shape", 3] and peaks["vanilla", 1] == peaks["vanilla", 3]
    assert peaks["u-shape", 1][0] > peaks["vanilla", 1][0], "the tail is at the client"
    assert peaks["u-shape", 1][1] < peaks["vanilla", 1][1]


def test_weights_count_twice_where_they_train() -> None:
    layer = nn.Linear(8, 8)
    layer.bias.requires_grad_(False)
    assert weight_bytes(layer.parameters()) == 4 * (64 * 2 + 8)


def test_deeper_bodies_keep_more() -> None:
    peaks = []
    for front in (1, 4):
        config = resolve(
            {"cut.front": front, "data.limit": 60, "data.partition": "iid", "devices.count": 1, "local.max-steps": 1}
        )
        built = world(config)
        report = run_round(built, start(built), 0, Loop(config), lambda _: None).updates[0].report
        peaks.append((report.client_peak_bytes, report.server_peak_bytes))
    assert peaks[0][0] < peaks[1][0] and peaks[0][1] > peaks[1][1]
