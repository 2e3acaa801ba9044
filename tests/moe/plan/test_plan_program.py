"""What is read off a compiled program, on programs small enough to count by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe.hosts.mesh import AXES, make_mesh
from moe.plan import hlo, work
from moe.plan.collectives import expert_weights_moved, find, table

SIZES = {"data": 2, "fsdp": 1, "expert": 4, "tensor": 1}
QUICK = {"xla_backend_optimization_level": 0}
P = PartitionSpec


def text_of(f, *shapes, specs=None, out=None) -> str:
    """f, compiled for the mesh of `SIZES`; as `shard_map` where there are specs."""
    mesh = make_mesh(SIZES)
    if specs is not None:
        f = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(f).lower(*arrays).compile(compiler_options=QUICK).as_text()


def found_in(text: str, sizes=SIZES, slices=1):
    module = hlo.parse(text)
    return find(module, hlo.executions(module), sizes, slices)


def only(found):
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize(
    ("f", "out", "kind", "payload", "sent", "axes"),
    [
        (lambda x: jax.lax.psum(x, "expert"), P(), "all-reduce", 256, 2 * 256 * 3 / 4, ("expert",)),
        (
            lambda x: jax.lax.psum(x, ("data", "expert")),
            P(),
            "all-reduce",
            256,
            2 * 256 * 7 / 8,
            ("data", "expert"),
        ),
        (
            lambda x: jax.lax.all_gather(x, "expert"),
            P(),
            "all-gather",
            4 * 256,
            4 * 256 * 3 / 4,
            ("expert",),
        ),
        (
            lambda x: jax.lax.psum_scatter(x, "expert"),
            P(),
            "reduce-scatter",
            256,
            256 * 3 / 4,
            ("expert",),
        ),
        (
            lambda x: jax.lax.all_to_all(x, "expert", 0, 0),
            P(),
            "all-to-all",
            256,
            256 * 3 / 4,
            ("expert",),
        ),
        (
            lambda x: jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]),
            P(),
            "collective-permute",
            256,
            256,
            ("data",),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and "-" in value else "",
)
def test_one_collective(f, out, kind, payload, sent, axes):
    """Of 4 x 16 float32 on each device."""
    one = only(found_in(text_of(f, (4, 16), specs=(P(),), out=out)))
    assert (one.kind, one.count, one.payload, one.sent, one.axes) == (kind, 1, payload, sent, axes)


def test_loops_multiply():
    def inner(x, _):
        return jnp.sin(jax.lax.psum(x, "expert")), None

    def outer(x, _):
        return jax.lax.scan(inner, x, None, length=3)[0], None

    def f(x):
        return jax.lax.scan(outer, x, None, length=5)[0]

    found = found_in(text_of(f, (4, 16), specs=(P(),), out=P()))
    assert sum(one.count for one in found) == 15
    row = only(table(found))
    assert (row.kind, row.count, row.payload) == ("all-reduce", 15, 15 * 256)


def test_a_loop_of_unknown_length_is_told():
    def f(x):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x * 2, x)

    runs = hlo.executions(hlo.parse(text_of(f, (16,))))
    assert len(runs.unknown_loops) == 1


@pytest.mark.parametrize(("start", "turns"), [(0, 24), (1, 23)])
def test_a_loop_after_its_peeled_turns(start, turns):
    """As the TPU's compiler writes it: no note of its length, the counter in the state."""
    text = f"""HloModule m

%body (b: (s32[], f32[8])) -> (s32[], f32[8]) {{
  ROOT %b = (s32[], f32[8]) parameter(0)
}}

%condition (c: (s32[], f32[8])) -> pred[] {{
  %c = (s32[], f32[8]{{0}}) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%c), index=0
  %n = s32[]{{:T(128)}} constant(24)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}}

ENTRY %main (x: f32[8]) -> (s32[], f32[8]) {{
  %x = f32[8]{{0}} parameter(0)
  %start = s32[] constant({start})
  %copied = s32[] copy(%start)
  %state = (s32[], f32[8]{{0}}) tuple(%copied, %x)
  ROOT %loop = (s32[], f32[8]{{0}}) while(%state), condition=%condition, body=%body
}}
"""
    runs = hlo.executions(hlo.parse(text))
    assert runs.times["body"] == turns and not runs.unknown_loops


