"""Gives a share of the training images a label that may be wrong, as careless people would.

Garcin et al. (Stochastic smoothing of the top-K calibrated hinge loss, ICML 2022) redraw labels
within groups of classes that look alike, to see what a loss of k guesses makes of ambiguity.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from moe import seeds
from moe.data.images.source import ImageSource, Records
from moe.errors import UsageError

Groups = tuple[tuple[int, ...], ...]


def parse_groups(text: str, classes: int = 0) -> Groups:
    """Reads "0,6;2,4" as the groups (0, 6) and (2, 4); "" is one group of all classes.

    Args:
      classes: how many there are; 0: not known yet.

    Raises:
      UsageError: something else than numbers of classes, each in one group at most.
    """
    if not text.strip():
        return (tuple(range(classes)),)
    try:
        groups = tuple(tuple(int(word) for word in part.split(",")) for part in text.split(";"))
    except ValueError:
        raise UsageError(
            f"config.data.label_groups={text!r}: expected numbers of classes that look alike, such "
            "as '0,6;2,4'"
        ) from None
    members = [label for group in groups for label in group]
    if len({*members}) < len(members):
        raise UsageError(f"config.data.label_groups={text!r} has a class twice")
    if wrong := [label for label in members if label < 0 or (classes and label >= classes)]:
        among = f"the {classes} classes are 0..{classes - 1}" if classes else "they count from 0"
        raise UsageError(f"config.data.label_groups={text!r}: {wrong[0]} is no class; {among}")
    return groups


def with_label_noise(source: ImageSource, share: float, groups: str, seed: int) -> ImageSource:
    """Returns the source with the labels of a share of its examples drawn anew within their group.

    Which examples, and their labels, depend on the seed alone: each epoch shows the same ones. A
    label may be drawn as it was, so that in a group of n a share of (n - 1) / n is wrong.
    """
    if not share:
        return source
    rng = np.random.default_rng(seeds.root(seed, "label noise"))
    drawn, place = rng.random(len(source)) < share, rng.random(len(source))
    of_class = {
        label: group for group in parse_groups(groups, source.num_classes) for label in group
    }
    records = _Noisy(source.records, drawn, place, of_class)
    return dataclasses.replace(source, records=records)


@dataclasses.dataclass(frozen=True, eq=False)
class _Noisy:
    """Holds records whose label is drawn anew where `drawn`: the one at `place`, in [0, 1), of its
    group."""

    records: Records
    drawn: np.ndarray
    place: np.ndarray
    of_class: dict[int, Sequence[int]]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        image, label = self.records[index]
        group = self.of_class.get(label, (label,))
        return image, group[int(self.place[index] * len(group))] if self.drawn[index] else label
