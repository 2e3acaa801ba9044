r"""Votes of the k nearest neighbours, hard and soft.

Of a query with embedding e and N candidates e_i with classes y_i, d_i = |e - e_i|^2, the weights m
are a mask of the k smallest d_i, and class c gets

  p_c = \sum_i m_i [y_i = c] / \sum_i m_i,

the sum being k for masks that add up to k. As m hardens, p is the share of each class among the k
nearest.
"""

import jax
import jax.numpy as jnp

from examples.masks import soft_mask

# Of the loss: what every class is given, lest a vote without any neighbour of the right class has
# an infinite loss.
FLOOR = 2.0**-10


def distances(queries_QD, candidates_ND):
    """Returns the squared distances [Q, N]."""
    cross_QN = jnp.matmul(queries_QD, candidates_ND.T, precision="highest")
    squares_Q, squares_N = (queries_QD**2).sum(-1), (candidates_ND**2).sum(-1)
    return jnp.maximum(squares_Q[:, None] + squares_N - 2 * cross_QN, 0)


def weights(name: str, distances_QN, k: int, width, key=None):
    """Returns the weights m [Q, N] of the k nearest.

    Besides the masks of `examples.masks` there is `softmax`: k softmax(-d/width), the weights of
    neighbourhood component analysis (Goldberger et al. 2004), which know of no k.
    """
    if name == "softmax":
        return k * jax.nn.softmax(-distances_QN / width)
    return soft_mask(name, -distances_QN, k, width, key)


def shares(weights_QN, classes_NC):
    """Returns the votes p [Q, C]; `classes_NC` is one-hot."""
    total_Q1 = jnp.maximum(weights_QN.sum(-1, keepdims=True), jnp.finfo(weights_QN.dtype).tiny)
    return weights_QN @ classes_NC / total_Q1


def log_loss(shares_QC, labels_Q):
    """Returns -log p_y, with `FLOOR` spread over the classes (SOFT's loss, bounded)."""
    own_Q = jnp.take_along_axis(shares_QC, labels_Q[:, None], -1)[:, 0]
    return -jnp.log((1 - FLOOR) * own_Q + FLOOR / shares_QC.shape[-1])


def linear_loss(shares_QC, labels_Q):
    """Returns 1 - p_y (NeuralSort's loss, Grover et al. 2019)."""
    return 1 - jnp.take_along_axis(shares_QC, labels_Q[:, None], -1)[:, 0]


LOSSES = {"log": log_loss, "linear": linear_loss}


def hard_shares(queries_QD, candidates_ND, labels_N, k: int, num_classes: int):
    """Returns the share of each class [Q, C] among the k nearest of all candidates."""
    nearest_QK = jax.lax.top_k(-distances(queries_QD, candidates_ND), k)[1]
    return jax.nn.one_hot(labels_N[nearest_QK], num_classes).mean(1)
