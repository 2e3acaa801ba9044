"""Lists what each accelerator can do, and where its maker says so.

All rates are per chip and in one direction. The memory is what the compiler grants a program: less
than the data sheet's, of which the runtime keeps a part (TPU: named by the compiler's own
out-of-memory error; GPU: three quarters of the data sheet's, JAX's default share).
"""

import dataclasses

from moe.errors import UsageError

_TPU = "https://cloud.google.com/tpu/docs/"


@dataclasses.dataclass(frozen=True)
class Chip:
    """Describes a kind of chip; None where nothing can be known."""

    name: str
    kind: str  # "tpu", "gpu" or "cpu"
    source: str
    hbm: float | None = None  # bytes that a program may use
    hbm_bandwidth: float | None = None  # bytes/s
    flops_bfloat16: float | None = None  # dense
    flops_float32: float | None = None  # at JAX's default precision
    link: float | None = None  # bytes/s of one link between chips (GPU: of all of NVLink)
    links: int = 0  # links of a chip
    network: float | None = None  # bytes/s to other slices or hosts
    largest: int | None = None  # chips that the links join
    wraps: int = 0  # a side of a slice closes to a ring where this divides it (TPU)
    products: str = ""  # what a float32 product is computed in, at JAX's default precision

    def flops(self, dtype: str) -> float | None:
        return self.flops_bfloat16 if dtype == "bfloat16" else self.flops_float32

    def arithmetic(self, dtype: str) -> str:
        """Returns the arithmetic whose peak `flops` is."""
        return "bfloat16" if dtype == "bfloat16" else self.products


def _tpu(name, hbm_gib, hbm_gb_s, tflops, link_gb_s, links, network_gbit_s, wraps, largest):
    # At the default precision a float32 product is one pass of bfloat16.
    peak = tflops * 1e12
    return Chip(
        name,
        "tpu",
        f"{_TPU}{name}",
        hbm=hbm_gib * 2**30,
        hbm_bandwidth=hbm_gb_s * 1e9,
        flops_bfloat16=peak,
        flops_float32=peak,
        link=link_gb_s * 1e9,
        links=links,
        network=network_gbit_s / 8 * 1e9,
        largest=largest,
        wraps=wraps,
        products="bfloat16",
    )


def _gpu(name, hbm_gb, hbm_gb_s, tflops, tf32, nvlink_gb_s, network_gbit_s, source):
    return Chip(
        name,
        "gpu",
        source,
        hbm=0.75 * hbm_gb * 1e9,
        hbm_bandwidth=hbm_gb_s * 1e9,
        flops_bfloat16=tflops * 1e12,
        flops_float32=tf32 * 1e12,
        link=nvlink_gb_s * 1e9,
        links=1,
        network=network_gbit_s / 8 * 1e9,
        largest=8,
        products="TF32",
    )


# TPU links: the pages give the sum of all links and both directions ("bidirectional ICI per chip":
# v5p 1200 GB/s over 6 links, v5e 400 and v6e 800 over 4; v4: 6 links of 50 GB/s, arXiv 2304.01433,
# table 4). Network: v5p 50 Gbit/s a chip; v5e 6.4 and v6e 25.6 Tbit/s a pod of 256; v4's page has
# none, v5p's is taken. v5e and v6e wrap only as a whole pod, 16 long; v4 and v5p in cubes of 4.
# GPU: SXM modules, dense figures, NVLink one way, one network card per GPU as in a DGX.
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"
CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v4", 30.75, 1200, 275, 50, 6, 50, 4, 4096),
        _tpu("v5e", 15.75, 819, 197, 50, 4, 25, 16, 256),
        _tpu("v5p", 95.73, 2765, 459, 100, 6, 50, 4, 6144),
        _tpu("v6e", 31.24, 1640, 918, 100, 4, 100, 16, 256),
        _gpu("a100", 80, 2039, 312, 156, 300, 200, _NVIDIA + "a100"),
        _gpu("h100", 80, 3350, 989, 494, 450, 400, _NVIDIA + "h100"),
        _gpu("h200", 141, 4800, 989, 494, 450, 400, _NVIDIA + "h200"),
        Chip("cpu", "cpu", "the machine at hand: nothing is assumed of it"),
    )
}


def find_chip(name: str) -> Chip:
    if name not in CHIPS:
        raise UsageError(f"--topology: no chip {name!r}; expected {', '.join(CHIPS)}")
    return CHIPS[name]
