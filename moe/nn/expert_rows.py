"""Applies each expert's network to its rows at once: what a layer of dropless experts computes.

The rows are sorted by expert, as in `moe.nn.grouped`, whose products do it on TPU and GPU. On CPU
a loop over blocks of rows does (`moe.nn.expert_blocks`), or batched products of the first rows of
every expert where there are few for each (`moe.nn.expert_slots`).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from moe.hosts import mesh
from moe.nn import expert_blocks, expert_slots
from moe.nn.expert_blocks import Parameters, before, linear, runs
from moe.nn.grouped import filled, grouped_rows, outer, times, zeros
from moe.nn.mlp import activate

# So few rows, as in decoding, cost an expert less than a copy of its parameters does: where there
# are two for each expert, so that most are chosen, all rows pass every expert as it lies.
FEW = 32


def mlp_rows(x_ND, parameters: Parameters, sizes_E, exact: bool = False):
    """Returns narrow(activate(wide(x), gate(x))) of each row by its expert, [N, D].

    Rows past the last expert's are zero in the result and in every derivative. `exact` is of
    `moe.nn.mlp.activate`.
    """
    arrays, form = jax.tree.flatten(parameters)
    x_ND, *arrays, sizes_E = mesh.alike(x_ND, *arrays, sizes_E)
    return _rows(exact, x_ND, jax.tree.unflatten(form, arrays), sizes_E)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(exact: bool, x_ND, parameters: Parameters, sizes_E):
    here = functools.partial(_forward_on_cpu, exact, False)
    if 2 * len(sizes_E) <= len(x_ND) <= FEW:
        here = functools.partial(_forward_by_all, exact)
    whole = lambda *args: _forward(exact, *args)[:1]  # noqa: E731
    return lax.platform_dependent(x_ND, parameters, sizes_E, cpu=here, default=whole)[0]


def _rows_forward(exact, x_ND, parameters, sizes_E):
    here = functools.partial(_forward_on_cpu, exact, True)
    whole = functools.partial(_forward, exact)
    y_ND, *hidden = lax.platform_dependent(x_ND, parameters, sizes_E, cpu=here, default=whole)
    return y_ND, (x_ND, parameters, sizes_E, hidden)


def _rows_backward(exact, kept, g_ND):
    x_ND, parameters, sizes_E, hidden = kept
    here, whole = (functools.partial(f, exact) for f in (_backward_on_cpu, _backward))
    arguments = x_ND, parameters, sizes_E, hidden, g_ND
    return *lax.platform_dependent(*arguments, cpu=here, default=whole), None


_rows.defvjp(_rows_forward, _rows_backward)


def _forward(exact, x_ND, parameters: Parameters, sizes_E):
    """Returns the result, and what comes before the activation: of `wide`, and of `gate`."""

    def linear(x, kernel, bias):
        out = times(x, kernel, sizes_E)
        return out if bias is None else out + grouped_rows(bias, sizes_E, len(x))

    hidden = [linear(x_ND, parameters.wide, parameters.bias_wide)]
    if parameters.gate is not None:
        hidden.append(linear(x_ND, parameters.gate, parameters.bias_gate))
    return linear(
        activate(*hidden, exact=exact), parameters.narrow, parameters.bias_narrow
    ), *hidden


def _backward(exact, x_ND, parameters: Parameters, sizes_E, hidden, g_ND):
    """Returns the derivatives by the rows and by the parameters."""

    def total(bias, g):  # of a bias: the sum over an expert's rows
        return None if bias is None else outer(jnp.ones_like(g[:, :1]), g, sizes_E)[:, 0]

    g_ND = jnp.where(filled(g_ND, sizes_E), g_ND, 0)
    active, pull = jax.vjp(lambda *hidden: activate(*hidden, exact=exact), *hidden)
    slopes = pull(times(g_ND, parameters.narrow, sizes_E, transposed=True))
    kernels = [parameters.wide, parameters.gate][: len(slopes)]
    dx_ND = sum(times(s, k, sizes_E, transposed=True) for s, k in zip(slopes, kernels, strict=True))
    slope_gate = slopes[1] if len(slopes) > 1 else None
    return dx_ND, Parameters(
        wide=outer(x_ND, slopes[0], sizes_E),
        narrow=outer(active, g_ND, sizes_E),
        bias_wide=total(parameters.bias_wide, slopes[0]),
        bias_narrow=total(parameters.bias_narrow, g_ND),
        gate=None if slope_gate is None else outer(x_ND, slope_gate, sizes_E),
        bias_gate=total(parameters.bias_gate, slope_gate),
    )


def _forward_on_cpu(exact, keep: bool, x_ND, parameters: Parameters, sizes_E):
    """Does as `_forward`; without `keep` it returns the result alone."""
    kept = 1 + (parameters.gate is not None) if keep else 0
    widths = [parameters.narrow.shape[2], *[parameters.wide.shape[2]] * kept]

    def by_blocks(x_ND, parameters, sizes_E):
        out = [zeros((len(x_ND), width), x_ND) for width in widths]
        return tuple(expert_blocks.forward(exact, x_ND, parameters, runs(sizes_E), out))

    by_slots = functools.partial(functools.partial, expert_slots.forward, exact, keep)
    return _choose(by_slots, by_blocks, x_ND, parameters, sizes_E)


def _backward_on_cpu(exact, x_ND, parameters: Parameters, sizes_E, hidden, g_ND):
    """Does as `_backward`."""

    def by_blocks(x_ND, parameters, sizes_E, hidden, g_ND):
        start = jax.tree.map(lambda a: zeros(a.shape, g_ND, a.dtype), parameters)
        at = x_ND, parameters, runs(sizes_E), hidden, g_ND
        return expert_blocks.backward(exact, *at, zeros(x_ND.shape, x_ND), start)

    by_slots = functools.partial(functools.partial, expert_slots.backward, exact)
    return _choose(by_slots, by_blocks, x_ND, parameters, sizes_E, hidden, g_ND)


def _choose(by_slots, by_blocks, x_ND, parameters, sizes_E, *rest):
    """Calls the way that is the fastest for so many rows, spread so over the experts."""
    arguments = x_ND, parameters, sizes_E, *rest
    counts = expert_slots.counts(len(x_ND), len(sizes_E))
    if not counts:
        return by_blocks(*arguments)
    ways = [by_blocks, *[by_slots(count) for count in counts]]
    return lax.switch(expert_slots.best(sizes_E, counts), ways, *arguments)


def _forward_by_all(exact, x_ND, parameters: Parameters, sizes_E):
    """Does as `_forward`, for the result alone: each row passes every expert, its own counts."""

    def network(own: Parameters, x):
        return linear(activate(*before(own, x), exact=exact), own.narrow, own.bias_narrow)

    x_END = jnp.broadcast_to(x_ND, (len(sizes_E), *x_ND.shape))  # batched: no kernel is transposed
    y_END = jax.vmap(network)(parameters, x_END)
    ends_E1, row_1N = jnp.cumsum(sizes_E)[:, None], jnp.arange(len(x_ND))[None]
    own_EN = (ends_E1 - sizes_E[:, None] <= row_1N) & (row_1N < ends_E1)
    return (jnp.where(own_EN[..., None], y_END, 0).sum(0),)
