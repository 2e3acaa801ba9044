"""Checkpoints that are written and read piece by piece."""

import jax
import numpy as np
import pytest

from moe.errors import UsageError
from moe.store import pieces
from moe.store.checkpoint import Checkpoints


def test_what_comes_in_pieces_is_what_is_restored(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "BLOCK", 100)
    rng = np.random.default_rng(0)
    whole = {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in {"experts": (3, 4, 5), "table": (13, 4), "scale": (7,)}.items()
    }
    shapes = {name: a.shape for name, a in whole.items()}
    writer = pieces.Writer(tmp_path / "checkpoints" / "0", shapes, {"experts"})
    for place in (2, 0, 1):
        writer.write("experts", whole["experts"][place], place)
    writer.write("table", np.asfortranarray(whole["table"]))
    writer.write("scale", whole["scale"])
    writer.finish()
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where) for n, a in whole.items()}
    saved = Checkpoints(tmp_path / "checkpoints", read_only=True)
    restored = saved.restore(0, {"params": like})["params"]  # compares the checksums
    for name, array in whole.items():
        np.testing.assert_array_equal(restored[name], array)

    reader = pieces.Reader(tmp_path / "checkpoints" / "0", "params", shapes)
    for place in range(3):
        found = reader.read("experts", (place,))
        np.testing.assert_array_equal(found, whole["experts"][place])
    with pytest.raises(UsageError, match="is not as it was saved"):
        reader.check()  # not all of it was read
    np.testing.assert_array_equal(reader.read("table"), whole["table"])
    reader.read("scale")
    reader.check()
    with pytest.raises(UsageError, match=r"scale is \[7\], expected \[8\]"):
        pieces.Reader(tmp_path / "checkpoints" / "0", "params", shapes | {"scale": (8,)})
