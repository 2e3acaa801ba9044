"""Says what was found in files of one's own: splits of labelled images, and one image's shape."""

import dataclasses
import io
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from PIL import Image

from moe.data.images.damage import reason_of
from moe.errors import UsageError

FORMATS = ("PNG", "JPEG")  # what the reader of a prepared set is tested with
_GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "F")

Shape = tuple[int | None, int | None, int]
Advance = Callable[[int], None]  # told how many images have been dealt with


@dataclasses.dataclass(frozen=True)
class Split:
    """Holds how many images a split has, and what yields them: each as (image, label).

    An image is the bytes of a PNG or JPEG file, or uint8 [H, W, C].
    """

    count: int
    examples: Callable[[], Iterator[tuple[bytes | np.ndarray, int]]]


@dataclasses.dataclass(frozen=True)
class Found:
    """Holds the splits of a set.

    Attributes:
        class_names: the label of an image is its class's position.
        shape: (H, W, C) of every image; H and W are None where images differ in them.
        encoded: whether images are bytes of files.
        splits: by name.
    """

    class_names: tuple[str, ...]
    shape: Shape
    encoded: bool
    splits: dict[str, Split]


def shape_of(encoded: bytes, where: str) -> tuple[int, int, int]:
    """Decodes an image whole; returns its height and width, and 1 for grey or 3 for colours.

    Raises:
        UsageError: it cannot be read; names `where` it is.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            kind = image.format
            if kind in FORMATS:
                image.load()
            shape = (image.height, image.width, 1 if image.mode in _GREY else 3)
    except Exception as error:  # PIL raises what its many decoders do
        raise UsageError(
            f"{where} cannot be read as an image ({reason_of(error)}): delete or replace it"
        ) from error
    if kind not in FORMATS:
        raise UsageError(f"{where} is {kind}; expected PNG or JPEG: convert it")
    return shape


def common(shapes: Iterable[tuple[int, int, int]]) -> Shape:
    """Returns the shape that all images have: None where sizes differ, colours if any has them."""
    seen = set(shapes)
    (height, *others), channels = {s[:2] for s in seen}, max(s[2] for s in seen)
    return (*((None, None) if others else height), channels)


def check_labels(labels: Iterable[int], classes: int, where: Callable[[int], str]) -> None:
    """Raises where a label is not in 0..classes-1; `where` names the i-th one's place."""
    for i, label in enumerate(labels):
        if not 0 <= label < classes:
            raise UsageError(
                f"{where(i)} has the label {label}, not one of 0..{classes - 1} as {classes} "
                "classes have: mend it, or name all classes with --classes=NAME,NAME"
            )
