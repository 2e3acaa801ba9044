"""Reads a split of a prepared TFDS image classification set as a random-access sequence.

Data sets are read from their array_record files alone: neither TensorFlow nor the code of the
data set is needed, so a set of one's own works like a stock one once it is prepared.
"""

import dataclasses
import hashlib
import io
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from PIL import Image

from moe.data.images import digits
from moe.data.images.damage import reason_of
from moe.data.images.prepared import Prepared, image_and_label, open_files, resolve_data_dir
from moe.errors import UsageError

# A record costs about 0.3 ms of Python, an array element one microsecond; so whatever fits in
# memory without being noticed is decoded once.
MEMORY_LIMIT_BYTES = 1 << 30
SAMPLES = 16  # examples that stand for a data set
_OPEN_THREADS = 16
_PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class Records(Protocol):
    """Gives examples by index: `[i]` is (uint8 image [H, W, C], label)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[np.ndarray, int]: ...


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSource:
    """Holds labelled images by index.

    Attributes:
        name: the data set, as it was asked for.
        split: the split, as it was asked for.
        class_names: one name per class; the label is its position.
        image_shape: (H, W, C) of every image; H or W is None where images differ in it.
        records: where the examples come from.
        in_memory: whether an example costs about a microsecond, rather than a read and a decode.
    """

    name: str
    split: str
    class_names: tuple[str, ...]
    image_shape: tuple[int | None, int | None, int]
    records: Records
    in_memory: bool

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def fingerprint(self) -> str:
        """Returns a digest of the size and the classes, and of some of the examples."""
        digest = hashlib.sha256(repr((len(self), self.class_names)).encode())
        for i in np.linspace(0, len(self) - 1, min(SAMPLES, len(self))).astype(int):
            example = self[int(i)]
            digest.update(repr((example["image"].shape, example["label"])).encode())
            digest.update(np.ascontiguousarray(example["image"]).tobytes())
        return digest.hexdigest()[:12]

    def class_counts(self) -> tuple[int, ...]:
        """Counts the examples of each class: reads each record that is not in memory."""
        labels = getattr(self.records, "labels", None)
        if labels is None:
            with ThreadPoolExecutor(_OPEN_THREADS) as pool:
                labels = list(pool.map(lambda i: self.records[i][1], range(len(self))))
        return tuple(np.bincount(labels, minlength=self.num_classes).tolist())

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns {"image": uint8 [H, W, C], "label": int}; the image must not be written to."""
        if not 0 <= index < len(self.records):
            raise IndexError(f"example {index} of {self.name} {self.split}, which has {len(self)}")
        image, label = self.records[index]
        return {"image": image, "label": label}


@dataclasses.dataclass(frozen=True, eq=False)
class _Arrays:
    """Holds records in memory: images uint8 [N, H, W, C], labels [N]."""

    images: np.ndarray
    labels: list[int]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], self.labels[index]


@dataclasses.dataclass(frozen=True, eq=False)
class _Files:
    """Reads and decodes records one by one; safe to call from several threads."""

    prepared: Prepared
    features: tfds.features.FeaturesDict  # the image and the label alone: others may need more
    image_key: str
    label_key: str

    def __len__(self) -> int:
        return len(self.prepared.raw)

    @property
    def shape(self) -> tuple[int | None, int | None, int]:
        """Returns (H, W, C) of every image; H or W is None where images differ in it."""
        height, width, channels = self.features[self.image_key].shape
        return height, width, channels or 3

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        try:
            image, label = self._read(index)
        except Exception as error:  # whatever array_record, protobuf, TFDS or PIL find wrong
            raise self.prepared.wrong(index, f"cannot be read ({reason_of(error)})") from error
        if any(a not in (None, b) for a, b in zip(self.shape, image.shape, strict=True)):
            raise self.prepared.wrong(
                index, f"has an image of {image.shape}, not {self.shape} as features.json says"
            )
        if not 0 <= label < self.features[self.label_key].num_classes:
            last = self.features[self.label_key].num_classes - 1
            raise self.prepared.wrong(
                index,
                f"has the label {label}, not one of 0..{last}",
                "pass a split whose records all have labels (-1 is TFDS's mark of none)",
            )
        return image, label

    def _read(self, index: int) -> tuple[np.ndarray, int]:
        feature = self.features[self.image_key]
        encoded = isinstance(feature, tfds.features.Image)
        # TFDS's own decoding keeps a palette or CMYK image as it is; ours converts it.
        skip = {self.image_key: tfds.decode.SkipDecoding()} if encoded else None
        example = self.features.deserialize_example_np(self.prepared.raw[index], decoders=skip)
        image = example[self.image_key]
        return _decode(image, self.shape[-1]) if encoded else image, int(example[self.label_key])


