"""Our own formulas and arithmetic: FLOPs, memory, links, the roofline, the table of chips."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.errors import UsageError
from moe.plan import links, memory
from moe.plan.chips import CHIPS, Chip
from moe.plan.collectives import Collective
from moe.plan.compiled import Compiled, compile_step, out_of_memory, refused
from moe.plan.roofline import roofline
from moe.plan.sweep import divisors, meshes
from moe.plan.topology import split_name
from moe.plan.work import Work
from moe.tasks import task_of
from moe.train.run import Run, set_up

V5P = CHIPS["v5p"]
# Wide enough that matrix products are nearly all that XLA counts.
WIDE = {
    "data__image_size": "32",
    "data__channels": "3",
    "data__num_classes": "100",
    "model__width": "128",
    "model__mlp_dim": "512",
    "model__num_heads": "2",
    "moe__expert_dim": "256",
    "moe__group_size": "2",
    "batch_size": "16",
}


def xla_flops(run, train: bool) -> float:
    """XLA's count, of one image."""
    images = run.abstract_batch()["image"]
    images = jax.ShapeDtypeStruct(images.shape, images.dtype)
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), run.params)

    def forward(params, images):
        out = nnx.merge(run.graphdef, params)(images, train=True)
        return out.logits.sum() + sum(r.aux_loss for r in out.reports.values())

    f = jax.grad(forward) if train else forward
    return jax.jit(f).lower(params, images).cost_analysis()["flops"] / images.shape[0]


@pytest.mark.parametrize(
    "overrides",
    [
        {"router__name": "topk"},
        {"router__name": "expert_choice", "model__pool": "mean"},
        {"router__name": "soft_moe"},
        {"moe__dense": "true"},
        {"router__name": "topk", "moe__dispatch": "dense"},
        {"depth__layers": "0", "depth__router": "topk", "depth__capacity": "0.25"},
        {"depth__layers": "0", "depth__router": "threshold", "depth__bound": "0.5"},
    ],
    ids=lambda overrides: "-".join(overrides.values()),
)
def test_flops_are_those_that_xla_counts(tiny, overrides):
    """XLA counts softmaxes, norms and routers' sums too: some hundredths, and never less."""
    run = set_up(tiny(**WIDE, **overrides))
    flops = run.task.flops(run.config)
    assert 1 <= xla_flops(run, train=False) / flops.computed < 1.05
    assert 1 <= xla_flops(run, train=True) / flops.training(flops.computed) < 1.05


def test_flops_of_a_block_by_hand(tiny):
    config = tiny(data__image_size="8", data__channels="1", data__num_classes="10")
    config.unlock()
    config.model.pool, config.moe.capacity_factor = "mean", 1.0
    flops = task_of(config).flops(
        config
    )  # 4 tokens of width 16, 2 blocks, one of them 4 experts, K = 2
    assert flops.embed == 2 * 4 * 16 * 16
    assert flops.attention == 2 * (4 * 2 * 4 * 16 * 16 + 2 * 2 * 4 * 4 * 16)
    assert flops.mlp == 2 * 2 * 4 * 16 * 32
    assert flops.router == 2 * 4 * 16 * 4
    assert flops.experts == flops.slots == 2 * 4 * (2 * 2 * 16 * 16)
    assert flops.head == 2 * 16 * 10
    assert flops.training(flops.model) == 3 * flops.model - flops.embed


def test_memory_of_the_state(tiny):
    """Dense kernels in `fsdp` parts, experts in `expert` parts, AdamW twice the parameters."""
    sizes = {"data__image_size": "8", "data__channels": "1", "data__num_classes": "10"}
    whole = memory.state_memory(set_up(tiny(**sizes)))
    run = set_up(tiny(**sizes, mesh__fsdp="2", mesh__expert="4", mesh__data="1"))
    split = memory.state_memory(run)
    assert whole.parameters == sum(p.size * 4 for p in jax.tree.leaves(run.params))
    assert whole.optimizer == pytest.approx(2 * whole.parameters, abs=16)  # and two counters
    assert whole.batch == split.batch == 16 / 8 * (8 * 8 * 1 * 4 + 4)
    block = run.params["blocks"]["1"]["feed_forward"]["experts"]
    experts = sum(p.size * 4 for p in jax.tree.leaves(block))
    assert memory.chip_bytes(block) == experts / 4
    dense = whole.parameters - experts
    assert dense / 2 + experts / 4 <= split.parameters < dense * 0.7 + experts / 4


