"""Reads IDX files, the form of MNIST and its relatives: train-images-idx3-ubyte.gz and the like.

A file is 0, 0, 8 (for uint8), the number of axes, the length of each as big-endian int32, and the
bytes. Images have the axes N, H, W or N, H, W, C, labels N.
"""

import gzip
import pathlib
import re
import zlib
from collections.abc import Iterator

import numpy as np

from moe.data.images.found import Found, Split, check_labels
from moe.errors import UsageError

_IMAGES = re.compile(r"(.+)-images[-.]idx[34]-ubyte(\.gz)?")
_UINT8 = 8
EXPECTED = "expected pairs such as train-images-idx3-ubyte and train-labels-idx1-ubyte (or .gz)"


def find(root: pathlib.Path, class_names: tuple[str, ...]) -> Found:
    """Reads the pairs of files in a folder; t10k is the split `test`.

    Args:
        root: the folder.
        class_names: () for "0", "1", ... up to the largest label of the split train.

    Raises:
        UsageError: files are missing, damaged or do not fit each other.
    """
    try:
        names = sorted(path.name for path in root.iterdir())
    except OSError as error:
        raise UsageError(f"cannot read {root} ({error.strerror}): {EXPECTED}") from error
    pairs = {}
    for name in names:
        if match := _IMAGES.fullmatch(name):
            split = "test" if match[1] == "t10k" else re.sub(r"\W", "_", match[1])
            pairs.setdefault(split, _pair(root, name, match[1]))
    if not pairs:
        raise UsageError(f"{root} holds no IDX images: {EXPECTED}")
    leading = pairs.get("train") or next(iter(pairs.values()))
    class_names = class_names or tuple(map(str, range(int(leading[1].max()) + 1)))
    shapes = {images.shape[1:] for images, _, _ in pairs.values()}
    if len(shapes) > 1:
        raise UsageError(f"the splits of {root} have images of {sorted(shapes)}: expected one size")
    for _, labels, file in pairs.values():
        check_labels(labels, len(class_names), lambda i, file=file: f"record {i} of {file}")
    splits = {
        split: Split(len(labels), lambda i=images, n=labels: _examples(i, n))
        for split, (images, labels, _) in pairs.items()
    }
    return Found(class_names, shapes.pop(), False, splits)


def _pair(root: pathlib.Path, name: str, stem: str) -> tuple[np.ndarray, np.ndarray, pathlib.Path]:
    """Returns images [N, H, W, C], their labels [N], and the file of the labels."""
    pattern = re.compile(rf"{re.escape(stem)}-labels[-.]idx1-ubyte(\.gz)?")
    others = sorted(p for p in root.iterdir() if pattern.fullmatch(p.name))
    if not others:
        raise UsageError(f"{root / name} has no labels beside it: {EXPECTED}")
    images, labels = read(root / name, (3, 4)), read(others[0], (1,))
    if len(images) != len(labels):
        raise UsageError(
            f"{root / name} holds {len(images)} images and {others[0].name} {len(labels)} labels: "
            "expected as many; they are of different sets, or one is damaged"
        )
    if not images.size:
        raise UsageError(f"{root / name} holds no images")
    return images if images.ndim == 4 else images[..., None], labels, others[0]


def read(file: pathlib.Path, axes: tuple[int, ...]) -> np.ndarray:
    """Returns the array of an IDX file, gzipped or not.

    Raises:
        UsageError: it is no such file of uint8 with so many axes, or cut short.
    """
    try:
        content = file.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"cannot read {file} ({error}): get it anew") from error
    if content[:3] != bytes((0, 0, _UINT8)) or len(content) < 4 or content[3] not in axes:
        raise UsageError(
            f"{file} is no IDX file of uint8 with {' or '.join(map(str, axes))} axes: it begins "
            f"with {content[:4].hex(' ') or 'nothing'}"
        )
    begin = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:begin].ljust(begin - 4, b"\0"), ">u4").astype(np.int64)
    if len(content) - begin != shape.prod():
        raise UsageError(
            f"{file} is damaged: its header says {' x '.join(map(str, shape))} bytes and "
            f"{max(len(content) - begin, 0)} follow; get it anew"
        )
    return np.frombuffer(content, np.uint8, offset=begin).reshape(shape)


def _examples(images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    yield from zip(images, map(int, labels), strict=True)
