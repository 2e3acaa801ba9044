"""Checksums of arrays: the same on every mesh, and other ones where a bit is another.

The bits of an array, as whole numbers, are multiplied along each axis by odd numbers that belong to
the places there, and summed modulo 2^32. A sum in integers has no order: each device sums its own
part. A change of one element always changes the sum, other changes escape once in about 2^32.

On accelerators the arrays are read once, by a program for each shape; the host gets the sums alone.
On CPUs numpy sums what the devices hold, for compiling would take longer than all the sums.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}  # by the bytes of an element


def checksums(arrays: dict[str, jax.Array]) -> dict[str, int]:
    """Returns a number below 2^32 for each array; every process must ask."""
    platforms = {device.platform for a in arrays.values() for device in a.devices()}
    sums = (_on_hosts if platforms == {"cpu"} else _on_devices)(list(arrays.values()))
    return {name: int(value) for name, value in zip(arrays, sums, strict=True)}


def of_part(part: np.ndarray, start: tuple[int, ...]) -> int:
    """Returns what a part of an array adds to its checksum, modulo 2^32.

    Args:
      start: the part's first place along each axis of the array.
    """
    spans = [(first, first + size) for first, size in zip(start, part.shape, strict=True)]
    words = part.view(UNSIGNED[part.dtype.itemsize]).astype(np.uint32, copy=False)
    return int(_contract(words, [_weights(axis, *span) for axis, span in enumerate(spans)]))


def _on_devices(arrays: list[jax.Array]) -> list[np.ndarray]:
    sums = [_summed(a, [_weights(i, 0, n) for i, n in enumerate(a.shape)]) for a in arrays]
    return jax.device_get(sums)


def _on_hosts(arrays: list[jax.Array]) -> np.ndarray:
    totals = [0] * len(arrays)
    for i, array in enumerate(arrays):
        for shard in array.addressable_shards:
            if shard.replica_id == 0:
                spans = [s.indices(n)[:2] for s, n in zip(shard.index, array.shape, strict=True)]
                totals[i] += of_part(np.asarray(shard.data), tuple(first for first, _ in spans))
    sums = np.array([total % 2**32 for total in totals], np.uint32)
    if jax.process_count() > 1:
        sums = process_allgather(sums).sum(0, dtype=np.uint32)
    return sums


@jax.jit
def _summed(array: jax.Array, weights: list[jax.Array]) -> jax.Array:
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(array, UNSIGNED[array.dtype.itemsize])
    return _contract(words.astype(jnp.uint32), weights)


def _contract(words, weights):
    for factors in reversed(weights):
        factors = factors.reshape((1,) * (words.ndim - 1) + (-1,))
        words = (words * factors).sum(-1, dtype=np.uint32)
    return words


def _weights(axis: int, start: int, stop: int) -> np.ndarray:
    """Returns odd numbers that look random, from MurmurHash3's last turn, for places on an axis."""
    place = np.arange(start, stop, dtype=np.uint32) + np.uint32((axis + 1) * 0x9E3779B9 % 2**32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        place = (place ^ (place >> shift)) * np.uint32(factor)
    return place | 1