def test_remat_keeps_less(tiny):
    sizes = {"data__image_size": "8", "data__channels": "1", "data__num_classes": "10"}
    kept = {
        remat: memory.activations(set_up(tiny(**sizes, model__remat=remat)))
        for remat in ("none", "dots", "full")
    }
    assert 0 < kept["full"] < kept["dots"] < kept["none"]
    blocks = 2 * 2 * 5 * 16 * 4  # two blocks' inputs of two images of five tokens
    assert blocks <= kept["full"] < 4 * blocks


def test_what_fits():
    known = memory.Memory(4e9, 8e9, 0.0, 1e6, 1e9)
    assert known.state == 12e9 and known.fits is None
    assert known._replace(limit=10e9).fits is False  # whatever the rest needs
    assert known._replace(limit=13e9).fits is None
    assert known._replace(limit=13e9, total=12.9e9).fits is True
    assert known._replace(limit=13e9, total=13.1e9).fits is False


@pytest.mark.parametrize(
    ("arguments", "peak", "padding", "activations", "temporary"),
    [
        (2_972_672, 28_524_032, 1_321_852, 400_000, 25_151_360),  # of digits on a v5e
        (2_972_672, 3_072_672, 1_321_852, 100_000, 0),
        (2_972_672, 2_972_672, 1_321_852, 0, 0),
        (1_600_000, 1_600_000, 0, 0, 0),  # the program does not use all that it is handed
    ],
)
def test_the_code_is_no_part_of_the_compilers_peak(
    arguments, peak, padding, activations, temporary
):
    known = memory.Memory(544_552, 1_089_116, 0, 17_152, 400_000, limit=16e9)
    program = Compiled("", arguments=arguments, peak=peak, code=25_970_176)
    parts = memory.split_peak(known, program)
    assert (parts.padding, parts.activations, parts.temporary) == (padding, activations, temporary)
    assert parts.total == sum(parts[: parts._fields.index("total")])
    assert parts.total == max(peak, known.state + known.batch) + 25_970_176


def test_a_mistake_in_a_users_router_keeps_its_traceback(tiny, monkeypatch):
    def step(state, batch):
        raise ValueError("not enough values to unpack (expected 3, got 2)")

    sizes = {"data__image_size": "8", "data__channels": "1", "data__num_classes": "10"}
    run = set_up(tiny(**sizes))
    monkeypatch.setattr(Run, "train_step", property(lambda run: step))
    with pytest.raises(ValueError, match="not enough values to unpack"):
        compile_step(run)


def test_the_compilers_words():
    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.\n\nTotal hbm usage"
    )
    words, needed = out_of_memory(message)
    assert words == "Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G."
    assert needed == 20.5 * 2**30
    earlier = (
        "INTERNAL: the total memory required for HLO temporaries (84.65G) exceeds available HBM "
        "(15.75G). HLO module: jit_train_step."
    )
    words, needed = out_of_memory(earlier)
    assert words.endswith("(84.65G) exceeds available HBM (15.75G)") and needed == 84.65 * 2**30
    assert out_of_memory("RESOURCE_EXHAUSTED: no numbers\nmore") == (
        "RESOURCE_EXHAUSTED: no numbers",
        None,
    )
    message = "INTERNAL: Ragged all-to-all is not supported here\nmore"
    assert refused(message) == (
        "the compiler cannot compile this step for these devices (INTERNAL: Ragged all-to-all is "
        "not supported here); another mesh or topology may do, or --config.moe.dispatch=capacity, "
        "which has none"
    )


