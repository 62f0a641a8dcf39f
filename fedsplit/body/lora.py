"""Low-rank adapters on the backbone, by peft."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fedsplit.types import Cut, FedsplitError, knob, split_names


@dataclass(frozen=True)
class Lora:
    """LoRA adapters beside chosen linear layers; train them with `train = "lora,..."`.

    Paper: arXiv 2106.09685, eq. 3; in federated form FedPEFT, arXiv 2210.01708.
    Place: body.edits.
    Off: not named; with B = 0, as it starts, the model computes what it did before.
    Deviates: adapters may also sit on client blocks (`blocks = "all"`), as FedPEFT has them.
    """

    rank: int = knob(8, "rank of the adapters", low=1)
    alpha: float = knob(16.0, "scale: the update is alpha / rank * B A", low=0.0)
    dropout: float = knob(0.0, "dropout before A", low=0.0, high=0.99)
    targets: str = knob("attn.qkv,attn.proj,mlp.fc1,mlp.fc2", "linear layers of a block that get an adapter")
    blocks: str = knob("all", "blocks with adapters: of the whole model or of the body", choices=("all", "body"))

    def edit(self, vit: nn.Module, cut: Cut, key: int) -> nn.Module:
        """`vit` with adapters in place; A is drawn from stream `key`.

        Raises:
            FedsplitError: a target that no block has, or peft is missing.
        """
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise FedsplitError("body.edits=lora needs peft: pip install 'fedsplit[lora]'.") from None
        numbers = range(cut.depth) if self.blocks == "all" else cut.body
        names = [f"blocks.{number}.{target}" for number in numbers for target in split_names(self.targets)]
        linear = {name for name, module in vit.named_modules() if isinstance(module, nn.Linear)}
        for name in names:
            if name not in linear:
                raise FedsplitError(f"body.lora.targets: the model has no linear layer '{name}'.")
        torch.manual_seed(key)
        settings = LoraConfig(r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=names)  # type: ignore[arg-type]
        inject_adapter_in_model(settings, vit)
        return vit
