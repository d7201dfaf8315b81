"""Arrays on many devices: the mesh, and one table from axes of arrays to axes of the mesh.

The mesh has four axes. ``data`` holds replicas (across slices of a pod too), ``fsdp`` shards of parameters and
optimizer state, both divide the batch; ``tensor`` divides heads, the MLP and the vocabulary; ``context`` divides the
sequence. Shardings are part of the arrays' types (``AxisType.Explicit``): what does not fit is an error when a program
is traced, and no compiler guesses.

Arrays name their axes by what they are ("embed", "kv_heads", …). Two layouts map these names to the mesh: *storage*,
parameters and optimizer state at rest, and *compute*, parameters where they are used and activations. Without a mesh
(``jax.set_mesh``) everything here does nothing: the model is then an ordinary function on one device.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from natsjax.config import Config, MeshConfig
from natsjax.errors import UserError

AXES = ("data", "fsdp", "tensor", "context")
"""Axes of the mesh, from those that communicate least to those that do most."""

BATCH = ("data", "fsdp")
"""The axes of the mesh that divide the batch."""

Axes = tuple[str | None, ...]
"""The names of an array's axes; None: no name, not divided."""

_COMPUTE: dict[str, str | tuple[str, ...]] = {
    "batch": BATCH,
    "sequence": "context",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}
_STORAGE = _COMPUTE | {"embed": "fsdp"}


def storage_spec(axes: Axes) -> PartitionSpec:
    """Maps an array's axes to those of the mesh, for the array at rest."""
    return PartitionSpec(*(_STORAGE.get(name) if name else None for name in axes))


def compute_spec(axes: Axes) -> PartitionSpec:
    """Maps an array's axes to those of the mesh, for the array in use."""
    return PartitionSpec(*(_COMPUTE.get(name) if name else None for name in axes))


# --- the mesh ---


