"""How long a collective takes on the links between chips, or on the network between hosts."""

import numpy as np

from moe.plan.chips import Chip
from moe.plan.collectives import Collective


def seconds(one: Collective, chip: Chip, places: np.ndarray | None) -> float:
    """Of all executions of a collective in one step.

    Args:
      places: of the partitions, [N, dimensions]: of a TPU where it is in the slice's torus.
    """
    if one.network == "network":
        return one.count * one.sent / chip.network
    if chip.kind != "tpu":
        return one.count * one.sent / chip.link
    if one.kind in ("all-to-all", "ragged-all-to-all", "collective-permute"):
        return one.count * _pairs_seconds(one, chip, places)
    return one.count * one.sent / (chip.link * _ways(one.members, chip, places))


def _ways(members: np.ndarray, chip: Chip, places: np.ndarray) -> int:
    """Links of a chip that a ring of its group uses: per dimension 2, or 1 where it is no ring."""
    sides = places.max(0) + 1
    ways = 0
    for dimension, side in enumerate(sides):
        along = len(np.unique(places[members[0], dimension]))
        if along > 1:
            ways += 2 if along == side and _closes(side, chip) else 1
    return max(ways, 1)


def _pairs_seconds(one: Collective, chip: Chip, places: np.ndarray) -> float:
    """Of the busiest link, where each pair's bytes go the shortest way, dimension by dimension.

    Chips that differ in another dimension alone share the load of a link evenly.
    """
    if one.kind == "collective-permute":
        pairs, size = one.members, one.payload
    else:
        n = one.members.shape[1]
        first, second = np.nonzero(~np.eye(n, dtype=bool))
        pairs = np.stack([one.members[:, first].ravel(), one.members[:, second].ravel()], 1)
        size = one.payload / n
    slowest = 0.0
    for dimension, side in enumerate(places.max(0) + 1):
        start, stop = places[pairs[:, 0], dimension], places[pairs[:, 1], dimension]
        load = _loads(start, stop, int(side), _closes(side, chip)).max(initial=0)
        rows = len(places) / side
        slowest = max(slowest, load * size / rows / chip.link)
    return slowest


def _loads(start: np.ndarray, stop: np.ndarray, side: int, ring: bool) -> np.ndarray:
    """Pairs that pass each link of one dimension, [2 side]: upwards, then downwards.

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
