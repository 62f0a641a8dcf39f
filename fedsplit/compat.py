"""Mends for combinations of packages that people have and that do not import as they are."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

# The two operators whose schemas `import torchvision` expects even where it has no compiled ones.
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
# A declared schema lives as long as its library object.
_kept: list[object] = []


def mend_torchvision() -> bool:
    """Let torchvision import where its compiled operators do not load; tell whether that was so.

    A torchvision wheel built for CUDA beside a CPU build of torch cannot load its operators; its
    import then fails at `torchvision::nms`, and with it timm, peft and transformers, which need only
    its transforms. Declaring the missing schemas mends the import; calling such an operator still
    fails. It does nothing where the operators load, where torchvision is already imported, or where
    torch or torchvision is absent, and may be called again.
    """
    if "torchvision" in sys.modules or _find("torch") is None or _find("torchvision") is None:
        return bool(_kept)
    import torch

    if operators_load():
        return False
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(schema)
            _kept.append(library)
    return bool(_kept)


def operators_load() -> bool:
    """Whether torchvision's compiled operators load into this torch, without importing torchvision.

    Loading is the only sure test, and costs nothing: `import torchvision` would load the same file,
    and the second time is a no-op.
    """
    import torch

    folder = _find("torchvision")
    files = sorted([*folder.glob("_C*.so"), *folder.glob("_C*.pyd")]) if folder else []
    for file in files:
        try:
            torch.ops.load_library(str(file))
        except OSError:
            continue
        if hasattr(torch.ops.torchvision, "nms"):
            return True
    return False


def _find(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None
