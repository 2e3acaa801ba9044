"""Makes batches of images: prepared TFDS sets, augmentation and an exactly resumable loader.

    source = open_split("digits", "train")          # prepares itself, offline, at first use
    for batch in train_batches(source, batch_size=128, seed=0, start_step=0, image_size=8,
                               augment={"flip": False, "crop": 1, "mixup": 0.2}):
        batch["image"]                              # float32 [B, S, S, C] in [-1, 1]

A training batch is a function of (source, batch_size, seed, step, image_size, augment) alone: a
run stopped anywhere and resumed at its step sees the bits it would have seen, on any number of
processes. TensorFlow is needed by `python -m moe.data.prepare`, which converts a stock data set
once, and by nothing else here.
"""

from moe.data.images.augment import Augment
from moe.data.images.label_noise import parse_groups, with_label_noise
from moe.data.images.pipeline import eval_batches, train_batches
from moe.data.images.source import ImageSource, from_arrays, open_split

__all__ = [
    "Augment",
    "ImageSource",
    "eval_batches",
    "from_arrays",
    "open_split",
    "parse_groups",
    "train_batches",
    "with_label_noise",
]
