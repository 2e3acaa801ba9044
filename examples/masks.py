"""Lists the top-k masks of `routers` under one signature, at one width: the arms of the examples.

Their `strength` means something else for each. A mask adds noise to every score, so to say, of a
distribution F that is the mask's own, and an item counts as far as it then passes the threshold.
`width` is the standard deviation of that noise, in units of the scores, whatever the mask: masks of
one width blur the order of the scores equally.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

import routers


class Mask(NamedTuple):
    """Holds an operator `(x, k, strength, key) -> weights`, and its F's deviation at strength 1."""

    operator: Callable
    deviation: float
    sums_to_k: bool = True
    exact_zeros: bool = False


def _straight_through(x, k, strength, key):
    """Returns the hard mask, with the derivative of x/strength in its place."""
    hard = jnp.put_along_axis(jnp.zeros_like(x), jax.lax.top_k(x, k)[1], 1, axis=-1, inplace=False)
    return hard + (x - jax.lax.stop_gradient(x)) / strength


def _power(p: float):
    return lambda x, k, strength, key: routers.sparse_topk_mask(x, k, p=p, strength=strength)


def _plain(operator):
    return lambda x, k, strength, key: operator(x, k, strength=strength)


LOGISTIC, LAPLACE = math.pi / math.sqrt(3), math.sqrt(2)
# F(u) = u^(q-1) on [0, 1] has the moments (q-1)/q and (q-1)/(q+1): q = 2 and q = 4.
UNIFORM, CUBIC = math.sqrt(1 / 12), math.sqrt(3 / 5 - 9 / 16)

MASKS = {
    "sparse": Mask(_power(2.0), UNIFORM, exact_zeros=True),
    "sparse_smooth": Mask(_power(4 / 3), CUBIC, exact_zeros=True),
    "lapsum": Mask(_plain(routers.lapsum_topk_mask), LAPLACE),
    "sinkhorn": Mask(_plain(routers.sinkhorn_topk_mask), LOGISTIC),
    "sigmoid": Mask(_plain(routers.sigmoid_topk_mask), LOGISTIC, sums_to_k=False),
    "exactly_k": Mask(_plain(routers.exactly_k_marginals), LOGISTIC),
    "perturbed": Mask(
        lambda x, k, strength, key: routers.perturbed_topk_mask(
            x, k, key, num_samples=32, strength=strength
        ),
        1.0,
        exact_zeros=True,
    ),
    "hard": Mask(_straight_through, 1.0, exact_zeros=True),
}


def soft_mask(name: str, x, k: int, width, key=None):
    """Returns the weights of the k largest of each row of x, by the mask `name` of that width.

    Args:
      name: of `MASKS`.
      x: scores [..., n].
      k: how many, static.
      width: above 0; may be traced.
      key: of the draws; only `perturbed` has any.
    """
    mask = MASKS[name]
    return mask.operator(x, k, width / mask.deviation, key)
