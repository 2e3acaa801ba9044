"""Draws docs/operators.png: what happens to one score of five as it crosses the others.

    python docs/draw_operators.py

The scores are (s, 2, 1, 0, -1) and k = 2, so that s enters the top 2 at s = 1. In the manner of
figure 1 of Sander et al., "Fast, Differentiable and Sparse Top-k" (ICML 2023).
"""

import pathlib

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from routers import sparse_topk_magnitude, sparse_topk_mask

K = 2
OTHERS = (2.0, 1.0, 0.0, -1.0)
COLOURS = {"hard": "0.55", "p = 2": "C0", "p = 4/3": "C3"}


def curves(operator, s):
    """Returns the operator's first entry at (s, others), for each s, and its derivative in s."""
    rows = jnp.stack([s, *(jnp.full_like(s, other) for other in OTHERS)], -1)
    for name, p in (("p = 2", 2.0), ("p = 4/3", 4 / 3)):

        def first(row, p=p):
            return operator(row, K, p=p)[0]

        value, slope = jax.jit(jax.vmap(jax.value_and_grad(first)))(rows)
        yield name, value, slope[:, 0]


def main():
    s = jnp.linspace(-0.5, 2.5, 1201)
    jump = np.where(s > 1, 1.0, 0.0)
    jump[np.argmin(np.abs(s - 1))] = np.nan  # a gap where the hard operator jumps
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.2), layout="constrained")
    for axis, operator, hard in (
        (axes[0], sparse_topk_mask, jump),
        (axes[1], sparse_topk_magnitude, jump * s),
    ):
        axis.plot(s, hard, color=COLOURS["hard"], label="hard")
        for name, value, slope in curves(operator, s):
            axis.plot(s, value, color=COLOURS[name], label=name)
            if operator is sparse_topk_mask:
                axes[2].plot(s, slope, color=COLOURS[name], label=name)
    for axis, title in zip(
        axes, ("mask", "top-k in magnitude", "derivative of the mask in s"), strict=True
    ):
        axis.set(title=title, xlabel="s, the score that crosses the others")
        axis.axvline(1, color="0.85", zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("entry of s")
    axes[0].legend(frameon=False)
    figure.savefig(pathlib.Path(__file__).with_name("operators.png"), dpi=150)


if __name__ == "__main__":
    main()
