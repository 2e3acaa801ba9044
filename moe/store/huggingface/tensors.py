"""Reads the safetensors of a directory, and writes some, a shard at a time."""

import json
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from moe.errors import UsageError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
SHARD = 5_000_000_000  # bytes of a file that is written
TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
SAVED = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class Tensor(NamedTuple):
    """Says where a tensor is, and its shape."""

    file: pathlib.Path
    shape: tuple[int, ...]


def find(directory: pathlib.Path) -> dict[str, Tensor]:
    """Returns the tensors of a directory by name, file by file; reads the headers alone.

    Raises:
      UsageError: there are none, a file is damaged or missing, or one has what is no float.
    """
    files = _files(directory)
    found: dict[str, Tensor] = {}
    for file, listed in files.items():
        with _opened(file) as opened:
            names = set(opened.keys())
            for name in sorted(listed - names):
                raise UsageError(f"{file} has no tensor {name}, which {INDEX} says it has")
            for name in sorted(names):
                if name in found:
                    raise UsageError(f"{name} is in {found[name].file} and in {file}")
                tensor = opened.get_slice(name)
                if tensor.get_dtype() not in TYPES:
                    raise UsageError(
                        f"{name} of {file} is {tensor.get_dtype()}; expected {', '.join(TYPES)}: "
                        "convert quantized weights to bfloat16 first"
                    )
                found[name] = Tensor(file, tuple(tensor.get_shape()))
    return found


def read(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Callable]]:
    """Yields each tensor's name and a function (index) -> that part of it, of the type it has.

    One file is open at a time, and the function reads what it is asked for. It is valid until the
    next name.
    """
    by_file: dict[pathlib.Path, list[str]] = {}
    for name, tensor in tensors.items():
        by_file.setdefault(tensor.file, []).append(name)
    for file, names in by_file.items():
        with _opened(file) as opened:
            for name in names:

                def part(index: tuple, name=name, opened=opened) -> np.ndarray:
                    return opened.get_slice(name)[index] if index else opened.get_tensor(name)

                yield name, part


def write(
    directory: pathlib.Path,
    shapes: dict[str, tuple[int, ...]],
    value: Callable[[str], np.ndarray],
    dtype: str,
) -> None:
    """Writes tensors in shards of at most `SHARD` bytes, or of one larger tensor, and their index.

    Args:
      value: (name) -> the tensor, asked for once each and in order.
      dtype: one of `SAVED`.
    """
    shards, size = [[]], 0
    width = np.dtype(SAVED[dtype]).itemsize
    for name, shape in shapes.items():
        size += width * math.prod(shape)
        if shards[-1] and size > SHARD:
            shards, size = [*shards, []], width * math.prod(shape)
        shards[-1].append(name)
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards, strict=True):
        _save(directory / file, {name: shapes[name] for name in shard}, value, dtype)
    if len(shards) > 1:
        total = width * sum(map(math.prod, shapes.values()))
        where = {n: file for file, shard in zip(names, shards, strict=True) for n in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _save(file: pathlib.Path, shapes, value: Callable[[str], np.ndarray], dtype: str) -> None:
    """Writes a file of safetensors: the header's length, the header as JSON, the numbers.

    The library has no way to write a tensor at a time: it would hold the file twice.
    """
    width, end = np.dtype(SAVED[dtype]).itemsize, 0
    kind = next(name for name, known in TYPES.items() if known is SAVED[dtype])
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    for name, shape in shapes.items():
        start, end = end, end + width * math.prod(shape)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the numbers are aligned
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            out.write(np.ascontiguousarray(value(name), SAVED[dtype]).view(np.uint8))


def _files(directory: pathlib.Path) -> dict[pathlib.Path, set[str]]:
    """Returns the files that hold the model, and which tensors the index says are in them."""
    if (directory / INDEX).is_file():
        try:
            listed = json.loads((directory / INDEX).read_bytes())["weight_map"]
            files: dict[pathlib.Path, set[str]] = {}
            for name, file in listed.items():
                files.setdefault(directory / pathlib.PurePath(file).name, set()).add(name)
            return files
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise UsageError(
                f"{directory / INDEX} is no index of safetensors "
                f"({type(error).__name__}: {error}): fetch it again"
            ) from error
    if (directory / SINGLE).is_file():
        return {directory / SINGLE: set()}
    if any(next(directory.glob(pattern), None) for pattern in PICKLES):
        raise UsageError(
            f"{directory} holds weights as pickles alone, which run code when they are read: fetch "
            f"the model's safetensors, or save it anew where you trust it, as {SINGLE}"
        )
    raise UsageError(f"{directory} has neither {SINGLE} nor {INDEX}: expected a model's directory")


def _opened(file: pathlib.Path):
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{file} is damaged or missing ({reason}): fetch it again, whole"
        ) from error