def mesh_sizes(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """Counts the devices along each of ``AXES``.

    Args:
      config: a size for each; -1, once, stands for the rest.
      num_devices: number of devices.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    sizes = [getattr(config, name) for name in AXES]
    asked = ", ".join(f"mesh.{name} = {size}" for name, size in zip(AXES, sizes, strict=True))
    known = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes:
        if num_devices % known:
            raise UserError(f"{asked}: {known} does not divide the number of devices, {num_devices}.")
        sizes[sizes.index(-1)] = num_devices // known
    elif known != num_devices:
        raise UserError(f"{asked} make {known} devices, and there are {num_devices}; -1 stands for the rest.")
    return tuple(sizes)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes the mesh of a run: all devices of all processes, neighbors along the axes that communicate most.

    Where TPUs come in slices that only the data-center network joins, the slices are along ``data``. Nodes of GPUs may
    share parameters: their network is meant for it, and their order puts them along the first axes anyhow.

    Args:
      config: its sizes.
      devices: by default ``jax.devices()``.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or ``data`` cannot be divided among the slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = mesh_sizes(config, len(devices))
    num_slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"} or {0})
    if num_slices > 1:
        if sizes[0] % num_slices:
            raise UserError(
                f"mesh.data = {sizes[0]} cannot be divided among {num_slices} slices; make it a multiple, so that only "
                "replicas talk across the data-center network."
            )
        within = (sizes[0] // num_slices, *sizes[1:])
        across = (num_slices, *(1 for _ in sizes[1:]))
        grid = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def for_cores(config: Config) -> Config:
    """Returns the config for CPU devices that share a memory: replicas in place of shards, where no mesh is asked for.

    Gathering parameters costs more there than it saves: at the quickstart's size two replicas took 0.76 of one device's
    time for a step, two shards 0.82.
    """
    if config.mesh != MeshConfig():
        return config
    return dataclasses.replace(config, mesh=MeshConfig(data=-1, fsdp=1))


def fits(config: Config, num_devices: int, *, trains: bool) -> bool:
    """Returns whether a config's mesh can be made of so many devices, and its arrays divided along it.

    Args:
      config: of the run; the vocabulary's size is not known yet and not looked at.
      num_devices: number of devices.
      trains: True if the batch has to be divided too; an evaluation fills its last one up.
    """
    try:
        mesh = jax.sharding.AbstractMesh(mesh_sizes(config.mesh, num_devices), AXES)
        (check if trains else check_arrays)(config, math.lcm(*mesh.shape.values()), mesh)
    except UserError:
        return False
    return True


def check(config: Config, vocab_size: int, mesh: Mesh | jax.sharding.AbstractMesh) -> None:
    """Checks that a run can be trained on the mesh.

    Raises:
      UserError: the batch or an array cannot be divided; the message names the field and what works.
    """
    size = dict(mesh.shape)
    train = config.train
    shards = size["data"] * size["fsdp"]
    sequences = train.batch_size // train.gradient_accumulation_steps
    if sequences % shards:
        parts = "" if train.gradient_accumulation_steps == 1 else " / train.gradient_accumulation_steps"
        raise UserError(
            f"train.batch_size{parts} = {sequences} sequences cannot be divided among mesh.data * mesh.fsdp = {shards} "
            f"devices; make train.batch_size a multiple of {shards * train.gradient_accumulation_steps}."
        )
    check_arrays(config, vocab_size, mesh)


def check_arrays(config: Config, vocab_size: int, mesh: Mesh | jax.sharding.AbstractMesh) -> None:
    """Checks that parameters and sequences can be divided along the mesh.

    Raises:
      UserError: one of them cannot; the message names the field and a size that works.
    """
    size = dict(mesh.shape)
    for field, count, axis in (
        ("model.num_kv_heads", config.model.num_kv_heads, "tensor"),
        ("model.mlp_dim", config.model.mlp_dim, "tensor"),
        ("the vocabulary's size", vocab_size, "tensor"),
        ("model.embed_dim", config.model.embed_dim, "fsdp"),
    ):
        if count % size[axis]:
            raise UserError(
                f"{field} = {count} cannot be divided by mesh.{axis} = {size[axis]}; the largest mesh.{axis} below it "
                f"that divides it is {max(n for n in range(1, size[axis]) if count % n == 0)}."
            )
    if size["context"] > 1 and config.data.context_length % (2 * size["context"]):
        raise UserError(
            f"data.context_length = {config.data.context_length} must be a multiple of 2 * mesh.context = "
            f"{2 * size['context']}: each device takes an early and a late part of the sequence."
        )


# --- inside a program ---


def _mesh() -> Any:
    """Returns the mesh that a program is traced under, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if not mesh.empty and set(AXES) <= set(mesh.axis_names) else None


def compute_sharding(*axes: str | None) -> PartitionSpec | None:
    """Returns the ``out_sharding`` for jax functions; None without a mesh."""
    return None if _mesh() is None else compute_spec(axes)


def reshard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Moves ``x`` to the compute layout; its gradient comes back in the layout of ``x``."""
    return x if _mesh() is None else jax.sharding.reshard(x, compute_spec(axes))


def whole_layers(x: jax.Array) -> jax.Array:
    """Moves a parameter ``[l, …]`` so that no layer is divided, but the layers among devices, where ``fsdp`` can."""
    mesh = _mesh()
    if mesh is None or x.ndim < 2:
        return x
    return jax.sharding.reshard(x, PartitionSpec("fsdp" if len(x) % mesh.shape["fsdp"] == 0 else None))


def reshard_as(x: jax.Array, like: jax.Array) -> jax.Array:
    """Moves ``x`` to the layout of ``like``, of the same shape."""
    return x if _mesh() is None else jax.sharding.reshard(x, jax.typeof(like).sharding.spec)


def sharding_of(shape: jax.ShapeDtypeStruct) -> PartitionSpec | None:
    """Returns the ``out_sharding`` for a result of ``jax.eval_shape``; None without a mesh."""
    sharding = shape.sharding
    return sharding.spec if _mesh() is not None and isinstance(sharding, NamedSharding) else None


def replicate(tree: Any) -> Any:
    """Copies all arrays whole to every device, where every process can read them."""
    return tree if _mesh() is None else jax.tree.map(lambda x: jax.sharding.reshard(x, PartitionSpec()), tree)


def shard_map(function: Callable, in_axes: Sequence[Axes], out_axes: Any) -> Callable:
    """Wraps ``function`` to run on each device's part of its arguments, arrays; the function itself without a mesh.

    Args:
      function: of arrays, positional.
      in_axes: the axes of each argument.
      out_axes: those of its result, or a list of them.
    """
    mesh = _mesh()
    if mesh is None:
        return function
    in_specs = tuple(compute_spec(axes) for axes in in_axes)
    out_specs = tuple(map(compute_spec, out_axes)) if isinstance(out_axes, list) else compute_spec(out_axes)

    def mapped(*arrays):
        placed = [x if x is None else jax.sharding.reshard(x, s) for x, s in zip(arrays, in_specs, strict=True)]
        return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs)(*placed)

    return mapped


def by_rank(function: Callable, axes: Mapping[int, Axes]) -> Callable:
    """Wraps ``function`` to run on each device's part of trees of arrays, whose axes follow from their rank.

    Args:
      function: of trees, to a tree.
      axes: of an array, by its number of axes; arguments and results have no others.
    """

    @functools.wraps(function)
    def mapped(*args, **kwargs):
        if _mesh() is None:
            return function(*args, **kwargs)
        leaves, structure = jax.tree.flatten((args, kwargs))
        leaves = [jnp.asarray(x) for x in leaves]

        def flat(*leaves):
            args, kwargs = jax.tree.unflatten(structure, leaves)
            return tuple(jax.tree.leaves(function(*args, **kwargs)))

        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            structs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
            args_structs, kwargs_structs = jax.tree.unflatten(structure, structs)
            out = jax.eval_shape(function, *args_structs, **kwargs_structs)
        out_leaves, out_structure = jax.tree.flatten(out)
        results = shard_map(flat, [axes[x.ndim] for x in leaves], [axes[x.ndim] for x in out_leaves])(*leaves)
        return jax.tree.unflatten(out_structure, results)

    return mapped


def mesh_axes(name: str) -> tuple[str, ...]:
    """Returns the mesh axes that divide an activation's axis, for collectives inside ``shard_map``; () without one."""
    if _mesh() is None:
        return ()
    axes = _COMPUTE.get(name, ())
    return (axes,) if isinstance(axes, str) else axes


def sequence_axis() -> str | None:
    """Returns the axis of the mesh that divides the sequence, None where it is whole."""
    mesh = _mesh()
    return "context" if mesh is not None and mesh.shape["context"] > 1 else None


def gathers() -> bool:
    """Returns True where parameters are divided at rest along an axis that they are gathered along for use."""
    mesh = _mesh()
    return mesh is not None and mesh.shape["fsdp"] > 1


def psum(x: jax.Array, *names: str) -> jax.Array:
    """Sums, inside ``shard_map``, over the devices that these axes of activations are divided among."""
    axes = tuple(axis for name in names for axis in mesh_axes(name))
    return jax.lax.psum(x, axes) if axes else x


def own_part(x: jax.Array, name: str, axis: int) -> jax.Array:
    """Cuts, inside ``shard_map``, this device's part out of an array that all of them hold whole; see ``whole``."""
    for mesh_axis in mesh_axes(name):
        size = x.shape[axis] // jax.lax.axis_size(mesh_axis)
        x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(mesh_axis) * size, size, axis)
    return x


