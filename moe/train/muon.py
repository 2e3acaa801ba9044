"""Defines Muon's direction: the momentum of each matrix, made nearly orthogonal.

Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; Liu et al. 2025,
"Muon is scalable for LLM training", for the scale. An array may hold many matrices, those of equal
layers and of a layer's experts: what is done to one does not depend on the others.
"""

import math

import jax
import jax.numpy as jnp
import optax

from moe.nn.matrices import matrix

STEPS = 5
QUINTIC = (3.4445, -4.7750, 2.0315)  # of Jordan et al.: the steepest at 0 whose values stay near 1
RMS = 0.2  # of an update's entries, as AdamW's are


def muon(momentum: float, others: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns the matrices' Nesterov momentum made orthogonal, and the `others`' own direction.

    An orthogonal matrix [m, n] has entries of root mean square 1 / sqrt(max(m, n)): they are scaled
    to `RMS`, which is about what AdamW's are, so that its learning rates and weight decays hold.
    """

    def label(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "matrices" if matrix(path) else "others", params
        )

    def direction(path, momentum):
        scale = RMS * math.sqrt(max(_sizes(momentum, *matrix(path))))
        return scale * orthogonal(momentum, *matrix(path))

    matrices = optax.chain(
        optax.trace(momentum, nesterov=True),
        optax.stateless(lambda momenta, _: jax.tree_util.tree_map_with_path(direction, momenta)),
    )
    return optax.partition({"matrices": matrices, "others": others}, label)


def orthogonal(kernel, inputs: int = 1, outputs: int = 1):
    """Returns U S' V^T for each matrix U S V^T of a kernel, with S' from about 0.7 to 1.2 wherever
    S is not tiny beside the norm.

    Five steps X <- a X + (b A + c A^2) X, A = X X^T, of Newton and Schulz, from X / ||X||. A matrix
    of zeros, an expert's that had no token, stays one. Products are batched over the axes before a
    matrix, which stay as they are: merging layers with experts would move these between devices.

    Args:
      inputs, outputs: how many of the last axes are a matrix's.
    """
    m, n = _sizes(kernel, inputs, outputs)
    x = kernel.reshape(*kernel.shape[: kernel.ndim - inputs - outputs], m, n)
    if m > n:
        x = x.mT  # the shorter side squared is what is computed with
    x /= jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-8
    a, b, c = QUINTIC
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if m > n else x).reshape(kernel.shape)


def _sizes(kernel, inputs: int, outputs: int) -> tuple[int, int]:
    """Returns the inputs and outputs of each matrix of a kernel."""
    shape = kernel.shape[kernel.ndim - inputs - outputs :]
    return math.prod(shape[:inputs]), math.prod(shape[inputs:])
