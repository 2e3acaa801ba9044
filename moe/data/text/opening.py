"""Opens a text by its name: the standard library, a folder of tokens, or a mixture of several."""

import os
import pathlib

from moe.data.text import mixture, shards, stdlib, token_set, tokenizer, writer
from moe.data.text.source import Mixture, TextSource
from moe.errors import UsageError

PREPARE = "python -m moe.data.prepare text --files='DIR/**/*.txt' --out"


def open_text(name: str, split: str, data_dir: str | None = None) -> TextSource | Mixture:
    """Opens one split of a text.

    Args:
        name: "stdlib"; a folder that `python -m moe.data.prepare text` made, or one of .bin files
            of nanoGPT-like speedruns; or several of these with weights, "stdlib:0.7,DIR:0.3".
        split: "train", "validation", "test", as far as the set has it, or a slice of its documents
            such as "train[:90%]".
        data_dir: where a folder is looked for that is not found as it stands.

    Raises:
        DataError: the files are damaged, or do not belong together.
        UsageError: there is no such set or split.
    """
    if (folder := _folder(name, data_dir)) is None and (parts := mixture.parse(name)):
        names, shares = zip(*parts, strict=True)
        return Mixture(name, split, tuple(_one(part, split, data_dir) for part in names), shares)
    return _one(name, split, data_dir, folder)


def _one(
    name: str, split: str, data_dir: str | None, folder: pathlib.Path | None = None
) -> TextSource:
    if name == stdlib.NAME:
        return stdlib.open_stdlib(split)
    folder = folder or _folder(name, data_dir)
    if folder is None:
        where = f", nor in {data_dir}" if data_dir else ""
        raise UsageError(
            f"there is no text set '{name}' here{where}: expected stdlib, a folder of tokens, or "
            f"NAME:WEIGHT,NAME:WEIGHT; prepare one with `{PREPARE}={name}`"
        )
    if (folder / writer.MANIFEST).exists():
        return token_set.open_set(folder, name, split)
    if any(folder.glob("*.bin")):
        return shards.open_shards(folder, name, split)
    raise UsageError(
        f"{folder} is no text set (it has neither {writer.MANIFEST} nor .bin files): prepare one "
        f"with `{PREPARE}=OTHER` and pass --config.data.name=OTHER"
    )


def _folder(name: str, data_dir: str | None) -> pathlib.Path | None:
    """Returns the folder of that name: as it stands, else in `data_dir`."""
    if name == stdlib.NAME:
        return None
    places = [pathlib.Path(name).expanduser()]
    if data_dir:
        places.append(pathlib.Path(data_dir).expanduser() / name)
    return next((place for place in places if os.path.isdir(place)), None)


def open_tokenizer(place: TextSource | Mixture | str | os.PathLike) -> tokenizer.Tokenizer:
    """Returns the tokenizer of a text, of the folder of a set, or of a tokenizer.json.

    Raises:
        UsageError: it has none, or the library that reads it is missing.
    """
    if isinstance(place, TextSource | Mixture):
        if not place.tokenizer:
            raise UsageError(
                f"text set '{place.name}' has no {tokenizer.FILE}: put GPT-2's into its folder"
            )
        return tokenizer.parse(
            place.tokenizer, f"the tokenizer of '{place.name}'", place.begin, place.end
        )
    path = pathlib.Path(place).expanduser()
    if (path / writer.MANIFEST).exists():
        manifest = token_set.read_manifest(path)
        return tokenizer.read(path / tokenizer.FILE, manifest["begin"], manifest["end"])
    return tokenizer.read(path / tokenizer.FILE if path.is_dir() else path)
