"""Every public operator as a function of (x, k, strength), for tests of what all of them hold."""

import jax
import numpy as np

from routers import (
    entmax,
    exactly_k_marginals,
    lapsum_topk_mask,
    permutahedron_projection,
    perturbed_kth_value,
    perturbed_topk_mask,
    sigmoid_topk_mask,
    sinkhorn_topk_mask,
    soft_rank,
    soft_sort,
    sorted_sinkhorn_topk,
    sparse_topk_magnitude,
    sparse_topk_mask,
    sparsemax,
    topk_hinge_loss,
)

KEY = jax.random.key(0, impl="rbg")


def _solved(operator, solver, p=2.0):
    return lambda x, k, strength: operator(x, k, p=p, strength=strength, solver=solver)


def _whole(operator, *rest):
    return lambda x, k, strength: operator(x, 2, *rest, strength=strength)


# By a threshold; k real, one for each row, traced or not.
REAL = {
    "mask": _solved(sparse_topk_mask, "threshold"),
    "smooth mask": _solved(sparse_topk_mask, "threshold", 4 / 3),
    "steep mask": _solved(sparse_topk_mask, "threshold", 5.0),
    "magnitude": _solved(sparse_topk_magnitude, "threshold"),
    "lapsum": lambda x, k, strength: lapsum_topk_mask(x, k, strength=strength),
    "sinkhorn": lambda x, k, strength: sinkhorn_topk_mask(x, k, strength=strength),
}
# The same by the solvers of the general problem.
SORTED = {
    "mask, pav": _solved(sparse_topk_mask, "pav"),
    "mask, merge": _solved(sparse_topk_mask, "merge"),
    "mask, dykstra": _solved(sparse_topk_mask, "dykstra"),
    "magnitude, merge": _solved(sparse_topk_magnitude, "merge"),
    "smooth mask, pav": _solved(sparse_topk_mask, "pav", 4 / 3),
    "smooth mask, merge": _solved(sparse_topk_mask, "merge", 4 / 3),
}
# k = 2 whatever is asked.
WHOLE = {
    "sigmoid": _whole(sigmoid_topk_mask),
    "sorted sinkhorn": _whole(sorted_sinkhorn_topk),
    "exactly k": _whole(exactly_k_marginals),
    "perturbed mask": _whole(perturbed_topk_mask, KEY),
    "perturbed value": _whole(perturbed_kth_value, KEY),
}
# No k.
ORDERS = {
    "rank": lambda x, k, strength: soft_rank(x, strength=strength),
    "sort": lambda x, k, strength: soft_sort(x, strength=strength),
    "projection": lambda x, k, strength: permutahedron_projection(
        x, np.arange(np.shape(x)[-1]), strength=strength
    ),
}
# Neither k nor strength.
SIMPLEX = {
    "sparsemax": lambda x, k, strength: sparsemax(x),
    "entmax": lambda x, k, strength: entmax(x),
}
STRONG = REAL | SORTED | WHOLE | ORDERS  # which have a strength
ALL = STRONG | SIMPLEX


def hinge(x):
    """The loss of rows `[G, n]`, whose labels are 0, 1, ..."""
    return topk_hinge_loss(x, np.arange(len(x)) % np.shape(x)[-1], KEY, k=2)
