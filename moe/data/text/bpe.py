"""Trains a tokenizer on the text at hand: byte-level pairs, as GPT-2 has them."""

from collections.abc import Iterable

from moe.data.text import tokenizer
from moe.errors import UsageError

SMALLEST = 257  # the bytes, and the token between documents
SEPARATOR = "<|endoftext|>"


def train(texts: Iterable[str], vocabulary: int) -> tokenizer.Tokenizer:
    """Trains on texts; finds fewer tokens than `vocabulary` where they are short.

    Raises:
        UsageError: the library is missing, or the vocabulary holds not even the bytes.
    """
    if vocabulary < SMALLEST:
        raise UsageError(
            f"--tokenizer=train:{vocabulary}: expected {SMALLEST} or more, the bytes and the token "
            "between documents"
        )
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise UsageError(
            f"--tokenizer=train:{vocabulary} needs the package tokenizers: {tokenizer.INSTALL}"
        ) from error
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    return tokenizer.parse(model.to_str().encode(), "the trained tokenizer")
