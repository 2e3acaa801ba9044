"""Derives every random stream of a run from its seed: one root for each use, none equal to another.

All bits of the seed and the use are hashed together. (`jax.random.key` would drop the upper half of
a seed, and two uses of one key meet: the first parameter's key was the first step's.)
"""

import jax
import numpy as np

from moe.errors import UsageError

# Their order is part of what a seed means: a new use comes last.
USES = ("parameters", "steps", "order of an epoch", "augmentation", "mixture", "generation")
USES += ("label noise",)
LIMIT = 1 << 63


def root(seed: int, use: str, *numbers: int) -> np.random.SeedSequence:
    """Returns the root of the random streams of one use, and of the `numbers` within it.

    Raises:
      UsageError: the seed is out of range.
    """
    if not 0 <= seed < LIMIT:
        raise UsageError(f"seed={seed}: expected a whole number from 0 to 2^63-1")
    return np.random.SeedSequence(seed, spawn_key=(USES.index(use), *numbers))


def key(seed: int, use: str) -> jax.Array:
    """Returns JAX's key of one use."""
    low, high = (int(word) for word in root(seed, use).generate_state(2))
    return jax.random.fold_in(jax.random.key(low), high)
