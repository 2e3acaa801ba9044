"""Passes rows that are sorted by expert through the experts' networks as batched products, on CPU.

Where an expert has few rows, a loop over experts spends more on copies of an expert's kernels and
on sums of their derivatives than on products. Here the first C rows of every expert, the mean, are
gathered into slots [E, C, D]; one product of them all reads each kernel where it lies and writes
its derivative where it belongs. Only what an expert has beyond C passes the loop, afterwards.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe.nn import expert_blocks as blocks
from moe.nn.expert_blocks import Parameters, Runs
from moe.nn.mlp import activate

# Means of an expert's rows for which slots are the faster way: with fewer the first C of an expert
# are seldom its own, with more a block in the cache saves more than the copy of a kernel costs.
MEANS = range(16, 257)
FULL = 0.75  # share of the slots that must have a row: an empty one costs as much as a row does


def slots(rows: int, experts: int) -> int:
    """Returns C, the slots of each expert for so many rows; 0 where the loop alone is faster."""
    mean = rows // experts
    return mean if mean in MEANS and experts > 1 else 0


def suit(sizes_E, rows: int):
    """Says whether the rows are spread over experts so that slots are worth it, a scalar."""
    count = slots(rows, len(sizes_E))
    return jnp.minimum(sizes_E, count).sum() >= FULL * count * len(sizes_E)


def forward(exact, keep: bool, x_ND, parameters: Parameters, sizes_E):
    """Returns the result and, if `keep`, x times `wide` and `gate` in the slots, E C of N rows.

    A pass over all hidden units is slow, so these are without biases, as the product writes them.
    Of rows that have no slot nothing is kept.
    """
    place = _slots(sizes_E, len(x_ND))
    x_ECD, kernels = place.gather(x_ND), [parameters.wide, parameters.gate]
    products = [x_ECD @ kernel for kernel in kernels if kernel is not None]
    active = activate(*_with_biases(parameters, products), exact=exact)
    y_ECD = jax.vmap(blocks.linear)(active, parameters.narrow, parameters.bias_narrow)
    (y_ND,) = blocks.forward(exact, x_ND, parameters, place.rest, [place.back(y_ECD)])
    return y_ND, *[_rows(a, len(x_ND)) for a in products if keep]


def backward(exact, x_ND, parameters: Parameters, sizes_E, products, g_ND):
    """Returns the derivatives by the rows and by the parameters."""
    place = _slots(sizes_E, len(x_ND))
    products = [a[: place.row_EC.size].reshape(*place.row_EC.shape, -1) for a in products]
    x_ECD, g_ECD = place.gather(x_ND), place.gather(g_ND)
    hidden = _with_biases(parameters, products)
    active, pull = jax.vjp(lambda *hidden: activate(*hidden, exact=exact), *hidden)
    slopes = pull(jnp.einsum("ecd,efd->ecf", g_ECD, parameters.narrow).astype(active.dtype))
    kernels = [parameters.wide, parameters.gate]
    dx_ECD = sum(jnp.einsum("ecf,edf->ecd", s, k) for s, k in zip(slopes, kernels, strict=False))
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


def _slots(sizes_E, rows: int) -> _Slots:
    experts, count = len(sizes_E), slots(rows, len(sizes_E))
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


def _with_biases(parameters: Parameters, products):
    """Returns what comes before the activation in the slots."""
    biases = (parameters.bias_wide, parameters.bias_gate)
    return [a if b is None else a + b[:, None] for a, b in zip(products, biases, strict=False)]


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