TPU = """HloModule m

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%async_collective_fusion.1 (p: bf16[8,16]) -> bf16[32,16] {
  %p = bf16[8,16]{1,0} parameter(0)
  ROOT %g1 = bf16[32,16]{1,0} all-gather(%p), channel_id=7, replica_groups=GROUPS, dimensions={0}
}

%async_collective_fusion.2 (p2: bf16[8,16]) -> bf16[32,16] {
  %p2 = bf16[8,16]{1,0} parameter(0)
  ROOT %g2 = bf16[32,16]{1,0} all-gather(%p2), channel_id=7, replica_groups=GROUPS, dimensions={0}
}

%all-reduce-scatter (q: f32[32,16]) -> f32[8,16] {
  %q = f32[32,16]{1,0} parameter(0)
  %r = f32[32,16]{1,0} all-reduce(%q), channel_id=8, replica_groups=GROUPS, to_apply=%sum
  %i = s32[] constant(0)
  ROOT %d = f32[8,16]{1,0} dynamic-slice(%r, %i, %i), dynamic_slice_sizes={8,16}
}

ENTRY %main (x: bf16[8,16], y: f32[32,16]) -> f32[8,16] {
  %x = bf16[8,16]{1,0} parameter(0)
  %y = f32[32,16]{1,0} parameter(1)
  %one = bf16[32,16]{1,0} fusion(%x), kind=kLoop, calls=%async_collective_fusion.1
  %two = bf16[32,16]{1,0} fusion(%x), kind=kLoop, calls=%async_collective_fusion.2
  ROOT %three = f32[8,16]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter
}
"""


@pytest.mark.parametrize(
    "groups",
    [
        "{{0,1,2,3},{4,5,6,7}}",
        "[2,4]<=[8]",
        "mesh['a'=2,'b'=4] {'b'}",
        "mesh['a'=8] {'a':(2)4}",
    ],
)
def test_habits_of_the_tpu_compiler(groups):
    """A background collective in two fusions is one; an all-reduce-scatter is a reduce-scatter."""
    gather, scatter = found_in(TPU.replace("GROUPS", groups))
    assert (gather.kind, gather.sent) == ("all-gather", 32 * 16 * 2 * 3 / 4)
    assert (scatter.kind, scatter.sent) == ("reduce-scatter", 32 * 16 * 4 * 3 / 4)
    assert gather.axes == scatter.axes == ("expert",)
    np.testing.assert_array_equal(gather.members, np.arange(8).reshape(2, 4))


def test_transposed_groups():
    found = found_in(TPU.replace("GROUPS", "[4,2]<=[2,4]T(1,0)"))
    assert found[0].axes == ("data",)
    np.testing.assert_array_equal(found[0].members, [[0, 4], [1, 5], [2, 6], [3, 7]])


@pytest.mark.parametrize("moves", [False, True])
def test_moving_expert_weights_is_told(moves):
    """Experts' kernels [8, 16, 32] used where they live, or gathered first."""
    mesh = make_mesh(SIZES)
    by_expert = NamedSharding(mesh, P("expert"))

    where = NamedSharding(mesh, P()) if moves else by_expert

    def f(x, kernel):
        kernel = jax.lax.with_sharding_constraint(kernel, where)
        out = jnp.einsum("ecd,edf->ecf", x, kernel)
        return jax.lax.with_sharding_constraint(out, where)

    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=by_expert)
        for shape in ((8, 24, 16), (8, 16, 32))
    ]
    text = jax.jit(f).lower(*shapes).compile(compiler_options=QUICK).as_text()
    moved = expert_weights_moved(found_in(text), {(8, 16, 32)}, SIZES)
    assert [one.kind for one in moved] == ["all-gather"] * moves


