"""Prepares the default data set offline: scikit-learn's 1,797 real images of handwritten digits.

They are the test part of the UCI set "Optical Recognition of Handwritten Digits" (Alpaydin and
Kaynak, 1998): 8x8 images, 17 grey levels, ten classes. It is an ordinary TFDS data set in
array_record form, so the default run reads its data by the very path that ImageNet takes.
"""

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from moe.errors import UsageError

NAME = "digits"
VERSION = "1.0.0"
NAMES = (NAME, f"{NAME}:{VERSION}")
_SPLIT_SEED = 0
_TEST_FRACTION = 0.2


class Digits(tfds.core.GeneratorBasedBuilder):
    """Builds `digits` in TFDS's form: image uint8 (8, 8, 1) in 0..255, label in 0..9."""

    VERSION = tfds.core.Version(VERSION)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits, 8x8 grey images, from scikit-learn.",
            features=tfds.features.FeaturesDict(
                {
                    # Not `Image`: encoding its PNG files would need TensorFlow.
                    "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing is downloaded
        from sklearn.datasets import load_digits  # a second, and needed once

        data = load_digits()
        images = np.round(data.images * (255 / 16)).astype(np.uint8)[..., None]
        test = stratified_mask(data.target, _TEST_FRACTION, _SPLIT_SEED)
        return {
            "train": self._generate_examples(images, data.target, ~test),
            "test": self._generate_examples(images, data.target, test),
        }

    def _generate_examples(self, images, labels, chosen) -> Iterator[tuple[int, dict]]:
        for i in np.flatnonzero(chosen):
            yield int(i), {"image": images[i], "label": int(labels[i])}


def stratified_mask(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Chooses round(fraction * count) examples of every class at random.

    Args:
        labels: int [N].
        fraction: in [0, 1].
        seed: the same seed chooses the same examples.

    Returns:
        bool [N], True where chosen.
    """
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        chosen[members[: round(fraction * len(members))]] = True
    return chosen


def prepare(data_dir: str) -> str:
    """Writes `digits` under `data_dir` in array_record form, unless it is there already.

    The files are written in a folder of their own and renamed into place: of several processes
    that do this at once one wins and the others drop their copy, and a process killed half way
    leaves nothing that could be taken for the data set.

    Returns:
        The folder of the prepared set.

    Raises:
        UsageError: the folder is not on a local disk, or cannot be written.
    """
    final = os.path.join(data_dir, NAME, VERSION)
    if os.path.isdir(final):
        return final
    if "://" in data_dir:
        raise UsageError(
            f"cannot write the data set 'digits' to {data_dir}: expected a folder of a local disk; "
            "pass --config.data.data_dir=DIR"
        )
    try:
        os.makedirs(os.path.dirname(final), exist_ok=True)
        print(f"preparing the data set 'digits' in {final} (once, offline)", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=data_dir, prefix="incomplete.digits.") as staging:
            _build(staging)
            _rename(os.path.join(staging, NAME, VERSION), final)
    except OSError as error:
        raise UsageError(
            f"cannot write the data set 'digits' to {data_dir} ({error.strerror or error}): "
            "pass a folder that can be written as --config.data.data_dir=DIR"
        ) from error
    return final


def _build(staging: str) -> None:
    """Runs TFDS in `staging`, without its banners and progress bars."""
    builder = Digits(data_dir=staging, file_format="array_record")
    silence = io.StringIO()
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        builder.download_and_prepare()


def _rename(made: str, final: str) -> None:
    """Moves the folder `made` to `final`; keeps what is there if another process was faster."""
    try:
        os.rename(made, final)
    except OSError:
        if not os.path.isdir(final):
            raise
