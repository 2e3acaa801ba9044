"""Makes batches of text: token files, windows of documents and an exactly resumable order.

    source = open_text("stdlib", "train")           # or a prepared set, .bin files, "A:0.7,B:0.3"
    for batch in train_batches(source, batch_size=64, seed=0, start_step=0, seq_len=256):
        batch["tokens"], batch["targets"]           # int32 [B, T]; see windows.py for all

A batch is a function of (source, batch_size, seed, step, seq_len) alone: a run stopped anywhere and
resumed at its step sees the bits it would have seen, on any number of processes.
"""

from moe.data.text.opening import open_text, open_tokenizer
from moe.data.text.source import Mixture, TextSource
from moe.data.text.tokenizer import Tokenizer
from moe.data.text.windows import eval_batches, train_batches

__all__ = [
    "Mixture",
    "TextSource",
    "Tokenizer",
    "eval_batches",
    "open_text",
    "open_tokenizer",
    "train_batches",
]
