"""The (fsdp, tp) mesh: platform start-up, how every parameter and activation is laid out on it."""

import ctypes
import dataclasses
import glob
import importlib.util
import math
import mmap
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Num

from minigrpo.config import UsageError, parse_mesh

PLATFORMS, CPU_DEVICES = "jax_platforms", "jax_num_cpu_devices"
FSDP, TP = "fsdp", "tp"
DATA = (FSDP, TP)
"""Activations and sequences are split over both mesh axes: every device is a data-parallel worker."""

AXIS_OF_DIM = {"V": TP, "N": TP, "K": TP, "F": TP, "D": FSDP}
"""Dim letter -> the mesh axis that shards it; H and L stay whole."""


LONG_TRACE, LONG_COMPILE = 0.03, 0.5
"""Seconds of tracing after which a program is new, and of compiling after which there is memory to give back."""

MOST_WORKERS = 8
"""Virtual devices of a CPU that rollouts are spread over, at most, where jax is not told how many there are."""

HOST_DEVICES = "xla_force_host_platform_device_count"
"""The flag of XLA's that tells; the other way is JAX_NUM_CPU_DEVICES."""

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Options of the C library's mallopt(3)."""

HUGE_PAGES = 256 << 20
"""Bytes of a CPU program's arrays that come in huge pages, if they can: the processor finds these faster."""


def accelerator_present() -> bool:
    """Whether a TPU or an NVIDIA GPU that jax can drive is attached, found without starting a backend."""
    tpu = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    gpu = os.path.exists("/dev/nvidiactl") and any(importlib.util.find_spec(plugin) for plugin in plugins)
    return bool(tpu or gpu)


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def mesh_sizes(mesh_flag: str, platform: str, devices: int) -> tuple[int, int]:
    """fsdp and tp of `--mesh`; auto is every device as fsdp, and 1,1 on the CPU, whose devices are virtual."""
    if mesh_flag != "auto":
        return parse_mesh(mesh_flag)
    return (1, 1) if platform == "cpu" else (devices, 1)


def virtual_devices(mesh_size: int) -> int | None:
    """A CPU's devices: those of the mesh; beside a mesh of one as many as jax was told, if it was, or one per core."""
    if mesh_size > 1:
        return mesh_size
    told = getattr(jax.config, CPU_DEVICES) > 0 or HOST_DEVICES in os.environ.get("XLA_FLAGS", "")
    return None if told else min(cores(), MOST_WORKERS)


def start_platform(mesh_flag: str) -> None:
    """Chooses the platform before jax starts: without an accelerator, the CPU as so many `virtual_devices`."""
    if getattr(jax.config, PLATFORMS) is None and not accelerator_present():
        jax.config.update(PLATFORMS, "cpu")
    if getattr(jax.config, PLATFORMS) == "cpu":
        devices = virtual_devices(math.prod(mesh_sizes(mesh_flag, "cpu", 1)))
        if devices:
            jax.config.update(CPU_DEVICES, devices)
        # One CPU client runs programs one after another: with several virtual devices, concurrent
        # programs can starve each other's collectives of threads.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        keep_freed_memory()


def of_c_library(name: str) -> Callable[..., int] | None:
    """A function of the GNU C library; None where that is not the system's."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def keep_freed_memory() -> None:
    """Makes malloc keep what is freed: a CPU program's arrays are allocated anew in every run of it.

    Otherwise each page of the large ones comes from the system every time, zeroed, at a tenth of an update's time. Only
    `launch` gives memory back from then on, after compiling.
    """
    set_option = of_c_library("mallopt")
    if set_option:
        set_option(M_MMAP_MAX, 0)
        set_option(M_TRIM_THRESHOLD, -1)  # never


def known_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options for XLA's compiler that it knows, as they come and go, and that XLA_FLAGS does not set."""
    flags = os.environ.get("XLA_FLAGS", "")
    known = {}
    for name, value in options.items():
        if f"--{name}=" in flags:
            continue
        try:
            jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):
                raise
            sys.stderr.write(f"{name}: this version of XLA knows no such option; programs may be slower\n")
        else:
            known[name] = value
    return known


def launch(function: Any, *arguments: Any) -> Any:
    """Calls a jitted function; if it has to be compiled, the host gets back what is free before that and after.

    What it takes again then, for the function's arrays, may come in huge pages.
    """
    started = time.perf_counter()
    lowered = function.lower(*arguments)
    given_back = give_back_after(started, LONG_TRACE)
    lowered.compile()  # at once if it has been, and the call finds it
    given_back |= give_back_after(started, LONG_COMPILE)
    if given_back:
        take_huge_pages(HUGE_PAGES)
    return function(*arguments)


def give_back_after(started: float, least: float) -> bool:
    """Gives free memory back to the system if more than `least` seconds have gone by -> whether it did."""
    give_back = of_c_library("malloc_trim")
    if not give_back or time.perf_counter() - started <= least:
        return False
    give_back(0)
    return True


