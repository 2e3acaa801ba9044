"""Makes and applies the few layers of the small models here: parameters are plain dictionaries."""

import jax
import jax.numpy as jnp


def dense(key, inputs: int, outputs: int) -> dict:
    """Returns the kernel and the bias of a linear map; LeCun's normal kernel, no bias at first."""
    kernel = jax.nn.initializers.lecun_normal()(key, (inputs, outputs))
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}


def linear(layer: dict, x):
    """Returns x W + b, [..., inputs] -> [..., outputs]."""
    return x @ layer["kernel"] + layer["bias"]


def norm(size: int) -> dict:
    """Returns the scale and the shift of a layer normalisation."""
    return {"scale": jnp.ones(size), "shift": jnp.zeros(size)}


def normalise(layer: dict, x):
    """Returns x of mean 0 and variance 1 along its last axis, then scaled and shifted."""
    x = x - x.mean(-1, keepdims=True)
    return (
        x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * layer["scale"] + layer["shift"]
    )


def drop(key, x, rate: float):
    """Returns x with each entry 0 with chance `rate`, the others scaled up; x without a key."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)
