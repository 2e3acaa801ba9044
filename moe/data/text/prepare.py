"""Prepares a token set from text files of one's own.

    python -m moe.data.prepare text --files='DIR/**/*.txt' --out=DIR

A file of .txt or source code is a document, and so is a line of .jsonl; each may be .gz. Documents
go whole to train, validation or test, by a hash of their text.
"""

import argparse
import hashlib
import importlib.metadata
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from moe.data.staging import staging
from moe.data.text import bpe, token_set, writer
from moe.data.text.documents import Piece, find_files, read_pieces
from moe.data.text.tokenizer import BYTES, Bytes, Tokenizer, read
from moe.errors import UsageError

_TRAIN = "train:"
_TRAINING_BYTES = 1 << 30  # of text, on which a tokenizer is trained: more changes little
_BATCH_BYTES = 1 << 22  # of text, which the tokenizer's threads share


def main(argv: list[str]) -> str:
    """Prepares the set that the arguments after `prepare text` describe; returns its folder.

    Raises:
        UsageError: an argument, a file or the folder is not as it must be.
    """
    options = _parser().parse_args(argv)
    if options.check:
        manifest = token_set.check_set(pathlib.Path(options.check).expanduser())
        print(_summary(manifest), file=sys.stderr)
        return options.check
    if not options.files or not options.out:
        raise UsageError("expected --files='DIR/**/*.txt' and --out=DIR (or --check=DIR)")
    shares = options.test_share, options.validation_share
    if min(shares) < 0 or sum(shares) > 1:
        raise UsageError(
            f"--test_share={shares[0]} --validation_share={shares[1]}: expected shares of the "
            "documents from 0 to 1, together at most 1"
        )
    out = pathlib.Path(options.out).expanduser()
    files = find_files(options.files)
    with staging(out) as folder, _progress() as bar:
        manifest = _prepare(options, files, folder, bar, ["text", *argv])
    print(_summary(manifest), file=sys.stderr)
    return str(out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m moe.data.prepare text", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--files", action="append", help="a pattern in quotes; may be given several times")
    add("--out", help="the folder of the set")
    add("--tokenizer", default=BYTES, help="bytes (the default), PATH/tokenizer.json, train:8192")
    add("--field", default="text", help="of a line of .jsonl: its text (default: text)")
    add("--separator", help="a line between two documents of a file; '' for an empty line")
    add("--test_share", type=float, default=0.05, help="of the documents (default: 0.05)")
    add("--validation_share", type=float, default=0.0, help="of the documents (default: 0)")
    add("--errors", choices=("strict", "replace"), default="strict", help="of what is no UTF-8")
    add("--begin", help="the token before a document (default: the tokenizer's known one)")
    add("--end", help="the token after a document (default: as --begin)")
    add("--check", metavar="DIR", help="only compare all hashes of a set that was prepared")
    return parser


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _prepare(
    options: argparse.Namespace,
    files: list[str],
    folder: pathlib.Path,
    bar: Progress,
    arguments: list[str],
) -> dict:
    """Writes the set into `folder`; returns its manifest."""
    shares = {"test": options.test_share, "validation": options.validation_share}
    total = sum(map(os.path.getsize, files))

    def pieces(what: str, utf8: bool) -> Iterator[tuple[str, Piece]]:
        """Yields the pieces of all documents and the split of each; moves the bar."""
        task = bar.add_task(what, total=total)
        found = read_pieces(
            files,
            field=options.field,
            separator=options.separator,
            utf8=utf8,
            replace=options.errors == "replace",
        )
        split = ""
        for piece in found:
            split = choose_split(piece.text, shares) if piece.first else split
            yield split, piece
            bar.update(task, advance=piece.read)
        bar.update(task, completed=total)

    tokenizer = _tokenizer(options, lambda: pieces("learning tokens", True))
    made = writer.Writer(folder, tokenizer)
    _encode(made, tokenizer, pieces("making tokens", not isinstance(tokenizer, Bytes)))
    _check_splits(made, shares, files)
    return made.finish({"program": _version(), "arguments": arguments})


def _version() -> str:
    try:
        return f"permoe {importlib.metadata.version('permoe')}"
    except importlib.metadata.PackageNotFoundError:  # used where it lies
        return "permoe"


def choose_split(text: bytes, shares: dict[str, float]) -> str:
    """Returns the split of a document by the hash of its first piece: equal ones stay together."""
    place = int.from_bytes(hashlib.sha256(text).digest()[:8]) / 2**64
    if place < shares["test"]:
        return "test"
    return "validation" if place < shares["test"] + shares["validation"] else "train"


def _tokenizer(options: argparse.Namespace, pieces) -> Tokenizer:
    """Returns the tokenizer that was asked for; one that is trained sees the split train alone."""
    if options.tokenizer == BYTES:
        if options.begin or options.end:
            raise UsageError(
                "--tokenizer=bytes has 256 between documents: pass no --begin or --end"
            )
        return Bytes()
    if not options.tokenizer.startswith(_TRAIN):
        return read(pathlib.Path(options.tokenizer).expanduser(), options.begin, options.end)
    size = options.tokenizer.removeprefix(_TRAIN)
    if not size.isdecimal():
        raise UsageError(f"--tokenizer={options.tokenizer}: expected a size, such as train:8192")

    def texts() -> Iterator[str]:
        left = _TRAINING_BYTES
        for split, piece in pieces():
            if left <= 0:
                return
            if split == "train":
                left -= len(piece.text)
                yield piece.text.decode()

    return bpe.train(texts(), int(size))


def _encode(made: writer.Writer, tokenizer: Tokenizer, pieces: Iterable[tuple[str, Piece]]) -> None:
    """Adds all documents to the set, many at a time."""
    size = counted = 0
    for batch in _batches(pieces):
        arrays = tokenizer.encode_pieces([piece.text for _, piece in batch])
        for (split, piece), tokens in zip(batch, arrays, strict=True):
            made.add(split, piece.name, tokens, first=piece.first, size=len(piece.text))
            size += len(piece.text)
            counted += int(tokenizer.token_bytes[tokens].sum())
    if size and abs(counted - size) > size / 100:
        print(
            f"the tokens stand for {counted:,} bytes and the text has {size:,} (a tokenizer that "
            "changes the text): bits per byte will be off by as much",
            file=sys.stderr,
        )


def _batches(pieces: Iterable[tuple[str, Piece]]) -> Iterator[list[tuple[str, Piece]]]:
    batch, size = [], 0
    for pair in pieces:
        batch.append(pair)
        size += len(pair[1].text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _check_splits(made: writer.Writer, shares: dict[str, float], files: list[str]) -> None:
    """Raises where there is no text, or a split that was asked for has none."""
    count = sum(made.documents(split) for split in writer.PARTS)
    if not count:
        raise UsageError(f"the {len(files)} files ({files[0]}, ...) are empty: pass some with text")
    wanted = {"train": 1 - sum(shares.values())} | shares
    for split, share in wanted.items():
        if share > 1e-9 and not made.documents(split):
            raise UsageError(
                f"none of the {count} documents fell to '{split}', which has {share:g} of them: "
                "pass --test_share (0 for none) or --validation_share, or cut the files into "
                "documents with --separator"
            )


def _summary(manifest: dict) -> str:
    splits = (
        f"{split} {facts['documents']:,} documents, {facts['bytes']:,} bytes, "
        f"{facts['tokens']:,} tokens"
        for split, facts in manifest["splits"].items()
    )
    return f"vocabulary {manifest['vocabulary']:,}; {'; '.join(splits)}"