def take_huge_pages(size: int) -> None:
    """Has the next `size` bytes by which malloc's heap grows come in huge pages, if the system has these.

    `size` is a multiple of a page. A block is set aside, advised and freed; the system gives it pages at its first use.
    Without `keep_freed_memory` so large a block is none of the heap's, and nothing comes of it.
    """
    library = ctypes.CDLL(None)
    library.malloc.restype = ctypes.c_void_p
    block = library.malloc(ctypes.c_size_t(size))
    if block:
        first_page = -(-block // mmap.PAGESIZE) * mmap.PAGESIZE
        library.madvise(ctypes.c_void_p(first_page), ctypes.c_size_t(size - mmap.PAGESIZE), mmap.MADV_HUGEPAGE)
        library.free(ctypes.c_void_p(block))


def make_mesh(mesh_flag: str) -> Mesh:
    """The mesh of `--mesh`; UsageError when it does not match the devices there are."""
    devices = jax.devices()
    fsdp, tp = mesh_sizes(mesh_flag, devices[0].platform, len(devices))
    if fsdp * tp == 1 and devices[0].platform == "cpu":
        devices = devices[:1]
    if fsdp * tp != len(devices):
        raise UsageError(
            f"--mesh={mesh_flag}: {fsdp * tp} devices wanted, {len(devices)} {devices[0].platform} devices found; "
            f"use --mesh={len(devices)},1 or another pair whose product is {len(devices)}"
        )
    return arrange(devices, fsdp, tp)


def arrange(devices: list[Any], fsdp: int, tp: int) -> Mesh:
    """The devices as an (fsdp, tp) mesh, neighbours on the chips' own network kept near each other."""
    grid = mesh_utils.create_device_mesh((fsdp, tp), devices, allow_split_physical_axes=True)
    return Mesh(grid, DATA, axis_types=(jax.sharding.AxisType.Auto,) * 2)


def worker_mesh(mesh: Mesh, most: int) -> Mesh:
    """Up to `most` of a CPU's virtual devices, where the mesh is one of them; any other mesh as it is."""
    if mesh.size > 1 or mesh.devices.flat[0].platform != "cpu":
        return mesh
    devices = jax.local_devices()[: max(1, most)]
    return arrange(devices, len(devices), 1)


def spec_of(dims: str) -> PartitionSpec:
    """Layout of a parameter with these dim letters: 'LNDH' -> P(None, 'tp', 'fsdp', None)."""
    return PartitionSpec(*(AXIS_OF_DIM.get(letter) for letter in dims))


def check_divisible(sizes: dict[str, int], mesh: Mesh) -> None:
    """UsageError naming the model's size that a mesh axis cannot split."""
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
    return NamedSharding(mesh, PartitionSpec())


def by_sequence(mesh: Mesh) -> NamedSharding:
    """Layout of [B, ...] arrays: sequences over every device."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def put(mesh: Mesh, tree: Any, sharding: NamedSharding) -> Any:
    """Host arrays, equal on every process, -> device arrays laid out by `sharding`."""

    def place(x):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree)


def look_up(table: Float[Array, "v d"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """One device's embeddings from a table split over both mesh axes, inside shard_map.

    Tokens are brought to the table, not the table to the tokens: each device looks up all tokens in its own rows and
    columns, `tp` peers add up their rows, and `fsdp` peers exchange columns for sequences.
    """
    everyone = jax.lax.all_gather(jax.lax.all_gather(tokens, TP), FSDP)  # [fsdp, tp, B, T]
    local = everyone - jax.lax.axis_index(TP) * table.shape[0]
    here = (local >= 0) & (local < table.shape[0])
    rows = jnp.where(here[..., None], table[jnp.where(here, local, 0)], 0)
    rows = jax.lax.psum_scatter(rows, TP, scatter_dimension=1)
    return jax.lax.all_to_all(rows, FSDP, split_axis=0, concat_axis=3, tiled=True)[0]


def in_order(x: Array, before: str, after: str) -> Array:
    """Dims put in another order, but not before x is made: XLA on the CPU would turn the larger things x is made of."""
    return jnp.einsum(f"{before}->{after}", jax.lax.optimization_barrier(x))


def in_dtype(params: Any, dtype: Any) -> Any:
    """Weights in the dtype computed with; int8 ones stay."""
    return jax.tree.map(lambda w: w if w.dtype == jnp.int8 else w.astype(dtype), params)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a pass through the model computes: in which dtype, and on which mesh (None: inside one device).

    On a mesh, activations are split by sequence over every device and each layer's weights are gathered for use: at
    these model sizes that moves fewer bytes than tensor-parallel layers (BUILD_NOTES.md).
    """

    dtype: Any = jnp.float32
    mesh: Mesh | None = None

    def weights(self, layer: Any) -> Any:
        """One layer's stored weights -> those computed with."""
        cast = in_dtype(layer, self.dtype)
        return cast if self.mesh is None else jax.lax.with_sharding_constraint(cast, replicated(self.mesh))

    def activations(self, x: Array) -> Array:
        return x if self.mesh is None else jax.lax.with_sharding_constraint(x, by_sequence(self.mesh))

    def embed(self, table: Num[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        if self.mesh is None or self.mesh.size == 1:
            return table.at[tokens].get(mode="promise_in_bounds", wrap_negative_indices=False).astype(self.dtype)
        rows, split = PartitionSpec(DATA), PartitionSpec(TP, FSDP)
        run = jax.shard_map(look_up, mesh=self.mesh, in_specs=(split, rows), out_specs=rows, check_vma=False)
        return run(table.astype(self.dtype), tokens)


ONE_DEVICE = Layout()
