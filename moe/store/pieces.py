"""Writes and reads the parameters of a checkpoint piece by piece: no array need be whole at once.

What is written is what `moe.store.checkpoint` saves: Orbax's files and the arrays' checksums.
"""

import contextlib
import json
import math
import pathlib
import shutil
import time

import numpy as np
import tensorstore as ts

from moe import outputs
from moe.errors import UsageError
from moe.store import checksums, stored

BLOCK = 1 << 24  # bytes
_HANDLER = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"


class Writer:
    """Makes the checkpoint of a step from parameters that come in pieces.

    Args:
      directory: of the checkpoint, which is made.
      shapes: of the parameters, by name; all are float32.
      split: the names of those that come by pieces of their first axis, the others come whole and
        are stored in blocks of `BLOCK` bytes: what is copied on the way is one of these.
    """

    def __init__(
        self, directory: pathlib.Path, shapes: dict[str, tuple[int, ...]], split: set[str]
    ):
        self._directory, self._item = directory, directory / "params"
        self._item.mkdir(parents=True)
        self._stores, self._sums, self._rows = {}, dict.fromkeys(shapes, 0), {}
        for name, (size, *rest) in shapes.items():
            most = max(1, BLOCK // (4 * math.prod(rest)))
            self._rows[name] = rows = 1 if name in split else min(size, most)
            name_there, shape = f"params.{name}", (size, *rest)
            with self._writing():
                self._stores[name] = stored.create(self._item, name_there, shape, (rows, *rest))

    def write(self, name: str, value: np.ndarray, place: int | None = None) -> None:
        """Writes a parameter of any type, or its piece at a place of the first axis."""
        first = 0 if place is None else place
        value = value if place is None else value[None]
        rows = self._rows[name]
        for row in range(0, len(value), rows):
            block = np.ascontiguousarray(value[row : row + rows], np.float32)
            with self._writing():
                self._put(name, block, first + row)
            start = (first + row, *[0] * (block.ndim - 1))
            self._sums[name] = (self._sums[name] + checksums.of_part(block, start)) % 2**32

    @contextlib.contextmanager
    def _writing(self):
        """Turns what tensorstore makes of a full disk into one line."""
        try:
            yield
        except ValueError as error:
            said = " ".join(str(error).split())
            full = "No space left on device"
            reason = full if full in said else said[:200]
            raise UsageError(
                f"cannot write {self._item} ({reason}): look whether its disk is full"
            ) from error

    def _put(self, name: str, block: np.ndarray, row: int) -> None:
        self._stores[name][row : row + len(block)].write(block).result()

    def write_zeros(self, name: str) -> None:
        """Writes a parameter that nothing is known of."""
        self.write(name, np.zeros(self._stores[name].shape, np.float32))

    def finish(self) -> None:
        """Writes what tells Orbax that the checkpoint is complete."""
        tree = {
            str((f"params.{name}",)): {
                "key_metadata": [{"key": f"params.{name}", "key_type": 2}],
                "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
            }
            for name in self._stores
        }
        sums = {f"params.{name}": value for name, value in self._sums.items()}
        item = {"tree_metadata": tree, "use_ocdbt": True, "use_zarr3": False}
        item |= {"store_array_data_equal_to_fill_value": True, "custom_metadata": None}
        now = time.time_ns()
        whole = {"item_handlers": {"params": _HANDLER}, "metrics": {}, "performance_metrics": {}}
        whole |= {"init_timestamp_nsecs": now, "commit_timestamp_nsecs": now, "custom_metadata": {}}
        (self._directory / "checksums").mkdir()
        for file, content in (
            ("params/_METADATA", item),
            ("checksums/checksums", sums),
            ("_CHECKPOINT_METADATA", whole),
        ):
            (self._directory / file).write_text(json.dumps(content))


class Reader:
    """Reads the parameters of a checkpoint, whole or by pieces of the first axis.

    Args:
      directory: of the checkpoint.
      item: "params" or "ema".
      shapes: of its arrays.

    Raises:
      UsageError: the checkpoint has not these arrays.
    """

    def __init__(self, directory: pathlib.Path, item: str, shapes: dict[str, tuple[int, ...]]):
        self._directory, self._shapes = directory, shapes
        self._stores: dict[str, ts.TensorStore] = {}
        # Training stores what a device held as one chunk, which is decoded once for its pieces.
        largest = max(map(math.prod, shapes.values()))
        context = ts.Context({"cache_pool": {"total_bytes_limit": 5 * largest}})
        self._sums = dict.fromkeys(shapes, 0)
        try:
            for name, shape in shapes.items():
                store = stored.open_array(directory / item, f"{item}.{name}", context).result()
                if store.shape != shape:
                    raise ValueError(f"{name} is {list(store.shape)}, expected {list(shape)}")
                self._stores[name] = store
            file = directory / "checksums" / "checksums"
            table = json.loads(file.read_text()) if file.exists() else None
            self._expected = table and {name: table[f"{item}.{name}"] for name in shapes}
        except (ValueError, OSError, KeyError, TypeError) as error:
            raise self._damaged(error) from error

    def read(self, name: str, place: tuple[int, ...] = ()) -> np.ndarray:
        """Returns a parameter, or the piece at these places of its first axes."""
        try:
            value = np.asarray(self._stores[name][place].read().result())
        except ValueError as error:
            raise self._damaged(error) from error
        piece = value.reshape((1,) * len(place) + value.shape)
        start = (*place, *[0] * value.ndim)
        self._sums[name] = (self._sums[name] + checksums.of_part(piece, start)) % 2**32
        return value

    def check(self) -> None:
        """Compares the checksums of what was read, once each, with those that were saved.

        Raises:
          UsageError: an array is not as it was saved.
        """
        if self._expected is not None and self._sums != self._expected:
            wrong = [name for name in self._sums if self._sums[name] != self._expected[name]]
            raise self._damaged(f"{', '.join(wrong[:4])} is not as it was saved, by its checksum")

    def _damaged(self, reason) -> UsageError:
        said = " ".join(str(reason).split())[:200]
        return UsageError(
            f"the checkpoint {self._directory} cannot be read ({said}): name another by --step=N"
        )


def check_space(out: pathlib.Path, needed: int) -> None:
    """Raises UsageError where the disk of a new directory has not so many bytes."""
    free = shutil.disk_usage(outputs.standing(out)).free
    if free < needed:
        raise UsageError(
            f"--out={out} has {free / 1e9:.3g} GB of free space, and the parameters need "
            f"{needed / 1e9:.3g} GB there: free some, or choose another disk"
        )


def size(shapes: dict[str, tuple[int, ...]]) -> int:
    """Returns the bytes of parameters of these shapes."""
    return 4 * sum(math.prod(shape) for shape in shapes.values())
