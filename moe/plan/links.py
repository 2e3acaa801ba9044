"""Computes how long a collective takes on links between chips, or the network between hosts."""

import numpy as np

from moe.plan.chips import Chip
from moe.plan.collectives import Collective


def seconds(collective: Collective, chip: Chip, places: np.ndarray | None) -> float:
    """Returns the seconds of all executions of a collective in one step.

    Args:
      places: of the partitions, [N, dimensions]: of a TPU where it is in the slice's torus.
    """
    if collective.network == "network":
        return collective.count * collective.sent / chip.network
    if chip.kind != "tpu":
        return collective.count * collective.sent / chip.link
    if collective.kind in ("all-to-all", "ragged-all-to-all", "collective-permute"):
        return collective.count * _pairs_seconds(collective, chip, places)
    return (
        collective.count * collective.sent / (chip.link * _ways(collective.members, chip, places))
    )


def _ways(members: np.ndarray, chip: Chip, places: np.ndarray) -> int:
    """Counts the links that a chip's group uses: 2 in each dimension that is a ring, else 1."""
    sides = places.max(0) + 1
    ways = 0
    for dimension, side in enumerate(sides):
        along = len(np.unique(places[members[0], dimension]))
        if along > 1:
            ways += 2 if along == side and _closes(side, chip) else 1
    return max(ways, 1)


def _pairs_seconds(collective: Collective, chip: Chip, places: np.ndarray) -> float:
    """Returns the busiest link's seconds; each pair's bytes go the shortest way, side by side.

    Chips that differ in another dimension alone share the load of a link evenly.
    """
    if collective.kind == "collective-permute":
        pairs, size = collective.members, collective.payload
    else:
        n = collective.members.shape[1]
        first, second = np.nonzero(~np.eye(n, dtype=bool))
        pairs = np.stack(
            [collective.members[:, first].ravel(), collective.members[:, second].ravel()], 1
        )
        size = collective.payload / n
    slowest = 0.0
    for dimension, side in enumerate(places.max(0) + 1):
        start, stop = places[pairs[:, 0], dimension], places[pairs[:, 1], dimension]
        load = _loads(start, stop, int(side), _closes(side, chip)).max(initial=0)
        rows = len(places) / side
        slowest = max(slowest, load * size / rows / chip.link)
    return slowest


def _loads(start: np.ndarray, stop: np.ndarray, side: int, ring: bool) -> np.ndarray:
    """Counts the pairs that pass each link of one dimension, [2 side]: upwards, then downwards.

    In a ring they go the shorter way; where both are as short, half of them either.
    """
    load = np.zeros(2 * side)
    for shift in np.unique(stop - start):
        here, ways = start[stop - start == shift], [(int(shift), 1.0)]
        if ring:
            up = int(shift) % side
            ways = [(up if 2 * up < side else up - side, 1.0)]
            if 2 * up == side:
                ways = [(up, 0.5), (-up, 0.5)]
        for way, weight in ways:
            for hop in range(abs(way)):
                link = (here + hop) % side if way > 0 else side + (here - hop) % side
                np.add.at(load, link, weight)
    return load


def _closes(side: int, chip: Chip) -> bool:
    return bool(chip.wraps) and side % chip.wraps == 0