def whole(x: jax.Array, name: str, axis: int) -> jax.Array:
    """Joins, inside ``shard_map``, the parts that the devices hold along an axis.

    Args:
      x: this device's part.
      name: of the axis of activations, which one axis of the mesh divides.
      axis: its number in ``x``.
    """
    for mesh_axis in mesh_axes(name):
        x = jax.lax.all_gather(x, mesh_axis, axis=axis, tiled=True)
    return x


def from_first(x: jax.Array, name: str) -> jax.Array:
    """Copies, inside ``shard_map``, the ``x`` of the first of the devices that an activation's axis is divided among.

    Args:
      x: of the same shape on all of them.
      name: of the axis, which one axis of the mesh divides.
    """
    for axis in mesh_axes(name):
        x = jax.lax.psum(jnp.where(jax.lax.axis_index(axis) == 0, x, 0), axis)
    return x


# --- from the host to the devices ---


def named_sharding(mesh: Mesh, spec: PartitionSpec) -> NamedSharding:
    """Returns the sharding of an array on this mesh."""
    return NamedSharding(mesh, spec)


def batch_rows(mesh: Mesh, batch_size: int) -> slice:
    """Returns the rows of a global batch that this process's devices hold (with any in between)."""
    sharding = NamedSharding(mesh, compute_spec(("batch",)))
    places = sharding.addressable_devices_indices_map((batch_size,)).values()
    parts = [place[0].indices(batch_size) for place in places if place is not None]
    return slice(min(start for start, _, _ in parts), max(stop for _, stop, _ in parts))


def put_batch(mesh: Mesh, rows: dict[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
    """Makes the global batch, divided among the devices, from this process's rows.

    Args:
      mesh: of the run.
      rows: arrays ``[r, t]``, the rows ``batch_rows(mesh, batch_size)``, or all of them.
      batch_size: of the global batch.

    Returns:
      Arrays ``[batch_size, t]``.
    """
    sharding = NamedSharding(mesh, compute_spec(("batch", "sequence")))
    first = batch_rows(mesh, batch_size).start if len(next(iter(rows.values()))) < batch_size else 0

    def put(x: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            return x[start - first : stop - first, index[1]]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), sharding, part)

    return {name: put(x) for name, x in rows.items()}


def axes_of(mesh: Mesh) -> Iterator[tuple[str, int]]:
    """Yields the axes with more than one device, with their sizes."""
    return ((name, size) for name, size in mesh.shape.items() if size > 1)
