"""Top-k with an order: a soft indicator for each of the k places, by entropic optimal transport."""

from functools import partial

import jax
import jax.numpy as jnp

from isotonic.rows import below_infinity
from routers.operands import rows, whole
from routers.soft_masks import largest


def sorted_sinkhorn_topk(x, k, *, strength=1.0, axis=-1, tol=1e-6, num_iters=50):
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
      tol: where the iteration stops: the error of the columns' sums, each relative to its mass;
        static.
      num_iters: the most iterations, static, each a step of Sinkhorn's and one of Newton's, from
        the solution of a tiny lam. The default is enough for scores like 1 and lam from
        1e-6 to 1e4, and far fewer where no scores are nearly ties. A row ends earlier where its
        dtype allows nothing nearer.

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

    return jnp.exp(log_plan(_balance(log_plan, mass, jnp.zeros_like(middle), tol, num_iters)))


def _balance(log_plan, mass, move, tol, num_iters):
    """Returns moves near `move` by which the columns of the plan sum to `mass` [..., k + 1].

    One iteration is a step of Sinkhorn's, then a damped one of Newton's. Both come nearer by the
    dual problem, sum_i logsumexp_j - sum_j mass_j potential_j; the second does so in few steps.
    """
    used = mass > 0
    log_mass = jnp.log(jnp.where(used, mass, 1))

    def missing(log_plan):
        """Returns the logarithm of what the columns should have over what they have."""
        return jnp.where(used, log_mass - jax.nn.logsumexp(log_plan, -2), 0)

    def size(error):
        return jnp.abs(error).max(-1, keepdims=True)

    def improve(carry):
        move, error, going, passes = carry
        sinkhorn = move + jnp.diff(error)
        at = log_plan(sinkhorn)
        left = missing(at)
        # Where a step's entries differ by at most d, the curvature of a sum of logsumexp changes by
        # exp(d) at most, so that log(1 + d)/d of it comes nearer for sure (Sun and Tran-Dinh 2019,
        # generalized self-concordant functions).
        step = _potentials(jnp.exp(at), -mass * jnp.expm1(-left))
        d = jnp.ptp(step, -1, keepdims=True)
        newton = sinkhorn + jnp.diff(step) * jnp.where(d > 0, jnp.log1p(d) / d, 1)
        last = missing(log_plan(newton))
        # A small step is checked by the error as well: near the end rounding may spoil it.
        better = (d > 0.1) | (size(last) < size(left))
        new = jnp.where(better, last, left)
        move = jnp.where(going, jnp.where(better, newton, sinkhorn), move)
        # A row where neither step helps is as near as its dtype allows.
        on = going & (size(new) > tol) & (better | (size(left) < size(error)))
        return move, jnp.where(going, new, error), on, passes + 1

    def unfinished(carry):
        _, _, going, passes = carry
        return going.any() & (passes < num_iters)

    error = missing(log_plan(move))
    return jax.lax.while_loop(unfinished, improve, (move, error, size(error) > tol, 0))[0]


def _potentials(plan, change):
    """Returns potentials of the columns, the first 0, that change the columns' sums by `change`.

    The matrix, of the columns' sums by potentials, is the Laplacian of a graph, built from its
    edges lest it cancels; those below the ridge join parts that are hard and exchange nothing.
    """
    edges = jnp.einsum("...ij,...il->...jl", plan, plan, precision="highest")
    eye = jnp.broadcast_to(jnp.eye(plan.shape[-1], dtype=plan.dtype), edges.shape)
    edges *= 1 - eye
    laplacian = eye * (edges.sum(-1, keepdims=True) + jnp.finfo(plan.dtype).eps) - edges
    found = jnp.linalg.solve(laplacian[..., 1:, 1:], change[..., 1:, None])[..., 0]
    return jnp.pad(found, [(0, 0)] * (plan.ndim - 2) + [(1, 0)])


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

    # The columns keep their sums.
    potential = _potentials(plan, -slope(direct).sum(-2))
    return plan, slope(direct + potential[..., None, :]) / lam[..., None, None]
