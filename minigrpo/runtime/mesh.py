"""The (fsdp, tp) mesh: platform start-up, how every parameter and activation is laid out on it."""

import contextlib
import functools
import math
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from minigrpo.config import UsageError, parse_mesh
from minigrpo.runtime.platform import choose_platform, start_backend
from minigrpo.runtime.workers import WORKERS

PLATFORMS, CPU_DEVICES = "jax_platforms", "jax_num_cpu_devices"
SLICE, FSDP, TP = "slice", "fsdp", "tp"
"""Axes of a mesh. Slices, joined by the data-centre network, each hold all of the weights; there is an axis for them
only where there are several."""

AXIS_OF_DIM = {"V": TP, "N": TP, "K": TP, "F": TP, "D": FSDP}
"""Dim letter -> the mesh axis that shards it; H and L stay whole."""

DEVICE_MEMORY, HOST_MEMORY = "device", "pinned_host"
"""jax's names of a device's own memory, and of the part of its host's that it copies to and from."""


def mesh_sizes(mesh_flag: str, platform: str, devices: int) -> tuple[int, int]:
    """Return fsdp and tp of `--mesh`; auto is every device as fsdp, and on the CPU one virtual device per process."""
    if mesh_flag != "auto":
        return parse_mesh(mesh_flag)
    return (WORKERS.count, 1) if platform == "cpu" else (devices, 1)


def virtual_devices(mesh_flag: str) -> int:
    """Return how many virtual devices each process's CPU is to have; UsageError for an uneven share."""
    total = math.prod(mesh_sizes(mesh_flag, "cpu", 1))
    if total % WORKERS.count:
        raise UsageError(f"--mesh={mesh_flag}: {total} devices cannot be shared evenly by {WORKERS.count} processes")
    return total // WORKERS.count


def start_platform(mesh_flag: str) -> None:
    """Choose the platform and start jax on it: without an accelerator, the CPU with a virtual device per mesh place."""
    platform = choose_platform(getattr(jax.config, PLATFORMS))
    if platform == "cpu":
        jax.config.update(PLATFORMS, "cpu")
        with contextlib.suppress(RuntimeError):  # a second run in one process has the devices of the first
            jax.config.update(CPU_DEVICES, virtual_devices(mesh_flag))
        # One CPU client runs programs one after another: with several virtual devices, concurrent
        # programs can starve each other's collectives of threads.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    elif platform in ("tpu", "cuda"):
        jax.config.update(PLATFORMS, f"{platform},cpu")
    start_backend(platform)


def make_mesh(mesh_flag: str) -> Mesh:
    """Return the mesh of `--mesh`; UsageError when it does not match the devices there are."""
    devices = jax.devices()
    slices = slice_count(devices)
    each = len(devices) // slices
    fsdp, tp = mesh_sizes(mesh_flag, devices[0].platform, each)
    if devices[0].platform == "cpu":  # which are virtual: some may stay unused
        devices, each = devices[: fsdp * tp], fsdp * tp
    if fsdp * tp != each or len(devices) < fsdp * tp:
        where = f"in each of {slices} slices" if slices > 1 else "found"
        raise UsageError(
            f"--mesh={mesh_flag}: {fsdp * tp} devices wanted, {each} {devices[0].platform} devices {where}; "
            f"use --mesh={each},1 or another pair whose product is {each}"
        )
    mesh = arrange(devices, fsdp, tp)
    if WORKERS.count > 1:
        meet(mesh)
    return mesh


def meet(mesh: Mesh) -> None:
    """Open the connections between workers' devices now, as all are here; later one may still compile for minutes."""
    WORKERS.equal({"devices": f"{jax.local_device_count()} {jax.local_devices()[0].device_kind}"})
    rows = data_spec(mesh)
    for axes in (mesh.axis_names, (FSDP,), (TP,)):
        ones = put(np.ones(mesh.size, np.float32), by_sequence(mesh))
        add = functools.partial(jax.lax.psum, axis_name=axes)
        jax.block_until_ready(jax.jit(jax.shard_map(add, mesh=mesh, in_specs=rows, out_specs=rows))(ones))


