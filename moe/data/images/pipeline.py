"""Makes batches for training and evaluation: an endless stream that can start at any step.

`moe.data.stream` says what number g of an example is: here it is augmented by the random stream of
(seed, g), and mixup's partner of g is g + 1.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from moe.data import stream
from moe.data.images import transforms
from moe.data.images.augment import Augment
from moe.data.images.source import ImageSource
from moe.data.stream import Batch
from moe.errors import UsageError

_READ_THREADS = 16  # for images that are read and decoded one by one


def train_batches(
    source: ImageSource,
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    image_size: int,
    augment: Mapping[str, Any] | Augment,
    rows: Sequence[int] | None = None,
    num_threads: int | None = None,
) -> Iterator[Batch]:
    """Yields the batches of the steps start_step, start_step + 1, ... without end.

    Args:
        source: the examples, N of them; every N consecutive numbers from a multiple of N on, an
            epoch, show each example once, in an order of that epoch.
        batch_size: global, over all processes.
        seed: of the order and the augmentation, in 0..2^63-1.
        start_step: the step of the first batch.
        image_size: S, side of the images in pixels.
        augment: see `Augment` for the keys.
        rows: the b positions in the batch that this process makes, in increasing order; None
            for all of them.
        num_threads: threads that read examples, 0 for none beside the one that makes batches;
            None means 0 for a source in memory (they would fight for the interpreter), else 16.

    Yields:
        image float32 [b, S, S, C] in [-1, 1], label int32 [b]; with mixup also
        label_mixed int32 [b] and mix float32 [b], the weight of `label` in [0, 1].

    Raises:
        UsageError: an argument is out of range.
        DataError: from the iterator, where an example cannot be read or has no label.
    """
    settings = Augment.from_mapping(augment)
    rows = stream.positions(batch_size, rows)
    if not len(source):
        raise UsageError(f"split '{source.split}' of '{source.name}' is empty: pass a longer slice")
    order, rngs = stream.epoch_order(len(source), seed), stream.example_rngs(seed)
    mapping = _example_map(source, num_threads)
    mixed = settings.mixup > 0

    def example(number: int, index: int) -> tuple[np.ndarray, int, float]:
        rng, record = rngs(number), source[index]
        image = settings(record["image"], rng, image_size)
        return image, record["label"], rng.beta(settings.mixup, settings.mixup) if mixed else 1.0

    def batch(step: int) -> Batch:
        numbers = step * batch_size + rows
        needed = np.union1d(numbers, numbers + 1) if mixed else numbers  # each, and its partner
        # The order is looked up here, by one thread: those that read would all compute a new epoch.
        indices = [order(number) for number in needed.tolist()]
        images, labels, mix = zip(*mapping(example, needed.tolist(), indices), strict=True)
        images, labels = transforms.to_float(np.stack(images)), np.array(labels, np.int32)
        if not mixed:
            return {"image": images, "label": labels}
        own = np.searchsorted(needed, numbers)
        mix = np.array(mix, np.float32)[own]
        images = transforms.mixup(images[own], images[own + 1], mix[:, None, None, None])
        return {"image": images, "label": labels[own], "label_mixed": labels[own + 1], "mix": mix}

    return stream.from_step(start_step, batch)


def eval_batches(
    source: ImageSource,
    *,
    batch_size: int,
    image_size: int,
    rows: Sequence[int] | None = None,
    num_threads: int | None = None,
) -> Iterator[Batch]:
    """Yields each example once, in order; the last batch is filled up with zeros.

    Args: as for `train_batches`.

    Yields:
        image float32 [b, S, S, C] in [-1, 1], label int32 [b], and mask float32 [b]: 1 for an
        example, 0 for padding. Every process yields ceil(N / batch_size) batches of equal size.

    Raises: as `train_batches`.
    """
    rows = stream.positions(batch_size, rows)
    mapping = _example_map(source, num_threads)

    def example(index: int) -> tuple[np.ndarray, int]:
        record = source[index]
        return transforms.fit(record["image"], image_size), record["label"]

    def batch(step: int) -> Batch:
        indices = step * batch_size + rows
        indices = indices[indices < len(source)]
        examples = list(mapping(example, indices.tolist()))
        shape = len(rows), image_size, image_size, source.image_shape[-1]
        images = np.zeros(shape, np.float32)
        labels, mask = np.zeros(len(rows), np.int32), np.zeros(len(rows), np.float32)
        if examples:
            real = len(examples)  # rows increase, so that those past the end come last
            images[:real] = transforms.to_float(np.stack([image for image, _ in examples]))
            labels[:real] = [label for _, label in examples]
            mask[:real] = 1
        return {"image": images, "label": labels, "mask": mask}

    return stream.up_to(-(-len(source) // batch_size), batch)


def _example_map(source: ImageSource, num_threads: int | None) -> Callable[..., Iterator]:
    """Returns `map`, or the `map` of a pool of threads; both keep the order."""
    if num_threads is None:
        num_threads = 0 if source.in_memory else _READ_THREADS
    return ThreadPoolExecutor(num_threads).map if num_threads else map
