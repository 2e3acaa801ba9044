"""Computes how long a step takes at the hardware's rates (Williams et al. 2009)."""

from typing import NamedTuple

from moe.plan.chips import Chip
from moe.plan.work import Work


class Roofline(NamedTuple):
    """Holds the seconds of a step; None where a rate is not known.

    Attributes:
      compute: all matrix products at the chip's peak.
      memory: all bytes of the main memory at its bandwidth.
      chip: instruction by instruction the slower of the two, one after the other.
      links: the collectives inside a slice or host, `network`: those between them.
      fastest: if these hide each other perfectly, `slowest`: if nothing hides anything.
      mfu: (at the slowest, at the fastest) the model's FLOPs as a share of what the chips could do.
      rate: (at the slowest, at the fastest) units of the task per second, of all chips.
    """

    compute: float
    memory: float | None
    chip: float | None
    links: float
    network: float
    fastest: float
    slowest: float | None
    mfu: tuple[float | None, float]
    rate: tuple[float | None, float]

    @property
    def bound(self) -> str:
        """Returns what the step waits for, if all is hidden that can be."""
        times = {"chip": self.chip or self.compute, "links": self.links, "network": self.network}
        longest = max(times, key=times.get)
        if longest != "chip":
            return longest
        return "compute" if self.compute >= (self.memory or 0) else "memory"


def roofline(
    chip: Chip,
    work: list[Work],
    links: float,
    network: float,
    *,
    dtype: str,
    model_flops: float,
    units: int,
) -> Roofline | None:
    """Returns the roofline of one step; None for a chip of which no rate is known.

    Args:
      links, network: seconds of the collectives.
      model_flops: of one chip.
      units: of the task, in a step of all chips.
    """
    peak = chip.flops(dtype)
    if peak is None:
        return None
    compute = sum(item.count * item.flops for item in work) / peak
    memory = busy = slowest = None
    if chip.kind == "tpu":  # the program was compiled for this chip: its bytes are the chip's
        memory = sum(item.count * item.bytes for item in work) / chip.hbm_bandwidth
        busy = sum(item.seconds(peak, chip.hbm_bandwidth) for item in work)
        slowest = busy + links + network
    fastest = max(busy or compute, links, network)
    useful = model_flops / peak

    def both(value: float) -> tuple[float | None, float]:
        return (None if slowest is None else value / slowest, value / fastest)

    return Roofline(
        compute, memory, busy, links, network, fastest, slowest, both(useful), both(units)
    )
