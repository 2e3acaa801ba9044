"""Defines the losses that are compared: of one guess, and of k."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import optax

from routers import rarity_margins, sparse_topk_loss, topk_hinge_loss

SCALE = 60.0  # of the cosines that margins are in units of; Garcin et al. 2022
LARGEST = 0.2  # margin, of the rarest class
GAMMA = 2.0  # of the focal loss
DRAWS = 5  # of noise, for an example in a step


class Arm(NamedTuple):
    """Names a loss (scores, labels, key) -> [B], of linear scores or of cosines.

    `wide` losses have a width, in units of the scores or cosines, that validation chooses.
    """

    loss: Callable
    cosine: bool = False
    wide: bool = False


def arms(k: int, counts, width: float) -> dict[str, Arm]:
    """Returns the arms by name, for so many guesses, the classes' counts and a width."""
    margins = rarity_margins(counts, LARGEST)
    noise = {"k": k, "num_samples": DRAWS, "strength": width}

    def hinge(scores, labels, key):
        return topk_hinge_loss(scores, labels, key, **noise)

    def hinge_with_margins(cosines, labels, key):
        found = topk_hinge_loss(cosines, labels, key, margins=margins, **noise)
        return SCALE * found

    def fenchel_young(scores, labels, _):
        return sparse_topk_loss(scores, labels, k, strength=width)

    return {
        "cross_entropy": Arm(_cross_entropy),
        "cross_entropy_cosine": Arm(lambda c, y, _: _cross_entropy(SCALE * c, y), cosine=True),
        "focal": Arm(_focal),
        "ldam": Arm(lambda c, y, _: _ldam(c, y, margins), cosine=True),
        "fenchel_young": Arm(fenchel_young, wide=True),
        "hinge": Arm(hinge, wide=True),
        "hinge_margins": Arm(hinge_with_margins, cosine=True, wide=True),
    }


def _cross_entropy(scores, labels, _=None):
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels)


def _focal(scores, labels, _):
    """Weighs cross-entropy by (1 - p)^gamma, p the label's probability (Lin et al. 2017)."""
    loss = _cross_entropy(scores, labels)
    return (1 - jnp.exp(-loss)) ** GAMMA * loss


def _ldam(cosines, labels, margins):
    """Takes cross-entropy of scores from which the label's loses its margin (Cao et al. 2019)."""
    own = jnp.asarray(margins)[labels]
    at = jnp.arange(cosines.shape[-1]) == labels[:, None]
    return _cross_entropy(SCALE * (cosines - jnp.where(at, own[:, None], 0)), labels)


NAMES = tuple(arms(1, (1, 1), 1.0))
WITHOUT_WIDTH = tuple(name for name, arm in arms(1, (1, 1), 1.0).items() if not arm.wide)
