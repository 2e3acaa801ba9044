"""Reads parquet files of images as the Hugging Face hub keeps them: bytes of files, and labels.

A file's name says its split (train-00000-of-00004.parquet, test.parquet), or where it is a number
(0000.parquet) the folder's. An image is a struct with the field `bytes`, or bytes themselves. Where
the schema has the hub's own description, the class names are in it.
"""

import glob
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from moe.data.images.damage import reason_of
from moe.data.images.found import Advance, Found, Split, check_labels, common, shape_of
from moe.errors import UsageError

_NAME = re.compile(r"(?P<split>[A-Za-z]\w*?)(-\d+-of-\d+.*)?\.parquet")
_ROWS = 256
_THREADS = 16


def find(pattern: str, advance: Advance, class_names: tuple[str, ...], columns) -> Found:
    """Reads every image of the files once, to know its shape.

    Args:
        pattern: of the files' paths.
        advance: is told how many images were read.
        class_names: () for those of the schema, else "0", "1", ... up to the largest label.
        columns: the names of the columns of the image and the label; None for one to be found.

    Raises:
        UsageError: there are no files, no such columns, or an image or a label that cannot be used.
    """
    files: dict[str, list[str]] = {}
    for path in sorted(glob.glob(os.path.expanduser(pattern), recursive=True)):
        files.setdefault(_split(path), []).append(path)
    if not files:
        raise UsageError(f"--parquet={pattern} fits no file: expected 'DIR/**/*.parquet' in quotes")
    first = next(iter(files.values()))[0]
    image, label, known = _columns(first, *columns)
    class_names = class_names or known
    shapes, counts, largest = set(), dict.fromkeys(files, 0), 0
    with ThreadPoolExecutor(_THREADS) as pool:
        for split, paths in files.items():
            for path in paths:
                for start, images, labels in _batches(path, image, label):
                    where = [f"row {start + i} of {path}" for i in range(len(images))]
                    classes = len(class_names) or 1 << 30
                    check_labels(labels, classes, where.__getitem__)
                    shapes |= set(pool.map(shape_of, images, where))
                    counts[split] += len(images)
                    largest = max(largest, *labels)
                    advance(len(images))
            if not counts[split]:
                raise UsageError(f"split {split!r} of --parquet={pattern} has no rows")
    class_names = class_names or tuple(map(str, range(largest + 1)))
    splits = {
        split: Split(counts[split], lambda p=paths: _examples(p, image, label))
        for split, paths in files.items()
    }
    return Found(class_names, common(shapes), True, splits)


def _split(path: str) -> str:
    folder, name = os.path.split(path)
    if match := _NAME.fullmatch(name):
        return match["split"]
    if (parent := os.path.basename(folder)).isidentifier():
        return parent
    raise UsageError(
        f"the name of {path} says no split: expected train-00000-of-00001.parquet, test.parquet, "
        "or train/0000.parquet"
    )


def _open(path: str):
    """Opens a parquet file; TFDS brings the library."""
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise UsageError("reading parquet needs pyarrow: type pip install pyarrow") from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except Exception as error:  # pyarrow raises its own kinds, also of OSError
        raise UsageError(f"cannot read {path} ({reason_of(error)}): get it anew") from error


def _columns(path: str, image: str | None, label: str | None) -> tuple[str, str, tuple[str, ...]]:
    """Returns the columns of the image and the label, and the names of the classes if known."""
    import pyarrow as pa

    schema = _open(path).schema_arrow
    described = f"{path} has the columns {', '.join(f'{f.name}: {f.type}' for f in schema)}"

    def choose(kind: str, asked: str | None, usual: tuple[str, ...], fits) -> str:
        fitting = [field.name for field in schema if fits(field.type)]
        known = [name for name in usual if name in fitting][:1]
        names = [asked] if asked in fitting else [] if asked else known or fitting
        if len(names) != 1:
            raise UsageError(f"{described}: name that of the {kind} with --{kind}_column=NAME")
        return names[0]

    def is_image(kind) -> bool:
        if pa.types.is_struct(kind):
            return any(f.name == "bytes" and _is_bytes(pa, f.type) for f in kind)
        return _is_bytes(pa, kind)

    image = choose("image", image, ("image", "img"), is_image)
    label = choose("label", label, ("label", "labels", "fine_label"), pa.types.is_integer)
    try:
        info = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]
        return image, label, tuple(map(str, info["names"]))
    except (KeyError, TypeError, ValueError):
        return image, label, ()


def _is_bytes(pa, kind) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _batches(path: str, image: str, label: str) -> Iterator[tuple[int, list[bytes], list[int]]]:
    """Yields the number of the first row, the images and the labels of some rows at a time."""
    start = 0
    opened = _open(path)
    if missing := {image, label} - set(opened.schema_arrow.names):
        raise UsageError(f"{path} has no column {missing.pop()!r}, unlike the first file")
    try:
        for batch in opened.iter_batches(_ROWS, columns=[image, label]):
            images, labels = batch.column(image).to_pylist(), batch.column(label).to_pylist()
            images = [cell["bytes"] if isinstance(cell, dict) else cell for cell in images]
            for i, (one, other) in enumerate(zip(images, labels, strict=True)):
                if one is None or other is None:
                    what = "image" if one is None else "label"
                    raise UsageError(f"row {start + i} of {path} has no {what}: delete the row")
            yield start, images, labels
            start += len(labels)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"cannot read {path} ({reason_of(error)}): get it anew") from error


def _examples(paths: list[str], image: str, label: str) -> Iterator[tuple[bytes, int]]:
    for path in paths:
        for _, images, labels in _batches(path, image, label):
            yield from zip(images, labels, strict=True)
