"""Defines the losses of top-k classification: a guess of k classes is right if it has the label."""

import dataclasses
from collections.abc import Iterator
from typing import Annotated

import jax
import jax.numpy as jnp

from routers import rarity_margins, sparse_topk_loss, topk_hinge_loss

LOSSES = ("topk", "topk_hinge")


@dataclasses.dataclass(frozen=True)
class TopK:
    """Holds the section `topk` of a config.

    Attributes:
      k: how many guesses are allowed; evaluation reports top-k accuracy of it, whatever the loss.
      p, strength: of `routers.sparse_topk_loss`, the loss "topk"; the strength is also that of the
        noise of `routers.topk_hinge_loss`, the loss "topk_hinge", in units of the scores.
      num_samples: draws per example and step, of topk_hinge.
      largest_margin: that of the rarest class, of topk_hinge for classes of unequal numbers; 0: all
        margins are 1.
    """

    k: Annotated[int, "[1, 1e6]"] = 5
    p: Annotated[float, "[1.01, 100]"] = 2.0
    strength: Annotated[float, "[1e-6, 1e6]"] = 1.0
    num_samples: Annotated[int, "[1, 1e4]"] = 10
    largest_margin: Annotated[float, "0 or [1e-6, 1e6]"] = 0.0

    def misfits(self, loss: str, classes: int, counts, smoothing: float) -> Iterator[str]:
        """Yields what does not fit a loss, of `LOSSES` or another; no classes are not known yet."""
        if loss not in LOSSES:
            return
        if classes and self.k >= classes:
            yield (
                f"config.topk.k={self.k} must be below the {classes} classes: a guess of all of "
                "them is always right"
            )
        if smoothing:
            yield (
                f"config.optimizer.label_smoothing={smoothing} is of the losses softmax and "
                f"sigmoid; config.loss={loss!r} has no distribution to smooth"
            )
        if self.largest_margin and loss != "topk_hinge":
            yield (
                f"config.topk.largest_margin={self.largest_margin} is of the loss topk_hinge; "
                f"config.loss={loss!r} has none"
            )
        if counts and classes and len(counts) != classes:
            yield f"config.data.class_counts has {len(counts)} numbers for {classes} classes"

    def losses(self, loss: str, logits, labels, counts, key=None, scale: float = 1.0) -> jax.Array:
        """Returns each example's loss, [B].

        Args:
          counts: of the classes' training examples, for the margins.
          key: of the noise; None: none, as in evaluation, the limit of a small strength.
          scale: by which a head has multiplied its scores: settings are in units of these.
        """
        scores = logits / scale
        if loss == "topk":
            found = sparse_topk_loss(scores, labels, self.k, p=self.p, strength=self.strength)
            return scale * found
        margins = None
        if self.largest_margin:
            margins = rarity_margins(counts or (1,) * logits.shape[-1], self.largest_margin)
        if key is None:
            return scale * _hinge(scores, labels, self.k, margins)
        noise = {"num_samples": self.num_samples, "strength": self.strength}
        return scale * topk_hinge_loss(scores, labels, key, k=self.k, margins=margins, **noise)


def _hinge(scores, labels, k: int, margins):
    """Returns relu(margin + (k + 1)-th largest score - the label's)."""
    margin = 1 if margins is None else jnp.asarray(margins)[labels]
    other = jnp.sort(scores, axis=-1)[..., -(k + 1)]
    own = jnp.take_along_axis(scores, labels[..., None], -1)[..., 0]
    return jax.nn.relu(margin + other - own)
