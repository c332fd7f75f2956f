"""Paged attention as a Pallas kernel for TPU, bound by the bandwidth at which pages arrive from HBM.

The grid runs over sequences. A sequence's pages are fetched in blocks by hand-made DMAs into a ring of buffers; a
cursor runs ahead of the computation, across sequences, so that while one block is attended to the next ones arrive.
All query heads are multiplied with all kv heads' lanes at once: the queries are laid out block-diagonally, each head's
vector in the lanes of its own kv head and zeros elsewhere, and of the output only that diagonal is kept.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from ..backend import PagedCache

HIDDEN = -1e30
"""Score of a position past the sequence's end."""

LANES = 128

VMEM_BYTES, TABLE_BYTES = 32 << 20, (1 << 20) - (1 << 14)
"""Bytes of vector memory for buffers, and of scalar memory for page tables, that calls may take."""


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Block sizes of the kernel's walk over the cache. They change time and VMEM; numbers only by the order of sums."""

    block_bytes: int = 2 << 20
    """Keys and values attended to at a time."""
    buffers: int = 4
    """Blocks in VMEM: one being attended to, the others arriving."""


def read_tuning(device_kind: str) -> Tuning:
    """Return the tuning counted best for this device (bench/kernel_cycles.py), from tuned.json, or the defaults."""
    values = json.loads(Path(__file__).with_name("tuned.json").read_text())
    return Tuning(**values.get(device_kind, {}))


def page_shape(page_size: int, kv_heads: int, head_dim: int) -> tuple[int, ...]:
    """Return [S, 2*K*H]."""
    return page_size, 2 * kv_heads * head_dim


def kv_heads(pages: Float[Array, "L P S W"], head_dim: int) -> int:
    """Return the number of heads of this size in the pages; 0 if they hold others."""
    return 0 if pages.shape[3] % (2 * head_dim) else pages.shape[3] // (2 * head_dim)


def append_rows(
    pages: Float[Array, "L P S W"],
    layer: Int[Array, ""],
    page: Int[Array, " B"],
    offset: Int[Array, " B"],
    k: Float[Array, "B K H"],
    v: Float[Array, "B K H"],
) -> Float[Array, "L P S W"]:
    """Append a token per sequence; see `PagedCache.append_rows`."""
    rows = jnp.stack([k, v], axis=2).reshape(k.shape[0], -1).astype(pages.dtype)
    return pages.at[layer, page, offset].set(rows, mode="drop")


