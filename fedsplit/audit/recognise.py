"""Whether a reconstruction still shows what it is of: a classifier that was trained on clean images."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsplit.audit.scene import pixels
from fedsplit.data.raw import missing_package
from fedsplit.front import models
from fedsplit.rng import numpy_rng
from fedsplit.settings import Model
from fedsplit.types import DataSet
from fedsplit.world import Indices

CLEAN = 2000  # training images, at most


class Recogniser:
    """Logistic regression on standardised features of the shipped backbone, from clean training images.

    It has nothing to do with the model under attack, so a defence cannot fool it. `ids` are the samples
    under attack, which it is not trained on.
    """

    def __init__(self, data: DataSet, ids: Indices, key: int) -> None:
        try:
            from sklearn.linear_model import LogisticRegression
            from sklearn.pipeline import make_pipeline
            from sklearn.preprocessing import StandardScaler
        except ModuleNotFoundError as error:
            raise missing_package(error, "the identification rate") from error
        self._backbone = models.create(replace(Model(), image_size=0), len(data.classes), 0)
        self._backbone.vit.eval()
        order = numpy_rng(key).permutation(len(data.train))
        rows = order[~torch.isin(torch.from_numpy(order), torch.from_numpy(ids)).numpy()][:CLEAN]
        self._fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        self._fitted.fit(self._features(pixels(data.train, rows)).numpy(), data.train.labels[rows])

    def right(self, images: Tensor, labels: Tensor) -> Tensor:
        """Which of images (S, 3, height, width) in [0, 1] are taken for their label (S,), bool (S,)."""
        guess = torch.from_numpy(self._fitted.predict(self._features(images.cpu()).numpy()))
        return guess == labels

    def _features(self, images: Tensor) -> Tensor:
        look, size, vit = self._backbone, self._backbone.image_size, self._backbone.vit
        mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (look.mean, look.std))
        found = []
        with torch.inference_mode():
            for part in images.split(256):
                scaled = F.interpolate(part, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
                found.append(vit.forward_head(vit.forward_features((scaled - mean) / std), pre_logits=True))  # type: ignore[operator]
        return torch.cat(found)
