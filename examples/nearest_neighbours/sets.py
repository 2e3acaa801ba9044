"""The images of the example, in three parts: training, validation and test."""

from typing import NamedTuple

import numpy as np

from examples import data

SETS = ("digits", "mnist_5k", "fashion_mnist")


class Part(NamedTuple):
    """Holds images [N, side, side, 1] from 0 to 1 and their classes [N]."""

    images: np.ndarray
    labels: np.ndarray


class Images(NamedTuple):
    """Holds the three parts of a set."""

    train: Part
    validation: Part
    test: Part

    @property
    def num_classes(self) -> int:
        return int(self.train.labels.max()) + 1


def load(name: str, data_dir: str | None = None, limit: int = 0) -> Images:
    """Returns a set, split once and for all: no seed of a run changes its parts.

    Digits and MNIST are cut into 70, 15 and 15 %; Fashion-MNIST has its own test part, and 5,000 of
    its training images are for validation. `limit` keeps so many images of each part, if not 0.
    """
    order = np.random.default_rng(0)
    if name == "fashion_mnist":
        arrays = data.load(name, data_dir)
        known = order.permutation(len(arrays["train_labels"]))
        whole = Part(arrays["train_images"], arrays["train_labels"])
        train, validation = _take(whole, known[5000:]), _take(whole, known[:5000])
        test = Part(arrays["test_images"], arrays["test_labels"].astype(np.int32))
    else:
        whole = _digits() if name == "digits" else Part(**data.load(name, data_dir))
        known = order.permutation(len(whole.labels))
        cuts = int(0.7 * len(known)), int(0.85 * len(known))
        train, validation, test = (_take(whole, some) for some in np.split(known, cuts))
    top = 16 if name == "digits" else 255
    parts = (Part(_scaled(part.images, top), part.labels) for part in (train, validation, test))
    return Images(*(Part(*(array[: limit or None] for array in part)) for part in parts))


def _digits() -> Part:
    from sklearn.datasets import load_digits

    found = load_digits()
    return Part(found.images, found.target)


def _take(part: Part, some: np.ndarray) -> Part:
    return Part(part.images[some], part.labels[some].astype(np.int32))


def _scaled(images: np.ndarray, top: int) -> np.ndarray:
    return (images.astype(np.float32) / top)[..., None]
