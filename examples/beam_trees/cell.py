"""Makes items of tokens, one item of two, and a class of the last one or two that are left.

The gated recursive cell (GRC) of Shen et al. 2019, as Chowdhury and Caragea 2023 use it:

  f, g, i, c = W2 drop(gelu(W1 [l; r]))
  parent = LN(sigmoid(f) l + sigmoid(g) r + sigmoid(i) c)
"""

import jax
import jax.numpy as jnp

from examples.layers import dense, drop, linear, norm, normalise


def init(key, tokens: int, width: int, classes: int, sides: int) -> dict:
    """Returns the parameters.

    Args:
      sides: 1 to read one tree of an example, 2 to compare two.
    """
    keys = jax.random.split(key, 7)
    features = width * (1 if sides == 1 else 4)
    return {
        "embedding": jax.random.normal(keys[0], (tokens, width)),
        "leaf": dense(keys[1], width, width),
        "leaf_norm": norm(width),
        "hidden": dense(keys[2], 2 * width, 4 * width),
        "gates": dense(keys[3], 4 * width, 4 * width),
        "norm": norm(width),
        "score": dense(keys[4], width, 1),
        "head": dense(keys[5], features, width),
        "classes": dense(keys[6], width, classes),
    }


def leaves(params, tokens):
    """Returns the items of tokens, [..., D]."""
    return normalise(params["leaf_norm"], linear(params["leaf"], params["embedding"][tokens]))


def compose(params, left, right, key, dropout: float):
    """Returns the parents of items and their neighbours to the right, [..., D]."""
    hidden = jax.nn.gelu(linear(params["hidden"], jnp.concatenate([left, right], -1)))
    f, g, i, c = jnp.split(linear(params["gates"], drop(key, hidden, dropout)), 4, -1)
    gate = jax.nn.sigmoid
    return normalise(params["norm"], gate(f) * left + gate(g) * right + gate(i) * c)


def score(params, parents):
    """Returns the scores of parents, by which one of them is made: [..., D] -> [...]."""
    return linear(params["score"], parents)[..., 0]


def classify(params, roots):
    """Returns the classes' logits: [N, sides, D] -> [N, classes]."""
    features = roots[:, 0]
    if roots.shape[1] == 2:
        a, b = roots[:, 0], roots[:, 1]
        features = jnp.concatenate([a, b, jnp.abs(a - b), a * b], -1)
    return linear(params["classes"], jax.nn.gelu(linear(params["head"], features)))
