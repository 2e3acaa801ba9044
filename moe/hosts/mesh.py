"""Makes the mesh of devices, and says where an axis of an array lies by what it means.

Four mesh axes, any of them 1:
  data    examples; its outer part crosses slices (and so the data centre's network)
  fsdp    examples too, and the parameters that are not experts', each a part
  expert  examples too, and the experts: an expert's parameters live with the expert, nowhere else
  tensor  the heads, hidden units and classes of every layer

Layers name the axes of their arrays and never the mesh; without a mesh in context
(`jax.set_mesh`) every function here does what one device would do.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe.errors import UsageError

AXES = ("data", "fsdp", "expert", "tensor")
EXAMPLES = ("data", "fsdp", "expert")  # a routing group never straddles these
RULES: dict[str | None, str | tuple[str, ...] | None] = {
    "batch": EXAMPLES,
    "slots": ("data", "fsdp"),  # rows of an expert, once the experts' devices have exchanged them
    "expert": "expert",
    "embed": "fsdp",  # the width D of dense parameters
    "mlp": "tensor",
    "heads": "tensor",
    "vocab": "tensor",
    "layers": None,  # of scanned parameters
    None: None,
}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes the mesh of these sizes, one of which may be -1 for the rest, over all devices.

    Raises:
      UsageError: the sizes do not multiply to the number of devices, or split a slice.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = _resolve({axis: sizes[axis] for axis in AXES}, len(devices))
    slices = _count_slices(devices)
    if shape["data"] % slices:
        raise UsageError(
            f"config.mesh.data={shape['data']} must be a multiple of the {slices} slices: only "
            "data parallelism crosses slices"
        )
    if slices > 1:
        inner = shape | {"data": shape["data"] // slices}
        array = mesh_utils.create_hybrid_device_mesh(
            tuple(inner.values()), (slices, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    elif devices[0].platform == "tpu":
        array = mesh_utils.create_device_mesh(
            tuple(shape.values()), devices, allow_split_physical_axes=True
        )
    else:
        array = np.array(devices).reshape(tuple(shape.values()))
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def shrink(sizes: Mapping[str, int], devices: Sequence[jax.Device]) -> dict[str, int]:
    """Returns the sizes of a mesh over these devices, like one that was made for others.

    Where the sizes do not multiply to the devices, each axis keeps what divides them and `data`
    takes the rest; what split an array evenly still does.
    """
    sizes = {axis: sizes[axis] for axis in AXES}
    try:
        return _resolve(sizes, len(devices))
    except UsageError:
        slices = _count_slices(devices)
    rest, shape = len(devices) // slices, {}
    for axis in ("expert", "fsdp", "tensor"):
        shape[axis] = math.gcd(max(sizes[axis], 1), rest)
        rest //= shape[axis]
    return {"data": rest * slices} | shape


def _count_slices(devices: Sequence[jax.Device]) -> int:
    return len({getattr(device, "slice_index", 0) for device in devices})


def _resolve(sizes: dict[str, int], count: int) -> dict[str, int]:
    """Returns the sizes with -1 replaced by what is left of `count` devices."""
    text = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UsageError(f"config.mesh has {text}; expected 1 or more each, and -1 at most once")
    if count % fixed if free else count != fixed:
        wanted = f"a multiple of {fixed}" if free else f"{fixed}"
        raise UsageError(
            f"config.mesh asks for {wanted} devices ({text}) and there are {count}; "
            "--config.mesh.data=-1 takes the rest"
        )
    return sizes | dict.fromkeys(free, count // fixed)


def spec(*names: str | None) -> PartitionSpec:
    """Says where an array lies whose axes have these names."""
    return PartitionSpec(*(_rule(name) for name in names))


def _rule(name: str | None) -> str | tuple[str, ...] | None:
    """Returns the mesh axes of an axis, but for those along which the code in context is already
    that of one shard (`moe.train.compressed`)."""
    axes, taken = RULES[name], jax.sharding.get_abstract_mesh().manual_axes
    if isinstance(axes, tuple):
        return tuple(axis for axis in axes if axis not in taken)
    return None if axes in taken else axes


def sharding(mesh: Mesh, names: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    """Says the same of an array of a shape; an axis that the mesh does not divide stays whole."""
    parts = []
    for name, size in zip(names, shape, strict=True):
        rule = _rule(name)
        axes = (rule,) if isinstance(rule, str) else rule or ()
        parts.append(rule if size % math.prod(mesh.shape[a] for a in axes) == 0 else None)
    return NamedSharding(mesh, PartitionSpec(*parts))


def fitting(names: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
    """Says the same of an array on the mesh in context."""
    return sharding(jax.sharding.get_abstract_mesh(), names, shape).spec


def parameter_shardings(mesh: Mesh, state: nnx.State):
    """Says where each parameter of an `nnx.State` lies, by its `axes`; returns the pure dict.

    A parameter without `axes` is on every device.
    """

    def place(variable: nnx.Variable) -> NamedSharding:
        shape = variable.get_value().shape
        return sharding(mesh, variable.get_metadata().get("axes", (None,) * len(shape)), shape)

    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    return nnx.to_pure_dict(jax.tree.map(place, state, is_leaf=is_variable))


def platform() -> str:
    """Returns "cpu", "gpu" or "tpu": of the mesh in context, which may be of devices that are not
    here, else of JAX's default device."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.default_backend() if device is None else device.platform


