"""Paged attention as a Pallas Mosaic kernel for Hopper GPUs, bound by the bandwidth at which pages arrive from HBM.

One warpgroup attends to one kv head of one sequence: keys and values are fetched a block at a time by the bulk copy
engine into a ring of buffers, and multiplied by the tensor cores, whose 64 rows the few queries of a head fill by
repetition. A page is [2, K, S, H], keys before values: a head's tokens are contiguous, as one copy fetches them.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from ..backend import PagedCache
from ..hopper import IN_TILES, ROWS, TILE_ROWS, load

BLOCK_TOKENS = 64
"""Context tokens attended to at a time."""

LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Block counts of the kernel's walk over the cache. They change time and shared memory, but no number."""

    buffers: int = 2
    """Blocks in shared memory: one being attended to, the others arriving."""


def takes(page_size: int, head_dim: int, dtype: Any) -> bool:
    """Tell if the kernel is for such pages: 16 bits, heads of whole tiles, page and block multiples of one another."""
    whole = page_size % TILE_ROWS == 0 and (BLOCK_TOKENS % page_size == 0 or page_size % BLOCK_TOKENS == 0)
    return whole and head_dim in (64, 128) and jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)


def page_shape(page_size: int, kv_heads: int, head_dim: int) -> tuple[int, ...]:
    """Return [keys and values, K, S, H]."""
    return 2, kv_heads, page_size, head_dim


def kv_heads(pages: Float[Array, "L P 2 K S H"], head_dim: int) -> int:
    """Return the number of heads of this size in the pages; 0 if they hold others."""
    return pages.shape[3] if pages.shape[5] == head_dim else 0


def append_rows(
    pages: Float[Array, "L P 2 K S H"],
    layer: Int[Array, ""],
    page: Int[Array, " B"],
    offset: Int[Array, " B"],
    k: Float[Array, "B K H"],
    v: Float[Array, "B K H"],
) -> Float[Array, "L P 2 K S H"]:
    """Append a token per sequence; see `PagedCache.append_rows`."""
    return pages.at[layer, page, :, :, offset].set(jnp.stack([k, v], axis=1).astype(pages.dtype), mode="drop")


