"""Arrays as a checkpoint stores them: named zarr arrays in one OCDBT database per item.

Orbax reads them too, but where an array is damaged its event loop ends under the other reads, and
each of those prints lines of its own.
"""

import pathlib
from typing import Any

import jax
import tensorstore as ts


def fits(directory: pathlib.Path, like: dict[str, Any]) -> bool:
    """Tells whether an item has arrays of these names, shapes and types; it may have more.

    Raises:
      ValueError: it cannot be read.
    """
    keys = ts.KvStore.open(_database(directory)).result().list().result() if like else []
    if not like.keys() <= {key.decode().partition("/")[0] for key in keys}:
        return False
    return all(
        not _misfit(open_array(directory, name).result(), leaf) for name, leaf in like.items()
    )


def read(directory: pathlib.Path, like: dict[str, Any]) -> dict[str, jax.Array]:
    """Reads arrays by name, each process what its devices hold, and what several hold once.

    Args:
      directory: of an item.
      like: shapes, types and shardings of the arrays.

    Raises:
      ValueError: an array cannot be read, is not there, or is of another shape or type.
    """
    opening = {name: open_array(directory, name) for name in like}
    parts: dict[str, dict[str, ts.Future]] = {}
    for name, leaf in like.items():
        store = opening[name].result()
        if misfit := _misfit(store, leaf):
            raise ValueError(f"{name} is {misfit}")
        parts[name] = {}
        for index in leaf.sharding.addressable_devices_indices_map(leaf.shape).values():
            if str(index) not in parts[name]:
                parts[name][str(index)] = store[index].read()
    for reads in parts.values():
        for future in reads.values():
            future.result()  # raises before any array is made

    def array(name: str, leaf) -> jax.Array:
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda index: parts[name][str(index)].result()
        )

    return {name: array(name, leaf) for name, leaf in like.items()}


def open_array(directory: pathlib.Path, name: str, context: ts.Context | None = None) -> ts.Future:
    """Opens an array of an item, to be read; a context may keep what was read."""
    spec = {"driver": "zarr", "kvstore": _database(directory) | {"path": f"{name}/"}}
    return ts.open(spec, context=context)


def create(
    directory: pathlib.Path, name: str, shape: tuple[int, ...], chunks: tuple[int, ...]
) -> ts.TensorStore:
    """Makes a float32 array in the database of an item, to be written in pieces of `chunks`."""
    metadata = {"shape": list(shape), "chunks": list(chunks), "dtype": "<f4"}
    metadata["compressor"] = {"id": "zstd", "level": 1}
    kvstore = _database(directory) | {"path": f"{name}/"}
    spec = {"driver": "zarr", "kvstore": kvstore, "metadata": metadata}
    return ts.open(spec, create=True, delete_existing=True).result()


def _misfit(store: ts.TensorStore, leaf) -> str:
    """Returns what an array is and should be, if it is not that."""
    if store.shape == leaf.shape and store.dtype.numpy_dtype == leaf.dtype:
        return ""
    expected = f"{leaf.dtype}{list(leaf.shape)}"
    return f"{store.dtype.name}{list(store.shape)}, expected {expected}"


def _database(directory: pathlib.Path) -> dict[str, Any]:
    return {
        "driver": "ocdbt",
        "base": {"driver": "file", "path": f"{directory.absolute()}/"},
    }
