"""Encoded images to one uint8 array, in chunks, so that memory stays bounded."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedsplit.types import FedsplitError

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = npt.NDArray[np.uint8]
CHUNK = 32  # a device decodes its pictures, too: few of them in memory at a time
ORIENTATION = 0x0112


def chunks(blobs: Iterable[tuple[int, bytes | None]], size: int, resize: bool, where: str) -> Iterator[Pixels]:
    """The encoded images `blobs`, each with its row, as RGB arrays (up to 32, size, size, 3) uint8, in order.

    `where` names the source in messages.

    Raises:
        FedsplitError: an image that is missing, cannot be read, or has another size when `resize` is False.
    """
    images = iter(blobs)
    while part := list(islice(images, CHUNK)):
        made = np.empty((len(part), size, size, 3), np.uint8)
        for slot, (row, blob) in enumerate(part):
            made[slot] = _decode(blob, size, resize, f"{where}, row {row}")
        yield made


def _decode(blob: bytes | None, size: int, resize: bool, where: str) -> Pixels:
    from PIL import Image

    if not blob:
        raise FedsplitError(f"{where}: the image has no bytes; store the encoded image in the file, or drop the row.")
    try:
        with Image.open(io.BytesIO(blob)) as image:
            return scaled(image, size, resize, where)
    except FedsplitError:
        raise
    except Exception as error:  # Pillow raises almost anything on broken input
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        reason = "not an image" if reason.startswith("cannot identify") else reason
        raise FedsplitError(f"{where}: cannot decode the image ({reason}); mend or drop the row.") from error


def scaled(image: Image, size: int, resize: bool, where: str) -> Pixels:
    """An image as (size, size, 3) uint8: upright, RGB, scaled by bicubic interpolation where needed."""
    from PIL import Image as pil
    from PIL import ImageOps

    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits at 255
        image = pil.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image = image.convert("RGB")
    if image.size != (size, size):
        if not resize:
            wide, high = image.size
            raise FedsplitError(
                f"{where}: the image has {wide} x {high} pixels and the model takes {size} x {size}; "
                "set data.resize=true or model.image-size."
            )
        image = image.resize((size, size), pil.Resampling.BICUBIC)
    return np.asarray(image)