def arrange(devices: list[Any], fsdp: int, tp: int) -> Mesh:
    """Arrange devices as an (fsdp, tp) mesh per slice, neighbours on the chips' own network kept near each other."""
    slices = slice_count(devices)
    if slices == 1:
        grid = mesh_utils.create_device_mesh((fsdp, tp), devices, allow_split_physical_axes=True)
        return Mesh(grid, (FSDP, TP), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    grid = mesh_utils.create_hybrid_device_mesh((1, fsdp, tp), (slices, 1, 1), devices, allow_split_physical_axes=True)
    return Mesh(grid, (SLICE, FSDP, TP), axis_types=(jax.sharding.AxisType.Auto,) * 3)


def slice_count(devices: list[Any]) -> int:
    """Return the number of slices that devices are of."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def data_spec(mesh: Mesh) -> P:
    """Return the layout of sequences and activations: over all axes, as every device is a data-parallel worker."""
    return P(mesh.axis_names)


def spec_of(dims: str) -> P:
    """Return the layout of a parameter with these dim letters: 'LNDH' -> P(None, 'tp', 'fsdp', None)."""
    return P(*(AXIS_OF_DIM.get(letter) for letter in dims))


def check_divisible(sizes: dict[str, int], mesh: Mesh) -> None:
    """Raise UsageError naming the model's size that a mesh axis cannot split."""
    names = {
        "V": "vocab_size",
        "N": "attention heads",
        "K": "key-value heads",
        "F": "intermediate_size",
        "D": "hidden_size",
    }
    for letter, axis in AXIS_OF_DIM.items():
        if sizes[letter] % mesh.shape[axis]:
            shape = f"{mesh.shape[FSDP]},{mesh.shape[TP]}"
            raise UsageError(
                f"--mesh={shape}: {axis}={mesh.shape[axis]} does not divide the model's "
                f"{sizes[letter]} {names[letter]}; choose another {axis}"
            )


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the layout of arrays that every device holds whole."""
    return NamedSharding(mesh, P())


def by_sequence(mesh: Mesh) -> NamedSharding:
    """Return the layout of [B, ...] arrays: sequences over every device."""
    return NamedSharding(mesh, data_spec(mesh))


def put(tree: Any, sharding: NamedSharding) -> Any:
    """Move host arrays, equal on every process, to devices as laid out by `sharding`."""

    def place(x: Any) -> Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree)


def move(x: Array, memory_kind: str) -> Array:
    """Move every part of an array to another memory of its device."""
    own = [shard.data for shard in x.addressable_shards]
    parts = [jax.device_put(part, part.sharding.with_memory_kind(memory_kind)) for part in own]
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding.with_memory_kind(memory_kind), parts)


def fetch(x: Array | np.ndarray) -> np.ndarray:
    """Return a whole array on the host of every process; each calls this at the same place."""
    if isinstance(x, np.ndarray) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


PIECE_BYTES = 64 << 20
"""Most of an array that hosts other than worker 0's hold of it, besides their own part, while it is collected."""


@functools.partial(jax.jit, static_argnums=(0, 1))
def own_rows(sharding: NamedSharding, count: int, x: Array, start: Array) -> Array:
    """Take `count` rows of every device's part of x, from the part's row `start` on."""

    def cut(part: Array, start: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(part, start, count)

    mesh, own = sharding.mesh, sharding.spec
    return jax.shard_map(cut, mesh=mesh, in_specs=(own, P()), out_specs=own, check_vma=False)(x, start)


def collect_pieces(x: Array) -> np.ndarray | None:
    """Return a whole array on worker 0's host, None on the others, which hold a piece of it at a time."""
    rows = x.sharding.shard_shape(x.shape)[0]
    count = min(rows, max(1, rows * PIECE_BYTES // x.nbytes))
    whole = np.empty((x.shape[0] // rows, rows, *x.shape[1:]), x.dtype) if WORKERS.writes else None
    for start in [min(start, rows - count) for start in range(0, rows, count)]:
        piece = fetch(own_rows(x.sharding, count, x, np.int32(start)))
        if whole is not None:
            whole[:, start : start + count] = piece.reshape(-1, count, *x.shape[1:])
    return None if whole is None else whole.reshape(x.shape)


def collect(x: Array | np.ndarray) -> np.ndarray | None:
    """Return a whole array on worker 0's host, None on the others; each calls this at the same place."""
    if isinstance(x, np.ndarray) or x.is_fully_addressable or x.is_fully_replicated or x.nbytes <= PIECE_BYTES:
        found = fetch(x)
        return found if WORKERS.writes else None
    return collect_pieces(x)
