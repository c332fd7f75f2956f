"""Digests of arrays: 32 bits that notice any changed element, whatever mesh the array is laid out on.

The elements' bits, as uint32, are summed modulo 2^32 with odd weights, one of the row (all dims but the last) times one
of the column. An odd weight times a difference is never 0, so that a single changed element always shows; several
cancel with probability 2^-32. Sums of shards add up to the sum of the whole.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minigrpo.runtime.mesh import DEVICE_MEMORY, HOST_MEMORY, move

ROW, COLUMN = 0x243F6A88, 0x85A308D3
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def weights(positions: Any, salt: int) -> Any:
    """Return an odd uint32 weight for each uint32 position, for NumPy's arrays and jax's."""
    mixed = (positions + np.uint32(salt)) * np.uint32(0x9E3779B1)
    mixed = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(0x85EBCA77)
    return (mixed ^ (mixed >> np.uint32(13))) | np.uint32(1)


def strides(shape: tuple[int, ...]) -> list[np.uint32]:
    """Return how many rows a step along each dim but the last passes over."""
    return [np.uint32(math.prod(shape[dim + 1 : -1]) % 2**32) for dim in range(len(shape) - 1)]


@jax.jit
def on_device(array: jax.Array) -> jax.Array:
    """Return an array's digest, computed where the array is: one pass over its memory, one program per shape."""
    shape = array.shape or (1,)
    plain = array.astype(jnp.uint8) if array.dtype == jnp.bool_ else array
    bits = jax.lax.bitcast_convert_type(plain, WORDS[plain.dtype.itemsize]).astype(jnp.uint32).reshape(shape)
    rows = jnp.zeros(shape, jnp.uint32)
    for dim, stride in enumerate(strides(shape)):
        rows += jax.lax.broadcasted_iota(jnp.uint32, shape, dim) * stride
    columns = jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
    return jnp.sum(bits * weights(rows, ROW) * weights(columns, COLUMN), dtype=jnp.uint32)


def of_shard(part: np.ndarray, starts: list[int], shape: tuple[int, ...]) -> int:
    """Return the share of a digest of the part of an array that begins at index `starts`; `shape` is the whole's."""
    words = np.ascontiguousarray(part).view(WORDS[part.dtype.itemsize]).reshape(-1, part.shape[-1])
    rows = np.zeros(1, np.uint32)
    for size, start, stride in zip(part.shape[:-1], starts, strides(shape), strict=False):
        rows = np.add.outer(rows, (start + np.arange(size)).astype(np.uint32) * stride).ravel()
    columns = (starts[-1] + np.arange(part.shape[-1])).astype(np.uint32)
    sums = np.einsum("r,rc->c", weights(rows, ROW), words.astype(np.uint32, copy=False))
    return int((sums * weights(columns, COLUMN)).sum(dtype=np.uint32))


def on_host(array: jax.Array) -> int:
    """Return an array's digest from its shards in this host's memory, several times faster than XLA does on a CPU."""
    total, shape = 0, array.shape or (1,)
    for shard in array.addressable_shards if array.size else ():
        if shard.replica_id == 0:
            starts = [part.start or 0 for part in shard.index] or [0]
            total += of_shard(np.asarray(shard.data).reshape(shard.data.shape or (1,)), starts, shape)
    return total % 2**32


def on_devices(arrays: dict[str, jax.Array]) -> dict[str, int]:
    """Return digests computed on the devices, one after the other: gloo's collectives deadlock when many are under way.

    Arrays that wait in the host's memory visit them.
    """
    there = ((name, move(x, DEVICE_MEMORY) if in_host_memory(x) else x) for name, x in arrays.items())
    return {name: int(on_device(array)) for name, array in there}


Digests = Callable[[], dict[str, int]]
"""A function that returns the digest of every array, by name."""


def begin_digests(arrays: dict[str, jax.Array]) -> Digests:
    """Compute now what the devices must for the digest of every array -> what returns them without a device.

    Arrays that are in this host's memory as a whole are read only then.
    """
    here = {name: x for name, x in arrays.items() if x.is_fully_addressable and (on_cpu(x) or in_host_memory(x))}
    found = on_devices({name: x for name, x in arrays.items() if name not in here})
    return lambda: found | {name: on_host(x) for name, x in here.items()}


def on_cpu(array: jax.Array) -> bool:
    """Tell if an array's devices are CPUs."""
    return all(device.platform == "cpu" for device in array.devices())


def in_host_memory(array: jax.Array) -> bool:
    """Tell if an array waits in the memory of its devices' hosts."""
    return bool(array.sharding.memory_kind == HOST_MEMORY)