def fill_pages(
    pages: Float[Array, "L P 2 K S H"],
    layer: Int[Array, ""],
    page: Int[Array, "B M"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
) -> Float[Array, "L P 2 K S H"]:
    """Write whole pages; see `PagedCache.fill_pages`."""
    both = jnp.stack([x.reshape(*page.shape, -1, *x.shape[2:]) for x in (k, v)], axis=2)
    return pages.at[layer, page].set(both.swapaxes(3, 4).astype(pages.dtype), mode="drop")


@dataclasses.dataclass(frozen=True)
class Walk:
    """State of one kernel instance that walks its sequence's pages.

    Example with pages of 64 tokens: row 0, head 1, length 130, table [[7, 9, 31, ...], ...]; tokens 128 and 129 are in
    page 31, and the third block is the last.
    """

    pages: Any  # [L, P, 2, K, S, H] in device memory
    table: Any  # [B, M], likewise
    keys: Any  # [buffers, BLOCK_TOKENS, H] in shared memory
    values: Any
    weights: Any  # [ROWS, BLOCK_TOKENS] in shared memory
    arrived: tuple[Any, ...]
    """A barrier per buffer, of keys and of values."""
    row: Any
    head: Any
    layer: Any
    length: Any

    def buffer(self, block: Any) -> Any:
        """Return the ring buffer that holds a block."""
        return jax.lax.rem(block, self.keys.shape[0])


def page_of(walk: Walk, first: Any) -> Any:
    """Return the page that holds token `first`; 0 past the sequence's end."""
    entry = jax.lax.div(first, walk.pages.shape[4])
    return jnp.where(first < walk.length, walk.table[walk.row, jnp.minimum(entry, walk.table.shape[1] - 1)], 0)


def fetch(walk: Walk, block: Any) -> None:
    """Start copying a block of keys and values."""
    page_size, buffer = walk.pages.shape[4], walk.buffer(block)
    piece = min(page_size, BLOCK_TOKENS)
    for start in range(0, BLOCK_TOKENS, piece):
        first = block * BLOCK_TOKENS + start
        page, tokens = page_of(walk, first), pl.ds(jax.lax.rem(first, page_size), piece)
        for which, buffers in enumerate((walk.keys, walk.values)):
            source = walk.pages.at[walk.layer, page, which, walk.head, tokens]
            plgpu.copy_gmem_to_smem(source, buffers.at[buffer, pl.ds(start, piece)], walk.arrived[which].at[buffer])


def spread(rows: Array, columns: int) -> Array:
    """Broadcast a number per row to every column."""
    return jax.lax.broadcast_in_dim(rows, (ROWS, columns), [0])


def zero_past(walk: Walk, buffer: Any, valid: Any) -> None:
    """Zero a buffer's values from token `valid` on, as a weight of 0 does not cancel NaN."""
    tokens = plgpu.broadcasted_iota(jnp.int32, walk.values.shape[1:], 0, layout=plgpu.Layout.WGMMA)
    values = plgpu.layout_cast(walk.values[buffer], plgpu.Layout.WGMMA)
    walk.values[buffer] = jnp.where(tokens < valid, values, jnp.zeros_like(values))
    plgpu.commit_smem()


def attend_block(walk: Walk, queries: Any, block: Any, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    """Take one step of the online softmax (arXiv:1805.02867), in powers of 2."""
    peak, total, acc = state
    buffer, valid = walk.buffer(block), walk.length - block * BLOCK_TOKENS
    plgpu.barrier_wait(walk.arrived[0].at[buffer])

    def multiply(scores: Any) -> Array:
        plgpu.wgmma(scores, queries, walk.keys.at[buffer].transpose((1, 0)))
        return scores[...]

    scores = pl.run_scoped(multiply, plgpu.ACC((ROWS, BLOCK_TOKENS), jnp.float32))
    tokens = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
    scores = jnp.where(tokens < valid, scores * (LOG2E / math.sqrt(walk.keys.shape[2])), -jnp.inf)
    new_peak = jnp.maximum(peak, scores.max(axis=1))
    weights, rescale = jnp.exp2(scores - spread(new_peak, BLOCK_TOKENS)), jnp.exp2(peak - new_peak)
    plgpu.barrier_wait(walk.arrived[1].at[buffer])
    pl.when(valid < BLOCK_TOKENS)(lambda: zero_past(walk, buffer, valid))
    walk.weights[...] = weights.astype(walk.weights.dtype)
    plgpu.commit_smem()

    def weigh(sums: Any) -> Array:
        plgpu.wgmma(sums, walk.weights, walk.values.at[buffer])
        return sums[...]

    sums = pl.run_scoped(weigh, plgpu.ACC((ROWS, acc.shape[1]), jnp.float32))
    return new_peak, total * rescale + weights.sum(axis=1), acc * spread(rescale, acc.shape[1]) + sums


def load_queries(q: Any, queries: Any) -> None:
    """Copy the queries of a kv head to a matmul's first rows; the others, which nobody reads, get the last's."""
    rows = plgpu.broadcasted_iota(jnp.int32, queries.shape, 0, layout=plgpu.Layout.WGMMA)
    found = jnp.zeros(queries.shape, queries.dtype)
    for index in range(q.shape[0]):
        query = load(q.at[index], plgpu.Layout.WGMMA.reduce(0))
        found = jnp.where(rows < index, found, jax.lax.broadcast_in_dim(query, queries.shape, [1]))
    queries[...] = found
    plgpu.commit_smem()


def kernel(
    q: Any, pages: Any, layer: Any, lengths: Any, table: Any, out: Any, queries: Any, keys: Any, values: Any,
    weights: Any, results: Any, *arrived: Any,
) -> None:  # fmt: skip
    """Attend with the queries of one kv head to one sequence."""
    row, head = jax.lax.axis_index("row"), jax.lax.axis_index("head")
    walk = Walk(pages, table, keys, values, weights, arrived, row, head, layer[0], lengths[row])
    blocks = jax.lax.div(walk.length + BLOCK_TOKENS - 1, BLOCK_TOKENS)
    buffers = keys.shape[0]
    for block in range(buffers):
        pl.when(block < blocks)(functools.partial(fetch, walk, jnp.int32(block)))
    load_queries(q.at[row, head], queries)

    def step(block: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        state = attend_block(walk, queries, block, state)
        pl.when(block + buffers < blocks)(lambda: fetch(walk, block + buffers))
        return state

    of_rows = plgpu.Layout.WGMMA.reduce(1)
    peak = plgpu.layout_cast(jnp.full((ROWS,), jnp.finfo(jnp.float32).min, jnp.float32), of_rows)
    total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), of_rows)
    acc = plgpu.layout_cast(jnp.zeros(queries.shape, jnp.float32), plgpu.Layout.WGMMA)
    _, total, acc = jax.lax.fori_loop(0, blocks, step, (peak, total, acc))
    acc = acc / spread(jnp.maximum(total, jnp.finfo(jnp.float32).tiny), acc.shape[1])
    results[...] = acc.astype(results.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(results.at[pl.ds(0, out.shape[2])], out.at[row, head])
    plgpu.wait_smem_to_gmem(0)


@functools.partial(jax.jit, static_argnames=("tuning", "interpret"))
def tuned_attention(
    q: Float[Array, "B N H"],
    pages: Float[Array, "L P 2 K S H"],
    layer: Int[Array, ""],
    lengths: Int[Array, " B"],
    page_table: Int[Array, "B M"],
    tuning: Tuning,
    interpret: Any = None,
) -> Float[Array, "B N H"]:
    """Run `paged_attention` with a given tuning; `interpret` emulates the kernel, as in jax's Pallas.

    Raises ValueError for more than 64 query heads that share a kv head.
    """
    (batch, heads, dim), (kv_heads, page_size) = q.shape, pages.shape[3:5]
    group, pieces = heads // kv_heads, max(1, BLOCK_TOKENS // page_size)
    if group > ROWS:
        raise ValueError(f"{heads} query heads for {kv_heads} kv heads: at most {ROWS} for each")
    blocks = plgpu.SMEM((tuning.buffers, BLOCK_TOKENS, dim), pages.dtype, transforms=IN_TILES)
    run = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((batch, kv_heads, group, dim), q.dtype),
        grid=(kv_heads, batch),
        grid_names=("head", "row"),
        scratch_types=[
            plgpu.SMEM((ROWS, dim), q.dtype, transforms=IN_TILES),
            blocks,
            blocks,
            plgpu.SMEM((ROWS, BLOCK_TOKENS), pages.dtype, transforms=IN_TILES),
            plgpu.SMEM((ROWS, dim), q.dtype),
            plgpu.Barrier(num_arrivals=pieces, num_barriers=tuning.buffers),
            plgpu.Barrier(num_arrivals=pieces, num_barriers=tuning.buffers),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    return run(q.reshape(batch, kv_heads, group, dim), pages, layer[None], lengths, page_table).reshape(q.shape)


def paged_attention(
    q: Float[Array, "B N H"],
    pages: Float[Array, "L P 2 K S H"],
    layer: Int[Array, ""],
    lengths: Int[Array, " B"],
    page_table: Int[Array, "B M"],
) -> Float[Array, "B N H"]:
    """Attend with queries in the pages' dtype; see `PagedCache.paged_attention`."""
    return tuned_attention(q, pages, layer, lengths, page_table, Tuning())


CACHE = PagedCache(page_shape, kv_heads, append_rows, fill_pages, paged_attention)