def flops_of(text: str) -> float:
    module = hlo.parse(text)
    return sum(one.count * one.flops for one in work.read_work(module, hlo.executions(module)))


def test_flops_of_products_in_loops():
    def f(x, w):
        x = jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=7)[0]
        return jnp.einsum("bi,bj->ij", x, x)

    assert flops_of(text_of(f, (32, 64), (64, 64))) == 2 * (7 * 32 * 64 * 64 + 64 * 64 * 32)


@pytest.mark.parametrize(
    ("stride", "padding", "spread"), [(1, (0, 0), 1), (2, (1, 1), 1), (1, (2, 3), 3)]
)
def test_flops_of_convolutions(stride, padding, spread):
    """Only multiplications with entries of the image: counted by a convolution of ones."""

    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x,
            w,
            (stride,),
            [padding],
            lhs_dilation=(spread,),
            dimension_numbers=("NCW", "OIW", "NCW"),
        )

    x, w = jnp.zeros((2, 5, 9)), jnp.zeros((4, 5, 3))
    program = jax.jit(convolve).lower(x, w).compile(compiler_options=QUICK)
    ones = convolve(jnp.ones((1, 1, 9)), jnp.ones((1, 1, 3)))
    assert flops_of(program.as_text()) == 2 * 2 * 5 * 4 * float(ones.sum())


def test_bytes_of_the_main_memory():
    """A sum of two arrays reads two and writes one; a slice reads no more than itself."""

    def moved(f, *shapes):
        module = hlo.parse(text_of(f, *shapes))
        return sum(one.count * one.bytes for one in work.read_work(module, hlo.executions(module)))

    assert moved(lambda x, y: jnp.sin(x) + y, (1000,), (1000,)) == 3 * 4000
    stack = moved(lambda x: jax.lax.scan(lambda c, x: (c + x, None), x[0], x)[0], (50, 1000))
    assert 50 * 3 * 4000 <= stack <= 50 * 6 * 4000  # not 50 * 50 * 4000


def test_bytes_of_stacks_in_a_loop():
    """A turn reads its slice of a stack and writes its slices of two, in one fusion."""
    text = """HloModule m

%slicing (q: f32[24,100], j: s32[]) -> f32[1,100] {
  %q = f32[24,100]{1,0} parameter(0)
  %j = s32[] parameter(1)
  ROOT %slice = f32[1,100]{1,0} dynamic-slice(%q, %j, %j), dynamic_slice_sizes={1,100}
}

%turn (p: f32[24,100], a: f32[24,100], b: f32[24,100], i: s32[]) -> (f32[24,100], f32[24,100]) {
  %p = f32[24,100]{1,0} parameter(0)
  %a = f32[24,100]{1,0} parameter(1)
  %b = f32[24,100]{1,0} parameter(2)
  %i = s32[] parameter(3)
  %row = f32[1,100]{1,0} fusion(%p, %i), kind=kLoop, calls=%slicing
  %one = f32[24,100]{1,0} dynamic-update-slice(%a, %row, %i, %i)
  %two = f32[24,100]{1,0} dynamic-update-slice(%b, %row, %i, %i)
  %same = f32[24,100]{1,0} bitcast(%two)
  ROOT %both = (f32[24,100], f32[24,100]) tuple(%one, %same)
}

ENTRY %main (x: f32[24,100], y: f32[24,100], z: f32[24,100], n: s32[]) -> (f32[24,100]) {
  %x = f32[24,100]{1,0} parameter(0)
  %y = f32[24,100]{1,0} parameter(1)
  %z = f32[24,100]{1,0} parameter(2)
  %n = s32[] parameter(3)
  ROOT %out = (f32[24,100], f32[24,100]) fusion(%x, %y, %z, %n), kind=kLoop, calls=%turn
}
"""
    module = hlo.parse(text)
    (one,) = work.read_work(module, hlo.executions(module))
    assert one.bytes == 3 * 400 + 4  # and the counter


def test_partitions_are_devices_of_the_mesh():
    assert tuple(SIZES) == AXES
