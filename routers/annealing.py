"""Lets a relaxed router's strength follow a schedule over the run, as a value that it remembers."""

import jax.numpy as jnp

from routers.routing import Router, RouterState


class Annealed(Router):
    """Is a router whose `strength` may go to `final_strength`, evenly in its logarithm.

    The strength in force is a `RouterState`: it is traced, so that nothing compiles again, and a
    checkpoint is evaluated with the strength of its step. `final_strength` 0 keeps it constant, and
    nothing is remembered.
    """

    def set_strength(self, strength: float, final_strength: float) -> None:
        """Says between which values the strength goes."""
        self.first, self.last = strength, final_strength
        if final_strength:
            self.now = RouterState(jnp.float32(strength))

    @property
    def strength(self):
        """Returns the strength in force, a number or a traced scalar."""
        return self.now[...] if self.last else self.first

    def observe(self):
        """Returns the statistics of a router that remembers its strength alone."""
        return {} if self.last else None

    def advance(self, state, statistics, progress):
        if not self.last:
            return state
        return state | {"now": self.first * jnp.float32(self.last / self.first) ** progress}
