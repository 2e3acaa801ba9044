"""What compressed gradients send: by their shapes, and in the compiled program."""

import jax
import pytest

from moe.plan import hlo
from moe.plan.collectives import find, table
from moe.plan.compression import measure, verdict
from tests.moe.conftest import QUICK
from tests.moe.train.test_compressed import small

ENTRIES = 10 + 8 * 10 + 3 * 8 * 12


def test_shapes_say_what_the_program_sends():
    """A tenth of each array, of each layer of a stack: all-gathered, and nothing is summed."""
    compressor, mesh = small("ef")
    found = measure(compressor, "float32")
    assert (found.workers, found.entries, found.kept) == (8, ENTRIES, 1 + 8 + 3 * 10)
    assert found.sent == 7 * 39 * (4 + 4) and found.whole == 2 * 7 / 8 * ENTRIES * 4
    kept = compressor.kept()
    with jax.set_mesh(mesh):
        exchange = jax.jit(compressor.exchange, compiler_options=QUICK)
        text = exchange.lower(kept["own"], kept).compile().as_text()
    module = hlo.parse(text)
    rows = table(find(module, hlo.executions(module), dict(mesh.shape)))
    assert {row.kind for row in rows} == {"all-gather"}
    assert sum(row.sent for row in rows) == found.sent


@pytest.mark.parametrize(
    ("keep", "dtype", "saves"),
    [
        (0.1, "float32", True),
        (0.13, "float32", False),
        (0.1, "bfloat16", False),
        (0.05, "bfloat16", True),
    ],
)
def test_bytes_are_saved_while_n_k_is_below_d(keep, dtype, saves):
    """In bfloat16, in which a ring sends half the bytes, while 2 n k is."""
    found = measure(small("ef", keep=keep)[0], dtype)
    assert found.saves == saves
    assert (found.workers * found.kept * (1 if dtype == "float32" else 2) < ENTRIES) == saves
    assert ("not fewer" in verdict(found)) != saves


def test_a_part_of_a_worker_is_counted_by_itself():
    """`fsdp` and `tensor` split a gradient: a chip sends its own part alone."""
    found = measure(small("ef21", (2, 2, 1, 2))[0], "float32")
    assert found.entries == 10 + 4 * 10 + 3 * 4 * 6 and found.kept == 1 + 4 + 3 * 3
    assert measure(small("", (1, 2, 2, 2))[0], "float32") is None
