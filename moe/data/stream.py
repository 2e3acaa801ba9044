"""Numbers the examples of any task, orders them by epoch, prepares batches ahead of their use.

Training examples are numbered from zero for ever: step s of a run holds the numbers
s * batch_size .. (s + 1) * batch_size - 1, and number g shows example order(g) of the source. So a
batch depends on its step and not on what came before it, nor on how many processes share the work.

Grain walks through the steps and prepares batches ahead in a thread. Shuffling and chance are
numpy's: Grain's index shuffle and a numpy Generator made the usual way cost 35 microseconds an
example each, a permutation per epoch and a stream keyed by (seed, g) cost 0.1 and 10.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from numpy.random.bit_generator import ISeedSequence

from moe import seeds
from moe.errors import UsageError

Batch = dict[str, np.ndarray]
EPOCH = "order of an epoch"


def from_step(start_step: int, make: Callable[[int], Batch]) -> Iterator[Batch]:
    """Yields make(start_step), make(start_step + 1), ... without end, prepared ahead.

    Raises:
        UsageError: the step is below 0.
    """
    if start_step < 0:
        raise UsageError(f"start_step={start_step}: expected 0 or more")
    return _prefetch(grain.MapDataset.range(start_step, sys.maxsize).map(make))


def up_to(steps: int, make: Callable[[int], Batch]) -> Iterator[Batch]:
    """Yields make(0), ..., make(steps - 1), prepared ahead."""
    return _prefetch(grain.MapDataset.range(steps).map(make))


def _prefetch(batches: grain.MapDataset) -> Iterator[Batch]:
    """Makes batches one after the other in a thread, two ahead of their use."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(batches.to_iter_dataset(options))


def epoch_order(length: int, seed: int, use: str = EPOCH, *numbers: int) -> Callable[[int], int]:
    """Returns number -> index of the example: a new permutation of 0..length-1 every epoch.

    Args:
        length: the number of examples, at most some 10^8: an epoch's order is held in memory.
        seed: of the order.
        use: of the seed; `numbers` tell several orders of one use apart.
    """

    @functools.lru_cache(maxsize=2)  # a batch may straddle two epochs
    def permutation(epoch: int) -> np.ndarray:
        root = seeds.root(seed, use, *numbers, epoch)
        return np.random.default_rng(root).permutation(length)

    def order(number: int) -> int:
        epoch, position = divmod(number, length)
        return int(permutation(epoch)[position])

    return order


class _Key(ISeedSequence):
    """Hands its two words to the bit generator as they are: Philox needs no mixing of its key."""

    def __init__(self, *words: int):
        self.words = words

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        return np.array(self.words, dtype)


def example_rngs(seed: int) -> Callable[[int], np.random.Generator]:
    """Returns number -> the random stream of that example: Philox, keyed by the number."""
    root = int(seeds.root(seed, "augmentation").generate_state(1, np.uint64)[0])
    return lambda number: np.random.Generator(np.random.Philox(_Key(root, number)))


def positions(batch_size: int, rows: Sequence[int] | None) -> np.ndarray:
    """Returns the positions in a batch that are to be made: all, or the given rows.

    Raises:
        UsageError: the batch is empty, or the rows are not increasing ones of it.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size}: expected 1 or more; pass --config.batch_size")
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    if not len(rows) or rows[0] < 0 or rows[-1] >= batch_size or (np.diff(rows) < 1).any():
        raise UsageError(f"rows {rows.tolist()}: expected increasing ones of 0..{batch_size - 1}")
    return rows
