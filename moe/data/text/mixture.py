"""Says which set of a mixture shows a window, and which of its windows: a function of the number.

Numbers are dealt to the first set so that among any m of them it has m * share of them, to within
one; what it leaves is numbered anew and dealt to the second set likewise, and so on. The count of a
set among the first n numbers is a closed form, floor(n * share + offset), so nothing is remembered:
a run resumes at any step, on any number of processes. The offsets come from the seed.
"""

import math
from collections.abc import Callable, Sequence

from moe import seeds
from moe.errors import UsageError

_BITS = 32  # shares and offsets are multiples of 2^-32, so that the counts are exact


def parse(name: str) -> list[tuple[str, float]] | None:
    """Returns the sets and weights of "A:0.7,B:0.3"; None where the name is of one set.

    Raises:
        UsageError: a weight is missing, or no positive number.
    """
    if "," not in name and _weight(name.rpartition(":")[2]) is None:
        return None
    pairs = []
    for text in name.split(","):
        part, _, weight = text.strip().rpartition(":")
        number = _weight(weight)
        if not part or number is None or not 0 < number < math.inf:
            raise UsageError(
                f"'{text}' of the mixture '{name}' has no weight: expected NAME:WEIGHT,NAME:WEIGHT "
                "with weights above 0, such as stdlib:0.7,DIR:0.3"
            )
        pairs.append((part, number))
    return pairs


def _weight(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def dealing(shares: Sequence[float], seed: int) -> Callable[[int], tuple[int, int]]:
    """Returns number -> (place of its set in the mixture, how many numbers that set had before).

    Args:
        shares: the weight of each set; only their ratios count.
        seed: of the offsets.
    """
    shares = [share / sum(shares) for share in shares]
    words = seeds.root(seed, "mixture").generate_state(len(shares)).tolist()
    rest = [sum(shares[place:]) for place in range(len(shares))]
    ratios = [round(share / left * 2**_BITS) for share, left in zip(shares, rest, strict=True)]
    splits = list(zip(ratios, words, strict=True))[:-1]

    def deal(number: int) -> tuple[int, int]:
        for place, (ratio, offset) in enumerate(splits):
            before = number * ratio + offset >> _BITS
            if number * ratio + ratio + offset >> _BITS > before:
                return place, before
            number -= before
        return len(splits), number

    return deal
