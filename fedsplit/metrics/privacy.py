"""How much of an image a reconstruction shows: per image, each with its direction.

Images are (S, 3, height, width) float32 in [0, 1]. For the defender high MSE is safe, and so are low PSNR, low
SSIM, and few reconstructions that are recognised. SSIM below 0.3 counts as unrecognisable (He, Zhang and Lee,
ACSAC 2019).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedsplit import rng
from fedsplit.types import FedsplitError

# True where more of it is safer for the one who is attacked.
SAFER_HIGH = {"mse": True, "psnr": False, "ssim": False, "lpips": True}
PSNR_MOST = 100.0  # dB, of an exact copy
DRAWS = 1000


def mse(found: Tensor, original: Tensor) -> Tensor:
    """Mean squared error of every image, (S,)."""
    return (found - original).square().flatten(1).mean(1)


def psnr(found: Tensor, original: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of every image, (S,), at most 100."""
    return (-10 * mse(found, original).clamp_min(1e-30).log10()).clamp_max(PSNR_MOST)


def ssim(found: Tensor, original: Tensor) -> Tensor:
    """Structural similarity of every image, (S,): torchmetrics, Gaussian window of 11 pixels, sigma 1.5, mean of RGB.

    Raises:
        FedsplitError: torchmetrics is not installed.
    """
    value = torchmetrics().functional.image.structural_similarity_index_measure(
        found, original, data_range=1.0, reduction="none"
    )
    scores: Tensor = value.reshape(len(found))
    return scores


def lpips() -> Callable[[Tensor, Tensor], Tensor] | None:
    """LPIPS of every image, (S,), where torchvision's AlexNet weights are at hand; else None."""
    from pathlib import Path

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if not list(folder.glob("alexnet-owt-*.pth")):
        return None
    network = torchmetrics().image.lpip.LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)

    def distance(found: Tensor, original: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.stack([network(a[None], b[None]) for a, b in zip(found, original, strict=True)])

    return distance


def interval(values: Tensor, key: int) -> tuple[float, float]:
    """The 95 % confidence interval of the mean of `values` (S,), by bootstrap (1,000 draws of stream `key`)."""
    draw = torch.randint(len(values), (DRAWS, len(values)), generator=rng.torch_rng(key))
    means = values.double()[draw].mean(1).sort().values
    return float(means[int(0.025 * DRAWS)]), float(means[int(0.975 * DRAWS) - 1])


def torchmetrics() -> Any:
    """The package, with the metrics that are used here; it is imported late, since that takes seconds.

    Raises:
        FedsplitError: it is not installed.
    """
    if importlib.util.find_spec("torchmetrics") is None:
        raise FedsplitError("Privacy scores need the package 'torchmetrics': pip install 'fedsplit[audit]'.")
    import torchmetrics as package
    import torchmetrics.functional.image
    import torchmetrics.functional.retrieval
    import torchmetrics.image

    return package
