"""Moves what workers keep of their gradients to another number of workers.

A checkpoint has an array [W, *shape] for each parameter, of W workers (`moe.train.compressed`).
What counts for the parameters is the mean over workers, of what is still to be sent as of what EF21
has sent: each new worker gets the mean of the old ones. On the same number each keeps its own.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from moe.store import stored

PREFIX = "compress.own."


def as_saved(directory: pathlib.Path, like: dict[str, Any]) -> dict[str, Any]:
    """Returns the shapes of an item's arrays as it has them, of as many workers as it was saved by.

    Raises:
      ValueError: an array cannot be read.
    """

    def saved(name: str, leaf):
        workers = stored.open_array(directory, name).result().shape[0]
        if workers == leaf.shape[0]:
            return leaf
        mesh, (axis, *rest) = leaf.sharding.mesh, leaf.sharding.spec
        spread = axis if workers % mesh.shape[axis] == 0 else None
        where = NamedSharding(mesh, PartitionSpec(spread, *rest))
        return jax.ShapeDtypeStruct((workers, *leaf.shape[1:]), leaf.dtype, sharding=where)

    return {n: saved(n, leaf) if n.startswith(PREFIX) else leaf for n, leaf in like.items()}


def moved(arrays: dict[str, jax.Array], like: dict[str, Any]) -> dict[str, jax.Array]:
    """Returns the arrays, those of other numbers of workers as `like` has them."""
    others = {n: a for n, a in arrays.items() if n in like and a.shape != like[n].shape}
    if not others:
        return arrays

    def spread(others):
        return {n: jnp.broadcast_to(a.mean(0), like[n].shape) for n, a in others.items()}

    layout = {n: like[n].sharding for n in others}
    return arrays | jax.jit(spread, out_shardings=layout)(others)