def collective(kind, members, payload=1e9, sent=1e9, network="links"):
    members = np.array(members)
    return Collective(kind, 2, payload, sent, members, ("expert",), network, ((1,),), "", "")


def test_time_on_links():
    """Rings of v5p, 100 GB/s a link and way; all executions are two."""
    ring = np.array([[i, 0, 0] for i in range(8)])  # closes: 4 divides 8
    line = np.array([[i, 0, 0] for i in range(6)])
    everyone = [list(range(8))]
    assert links.seconds(collective("all-gather", everyone), V5P, ring) == 2 * 1e9 / 200e9
    six = [list(range(6))]
    assert links.seconds(collective("all-gather", six), V5P, line) == 2 * 1e9 / 100e9
    # All-to-all of S on a ring of n: S n / 8 a link; over a line's middle n/2 n/2 pairs of S/n.
    ours = links.seconds(collective("all-to-all", everyone), V5P, ring)
    assert ours == pytest.approx(2 * 1e9 * 8 / 8 / 100e9)
    ours = links.seconds(collective("all-to-all", six), V5P, line)
    assert ours == pytest.approx(2 * 1e9 * 6 / 4 / 100e9)
    shift = collective("collective-permute", [[i, (i + 1) % 8] for i in range(8)])
    assert links.seconds(shift, V5P, ring) == pytest.approx(2 * 1e9 / 100e9)


def test_a_torus_is_as_fast_as_its_longest_side():
    places = np.array([[x, y, 0] for x in range(4) for y in range(8)])
    both = collective("all-to-all", [list(range(32))])
    assert links.seconds(both, V5P, places) == pytest.approx(2 * 1e9 * 8 / 8 / 100e9)
    gather = collective("all-gather", [list(range(32))])
    assert links.seconds(gather, V5P, places) == 2 * 1e9 / 400e9  # four links


def test_time_on_a_network():
    one = collective("all-reduce", [[0, 1]], network="network")
    assert links.seconds(one, V5P, None) == 2 * 1e9 / V5P.network
    gpu = CHIPS["h100"]
    assert links.seconds(collective("all-reduce", [[0, 1]]), gpu, None) == 2 * 1e9 / 450e9


def test_roofline_by_hand():
    chip = Chip("x", "tpu", "", 1e9, 100.0, 1000.0, 500.0)
    work = [Work("a", 3, 2000.0, 100.0, ""), Work("b", 1, 0.0, 300.0, "")]
    time = roofline(chip, work, 4.0, 1.0, dtype="bfloat16", model_flops=4500.0, units=90)
    assert time.compute == 6.0 and time.memory == 6.0
    assert time.chip == 3 * 2.0 + 3.0  # a is bound by products, b by memory
    assert (time.fastest, time.slowest) == (9.0, 14.0)
    assert time.mfu == (4.5 / 14, 4.5 / 9) and time.rate == (90 / 14, 10.0)
    assert time.bound == "compute"
    slow = roofline(chip, work, 4.0, 20.0, dtype="float32", model_flops=4500.0, units=90)
    assert slow.bound == "network" and slow.fastest == 20.0 and slow.compute == 12.0
    assert roofline(CHIPS["cpu"], work, 0, 0, dtype="float32", model_flops=1, units=1) is None


