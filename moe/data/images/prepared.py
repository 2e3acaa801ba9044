"""Opens the files of prepared TFDS data sets, or says what is wrong with them and what to type.

Only what TFDS wrote beside the records is used (`dataset_info.json`, `features.json`), never the
code that made them.
"""

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import dataset_builder, read_only_builder, registered

from moe.data.images.damage import (
    check_description,
    prepare_again,
    prepare_command,
    version_folders,
)
from moe.errors import DataError, UsageError


class Prepared(NamedTuple):
    """Holds one split of a prepared set, opened.

    Attributes:
        name: the data set, as it was asked for.
        split: the split, or a slice of one.
        data_dir: the folder in which the set was prepared.
        info: what TFDS wrote about the set.
        raw: the serialized examples by index.
    """

    name: str
    split: str
    data_dir: str
    info: tfds.core.DatasetInfo
    raw: Sequence[bytes]

    def first_of_each_file(self) -> list[int]:
        """Returns the index of the first example in each file."""
        sizes = [file.take for file in self.info.splits[self.split].file_instructions]
        return [sum(sizes[:i]) for i, size in enumerate(sizes) if size]

    def wrong(self, index: int, what: str, remedy: str = "") -> DataError:
        """Returns the error that `what` is wrong with an example, which names its file."""
        end = 0
        for file in self.info.splits[self.split].file_instructions:
            end += file.take
            if index < end:
                break
        remedy = remedy or prepare_again(self.name, self.data_dir, file.filename)
        return DataError(
            f"record {index} of split '{self.split}' of data set '{self.name}', in "
            f"{file.filename}, {what}: {remedy}"
        )


def resolve_data_dir(data_dir: str | None) -> str:
    """Returns the folder of the data sets: the given one, else TFDS's default."""
    # TFDS reads the variable when it is imported; here it may still be set afterwards.
    default = os.environ.get("TFDS_DATA_DIR") or os.path.join("~", "tensorflow_datasets")
    return os.path.expanduser(os.fspath(data_dir or default))


def open_files(name: str, split: str, data_dir: str) -> Prepared:
    """Opens one split of a prepared set.

    Args:
        name: "name", "name/config", "name:version" or "name/config:version".
        split: a split or a slice of one, "train[:90%]".
        data_dir: the folder in which the set was prepared.

    Raises:
        UsageError: no such set, one whose files are damaged, no such split or an empty one, or a
            form without random access.
    """
    builder = _builder(name, data_dir)
    try:
        examples = builder.info.splits[split].num_examples
    except ValueError as error:
        raise UsageError(
            f"data set '{name}' has no split '{split}': expected one of "
            f"{', '.join(builder.info.splits)}, or a slice within one such as train[:90%]"
        ) from error
    if examples < 1:  # a slice that ends before it begins counts below 0
        raise UsageError(
            f"split '{split}' of data set '{name}' is empty: pass a longer slice, or another of "
            f"{', '.join(builder.info.splits)}"
        )
    try:
        raw = builder.as_data_source(
            split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )
    except NotImplementedError as error:
        other = data_dir.rstrip("/") + "_array_record"
        raise UsageError(
            f"data set '{name}' lies in {data_dir} as {builder.info.file_format.value}, which "
            "needs TensorFlow to be read: expected array_record; prepare it in another folder "
            f"with `{prepare_command(name, other)}` (this step alone needs TensorFlow), then pass "
            f"--config.data.data_dir={other}"
        ) from error
    return Prepared(name, split, data_dir, builder.info, raw)


def _builder(name: str, data_dir: str) -> dataset_builder.DatasetBuilder:
    """Opens a set by the two files that describe it."""
    try:
        return read_only_builder.builder_from_files(name, data_dir=data_dir)
    except Exception as error:  # whatever TFDS, protobuf or json find wrong with the files
        folders = []
        try:
            for folder in version_folders(name, data_dir):
                check_description(name, data_dir, folder)
                folders.append(os.path.relpath(folder, data_dir))
        except OSError as unreadable:
            raise UsageError(
                f"cannot read {unreadable.filename} of data set '{name}' ({unreadable.strerror}): "
                "allow it, or pass a folder that can be read as --config.data.data_dir=DIR"
            ) from error
        if not isinstance(error, registered.DatasetNotFoundError | ValueError):
            raise  # the files are right: an error of TFDS or of ours
        only = f" (found only {', '.join(sorted(folders))})" if folders else ""
        raise UsageError(
            f"data set '{name}' is not prepared in {data_dir}{only}: prepare it once with "
            f"`{prepare_command(name, data_dir)}` (this step alone needs TensorFlow), or from "
            "files of your own: `python -m moe.data.prepare images --help`"
        ) from error


def image_and_label(prepared: Prepared) -> tuple[str, str]:
    """Returns the names of the features that hold the image and its class.

    They are the set's supervised pair, or, where it declares none, "image" and "label".

    Raises:
        UsageError: they are not a uint8 image (H, W, C) and one class of a known list.
    """
    info = prepared.info
    pair = info.supervised_keys
    if not (isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(k, str) for k in pair)):
        pair = ("image", "label")
    features = dict(info.features) if isinstance(info.features, tfds.features.FeaturesDict) else {}
    image, label = (features.get(key) for key in pair)
    is_image = (
        isinstance(image, tfds.features.Image | tfds.features.Tensor)
        and image.np_dtype == np.uint8
        and len(image.shape) == 3
    )
    if not (is_image and isinstance(label, tfds.features.ClassLabel) and label.num_classes):
        raise UsageError(
            f"data set '{prepared.name}' is not for image classification: expected the features "
            "image (uint8, height x width x channels) and label (ClassLabel), got "
            f"{_describe(features)}"
        )
    if len(label.names) != label.num_classes:
        file = os.path.join(info.data_dir, f"{pair[1]}.labels.txt")
        raise UsageError(
            f"{file} of data set '{prepared.name}' is damaged (it names {len(label.names)} classes "
            f"of {label.num_classes}): {prepare_again(prepared.name, prepared.data_dir, file)}"
        )
    return pair


def _describe(features: Mapping[str, tfds.features.FeatureConnector]) -> str:
    """Returns "image: float32(8, 8, 1) Tensor, label: Text" on one line."""
    arrays = tfds.features.Tensor | tfds.features.Image
    described = (
        f"{key}: {value.np_dtype}{value.shape if isinstance(value, arrays) else ''} "
        f"{type(value).__name__}"
        for key, value in features.items()
    )
    return ", ".join(described) or "no named features"
