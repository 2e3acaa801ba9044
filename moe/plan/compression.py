"""Counts the bytes of gradients that are sent in part, and those of sending all of them."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe.train.compressed import Compressor
from routers.compression import count

PLACE = 4  # bytes


class Compression(NamedTuple):
    """Holds what one chip exchanges along `data` in a step; bytes are of one chip.

    Attributes:
      workers: shards of `data`, n.
      entries: of the chip's part of a gradient, d.
      kept: of them sent, k.
      sent: values and places, all-gathered: (n - 1) k (4 + 4).
      whole: a ring's all-reduce of all entries, 2 (n - 1)/n d of 4 bytes, or of 2 where the model
        computes in bfloat16, as XLA then sums gradients.
    """

    workers: int
    entries: int
    kept: int
    sent: float
    whole: float

    @property
    def saves(self) -> bool:
        """Returns whether fewer bytes are sent: whether n k < d, of bfloat16 2 n k < d."""
        return self.sent < self.whole

    @property
    def most(self) -> float:
        """Returns the share `keep` below which this many workers save bytes."""
        return self.whole / (self.workers - 1) / (4 + PLACE) / self.entries


def measure(compressor: Compressor, dtype: str) -> Compression | None:
    """Returns what is sent of gradients; None where `data` has one shard, which sends nothing.

    Args:
      dtype: in which the model computes.
    """
    n, entries, kept = compressor.workers, 0, 0
    if n == 1:
        return None
    leaves = zip(*map(jax.tree.leaves, (compressor.params, compressor.stacked)), strict=True)
    for p, stacked in leaves:
        part = p.sharding.shard_shape(p.shape)
        rows = part[0] if stacked else 1
        entries += math.prod(part)
        kept += rows * count(math.prod(part) // rows, compressor.keep)
    whole = 2 * (n - 1) / n * entries * jnp.dtype(dtype).itemsize
    return Compression(n, entries, kept, float((n - 1) * kept * (4 + PLACE)), whole)


def verdict(found: Compression) -> str:
    """Returns in words what compression changes."""
    k, d, n = f"{found.kept:,}", f"{found.entries:,}", found.workers
    if found.saves:
        return f"fewer, as n k < d: {n} shards, {k} of {d} entries"
    return (
        f"not fewer: {n} shards, {k} of {d} entries; the share sent must be below {found.most:.3g} "
        "(--config.optimizer.compress.keep)"
    )