def test_chips_are_plausible():
    """The peaks and bandwidths of accelerators of these years, and none forgotten."""
    for chip in CHIPS.values():
        assert chip.source
        if chip.kind == "cpu":
            assert chip.flops("bfloat16") is None and chip.hbm is None
            continue
        assert 1e14 < chip.flops("bfloat16") < 2e15
        assert chip.flops("float32") <= chip.flops("bfloat16")
        # A TPU multiplies float32 in one pass of bfloat16, a GPU in TF32 at half the rate.
        expected = {"tpu": ("bfloat16", 1.0), "gpu": ("TF32", 0.5)}[chip.kind]
        ratio = chip.flops("float32") / chip.flops("bfloat16")
        assert (chip.arithmetic("float32"), pytest.approx(ratio, rel=2e-3)) == expected
        assert chip.arithmetic("bfloat16") == "bfloat16"
        assert 100 < chip.flops("bfloat16") / chip.hbm_bandwidth < 1000
        assert 10e9 < chip.hbm < 200e9 and chip.network < chip.link * max(chip.links, 1)
        assert chip.source.startswith("https://")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v5p:4x4x8", (1, "v5p", (4, 4, 8))),
        ("2xv5e:16x16", (2, "v5e", (16, 16))),
        ("h100:4x8", (1, "h100", (4, 8))),
        ("a100:8", (1, "a100", (8,))),
        ("64xv6e:16x16", (64, "v6e", (16, 16))),
        ("cpu:8", (1, "cpu", (8,))),
    ],
)
def test_names_of_topologies(name, expected):
    slices, chip, shape = split_name(name)
    assert (slices, chip.name, shape) == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5p", "is not CHIP:SHAPE; expected for example v5p:4x4x8"),
        ("v5p:4x4x", "is not CHIP:SHAPE"),
        ("v9:4x4", "no chip 'v9'; expected v4, v5e"),
        ("v5p:4x4x\u0664", "is not CHIP:SHAPE"),  # a digit, but not one of 0 to 9
        ("v5p:\uff14x4x8", "is not CHIP:SHAPE"),
        ("cpu:" + "9" * 5000, "is not CHIP:SHAPE"),
        ("v5p:0x4x4", "expected v5p:AxBxC or Nxv5p:AxBxC, no size 0"),
        ("0xv5p:4x4x4", "expected v5p:AxBxC or Nxv5p:AxBxC, no size 0"),
        ("v5p:4x4", "expected v5p:AxBxC or"),
        ("v4:8", "expected v4:AxBxC or"),
        ("v5e:2x2x1", "expected v5e:AxB or Nxv5e:AxB"),
        ("v6e:4", "expected v6e:AxB or"),
        ("2xh100:4x8", "expected h100:HOSTSxGPUS"),
        ("h100:2x2x2", "expected h100:HOSTSxGPUS"),
        ("2xcpu:2", "expected cpu:N, no size 0"),
        ("cpu:2x2x2", "expected cpu:N"),
        ("v5e:32x16", "a slice of v5e has 256 at most"),
        ("h100:99999999", "a host of h100 has 8 at most"),
        ("a100:1x16", "a host of a100 has 8 at most"),
        ("h100:999999x8", "has 7999992 devices; expected 4096 at most"),
        ("99999xv5e:16x16", "has 25599744 devices; expected 16384 at most"),
        ("cpu:1000000", "has 1000000 devices; expected 4096 at most"),
    ],
)
def test_names_of_no_topology(name, message):
    with pytest.raises(UsageError, match=message):
        split_name(name)


def test_meshes_of_a_sweep(tiny):
    config = tiny(data__image_size="8", data__channels="1", data__num_classes="10")
    topology = types.SimpleNamespace(devices=range(8), slices=2)
    found = list(meshes(config, topology))
    assert all(np.prod(list(mesh.values())) == 8 and mesh["data"] % 2 == 0 for mesh in found)
    assert all(mesh["tensor"] <= 2 and mesh["expert"] <= 4 for mesh in found)  # heads, experts
    assert {"data": 2, "fsdp": 1, "expert": 4, "tensor": 1} in found
    assert len(found) == len({tuple(mesh.values()) for mesh in found}) == 9
    assert divisors(12) == [1, 2, 3, 4, 6, 12]


def test_jax_counts_as_we_do():
    """What the tests above lean on: a product is 2 FLOPs a multiplication for XLA too."""
    x = jnp.zeros((8, 16))
    cost = jax.jit(lambda x: x @ x.T).lower(x).cost_analysis()
    assert cost["flops"] == 2 * 8 * 8 * 16
