"""Tells the shapes of a run's parameters, block by block; computes nothing."""

from flax import nnx

from moe.nn.memory import join, split
from moe.store.checkpoint import named
from moe.store.origins import Place, places
from moe.tasks import task_of


def shapes_of(settings) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each parameter as a checkpoint has it, by name, for a run's config."""
    return {name: leaf.shape for name, leaf in named(_parts(settings)[1]).items()}


def places_of(settings) -> dict[str, Place]:
    """Returns where each parameter of one block is in the checkpoint, for a run's config."""
    graphdef, params, memory = _parts(settings)
    where = places(graphdef, join(params, memory))
    return {name: place for name, place in where.items() if place.leaf in named(params)}


def _parts(settings):
    model = nnx.eval_shape(lambda: task_of(settings).build(settings, nnx.Rngs(0)))
    graphdef, params, memory = split(model)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(memory)
