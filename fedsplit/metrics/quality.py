"""Quality of a model on a labelled set."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from fedsplit.data.batches import to_batch
from fedsplit.front.vit import Parts
from fedsplit.types import Images


@dataclass(frozen=True)
class Quality:
    """Accuracy (0 to 1, higher is better) and mean cross-entropy, over all samples and by class.

    `class_samples` (K,) counts the test samples of each class, `class_correct` (K,) those classified
    rightly.
    """

    accuracy: float
    loss: float
    class_samples: npt.NDArray[np.int64]
    class_correct: npt.NDArray[np.int64]


def evaluate(
    parts: Parts,
    images: Images,
    indices: npt.NDArray[np.int64],
    classes: int,
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    batch_size: int,
    device: torch.device,
) -> Quality:
    """Test the whole model in evaluation mode, without a wire, on the samples at `indices`."""
    parts.train(False)
    total = np.zeros(classes, np.int64)
    correct = np.zeros(classes, np.int64)
    loss = 0.0
    with torch.inference_mode():
        for start in range(0, len(indices), batch_size):
            batch = to_batch(images, indices[start : start + batch_size], mean, std, "none", 0, device)
            logits = parts(batch.x)
            loss += float(F.cross_entropy(logits, batch.y, reduction="sum"))
            right = batch.y[logits.argmax(1) == batch.y].cpu().numpy()
            total += np.bincount(batch.y.cpu().numpy(), minlength=classes)
            correct += np.bincount(right, minlength=classes)
    parts.train(True)
    samples = max(1, len(indices))
    return Quality(float(correct.sum()) / samples, loss / samples, total, correct)