def axis_size(axis: str) -> int:
    """Counts the devices along an axis of the mesh in context; 1 without a mesh."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def constrain(x, *names: str | None):
    """Returns x, laid out as its axes' names say; what the mesh does not divide stays whole."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, fitting(names, x.shape))


def local(f: Callable, in_specs, out_specs) -> Callable:
    """Makes f work on each device's part of the arrays (`jax.shard_map`) and exchange by itself."""
    if jax.sharding.get_abstract_mesh().empty:
        return f
    return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs)


def total(x, axis: str):
    """Returns, inside `local`, the sum of every device's x along an axis."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.psum(x, axis)


def alike(*arrays):
    """Returns, inside `local`, the arrays, all varying over the same mesh axes: the transpose of
    what made them vary then sums their derivatives."""
    axes = frozenset().union(*(_varying(a) for a in arrays))
    return tuple(_vary(a, axes) for a in arrays)


def vary_like(x, like):
    """Returns, inside `local`, x varying over the axes of `like`, as a loop's carry must."""
    return _vary(x, _varying(like))


def examples_axes(x) -> tuple[str, ...]:
    """Returns, inside `local`, the axes over which x has other examples on other devices."""
    return tuple(axis for axis in EXAMPLES if axis in _varying(x))


def _varying(x) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


def _vary(x, axes):
    missing = tuple(sorted(axes - _varying(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def on_groups(f: Callable) -> Callable:
    """Makes f work on each device's routing groups: all arguments and results begin with axis G."""
    return local(f, spec("batch"), spec("batch"))


def to_experts(x_GECD):
    """Moves slots from the tokens' devices to the experts', `[E, G, C, D]`: one all-to-all."""

    def exchange(x_GECD):
        x_EGCD = x_GECD.swapaxes(0, 1)
        if axis_size("expert") == 1:
            return x_EGCD
        return jax.lax.all_to_all(x_EGCD, "expert", 0, 1, tiled=True)

    return local(exchange, spec("batch"), spec("expert", "slots"))(x_GECD)


def to_groups(x_EGCD):
    """Moves slots back, `[G, E, C, D]`, each group to its tokens' devices."""

    def exchange(x_EGCD):
        if axis_size("expert") > 1:
            x_EGCD = jax.lax.all_to_all(x_EGCD, "expert", 1, 0, tiled=True)
        return x_EGCD.swapaxes(0, 1)

    return local(exchange, spec("expert", "slots"), spec("batch"))(x_EGCD)
