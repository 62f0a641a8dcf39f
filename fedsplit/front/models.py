"""Backbones: our own small ViTs, one of them shipped with weights, and every plain timm ViT, by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import timm
import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

from fedsplit import assets
from fedsplit.front import prune
from fedsplit.rng import key
from fedsplit.settings import Model
from fedsplit.types import FedsplitError, Tensors

_MICRO: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 96,
    "depth": 8,
    "num_heads": 6,
    "class_token": False,
    "global_pool": "avg",
}
# nano is for trying the recipe of `fedsplit pretrain`, tiny for a GPU.
SHAPES: dict[str, dict[str, Any]] = {
    "fedsplit_nano": _MICRO | {"embed_dim": 48, "depth": 3, "num_heads": 3},
    "fedsplit_micro": _MICRO,
    "fedsplit_tiny": _MICRO | {"embed_dim": 192, "depth": 12, "num_heads": 6},
}
SHIPPED = ("fedsplit_micro",)
SHIPPED_MEAN = SHIPPED_STD = (0.5, 0.5, 0.5)
CLASSIFIER = ("head.", "head_dist.")
PLAIN = ("timm.models.vision_transformer", "timm.models.vision_transformer_hybrid", "timm.models.deit")


@dataclass(frozen=True)
class Backbone:
    """A ViT and what its input must look like: `image_size` pixels square, channels scaled by `mean` and `std`."""

    vit: nn.Module
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return len(cast(nn.Sequential, self.vit.blocks))

    @property
    def metadata(self) -> dict[str, str] | None:
        """What a file of its weights must say so that they can be loaded: the shape of a pruned model, else nothing."""
        shape = prune.shape_of(self.vit)
        return None if shape is None else shape.metadata()


def create(settings: Model, classes: int, seed: int, hollow: bool = False) -> Backbone:
    """The backbone with a new classifier for `classes` classes, the same for the same seed.

    A checkpoint of a pruned model says its shape, which the backbone is given first. A `hollow` one is on the meta
    device: shapes without values, and without weights of a file or the hub.

    Raises:
        FedsplitError: an unknown or unsupported model, an image size it cannot take, or weights
            that are missing or do not fit.
    """
    torch.manual_seed(key(seed, "model"))
    if hollow:
        settings = replace(settings, pretrained=False)
    # Initial values of a tensor without values cost more than all else of it.
    more = {"weight_init": "skip"} if hollow else {}
    with torch.device("meta") if hollow else nullcontext():
        vit = (_own if settings.name in SHAPES else _from_timm)(settings, classes, more)
    if settings.checkpoint:
        path = Path(settings.checkpoint).expanduser()
        shape = prune.read_shape(path)
        if shape is not None:
            prune.shape_as(vit, shape)
        if not hollow:
            load_weights(vit, path)
    if settings.name in SHAPES:
        mean, std = SHIPPED_MEAN, SHIPPED_STD
    else:
        mean, std = (tuple(vit.pretrained_cfg[name]) for name in ("mean", "std"))
    vit.look = (mean, std)  # the parts of the model carry it: `Part.pixels`
    return Backbone(vit, vit.patch_embed.img_size[0], mean, std)


def input_size(settings: Model) -> int:
    """Input height and width in pixels, known before the weights are built.

    Raises:
        FedsplitError: the name is unknown.
    """
    if settings.image_size:
        return settings.image_size
    if settings.name in SHAPES:
        return int(SHAPES[settings.name]["img_size"])
    config = timm.get_pretrained_cfg(_timm_name(settings))
    return int(config.input_size[-1]) if config else 224


def load_weights(vit: nn.Module, path: Path) -> None:
    """Load a state dict; position embeddings are resampled, another classifier is left out.

    Raises:
        FedsplitError: the file cannot be read, or its tensors do not fit the model.
    """
    state = checkpoint_filter_fn(read_weights(path), cast(VisionTransformer, vit))
    own = vit.state_dict()
    for name in [name for name in state if name.startswith(CLASSIFIER)]:
        if name not in own or own[name].shape != state[name].shape:
            del state[name]
    wrong = [name for name in own if not name.startswith(CLASSIFIER) and _shape(state, name) != own[name].shape]
    if wrong or set(state) - set(own):
        odd = sorted({*wrong, *(set(state) - set(own))})
        raise FedsplitError(
            f"{path} does not fit the model ({len(odd)} tensors differ, first '{odd[0]}'); "
            "set model.name to the model it was saved from."
        )
    vit.load_state_dict(state, strict=False)


def fill(vit: nn.Module, path: Path, device: torch.device) -> None:
    """Give a model on the meta device the tensors that the file holds; the others stay without values.

    Raises:
        FedsplitError: the file cannot be read, or its tensors do not fit the model.
    """
    state = {name: value.to(device) for name, value in read_weights(path).items()}
    try:
        unknown = vit.load_state_dict(state, strict=False, assign=True).unexpected_keys
    except RuntimeError as error:
        raise _other_half(path, str(error).splitlines()[-1].strip().rstrip(".")) from None
    if unknown:
        raise _other_half(path, f"the model has no '{unknown[0]}'")


def check_filled(parts: Iterable[nn.Module], path: Path) -> None:
    """Whether every tensor of `parts` has values, out of the file `path`.

    Raises:
        FedsplitError: one has none.
    """
    for part in parts:
        for name, tensor in (*part.named_parameters(), *part.named_buffers()):
            if tensor.is_meta:
                raise _other_half(path, f"it lacks '{name.removeprefix('_shell.')}'")


def _other_half(path: Path, why: str) -> FedsplitError:
    return FedsplitError(f"{path} is not the client's half of this run's model ({why}); make it anew: fedsplit bundle.")


def read_weights(path: Path) -> Tensors:
    """A state dict from a .safetensors or torch file; torch files are read without executing code."""
    if not path.is_file():
        raise FedsplitError(f"model.checkpoint: there is no file {path}; give a .safetensors or .pth file.")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise FedsplitError(
            f"{path} is not a readable checkpoint ({type(error).__name__}); "
            "save the model's state dict, tensors only, as .safetensors or .pth."
        ) from None
    for wrapper in ("state_dict", "model"):
        state = state.get(wrapper, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise FedsplitError(f"{path} holds no state dict of tensors.")
    return state


def _own(settings: Model, classes: int, how: Mapping[str, Any]) -> Any:
    shape = SHAPES[settings.name] | ({"img_size": settings.image_size} if settings.image_size else {})
    if settings.pool not in ("", "avg"):
        raise FedsplitError(f"{settings.name} has no class token; set model.pool to '' or 'avg'.")
    vit = _build(settings, lambda **more: VisionTransformer(num_classes=classes, **shape, **how, **more))
    if settings.pretrained and not settings.checkpoint:
        if settings.name not in SHIPPED:
            raise FedsplitError(
                f"No weights of {settings.name} are shipped: set model.checkpoint to a file "
                "that fedsplit pretrain wrote, or model.pretrained=false."
            )
        load_weights(vit, assets.locate(f"{settings.name}.safetensors"))
    return vit


def _from_timm(settings: Model, classes: int, how: Mapping[str, Any]) -> Any:
    name = _timm_name(settings)
    shape: dict[str, Any] = {**how, **({"img_size": settings.image_size} if settings.image_size else {})}
    if settings.pool:
        shape["global_pool"] = settings.pool
    if timm.model_entrypoint(name.split(".")[0]).__module__ not in PLAIN:
        raise FedsplitError(f"model.name '{name}' is no plain ViT; fedsplit cuts timm's plain vit_* and deit_* only.")
    pretrained = settings.pretrained and not settings.checkpoint
    vit = _build(
        settings, lambda **more: timm.create_model(name, pretrained=pretrained, num_classes=classes, **shape, **more)
    )
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in vit.modules()):
        raise FedsplitError(
            f"model.name '{name}' keeps running statistics (BatchNorm), which are not shared between clients; "
            "choose a ViT without a convolutional stem."
        )
    return vit


def _timm_name(settings: Model) -> str:
    name = settings.name.removeprefix("timm/")
    if timm.is_model(name.split(".")[0]):
        return name
    near = difflib.get_close_matches(name, [*SHAPES, *timm.list_models(["vit_*", "deit*"])], n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    raise FedsplitError(f"model.name '{settings.name}' is neither ours ({', '.join(SHAPES)}) nor known to timm{hint}")


def _build(settings: Model, make: Any) -> Any:
    rates = {
        "pos_drop_rate": settings.dropout,
        "proj_drop_rate": settings.dropout,
        "drop_path_rate": settings.drop_path,
    }
    try:
        vit = make(**{name: rate for name, rate in rates.items() if rate})
    except (AssertionError, TypeError, ValueError) as error:
        raise FedsplitError(
            f"{settings.name} cannot be built with these model settings: {str(error).rstrip('.')}."
        ) from None
    except (OSError, RuntimeError) as error:
        raise FedsplitError(
            f"The pre-trained weights of {settings.name} could not be had ({type(error).__name__}); "
            "set model.pretrained=false, or model.checkpoint to a file, or go online."
        ) from None
    patch = vit.patch_embed
    fits = all(size % step == 0 and size >= step for size, step in zip(patch.img_size, patch.patch_size, strict=True))
    if settings.image_size and not fits:  # some of timm's own sizes leave a border over
        raise FedsplitError(
            f"model.image-size={patch.img_size[0]} does not fit {settings.name}: "
            f"give a multiple of its patch size, {patch.patch_size[0]}."
        )
    return vit


def _shape(state: Tensors, name: str) -> torch.Size | None:
    return state[name].shape if name in state else None
