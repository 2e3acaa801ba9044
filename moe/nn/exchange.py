"""Finds the rows of dropless experts on one device, moves them to their experts and back.

A row is one token at one of its experts. N, the number of rows that a device can have, is static;
rows are sorted by expert and fill the first places. P devices share the experts, L each.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe.hosts import mesh
from routers.selection import largest, ranks


def share(groups: int, bound: int, receive: float, in_order: bool) -> int:
    """Returns S, the most rows that a device sends to one device: `receive` fair shares of those of
    all its groups, or, in order, as many of each group's."""
    parts, devices = groups if in_order else 1, mesh.axis_size("expert")
    rows = groups // parts * bound
    return parts * math.ceil(min(rows, receive * rows / devices))


def within(weights_GTE, bound: int, share: int, in_order: bool):
    """Returns the weights that are kept, 0 elsewhere: the `bound` heaviest of each group and, where
    experts are spread, of those that go to one device the heaviest `share`. In order it is the
    first of each group, and of each group's that go to one device the first of its part."""
    groups = len(weights_GTE)
    keep, parts = (_first, groups) if in_order else (_heaviest, 1)
    kept_GTE = keep(weights_GTE, bound)
    devices = mesh.axis_size("expert")
    if devices == 1:
        return kept_GTE
    by_device = kept_GTE.reshape(parts, -1, devices, kept_GTE.shape[-1] // devices).swapaxes(1, 2)
    rows = by_device.reshape(parts * devices, *by_device.shape[2:])
    by_device = keep(rows, share // parts).reshape(by_device.shape)
    return by_device.swapaxes(1, 2).reshape(kept_GTE.shape)


def _heaviest(weights_RTE, count: int):
    """Keeps each row's `count` largest, 0 elsewhere."""

    def cut(weights_RTE):
        weights_RX = jax.lax.stop_gradient(weights_RTE).reshape(len(weights_RTE), -1)
        return jnp.where(largest(weights_RX, count).reshape(weights_RTE.shape), weights_RTE, 0)

    return _where_above(weights_RTE, count, cut)


def _first(weights_RTE, count: int):
    """Keeps each row's first `count` above 0, 0 elsewhere; of one token the heaviest first."""

    def cut(weights_RTE):
        own_RT = (weights_RTE > 0).sum(-1)
        left_RT = count - (jnp.cumsum(own_RT, axis=1) - own_RT)  # by the tokens before
        place_RTE = ranks(jax.lax.stop_gradient(weights_RTE), weights_RTE.shape[-1])
        return jnp.where(place_RTE < left_RT[..., None], weights_RTE, 0)

    return _where_above(weights_RTE, count, cut)


def _where_above(weights_RTE, count: int, cut: Callable):
    """Applies `cut`, which sorts, only where a row has more than `count` weights above 0."""
    if count >= weights_RTE[0].size:
        return weights_RTE
    overflows = ((weights_RTE > 0).sum((1, 2)) > count).any()
    return jax.lax.cond(overflows, cut, lambda weights_RTE: weights_RTE, weights_RTE)


def through_experts(network: Callable, bound: int, share: int, x_GTD, kept_GTE, parameters):
    """Returns each token's weighted sum of its experts' outputs, [G, T, D].

    `network(parameters, x_ND, sizes_E, id_N)` are the experts of this device on sorted rows; id_N
    numbers a row among those of all devices.
    """
    (groups, tokens, dim), experts = x_GTD.shape, kept_GTE.shape[-1]
    weight_X = kept_GTE.transpose(2, 0, 1).reshape(-1)  # by expert, then by token
    sizes_E = (weight_X > 0).reshape(experts, -1).sum(-1, dtype=jnp.int32)
    row_N = jnp.arange(groups * bound)
    entry_N = jnp.searchsorted(jnp.cumsum(weight_X > 0), row_N + 1)  # of weight_X
    entry_N = jnp.minimum(entry_N, len(weight_X) - 1)
    weight_N = jnp.where(row_N < sizes_E.sum(), weight_X[entry_N], 0)
    token_N = entry_N % (groups * tokens)
    x_ND = x_GTD.reshape(-1, dim)[token_N]
    id_N = _first_token(x_GTD) * experts + token_N * experts
    id_N += entry_N // (groups * tokens)
    devices = mesh.axis_size("expert")
    if devices == 1:
        out_ND = network(parameters, x_ND, sizes_E, id_N)
    else:
        out_ND = _abroad(network, share, x_ND, sizes_E.reshape(devices, -1), id_N, parameters)
    out_ND *= weight_N[:, None].astype(out_ND.dtype)
    y_XD = jnp.zeros((groups * tokens, dim), out_ND.dtype).at[token_N].add(out_ND)
    return y_XD.reshape(x_GTD.shape)


def _first_token(x_GTD):
    """Returns the number of this device's first token among those of all devices."""
    axes = mesh.examples_axes(x_GTD)
    return jax.lax.axis_index(axes) * x_GTD.shape[0] * x_GTD.shape[1] if axes else 0


def _abroad(network: Callable, share: int, x_ND, sizes_PL, id_N, parameters):
    """Returns the rows' outputs where the experts live on the P devices of the axis `expert`.

    The rows for each device go in S = `share` places, one all-to-all there and one back. What
    arrives is sorted by device and then by expert, and is sorted by expert alone for the product.
    """
    arrived_PL = _exchange(sizes_PL)
    sent_P, came_P = sizes_PL.sum(1), arrived_PL.sum(1)
    x_PSD = checkpoint_name(_send(x_ND, sent_P, came_P, share), "exchange")
    id_PS = _send(id_N, sent_P, came_P, share)
    to_PS, filled_PS = _by_expert(arrived_PL, share)
    places = to_PS.size
    order_M = jnp.zeros_like(id_PS, shape=places).at[to_PS.reshape(-1)].set(
        jnp.arange(places, dtype=id_PS.dtype), mode="drop"
    )  # fmt: skip
    x_MD, id_M = x_PSD.reshape(places, -1)[order_M], id_PS.reshape(-1)[order_M]
    out_MD = network(parameters, x_MD, arrived_PL.sum(0), id_M)
    back_PSD = jnp.where(filled_PS[..., None], out_MD[jnp.minimum(to_PS, places - 1)], 0)
    return checkpoint_name(_send_back(back_PSD, sent_P, came_P, len(x_ND)), "exchange")


def _exchange(a):
    """Sends entry i of the first axis to device i."""
    return jax.lax.all_to_all(a, "expert", 0, 0, tiled=True)


def _send(a_N, sent_P, came_P, share: int):
    """Sends rows `[N, ...]`, sorted by device, to their places `[P, S, ...]` on those devices.

    TPUs move only the filled places; elsewhere all places are moved.
    """
    devices, rest = len(sent_P), a_N.shape[1:]

    def ragged(a_N, sent_P, came_P):
        first_P = jnp.zeros_like(sent_P) + share * jax.lax.axis_index("expert")
        empty = jnp.zeros_like(a_N, shape=(devices * share, *rest))
        out = _ragged(a_N, empty, _starts(sent_P), sent_P, first_P, came_P)
        return out.reshape(devices, share, *rest)

    def padded(a_N, sent_P, came_P):
        row_PS = jnp.minimum(_starts(sent_P)[:, None] + jnp.arange(share)[None, :], len(a_N) - 1)
        return _exchange(a_N[row_PS])

    return jax.lax.platform_dependent(a_N, sent_P, came_P, tpu=ragged, default=padded)


def _send_back(a_PSD, sent_P, came_P, rows: int):
    """Returns rows to the devices that they came from, `[N, D]` in the order they were sent."""
    devices, share, dim = a_PSD.shape

    def ragged(a_PSD, sent_P, came_P):
        first_P = share * jnp.arange(devices, dtype=came_P.dtype) + jnp.zeros_like(came_P)
        empty = jnp.zeros_like(a_PSD, shape=(rows, dim))
        target_P = _exchange(_starts(sent_P))
        return _ragged(a_PSD.reshape(-1, dim), empty, first_P, came_P, target_P, sent_P)

    def padded(a_PSD, sent_P, came_P):
        starts_P, row_N = _starts(sent_P), jnp.arange(rows)
        device_N = (row_N[:, None] >= starts_P[None, 1:]).sum(-1)
        place_N = jnp.minimum(device_N * share + row_N - starts_P[device_N], devices * share - 1)
        return _exchange(a_PSD).reshape(-1, dim)[place_N]

    return jax.lax.platform_dependent(a_PSD, sent_P, came_P, tpu=ragged, default=padded)


def _ragged(a, out, starts_P, sizes_P, target_P, came_P):
    """Sends each device its slice of `a`, to the place `target` in that device's `out`."""
    sizes = starts_P, sizes_P, target_P, came_P
    return jax.lax.ragged_all_to_all(a, out, *sizes, axis_name="expert")


def _by_expert(arrived_PL, share: int):
    """Returns where each arrived row goes when rows are sorted by expert, [P, S] (past the end for
    an empty place), and which places are filled."""
    ends_PL = jnp.cumsum(arrived_PL, axis=1)
    place_S = jnp.arange(share)
    expert_PS = (place_S[None, :, None] >= ends_PL[:, None]).sum(-1)
    filled_PS = expert_PS < arrived_PL.shape[1]
    earlier_PL = jnp.cumsum(arrived_PL, axis=0) - arrived_PL  # from devices before
    shift_PL = _starts(arrived_PL.sum(0))[None] + earlier_PL - (ends_PL - arrived_PL)
    shift_PS = jnp.take_along_axis(
        shift_PL, jnp.minimum(expert_PS, arrived_PL.shape[1] - 1), axis=1
    )
    return jnp.where(filled_PS, place_S[None] + shift_PS, arrived_PL.shape[0] * share), filled_PS


def _starts(sizes):
    """Returns where each part begins when parts of these sizes lie one after the other."""
    return jnp.cumsum(sizes) - sizes
