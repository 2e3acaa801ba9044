r"""Top-k operators smoothed by Gaussian noise, and the loss that is made of one.

The mean of a hard operator over random perturbations of its input is smooth. With Z standard
normal and lam = strength, each is an average over `num_samples` draws of

  perturbed_topk_mask     E mask(x + lam Z)       derivative by integration by parts
  perturbed_kth_value     E (x + lam Z)_(k)       derivative draw by draw

where mask(x) marks the k largest entries and x_(k) is the k-th largest. Value and derivative use
the same draws; both are unbiased, and their errors fall as 1/sqrt(num_samples).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from routers.operands import as_scores, check_axis, class_numbers, nan_rows, rows, whole
from routers.selection import ROUNDS, kth_value, largest, ranks


def perturbed_topk_mask(x, k, key, *, num_samples=100, strength=1.0, axis=-1):
    r"""Returns the top-k mask averaged over noise: weights in [0, 1] that sum to k.

    y = (1/B) \sum_b mask(x + lam Z_b),    Z_b ~ N(0, I),  lam = strength,  B = num_samples.

    Args:
      x: scores, any shape; float16, bfloat16, float32 or float64 (perturbed in float32 or better).
        Entries of -inf get weight 0; rows with fewer than k others select all of them.
      k: how many to select, static, a whole number in [1, n].
      key: key of the draws.
      num_samples: B, static. Memory grows with it: all draws are held at once.
      strength: lam > 0; a number or an array that broadcasts against x without `axis`. May be
        traced. The mean tends to the hard mask as lam falls and to k/n as it grows.
      axis: the axis of the items.

    Returns:
      The mask, of x's shape and dtype: whole multiples of 1/B.

    Derivative in x and strength, forward and reverse, of first order only: the mean over b of
    (mask(x + lam Z_b) - mask(x)) (<Z_b, dx> + (|Z_b|^2 - n) d lam) / lam.  Unbiased for that of
    the expectation; mask(x), which adds 0 on average, keeps the sum at k and hard rows free of
    noise.

    Raises:
      ValueError: k not whole, not static or outside [1, n], num_samples < 1, or strength <= 0
        (where not traced).

    Source: Berthet et al. 2020, perturbed optimizers.
    """
    k = whole(k)
    x, _, lam, restore = rows(x, k, strength, axis)
    return restore(_mean_mask(k, nan_rows(x, lam), lam, _noise(key, num_samples, x)))


def perturbed_kth_value(x, k, key, *, num_samples=10, strength=1.0, axis=-1):
    r"""Returns the k-th largest score averaged over noise: a smooth order statistic.

    t = (1/B) \sum_b (x + lam Z_b)_(k),    Z_b ~ N(0, I),  lam = strength,  B = num_samples.

    Arguments and errors as for `perturbed_topk_mask`.

    Returns:
      The value, of x's shape without `axis` and of its dtype; -inf where a row has fewer than k
      entries above -inf.

    Derivative in x and strength, forward and reverse: the mean over b of dx_i + Z_bi d lam at the
    item i that comes k-th in draw b. In x these are non-negative weights that sum to 1.

    Source: Garcin et al. 2022, who use it with k + 1 in `topk_hinge_loss`.
    """
    k, scores = whole(k), as_scores(x)
    x, _, lam, _ = rows(scores, k, strength, axis)
    noisy = nan_rows(x, lam)[None] + lam[None, ..., None] * _noise(key, num_samples, x)
    return kth_value(noisy, k).mean(0).astype(scores.dtype)


def topk_hinge_loss(scores, labels, key, *, k=5, num_samples=10, strength=0.2, margins=None):
    r"""Stochastic top-k hinge loss: is the label's score among the k largest, with a margin?

    loss = relu(m_y + t - s_y),    t = `perturbed_kth_value`(s, k + 1),

    0 only if s_y exceeds the (k + 1)-th largest score by the margin. Balanced: m = 1. For classes
    of unequal numbers of training examples: `rarity_margins`, so that rare ones keep a larger
    distance.

    Args:
      scores: s `[..., V]`, the V classes last; dtypes as for `perturbed_topk_mask`.
      labels: y `[...]`, whole numbers in [0, V).
      key: key of the draws.
      k: how many guesses are allowed, static, a whole number in [1, V - 1].
      num_samples: draws per example, static; 5 to 10 are enough.
      strength: lam > 0, of the noise, in units of the scores.
      margins: `[V]`, a margin per class; 1 for all if None.

    Returns:
      The loss of each example `[...]`, of the scores' dtype. Convex in the scores.

    Derivative in scores, strength and margins, forward and reverse: that of the value, with the
    (k + 1)-th scores of the draws pushed down and the label's pushed up.

    Raises:
      ValueError: labels or margins of the wrong shape, labels that are not whole numbers in
        [0, V) (where not traced), k outside [1, V - 1]; and those of `perturbed_kth_value`.

    Source: Garcin et al. 2022, stochastic smoothing of the top-K calibrated hinge loss.
    """
    k, scores = whole(k), as_scores(scores)
    check_axis(-1, scores)
    num_classes = scores.shape[-1]
    if not 1 <= k < num_classes:
        raise ValueError(f"k must be at least 1 and below {num_classes}, the classes; got {k}")
    labels = class_numbers(labels, scores)
    margin = 1
    if margins is not None:
        if np.shape(margins) != (num_classes,):
            raise ValueError(f"margins must be of shape ({num_classes},), not {np.shape(margins)}")
        margin = jnp.asarray(margins, scores.dtype)[labels]
    t = perturbed_kth_value(scores, k + 1, key, num_samples=num_samples, strength=strength)
    own = jnp.take_along_axis(scores, labels[..., None], -1, mode="fill")[..., 0]
    return jax.nn.relu(margin + t - own)


def _noise(key, num_samples, x):
    """Returns Z `[B, ..., n]`."""
    num_samples = whole(num_samples, "num_samples")
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, not {num_samples}")
    return jax.random.normal(key, (num_samples, *x.shape), x.dtype)


def rarity_margins(counts, largest: float) -> np.ndarray:
    """Returns a margin for each class, proportional to n_c^(-1/4), of which the rarest's is
    `largest`, to be tuned (Cao et al. 2019, LDAM).

    Args:
      counts: n `[V]`, the classes' numbers of training examples; 0 counts as 1.
    """
    margins = np.maximum(np.asarray(counts, np.float64), 1) ** -0.25
    return (largest * margins / margins.max()).astype(np.float32)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _mean_mask(k, x, lam, noise):
    return _mask(k, x[None] + lam[None, ..., None] * noise).mean(0)


@_mean_mask.defjvp
def _mean_mask_jvp(k, primals, tangents):
    x, lam, noise = primals
    dx, dlam, _ = tangents
    masks = _mask(k, x[None] + lam[None, ..., None] * noise)
    real = x[None] > -jnp.inf
    noise = jnp.where(real, noise, 0)
    spread = (noise**2).sum(-1) - real.sum(-1)
    # One number per draw and row:
    moves = ((noise * dx[None]).sum(-1) + spread * dlam[None]) / lam[None]
    return masks.mean(0), ((masks - _mask(k, x)[None]) * moves[..., None]).mean(0)


def _mask(k, x):
    """Returns the hard mask, by places: scores far above the noise may tie."""
    chosen = ranks(x, k) < k if k <= ROUNDS else largest(x, k)
    mask = chosen.astype(x.dtype)
    return jnp.where(x > -jnp.inf, mask, jnp.where(x == -jnp.inf, 0, jnp.nan))