def _decode(encoded: bytes, channels: int) -> np.ndarray:
    """Returns a PNG or JPEG file as uint8 [H, W, channels], whatever colours it was saved in."""
    with Image.open(io.BytesIO(encoded)) as file:
        if file.mode.startswith("I"):
            # 16 bits of grey, of which PIL would make white all that is above 255.
            file = Image.fromarray((np.asarray(file) >> 8).astype(np.uint8))
        image = np.asarray(file.convert(_PIL_MODES[channels]))
    return image.reshape(*image.shape[:2], channels)


def from_arrays(
    images: np.ndarray, labels: Sequence[int], class_names: Sequence[str], name: str = "arrays"
) -> ImageSource:
    """Returns a source of arrays in memory: images uint8 [N, H, W, C], labels in 0..classes-1."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) != len(labels):
        raise UsageError(
            f"images are {images.dtype} {images.shape} with {len(labels)} labels: "
            "expected uint8 [N, H, W, C] and N labels"
        )
    records = _Arrays(images, [int(label) for label in labels])
    if records.labels and not 0 <= min(records.labels) <= max(records.labels) < len(class_names):
        raise UsageError(f"labels out of range: expected 0..{len(class_names) - 1}")
    return ImageSource(name, "all", tuple(class_names), images.shape[1:], records, in_memory=True)


def open_split(name: str, split: str, data_dir: str | None = None) -> ImageSource:
    """Opens a split of a data set that was prepared in array_record form.

    Args:
        name: as TFDS writes it: "cifar100", "name/config", "name:1.0.0". "digits" prepares
            itself at first use; any other is prepared once by `python -m moe.data.prepare`.
        split: "train", "test", or a slice such as "train[:90%]".
        data_dir: where data sets lie; None means $TFDS_DATA_DIR, else ~/tensorflow_datasets.

    Returns:
        The split, held in memory if its images have one fixed size and take less than 1 GiB.

    Raises:
        UsageError: the set is missing, damaged or in another form, has no such split, or does not
            hold uint8 images with one class each.
    """
    data_dir = resolve_data_dir(data_dir)
    if name in digits.NAMES:
        digits.prepare(data_dir)
    prepared = open_files(name, split, data_dir)
    image_key, label_key = image_and_label(prepared)
    kept = {key: prepared.info.features[key] for key in (image_key, label_key)}
    files = _Files(prepared, tfds.features.FeaturesDict(kept), image_key, label_key)
    opened = ImageSource(
        name, split, tuple(kept[label_key].names), files.shape, files, in_memory=False
    )
    if None in files.shape or len(files) * math.prod(files.shape) >= MEMORY_LIMIT_BYTES:
        with ThreadPoolExecutor(_OPEN_THREADS) as pool:  # a file that is cut short is found here
            list(pool.map(files.__getitem__, prepared.first_of_each_file()))
        return opened
    logging.info("reading the %d images of %s %s into memory", len(files), name, split)
    return dataclasses.replace(opened, records=_read_all(files), in_memory=True)


def _read_all(files: _Files) -> _Arrays:
    """Decodes every record; the images are made read-only, since all batches share them."""
    images, labels = np.empty((len(files), *files.shape), np.uint8), []
    for i in range(len(files)):
        images[i], label = files[i]
        labels.append(label)
    images.flags.writeable = False
    return _Arrays(images, labels)
