"""The files of prepared TFDS data sets: finding them, and what to type when they are not there.

Only what TFDS wrote beside the records is used (`dataset_info.json`, `features.json`), never the
code that made them.
"""

import glob
import os
import shlex
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import read_only_builder, registered

from moe.errors import UsageError


def resolve_data_dir(data_dir: str | None) -> str:
    """Returns the folder of the data sets: the given one, else TFDS's default."""
    # TFDS reads the variable when it is imported; here it may still be set afterwards.
    default = os.environ.get("TFDS_DATA_DIR") or os.path.join("~", "tensorflow_datasets")
    return os.path.expanduser(os.fspath(data_dir or default))


def prepare_command(name: str, data_dir: str) -> str:
    """Returns what to type to prepare a data set."""
    # `tfds build` would need Apache Beam as well: tfds 4.9.10 imports it for every command.
    arguments = f"{shlex.quote(name)} --data_dir={shlex.quote(data_dir)}"
    return f"pip install 'permoe[prepare]' && python -m moe.data.prepare {arguments}"


def open_files(
    name: str, split: str, data_dir: str
) -> tuple[tfds.core.DatasetInfo, Sequence[bytes]]:
    """Opens one split of a prepared set.

    Args:
        name: "name", "name/config", "name:version" or "name/config:version".
        split: a split or a slice of one, "train[:90%]".
        data_dir: the folder in which the set was prepared.

    Returns:
        What TFDS knows of the set, and the serialized examples by index.

    Raises:
        UsageError: no such set, no such split, or a form without random access.
    """
    try:
        builder = read_only_builder.builder_from_files(name, data_dir=data_dir)
    except (registered.DatasetNotFoundError, ValueError) as error:
        raise UsageError(_not_found(name, data_dir)) from error
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
    except ValueError as error:
        raise UsageError(
            f"data set '{name}' has no split '{split}': expected one of "
            f"{', '.join(builder.info.splits)}, or a slice within one such as train[:90%]"
        ) from error
    return builder.info, raw


def _not_found(name: str, data_dir: str) -> str:
    """Returns the message for a set that is not there, with its variants that are."""
    stem = name.partition(":")[0].partition("/")[0]
    found = glob.glob(
        os.path.join(data_dir, glob.escape(stem), "**", "features.json"), recursive=True
    )
    there = sorted(os.path.relpath(os.path.dirname(path), data_dir) for path in found)
    variants = f" (found only {', '.join(there)})" if there else ""
    return (
        f"data set '{name}' is not prepared in {data_dir}{variants}: prepare it once with "
        f"`{prepare_command(name, data_dir)}` (this step alone needs TensorFlow)"
    )


def image_and_label(name: str, info: tfds.core.DatasetInfo) -> tuple[str, str]:
    """Finds the features that hold the image and its class.

    They are the set's supervised pair, or, where it declares none, "image" and "label".

    Raises:
        UsageError: they are not a uint8 image (H, W, C) and one class of a known list.
    """
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
            f"data set '{name}' is not for image classification: expected the features image "
            f"(uint8, height x width x channels) and label (ClassLabel), got {_describe(features)}"
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
