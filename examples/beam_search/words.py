"""Reads the CMU Pronouncing Dictionary as letters and phonemes, and counts errors."""

import random
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from moe.errors import UsageError

END = 0  # of a word's phonemes; 0 fills up its letters as well
LETTERS = "abcdefghijklmnopqrstuvwxyz'"


class Words(NamedTuple):
    """Holds pairs to train on, and words to test on with all their pronunciations.

    Attributes:
      phonemes: their names; number n + 1 is phonemes[n].
      letters, counts: of the training pairs, [n, L] and [n].
      sounds: their phonemes with END behind, then END again, [n, T + 1].
      test_letters, test_counts: [m, L] and [m].
      references: of each word to test on, the phonemes of all its pronunciations.
    """

    phonemes: list[str]
    letters: np.ndarray
    counts: np.ndarray
    sounds: np.ndarray
    test_letters: np.ndarray
    test_counts: np.ndarray
    references: list[list[tuple[int, ...]]]


def parse(arrays: Mapping[str, np.ndarray]) -> dict[str, list[tuple[str, ...]]]:
    """Returns the pronunciations of each word, without stress: "AH0" is "AH".

    Words with other signs than letters and apostrophes are left out.

    Args:
      arrays: "words", and "phonemes" with spaces between, of `examples.data`, as bytes.
    """
    found: dict[str, list[tuple[str, ...]]] = {}
    for word, sounds in zip(arrays["words"].tolist(), arrays["phonemes"].tolist(), strict=True):
        word = word.decode()
        said = tuple(sound.rstrip("012") for sound in sounds.decode().split())
        if said and set(word) <= set(LETTERS) and said not in found.get(word, []):
            found.setdefault(word, []).append(said)
    return found


def split(said: dict, train: int, test: int, longest: int, seed: int) -> Words:
    """Returns `train` words with all their pronunciations, and `test` others.

    Args:
      longest: the most letters and the most phonemes of a word; others are left out.

    Raises:
      UsageError: there are fewer words.
    """
    names = sorted({sound for ways in said.values() for way in ways for sound in way})
    number = {name: place + 1 for place, name in enumerate(names)}
    short = [word for word, ways in said.items() if max(len(word), *map(len, ways)) <= longest]
    if len(short) < train + test:
        raise UsageError(
            f"there are {len(short)} words of at most {longest} letters and phonemes, not "
            f"{train + test}; ask for fewer"
        )
    random.Random(seed).shuffle(short)
    tested, trained = short[:test], short[test : test + train]

    def numbers(way):
        return tuple(number[sound] for sound in way)

    pairs = [(word, numbers(way)) for word in trained for way in said[word]]
    return Words(
        names,
        _fill([[LETTERS.index(letter) + 1 for letter in word] for word, _ in pairs], longest),
        np.array([len(word) for word, _ in pairs], np.int32),
        _fill([way for _, way in pairs], longest + 1),
        _fill([[LETTERS.index(letter) + 1 for letter in word] for word in tested], longest),
        np.array([len(word) for word in tested], np.int32),
        [[numbers(way) for way in said[word]] for word in tested],
    )


def _fill(rows, width: int) -> np.ndarray:
    filled = np.zeros((len(rows), width), np.int32)
    for row, values in zip(filled, rows, strict=True):
        row[: len(values)] = values
    return filled


def edits(a, b) -> int:
    """Returns the fewest insertions, deletions and replacements that make b of a."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def errors(guesses: np.ndarray, references: list[list[tuple[int, ...]]]) -> tuple[float, float]:
    """Returns the word error and the phoneme error of guesses [m, T], each up to its END.

    A word is right where it is one of its pronunciations. Phonemes are compared with the closest
    one: edits over the length of that.
    """
    wrong = changes = length = 0
    for guess, ways in zip(guesses.tolist(), references, strict=True):
        said = tuple(guess[: guess.index(END)] if END in guess else guess)
        least, size = min((edits(said, way), len(way)) for way in ways)
        wrong, changes, length = wrong + (least > 0), changes + least, length + size
    return wrong / len(references), changes / length
