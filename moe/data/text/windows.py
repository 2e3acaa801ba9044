"""Makes batches of text: windows of T tokens, in an order that is a function of seed and epoch.

Window i of a set is tokens[i * T : i * T + T + 1]: T inputs, and as targets the same moved by one.
Documents lie one after the other and are cut where a window ends; a row holds pieces of several.
Every array of a batch is int32 [b, T], but for `weight`, float32:

    tokens     the inputs
    targets    the token that follows each
    weight     1 where the target is to be predicted, else 0: in padding, and where the target
               begins another document. Where one token begins and ends documents, that target is
               the end of this document, and has 1.
    bytes      UTF-8 bytes of the target; 0 where it is special, and where `weight` is 0. Bits per
               byte are the loss over the targets with bytes, divided by their bytes.
    segments   1, 2, ... in each row: which tokens are of one document; 0 is padding
    positions  0, 1, ... from the begin of the document, or of the row where that lies before it
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from moe.data import stream
from moe.data.stream import Batch
from moe.data.text.mixture import dealing
from moe.data.text.source import Mixture, TextSource, check_tokens
from moe.errors import UsageError

Place = tuple[TextSource, int]  # a set and the number of a window


def train_batches(
    source: TextSource | Mixture,
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    seq_len: int,
    rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Yields the batches of the steps start_step, start_step + 1, ... without end.

    Args:
        source: of N windows; every N consecutive numbers from a multiple of N on show each window
            once, in an order of that epoch. Of a mixture this holds for each set, among the
            numbers that fall to it.
        batch_size: global, over all processes.
        seed: of the order, in 0..2^63-1.
        start_step: the step of the first batch.
        seq_len: T.
        rows: the b positions in the batch that this process makes, in increasing order; None
            for all of them.

    Raises:
        UsageError: an argument is out of range.
        DataError: from the iterator, where a token is none of the vocabulary.
    """
    rows = stream.positions(batch_size, rows)
    place = training_places(source, seq_len, seed)

    def batch(step: int) -> Batch:
        return cut([place(number) for number in (step * batch_size + rows).tolist()], seq_len)

    return stream.from_step(start_step, batch)


def eval_batches(
    source: TextSource | Mixture,
    *,
    batch_size: int,
    seq_len: int,
    rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Yields each window once, in order, set by set; the last batch is filled up with zeros.

    Every token but the first is a target exactly once. Every process yields the same number of
    batches, of equal size. Arguments and errors are those of `train_batches`.
    """
    rows = stream.positions(batch_size, rows)
    ends = np.cumsum([_windows(part, seq_len) for part in source.parts])

    def place(index: int) -> Place | None:
        part = int(np.searchsorted(ends, index, side="right"))
        if part == len(ends):
            return None
        return source.parts[part], index - int(ends[part - 1] if part else 0)

    def batch(step: int) -> Batch:
        indices = (step * batch_size + rows).tolist()
        return cut([place(index) for index in indices], seq_len)

    return stream.up_to(-(-int(ends[-1]) // batch_size), batch)


def training_places(
    source: TextSource | Mixture, seq_len: int, seed: int
) -> Callable[[int], Place]:
    """Returns number -> the set and window that this example of a run shows."""
    parts = source.parts
    sizes = [_windows(part, seq_len) for part in parts]
    if len(parts) == 1:
        order = stream.epoch_order(sizes[0], seed)
        return lambda number: (parts[0], order(number))
    orders = [stream.epoch_order(size, seed, "mixture", i) for i, size in enumerate(sizes)]
    deal = dealing(source.shares, seed)

    def place(number: int) -> Place:
        part, count = deal(number)
        return parts[part], orders[part](count)

    return place


def cut(places: Sequence[Place | None], seq_len: int) -> Batch:
    """Returns the batch of these windows; None is a row of padding."""
    tokens = np.zeros((len(places), seq_len + 1), np.int32)
    lengths = np.zeros((len(places), 1), np.int32)
    source = next((place[0] for place in places if place), None)
    for row, place in enumerate(places):
        if place:
            part, start = place[0], place[1] * seq_len
            window = part.tokens[start : start + seq_len + 1]
            check_tokens(part, window)
            tokens[row, : len(window)] = window
            lengths[row] = len(window) - 1
    return _describe(tokens, lengths, source)


def _describe(tokens: np.ndarray, lengths: np.ndarray, source: TextSource | None) -> Batch:
    """Returns the batch of windows [b, T + 1], of which lengths [b, 1] targets are real."""
    inputs, targets = tokens[:, :-1].copy(), tokens[:, 1:].copy()
    column = np.arange(inputs.shape[1], dtype=np.int32)
    real = column < lengths
    if source is None:  # nothing but padding
        names = ("tokens", "targets", "segments", "positions", "bytes")
        return {name: np.zeros_like(inputs) for name in names} | {
            "weight": np.zeros(inputs.shape, np.float32)
        }
    begins = inputs == source.begin
    begins[:, 0] = True
    start = np.maximum.accumulate(np.where(begins, column, 0), axis=1)
    wanted = real if source.begin == source.end else real & (targets != source.begin)
    return {
        "tokens": inputs * real,
        "targets": targets * real,
        "weight": wanted.astype(np.float32),
        "segments": np.cumsum(begins, axis=1, dtype=np.int32) * real,
        "positions": (column - start) * real,
        "bytes": source.token_bytes[targets] * wanted,
    }


def _windows(source: TextSource, seq_len: int) -> int:
    if seq_len < 1:
        raise UsageError(f"seq_len={seq_len}: expected 1 or more tokens")
    if not (windows := source.windows(seq_len)):
        raise UsageError(f"split '{source.split}' of '{source.name}' is empty: pass a longer slice")
    return windows
