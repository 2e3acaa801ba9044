"""Passes rows that are sorted by expert through the experts' networks as batched products, on CPU.

Where an expert has few rows, a loop over experts spends more on copies of an expert's kernels and
on sums of their derivatives than on products. Here the first C rows of every expert are
gathered into slots [E, C, D]; one product of them all reads each kernel where it lies and writes
its derivative where it belongs. Only what an expert has beyond C passes the loop, afterwards.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe.nn import expert_blocks as blocks
from moe.nn.expert_blocks import Parameters, Runs
from moe.nn.mlp import activate

# Means of an expert's rows for which slots can be the faster way: with fewer the rows of an expert
# are seldom so many, with more a block in the cache saves more than the copy of a kernel costs.
MEANS = range(16, 257)
VISIT = 80  # rows that cost as much as the copies of one visit in the loop do


def counts(rows: int, experts: int) -> list[int]:
    """Returns numbers of slots for each expert, to choose from; none where the loop is faster."""
    mean = rows // experts
    if mean not in MEANS or experts < 2:
        return []
    # Half of the rows are an expert's where a router has room for twice K. Two standard deviations
    # above a mean are room for nearly all of rows that are spread by chance.
    return [round(own + 2 * math.sqrt(own)) for own in (mean / 2, mean)]


def best(sizes_E, counts: list[int]):
    """Returns which way is the cheapest for rows spread so: 0, the loop, or 1 + i, counts[i]."""
    costs = [_rows_computed(sizes_E, count) for count in [0, *counts]]
    return jnp.argmin(jnp.stack(costs))


def _rows_computed(sizes_E, count: int):
    """Counts the rows that are computed, empty slots and whole blocks, and the loop's copies."""
    left_E, block = jnp.maximum(sizes_E - count, 0), blocks.BLOCKS[-1]
    looped_E = -(-left_E // block) * block + VISIT
    return len(sizes_E) * count + jnp.where(left_E > 0, looped_E, 0).sum()


def forward(exact, keep: bool, count: int, x_ND, parameters: Parameters, sizes_E):
    """Returns the result and, if `keep`, x times `wide` and `gate` in the first slots of each
    expert, as many as N rows have room for.

    A pass over all hidden units is slow, so these are without biases, as the product writes them.
    Of rows that have no such slot nothing is kept.
    """
    place = _slots(sizes_E, len(x_ND), count)
    x_ECD, kept = place.gather(x_ND), _kept(x_ND, place)
    firsts = [x_ECD[:, :kept] @ kernel for kernel in _kernels(parameters)]
    active = activate(*_before(parameters, firsts, x_ECD), exact=exact)
    y_ECD = jax.vmap(blocks.linear)(active, parameters.narrow, parameters.bias_narrow)
    (y_ND,) = blocks.forward(exact, x_ND, parameters, place.rest, [place.back(y_ECD)])
    return y_ND, *[_rows(a, len(x_ND)) for a in firsts if keep]


def backward(exact, count: int, x_ND, parameters: Parameters, sizes_E, firsts, g_ND):
    """Returns the derivatives by the rows and by the parameters."""
    place = _slots(sizes_E, len(x_ND), count)
    kept = _kept(x_ND, place)
    firsts = [a[: len(sizes_E) * kept].reshape(len(sizes_E), kept, -1) for a in firsts]
    x_ECD, g_ECD = place.gather(x_ND), place.gather(g_ND)
    hidden = _before(parameters, firsts, x_ECD)
    active, pull = jax.vjp(lambda *hidden: activate(*hidden, exact=exact), *hidden)
    slopes = pull(jnp.einsum("ecd,efd->ecf", g_ECD, parameters.narrow).astype(active.dtype))
    kernels = zip(slopes, _kernels(parameters), strict=True)
    dx_ECD = sum(jnp.einsum("ecf,edf->ecd", slope, kernel) for slope, kernel in kernels)
    gate = slopes[1] if len(slopes) > 1 else None
    totals = Parameters(
        wide=_outer(x_ECD, slopes[0]),
        narrow=_outer(active, g_ECD),
        bias_wide=_total(parameters.bias_wide, slopes[0]),
        bias_narrow=_total(parameters.bias_narrow, g_ECD),
        gate=None if gate is None else _outer(x_ECD, gate),
        bias_gate=_total(parameters.bias_gate, gate),
    )
    dx_ND = place.back(dx_ECD)
    dx_ND, totals = blocks.backward(exact, x_ND, parameters, place.rest, [], g_ND, dx_ND, totals)
    return dx_ND, jax.tree.map(lambda total, a: total.astype(a.dtype), totals, parameters)


class _Slots(NamedTuple):
    """Says which row is in which slot."""

    row_EC: jax.Array
    own_EC: jax.Array  # bool: the slot has a row, which is the expert's
    slot_N: jax.Array  # the place among the E C slots
    own_N: jax.Array  # bool: the row has a slot
    rest: Runs  # the rows that have none

    def gather(self, a_ND):
        """Returns the slots' rows, zeros where there is none."""
        return jnp.where(self.own_EC[..., None], a_ND[self.row_EC], 0)

    def back(self, a_ECD):
        """Returns the rows of the slots in their order, zeros where one has no slot."""
        a_XD = a_ECD.reshape(-1, a_ECD.shape[-1])
        return jnp.where(self.own_N[:, None], a_XD[self.slot_N], 0)


def _slots(sizes_E, rows: int, count: int) -> _Slots:
    experts = len(sizes_E)
    firsts_E, row_N, slot_C = blocks.runs(sizes_E).firsts_E, jnp.arange(rows), jnp.arange(count)
    ends_E = firsts_E + sizes_E
    expert_N = jnp.searchsorted(ends_E, row_N, side="right", method="compare_all")
    expert_N = jnp.minimum(expert_N, experts - 1)
    within_N = row_N - firsts_E[expert_N]
    return _Slots(
        row_EC=jnp.minimum(firsts_E[:, None] + slot_C, rows - 1),
        own_EC=slot_C < sizes_E[:, None],
        slot_N=expert_N * count + jnp.minimum(within_N, count - 1),
        own_N=within_N < jnp.minimum(sizes_E, count)[expert_N],
        rest=Runs(firsts_E + count, jnp.maximum(sizes_E - count, 0)),
    )


def _kept(x_ND, place: _Slots) -> int:
    """Returns of how many slots of each expert the products are kept."""
    experts, count = place.row_EC.shape
    return min(count, len(x_ND) // experts)


def _kernels(parameters: Parameters) -> list[jax.Array]:
    return [a for a in (parameters.wide, parameters.gate) if a is not None]


def _before(parameters: Parameters, firsts, x_ECD):
    """Returns what comes before the activation in the slots, from the products of the first."""
    hidden = []
    biases = (parameters.bias_wide, parameters.bias_gate)
    for first, kernel, bias in zip(firsts, _kernels(parameters), biases, strict=False):
        if first.shape[1] < x_ECD.shape[1]:
            first = jnp.concatenate([first, x_ECD[:, first.shape[1] :] @ kernel], 1)
        hidden.append(first if bias is None else first + bias[:, None])
    return hidden


def _rows(a_ECF, rows: int):
    """Lays slots out as rows, with zeros after them."""
    a_XF = a_ECF.reshape(-1, a_ECF.shape[-1])
    return jnp.pad(a_XF, ((0, rows - len(a_XF)), (0, 0)))


def _outer(a_ECD, b_ECF):
    """Sums a^T b over an expert's slots, [E, D, F]."""
    into = blocks.sums_in(b_ECF.dtype)
    return jnp.einsum("ecd,ecf->edf", a_ECD, b_ECF, preferred_element_type=into)


def _total(bias, slopes_ECF):
    """Sums over an expert's slots; None where there is no such bias."""
    return None if bias is None else slopes_ECF.sum(1, dtype=blocks.sums_in(slopes_ECF.dtype))
