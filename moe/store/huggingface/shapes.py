"""Tells the shapes of a run's parameters, block by block; computes nothing."""

import jax
from flax import nnx

from moe.store.checkpoint import named
from moe.store.origins import Place, places
from moe.tasks import task_of


def shapes_of(settings) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each parameter as a checkpoint has it, by name, for a run's config."""
    return {name: leaf.shape for name, leaf in named(_parameters(settings)[1]).items()}


def places_of(settings) -> dict[str, Place]:
    """Returns where each parameter of one block is in the checkpoint, for a run's config."""
    return places(*_parameters(settings))


def _parameters(settings):
    model = nnx.eval_shape(lambda: task_of(settings).build(settings, nnx.Rngs(0)))
    graphdef, state = nnx.split(model, nnx.Param)
    return graphdef, jax.tree.map(lambda a: a, nnx.to_pure_dict(state))
