"""Gives a part of a model random streams of its own, so that what it draws moves nobody else's."""

import jax.numpy as jnp
from flax import nnx


def aside(rngs: nnx.Rngs, keys: int) -> nnx.Rngs:
    """Returns streams for a part that may draw any number of keys, the first of which is the next
    of `rngs`; `rngs` goes on as if the part had drawn `keys` of them.

    So two models that differ in this part alone start with the same parameters elsewhere.
    """
    own = nnx.Rngs()
    own.default = _Own(rngs.params(), tag="default")
    for _ in range(keys - 1):
        rngs.params()
    return own


class _Own(nnx.RngStream):
    """Gives its key itself first, then keys that are derived from it."""

    def __call__(self):
        first, derived = self.count[...] == 0, super().__call__()
        return jnp.where(first, self.key[...], derived)