def fill_pages(
    pages: Float[Array, "L P S W"],
    layer: Int[Array, ""],
    page: Int[Array, "B M"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
) -> Float[Array, "L P S W"]:
    """Write whole pages; see `PagedCache.fill_pages`."""
    rows = jnp.stack([k, v], axis=3).reshape(*page.shape, *pages.shape[2:]).astype(pages.dtype)
    return pages.at[layer, page].set(rows, mode="drop")


def pages_per_block(tuning: Tuning, page_bytes: int, max_pages: int) -> int:
    """Return how many pages of `page_bytes` the kernel fetches per block."""
    return max(1, min(tuning.block_bytes // page_bytes, max_pages))


@dataclasses.dataclass(frozen=True)
class Shape:
    """Static sizes of one call."""

    batch: int
    heads: int
    kv_heads: int
    dim: int
    page_size: int
    max_pages: int
    block_pages: int
    buffers: int

    @property
    def block(self) -> int:
        """Return the tokens of a block."""
        return self.block_pages * self.page_size

    @property
    def split(self) -> bool:
        """Tell if keys and values are sliced separately, which is free if a head fills whole vector registers."""
        return self.dim % LANES == 0

    @property
    def width(self) -> int:
        """Return the lanes of the block-diagonal queries: all keys' lanes, or all keys' and values'."""
        return self.kv_heads * self.dim * (1 if self.split else 2)


# Fetching


def page_copies(
    shape: Shape, refs: "Refs", sequence: Array, block: Array, slot: Array, do: Callable[[Any], None]
) -> None:
    """Apply `do`, start or wait, to the DMA of every page that the block of the sequence has."""
    first = block * shape.block_pages
    pages = (refs.lengths[sequence] + shape.page_size - 1) // shape.page_size

    def one(entry: Array, _: None) -> None:
        source = refs.pages.at[refs.layer[0], refs.table[sequence * shape.max_pages + first + entry]]
        do(pltpu.make_async_copy(source, refs.buffers.at[slot, entry], refs.arrived.at[slot]))

    jax.lax.fori_loop(0, jnp.minimum(shape.block_pages, pages - first), one, None)


def start(copy: Any) -> None:
    """Start a DMA."""
    copy.start()


def wait(copy: Any) -> None:
    """Wait for a DMA to end."""
    copy.wait()


def num_blocks(shape: Shape, length: Array) -> Array:
    """Return the number of blocks of a sequence; an empty one has one block without pages."""
    return jnp.maximum(1, (length + shape.block - 1) // shape.block)


def fetch_next(shape: Shape, refs: "Refs") -> None:
    """Start the DMAs of the cursor's block and move the cursor on, after the last block into the next sequence."""
    sequence, block, slot = refs.cursor[0], refs.cursor[1], refs.cursor[2]

    @pl.when(sequence < shape.batch)
    def _() -> None:
        page_copies(shape, refs, sequence, block, slot, start)
        last = block + 1 == num_blocks(shape, refs.lengths[sequence])
        refs.cursor[0] = jnp.where(last, sequence + 1, sequence)
        refs.cursor[1] = jnp.where(last, 0, block + 1)
        refs.cursor[2] = next_slot(shape, slot)


def next_slot(shape: Shape, slot: Array) -> Array:
    """Return the buffer after `slot` in the ring."""
    return jnp.where(slot + 1 == shape.buffers, 0, slot + 1)


def fill_with_zeros(shape: Shape, refs: "Refs", slot: Array, valid: Array) -> None:
    """Clear a buffer from row `valid` on: its old contents may be NaN, and 0 * NaN is not 0."""

    def clear(entry: Array, _: None) -> None:
        page = refs.buffers[slot, entry]
        kept = jax.lax.broadcasted_iota(jnp.int32, page.shape, 0) < valid - entry * shape.page_size
        refs.buffers[slot, entry] = jnp.where(kept, page.astype(jnp.float32), 0).astype(page.dtype)

    jax.lax.fori_loop(valid // shape.page_size, shape.block_pages, clear, None)


# Attending


def kv_lanes(shape: Shape, rows: Array, part: int) -> Array:
    """Take keys (part 0) or values (part 1) of rows [S, 2*K*H] -> [S, width]; all lanes if they are not split."""
    if not shape.split:
        return rows
    pieces = [rows[:, (2 * k + part) * shape.dim :][:, : shape.dim] for k in range(shape.kv_heads)]
    return jnp.concatenate(pieces, axis=1)


def owned(shape: Shape, kv_head: int) -> Array:
    """Return [N, 1], True for query heads that share this kv head."""
    group = shape.heads // shape.kv_heads
    head = jax.lax.broadcasted_iota(jnp.int32, (shape.heads, 1), 0)
    return (head >= kv_head * group) & (head < (kv_head + 1) * group)


def block_diagonal(shape: Shape, q: Array) -> Array:
    """Arrange q [N, H] as [N, width], each head's vector in the key lanes of its kv head."""
    pieces = []
    for k in range(shape.kv_heads):
        pieces += [jnp.where(owned(shape, k), q, 0)] + ([] if shape.split else [jnp.zeros_like(q)])
    return jnp.concatenate(pieces, axis=1)


def diagonal(shape: Shape, acc: Array) -> Array:
    """Extract [N, H] from [N, width]: each head's output from the value lanes of its kv head."""
    stride, offset = (shape.dim, 0) if shape.split else (2 * shape.dim, shape.dim)
    out = jnp.zeros((shape.heads, shape.dim), jnp.float32)
    for k in range(shape.kv_heads):
        out = jnp.where(owned(shape, k), acc[:, k * stride + offset :][:, : shape.dim], out)
    return out


def dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Contract one dim of each operand, in float32; float32 operands are multiplied in full precision."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = ((contract[:1], contract[1:]), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def attend_block(
    shape: Shape, refs: "Refs", q: Array, slot: Array, valid: Array, state: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array]:
    """Update the running softmax with one more block; `valid` rows of the buffer are tokens of the sequence."""
    peak, total, acc = state
    rows = refs.buffers[slot].reshape(shape.block, -1)
    scores = dot(q, kv_lanes(shape, rows, 0), (1, 1)) / math.sqrt(shape.dim)
    scores = jnp.where(jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1) < valid, scores, HIDDEN)
    new_peak = jnp.maximum(peak, scores.max(axis=1, keepdims=True))
    weights = jnp.exp(scores - new_peak)
    rescale = jnp.exp(peak - new_peak)
    update = dot(weights.astype(rows.dtype), kv_lanes(shape, rows, 1), (1, 0))
    return new_peak, total * rescale + weights.sum(axis=1, keepdims=True), acc * rescale + update


@dataclasses.dataclass(frozen=True)
class Refs:
    """References to everything that the kernel reads and writes.

    Example with M = 3: lengths [130, 5], table [7, 9, 31, 4, 0, 0]; cursor [0, 1, 1, 0] fetches block 1 of sequence 0
    into slot 1 next, while slot 0 is attended to.
    """

    layer: Any  # SMEM int32 [1]
    lengths: Any  # SMEM int32 [B]
    table: Any  # SMEM int32 [B*M]
    q: Any  # VMEM [1, N, H]
    pages: Any  # HBM [L, P, S, 2*K*H]
    out: Any  # VMEM [1, N, H]
    buffers: Any  # VMEM [buffers, block_pages, S, 2*K*H]
    arrived: Any  # DMA semaphores [buffers]
    cursor: Any  # SMEM int32 [4]: sequence, block and slot to fetch next; slot to attend to next


def kernel(shape: Shape, *args: Any) -> None:
    """Attend to one sequence. Blocks are fetched `buffers - 1` ahead of the current one."""
    refs, sequence = Refs(*args), pl.program_id(0)

    @pl.when(sequence == 0)
    def _() -> None:
        for index in range(4):
            refs.cursor[index] = 0
        for _ in range(shape.buffers - 1):
            fetch_next(shape, refs)

    length = refs.lengths[sequence]
    q = block_diagonal(shape, refs.q[0])

    def step(block: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        slot = refs.cursor[3]
        fetch_next(shape, refs)
        page_copies(shape, refs, sequence, block, slot, wait)
        valid = length - block * shape.block
        fill_with_zeros(shape, refs, slot, valid)
        state = attend_block(shape, refs, q, slot, valid, state)
        refs.cursor[3] = next_slot(shape, slot)
        return state

    column = jnp.zeros((shape.heads, 1), jnp.float32)
    state = (column + HIDDEN, column, jnp.zeros((shape.heads, shape.width), jnp.float32))
    _, total, acc = jax.lax.fori_loop(0, num_blocks(shape, length), step, state)
    refs.out[0] = (diagonal(shape, acc) / total).astype(refs.out.dtype)


def tuned_attention(
    q: Float[Array, "B N H"],
    pages: Float[Array, "L P S W"],
    layer: Int[Array, ""],
    lengths: Int[Array, " B"],
    page_table: Int[Array, "B M"],
    tuning: Tuning,
    interpret: Any = False,
) -> Float[Array, "B N H"]:
    """Run `PagedCache.paged_attention` with a given tuning; `interpret` emulates the kernel, as in pallas_call."""
    batch, heads, dim = q.shape
    page_size, width = pages.shape[2:]
    row_bytes = width * pages.dtype.itemsize
    block_pages = pages_per_block(tuning, row_bytes * page_size, page_table.shape[1])
    shape = Shape(batch, heads, kv_heads(pages, dim), dim, page_size, page_table.shape[1], block_pages, tuning.buffers)
    one = pl.BlockSpec((1, heads, dim), lambda sequence, *_: (sequence, 0, 0))
    call = pl.pallas_call(
        functools.partial(kernel, shape),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch,),
            in_specs=[one, pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=one,
            scratch_shapes=[
                pltpu.VMEM((shape.buffers, shape.block_pages, page_size, width), pages.dtype),
                pltpu.SemaphoreType.DMA((shape.buffers,)),
                pltpu.SMEM((4,), jnp.int32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=2 * shape.buffers * shape.block * row_bytes + (16 << 20),
            disable_bounds_checks=True,
        ),
        interpret=interpret,
        name="paged_attention",
    )
    return call(jnp.reshape(layer, 1).astype(jnp.int32), lengths, page_table.reshape(-1), q, pages)


def cache(tuning: Tuning) -> PagedCache:
    """Return the cache that the kernel reads with this tuning."""
    attend = functools.partial(tuned_attention, tuning=tuning)
    page_bytes = VMEM_BYTES // tuning.buffers
    return PagedCache(page_shape, kv_heads, append_rows, fill_pages, attend, page_bytes, TABLE_BYTES)
