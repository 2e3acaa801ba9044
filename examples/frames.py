"""Reads a pickled table of a package without trusting it: arrays and frames, and nothing else.

A pickle is a program that may call whatever it can name. Here it can name what arrays and pandas'
frames are rebuilt with; any other name ends the reading before anything of it has run.
"""

import importlib
import io
import lzma
import pathlib
import pickle

import numpy as np

from moe.errors import UsageError

# What a pickle may name, and where it is found today: NumPy 2 has moved its private modules.
_ALLOWED = {
    ("builtins", "slice"): "builtins",
    ("numpy", "dtype"): "numpy",
    ("numpy", "ndarray"): "numpy",
    ("pandas", "DataFrame"): "pandas",
    ("pandas", "Index"): "pandas",
    ("pandas", "RangeIndex"): "pandas",
    ("pandas._libs.internals", "_unpickle_block"): "pandas._libs.internals",
    ("pandas.core.frame", "DataFrame"): "pandas",
    ("pandas.core.indexes.base", "Index"): "pandas",
    ("pandas.core.indexes.base", "_new_Index"): "pandas.core.indexes.base",
    ("pandas.core.indexes.range", "RangeIndex"): "pandas",
    ("pandas.core.internals.managers", "BlockManager"): "pandas.core.internals.managers",
}
for _core in ("numpy.core", "numpy._core"):
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = "numpy._core.multiarray"
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = "numpy._core.numeric"


class _ArraysAndFrames(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return getattr(importlib.import_module(_ALLOWED[module, name]), name)


def loads(content: bytes):
    """Returns the array or frame of a pickle.

    Raises:
      pickle.UnpicklingError: it names anything else; nothing that it asks for has run.
    """
    return _ArraysAndFrames(io.BytesIO(content)).load()


def read_columns(file: pathlib.Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Returns columns of an xz-compressed pickle of a frame; text as arrays of text.

    Raises:
      UsageError: the file cannot be read, is no such frame, or lacks a column.
    """
    try:
        frame = loads(lzma.decompress(file.read_bytes()))
        return {name: _plain(frame[name].to_numpy()) for name in names}
    except (OSError, lzma.LZMAError, pickle.UnpicklingError, EOFError) as error:
        raise UsageError(f"{file} is not read, for it is no frame alone: {error}") from error
    except (AttributeError, KeyError, TypeError, ValueError, ImportError) as error:
        raise UsageError(
            f"{file} holds no frame with the columns {', '.join(names)} ({error}): install the "
            "version of the package that permoe[examples] asks for"
        ) from error


def _plain(column: np.ndarray) -> np.ndarray:
    """Returns the column without Python objects; what is missing becomes empty text."""
    if column.dtype != object:
        return column
    return np.array([value if isinstance(value, str) else "" for value in column])
