"""Trains one model on several clients that each do steps of their own between two exchanges.

Clients w = 1..W have losses f_w, and all want the minimiser of their mean. A round starts at a
point x that all know, and ends at the mean of their own points after H steps each,

  FedAvg   y_w <- y_w - rate grad f_w(y_w)
  FedLin   y_w <- y_w - rate (grad f_w(y_w) - grad f_w(x) + g),   g = mean grad f_w(x)

McMahan et al. 2017; Mitra et al., NeurIPS 2021. At FedLin's end every step is g = 0; FedAvg's is
where the clients' moves cancel, which is another point as soon as they differ. FedLin sends two
vectors for each of FedAvg's, y and the gradient, of which `routers.compression` may send a part.
With EF21 the end stays the right one: what a client has sent follows its gradient. With error
feedback what is still to be sent never settles where clients differ, and the end is near the right
one, the nearer the lower the rate.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from routers import compression


class Method(NamedTuple):
    """Says what clients do in a round.

    Attributes:
      steps: H, of each client between two exchanges.
      rate: of each step.
      corrected: True for FedLin.
      keep: share of a gradient's entries that a client sends.
      memory: how it makes up for those that it does not, of `compression.METHODS`; "": not at all.
    """

    name: str
    steps: int
    rate: float
    corrected: bool = False
    keep: float = 1.0
    memory: str = ""

    def numbers(self, size: int) -> int:
        """Returns how many numbers a client sends in a round, places of entries included."""
        if not self.corrected:
            return size
        kept = compression.count(size, self.keep)
        return size + (size if kept == size else 2 * kept)


def descend(gradients: Callable, x, clients: int, method: Method, rounds: int):
    """Returns the points between rounds, [rounds + 1, n], of which the first is x.

    Args:
      gradients: the clients' points [W, n] -> their gradients there [W, n].
      x: where all start, [n].
    """
    size = x.shape[0]

    def one_round(carry, _):
        x, kept = carry
        start = jnp.broadcast_to(x, (clients, size))
        shift = jnp.zeros_like(start)
        if method.corrected:
            own = gradients(start)
            g, kept = _exchange(method, own, kept)
            shift = g - own
        ends = jax.lax.fori_loop(
            0, method.steps, lambda _, y: y - method.rate * (gradients(y) + shift), start
        )
        x = ends.mean(0)
        return (x, kept), x

    start = x, jnp.zeros((clients, size), x.dtype)
    return jnp.concatenate([x[None], jax.lax.scan(one_round, start, None, length=rounds)[1]])


def _exchange(method: Method, own, kept):
    """Returns the gradient that all clients get to know, and what each keeps of its own."""
    size = own.shape[1]
    if (count := compression.count(size, method.keep)) == size:
        return own.mean(0), kept
    sent, kept = compression.METHODS.get(method.memory, compression.none)(own, kept, count)
    return kept.mean(0) if method.memory == "ef21" else compression.mean(sent, size), kept


def quadratics(a, c) -> Callable:
    """Returns the gradients of f_w(x) = a_w (x - c_w)^2 / 2; the minimiser is sum(a c) / sum(a)."""
    return lambda x: a[:, None] * (x - c[:, None])


def fedavg_limit(a, c, steps: int, rate: float):
    """Returns where FedAvg ends on `quadratics`: sum(q c) / sum(q), q_w = 1 - (1 - rate a_w)^H.

    H steps take a client the share q_w of its way to c_w. With H = 1, q is proportional to a.
    """
    q = 1 - (1 - rate * a) ** steps
    return (q * c).sum() / q.sum()
