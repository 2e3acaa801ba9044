"""Prepares a stock TFDS set, once: the one step of permoe that needs TensorFlow.

    python -m moe.data.prepare cifar100 --data_dir=DIR

The set is downloaded and converted; all of permoe then reads DIR without TensorFlow.
"""

import argparse
import importlib.util
from collections.abc import Sequence

import tensorflow_datasets as tfds

from moe.data.images import digits
from moe.data.images.damage import prepare_command, reason_of
from moe.data.images.prepared import resolve_data_dir
from moe.errors import UsageError


def main(argv: Sequence[str]) -> str:
    """Prepares the set that a command line names; returns its folder."""
    parser = argparse.ArgumentParser(prog="python -m moe.data.prepare", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("name", help="a TFDS name (cifar100, name/config, name:version)")
    parser.add_argument("--data_dir", help="default: $TFDS_DATA_DIR, else ~/tensorflow_datasets")
    options = parser.parse_args(argv)
    return prepare(options.name, options.data_dir)


def prepare(name: str, data_dir: str | None = None) -> str:
    """Downloads and converts a data set; does nothing if it is there already.

    Args:
        name: "cifar100", "name/config" or "name:version".
        data_dir: where to write; None means $TFDS_DATA_DIR, else ~/tensorflow_datasets.

    Returns:
        The folder of the prepared set.

    Raises:
        UsageError: TensorFlow is missing, TFDS knows no such set, or it lies there in another form.
    """
    data_dir = resolve_data_dir(data_dir)
    if name in digits.NAMES:
        return digits.prepare(data_dir)
    if importlib.util.find_spec("tensorflow") is None:
        raise UsageError(
            f"preparing '{name}' needs TensorFlow, which is not installed: type "
            f"`{prepare_command(name, data_dir)}`"
        )
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        raise UsageError(
            f"TFDS knows no data set '{name}': expected a name of "
            "https://www.tensorflow.org/datasets/catalog/overview"
        ) from error
    except Exception as error:  # whatever TFDS finds wrong with what lies there
        raise UsageError(
            f"cannot prepare '{name}' in {data_dir} as array_record ({reason_of(error)}): if it "
            "lies there damaged, delete it; if in another form, pass another folder as --data_dir"
        ) from error
    try:
        builder.download_and_prepare()
    except OSError as error:
        raise UsageError(
            f"cannot prepare '{name}' in {data_dir} ({reason_of(error)}): pass a folder that can "
            "be written as --data_dir, and look whether its disk is full and the net can be reached"
        ) from error
    return str(builder.data_path)
