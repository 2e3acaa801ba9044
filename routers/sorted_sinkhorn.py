"""Top-k with an order: a soft indicator for each of the k places, by entropic optimal transport."""

from functools import partial

import jax
import jax.numpy as jnp

from isotonic.rows import below_infinity
from routers.operands import rows, whole
from routers.soft_masks import largest


def sorted_sinkhorn_topk(x, k, *, strength=1.0, axis=-1, tol=1e-6, num_iters=1000):
    r"""Returns soft indicators of the largest, second, ..., k-th largest score (sorted SOFT).

    The first k columns of the entropic optimal transport plan of the items, of mass 1 each, to
    the k + 1 anchors a = (k, ..., 1, 0), the last of which takes the n - k items that are left:

      min_{P >= 0}  \sum_ij P_ij (x_i - a_j)^2 + 2 lam \sum_ij P_ij (log P_ij - 1),
      \sum_j P_ij = 1,    \sum_i P_ij = 1 for j <= k, and n - k for j = k + 1,    lam = strength.

    Only the cross terms matter, P_ij ~ exp(x_i a_j/lam): strength is in units of x, and with k = 1
    this is `sinkhorn_topk_mask`. The paper divides the cost by its largest entry C_max before it
    weighs the entropy with eps, hence strength = eps C_max/2. No maximum is taken here: one over
    the batch, as in the authors' code, makes rows depend on each other. For the paper's scale
    pass an array of strengths, one per row.

    Args:
      x: scores, any shape; float16, bfloat16, float32 or float64 (solved in float32 or better).
        Entries of -inf get weight 0; a row with m < k others fills the first m places only.
      k: how many places, static, a whole number in [1, n].
      strength: lam > 0; a number or an array that broadcasts against x without `axis`. May be
        traced. The indicators tend to 0 and 1 as lam falls and to 1/n as it grows.
      axis: the axis of the items.
      tol: where Sinkhorn's iteration stops: the error of the columns' sums, each relative to its
        mass; static.
      num_iters: the most iterations, static. They start from the solution of a tiny lam. Above
        it they are many: some tens where lam is like the spread of the scores, growing as 1/lam;
        of 400 normal scores with k = 28 and lam = 0.03 the default leaves an error of 3e-4.

    Returns:
      The indicators, of x's dtype and of its shape with an axis of the k places appended. Their
      sum over the places is a top-k mask whose weights add up to k.

    Derivative in x and strength, forward and reverse, by the implicit function theorem: one linear
    system of size k per row, whatever the number of iterations.

    Raises:
      ValueError: k not whole, not static or outside [1, n], or strength <= 0 (where not traced).

    Source: Xie et al. 2020, sorted SOFT top-k.
    """
    k = whole(k)
    x, _, lam, restore = rows(x, k, strength, axis)
    plan = jax.jit(_plan, static_argnums=(0, 1, 2))  # so that eager calls do not compile again
    plan = plan(k, tol, num_iters, below_infinity(x), lam)[..., :k]
    wrong = jnp.isnan(x).any(-1) | jnp.isnan(lam)
    plan *= jnp.where(wrong, jnp.nan, 1).astype(x.dtype)[..., None, None]
    return jax.vmap(restore, -1, -1)(plan)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _plan(k, tol, num_iters, x, lam):
    r"""Returns the plan `[..., n, k + 1]`.

    Its unknowns are k thresholds: P_ij ~ exp(-\sum_{b < j} (x_i - theta_b)/lam). They are found as
    moves from the midpoints of the sorted scores, the solution of a narrow lam, so that neither
    large scores nor a small lam costs digits.
    """
    real = x > -jnp.inf
    count = real.sum(-1, keepdims=True).astype(x.dtype)
    place = jnp.broadcast_to(jnp.arange(k + 1), (*count.shape[:-1], k + 1))
    mass = jnp.where(place < k, place < count, jnp.maximum(count - k, 0))
    used = mass > 0
    log_mass = jnp.log(jnp.where(used, mass, 1))
    present = used[..., None, :] & real[..., None]
    best = largest(x, k + 1)
    middle = jnp.where(used[..., 1:], best[..., :-1] / 2 + best[..., 1:] / 2, 0)
    gap = jnp.where(real, x, 0)[..., None] - middle[..., None, :]
    edge = [(0, 0)] * x.ndim

    def log_plan(move):
        step = gap / lam[..., None, None] - move[..., None, :]
        # Up to a term of the item: summed away from its best place, where the digits matter.
        before = jnp.pad(jnp.cumsum(jnp.maximum(step, 0), -1), [*edge, (1, 0)])
        after = jnp.cumsum(jnp.maximum(-step, 0)[..., ::-1], -1)[..., ::-1]
        logits = jnp.where(present, -before - jnp.pad(after, [*edge, (0, 1)]), -jnp.inf)
        return jax.nn.log_softmax(logits, where=present)

    def missing(move):
        """Returns the logarithm of what the columns should have over what they have."""
        return jnp.where(used, log_mass - jax.nn.logsumexp(log_plan(move), -2), 0)

    def wrong(error):
        return (jnp.abs(error) > tol).any(-1, keepdims=True)

    def unfinished(carry):
        _, error, passes = carry
        return (passes < num_iters) & wrong(error).any()

    def improve(carry):
        move, error, passes = carry
        move += jnp.where(wrong(error), jnp.diff(error), 0)  # no row waits for the others
        return move, missing(move), passes + 1

    start = jnp.zeros_like(middle)
    move, _, _ = jax.lax.while_loop(unfinished, improve, (start, missing(start), 0))
    return jnp.exp(log_plan(move))


@_plan.defjvp
def _plan_jvp(k, tol, num_iters, primals, tangents):
    (x, lam), (dx, dlam) = primals, tangents
    plan = _plan(k, tol, num_iters, x, lam)
    log_plan = jnp.log(jnp.where(plan > 0, plan, 1))
    # lam d log P_ij, up to terms of row i and without those of column j's potential.
    place = jnp.broadcast_to(jnp.arange(k + 1, dtype=x.dtype), plan.shape)
    direct = -place * dx[..., None] - log_plan * dlam[..., None, None]

    def slope(moves):
        return plan * (moves - (plan * moves).sum(-1, keepdims=True))

    # The columns keep their sums. Their matrix is the Laplacian of a graph, built from its edges
    # lest it cancels; those below the ridge join parts that are hard and exchange nothing.
    edges = jnp.einsum("...ij,...il->...jl", plan, plan, precision="highest")
    eye = jnp.broadcast_to(jnp.eye(k + 1, dtype=x.dtype), edges.shape)
    edges *= 1 - eye
    laplacian = eye * (edges.sum(-1, keepdims=True) + jnp.finfo(x.dtype).eps) - edges
    change = slope(direct).sum(-2)[..., 1:, None]
    potential = -jnp.linalg.solve(laplacian[..., 1:, 1:], change)[..., 0]
    potential = jnp.pad(potential, [(0, 0)] * (x.ndim - 1) + [(1, 0)])
    return plan, slope(direct + potential[..., None, :]) / lam[..., None, None]
