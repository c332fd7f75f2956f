"""Paged attention on the CPU for small heads, reading keys and values in place, without a gathered copy.

XLA on the CPU copies the operand that a batched matmul reads through a page table, and the copy costs several times the
matmul. A dot product that is written out term by term is one fused loop instead, which reads pages in place. It is
vectorized along the last dim, so a piece of a page holds LANES adjacent numbers that are summed separately: a head's
keys [S/LANES, H, LANES] and its values [H/LANES, S, LANES], in the order the loop walks them.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..backend import PagedCache
from .xla import PIECE_TOKENS, attend_blocks, kv_heads, page_shape

MOST_HEAD_DIM = 32
"""Larger heads go by `xla`: their sums have more terms, which take longer to compile than they save."""

LANES = 16

BLOCK_TOKENS, CHAIN = PIECE_TOKENS, 16
"""Context tokens read per loop turn, and how many of these are summed one after the other, whatever the page size."""


def as_keys(pages: Float[Array, "L P R K W"], dim: int) -> Float[Array, "L pieces 2 K X H S"]:
    """View all pieces, of keys and of values, as keys: X times S tokens, S of them adjacent."""
    layers, kv_heads, width = pages.shape[0], *pages.shape[3:]
    tokens = width // dim
    across = math.gcd(tokens, LANES)
    return pages.reshape(layers, -1, 2, kv_heads, tokens // across, dim, across)


def as_values(pages: Float[Array, "L P R K W"], dim: int) -> Float[Array, "L pieces 2 K X S U"]:
    """View all pieces, of keys and of values, as values: S tokens of X times U numbers, U adjacent."""
    layers, kv_heads, width = pages.shape[0], *pages.shape[3:]
    along = math.gcd(dim, LANES)
    return pages.reshape(layers, -1, 2, kv_heads, dim // along, width // dim, along)


def append_rows(
    pages: Float[Array, "L P R K W"],
    layer: Int[Array, ""],
    page: Int[Array, " B"],
    offset: Int[Array, " B"],
    k: Float[Array, "B K H"],
    v: Float[Array, "B K H"],
) -> Float[Array, "L P R K W"]:
    """Append a token per sequence; see `PagedCache.append_rows`."""
    dim = k.shape[2]
    tokens = pages.shape[4] // dim
    piece, token = page * (pages.shape[2] // 2) + offset // tokens, offset % tokens
    keys = as_keys(pages, dim)
    lanes = keys.shape[-1]
    keys = keys.at[layer, piece, 0, :, token // lanes, :, token % lanes].set(k.astype(pages.dtype), mode="drop")
    values = as_values(keys.reshape(pages.shape), dim)
    rows = v.reshape(*v.shape[:2], -1, values.shape[-1]).astype(pages.dtype)
    return values.at[layer, piece, 1, :, :, token].set(rows, mode="drop").reshape(pages.shape)


def fill_pages(
    pages: Float[Array, "L P R K W"],
    layer: Int[Array, ""],
    page: Int[Array, "B M"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
) -> Float[Array, "L P R K W"]:
    """Write whole pages; see `PagedCache.fill_pages`."""
    keys, values = as_keys(pages, k.shape[3]), as_values(pages, k.shape[3])
    lead, heads = (*page.shape, pages.shape[2] // 2), pages.shape[3:]
    k = k.reshape(*lead, keys.shape[4], keys.shape[6], *k.shape[2:]).astype(pages.dtype)
    v = v.reshape(*lead, values.shape[5], v.shape[2], *values.shape[4::2]).astype(pages.dtype)
    laid_out = jnp.einsum("BMCXSKH->BMCKXHS", k), jnp.einsum("BMCSKXH->BMCKXSH", v)
    pairs = jnp.stack([x.reshape(*lead, *heads) for x in laid_out], axis=3)
    return pages.at[layer, page].set(pairs.reshape(*page.shape, *pages.shape[2:]), mode="drop")


def summed(count: int, term: Callable[[int], Array]) -> Array:
    """Add term(0) + term(1) + ..., in this order."""
    return sum((term(i) for i in range(1, count)), term(0))


@jax.jit
def score(
    q: Float[Array, "B K H"], keys: Float[Array, "P K X H S"], rows: Int[Array, "B C"]
) -> Float[Array, "B C K X S"]:
    """Compute q k^T with the keys of the rows, tokens in the last dim. Traced once for all layers."""

    def term(h: int) -> Array:
        key = keys[:, :, :, h].at[rows].get(mode="promise_in_bounds")
        return q[:, None, :, h, None, None] * key.astype(q.dtype)

    return summed(q.shape[2], term)


def score_groups(
    q: Float[Array, "B K G H"], keys: Float[Array, "P K X H S"], rows: Int[Array, "B C"]
) -> Float[Array, "B C K G X S"]:
    """Apply `score` to each of a head's queries or, if it has one, to each half of the heads, and join the results.

    XLA computes a joined array once. It would repeat bare sums for each of their uses, the softmax's peak and its
    weights, and copy the keys to do so.
    """
    if q.shape[2] > 1:
        return jnp.stack([score(q[:, :, g], keys, rows) for g in range(q.shape[2])], axis=3)
    half = q.shape[1] // 2
    halves = slice(None, half), slice(half, None)
    return jnp.concatenate([score(q[:, heads, 0], keys[:, heads], rows) for heads in halves], axis=2)[:, :, :, None]


@jax.jit
def weigh(
    weights: Float[Array, "B C K J T"], values: Float[Array, "P K X J S U"], rows: Int[Array, "B C M"]
) -> Float[Array, "B C K X J U"]:
    """Sum chains of T tokens by weight; a weight of 0 adds nothing, even to NaN. Traced once for all layers too.

    A chain is the tokens of M rows of S each or, where a row holds more, one of the J chains in it.
    """
    tokens = values.shape[4]

    def term(t: int) -> Array:
        weight = weights[:, :, :, None, :, t, None]
        value = values[:, :, :, :, t % tokens].at[rows[..., t // tokens]].get(mode="promise_in_bounds")
        return jnp.where(weight != 0, weight * value.astype(weight.dtype), 0)

    return summed(weights.shape[4], term)


def paged_attention(
    q: Float[Array, "B N H"],
    pages: Float[Array, "L P R K W"],
    layer: Int[Array, ""],
    lengths: Int[Array, " B"],
    page_table: Int[Array, "B M"],
) -> Float[Array, "B N H"]:
    """Attend to cached tokens; see `PagedCache.paged_attention`.

    Pages are viewed as keys and as values inside the loop: XLA copies the whole of a view that is made before the loop
    if one of its dims is 1, as with small pages. Pages of two tokens, pages of few tokens and one head, and bfloat16
    pages are still copied.
    """
    (batch, heads, dim), (num_pages, pairs, kv_heads, width) = q.shape, pages.shape[1:]
    grouped = q.astype(jnp.float32).reshape(batch, kv_heads, heads // kv_heads, dim) / math.sqrt(dim)
    groups, piece, count = range(heads // kv_heads), width // dim, pairs // 2
    within, along = math.gcd(piece, CHAIN), math.gcd(dim, LANES)  # a chain's tokens in one piece, numbers side by side
    chains = BLOCK_TOKENS // CHAIN * within // piece, dim // along, piece // within, along

    def wanted(index: Array) -> Array:
        first = index * BLOCK_TOKENS + jnp.arange(0, BLOCK_TOKENS, piece)
        page = page_table[:, jnp.minimum(first // (count * piece), page_table.shape[1] - 1)]
        page = layer * num_pages + jnp.where(first[None] < lengths[:, None], page, 0)
        return 2 * (page * count + first[None] // piece % count)

    def scores(index: Array) -> Array:
        keys = as_keys(pages, dim)
        keys = keys.reshape(-1, *keys.shape[3:])
        return jnp.moveaxis(score_groups(grouped, keys, wanted(index)), 1, 3).reshape(*grouped.shape[:3], BLOCK_TOKENS)

    def weighted(index: Array, weights: Array) -> Array:
        parts = jnp.moveaxis(weights.reshape(*weights.shape[:3], chains[0], -1, CHAIN), 3, 1)
        values = as_values(pages, dim).reshape(-1, kv_heads, *chains[1:3], within, along)
        rows = wanted(index).reshape(batch, chains[0], -1) + 1
        return jnp.moveaxis(jnp.stack([weigh(parts[:, :, :, g], values, rows) for g in groups], axis=3), 1, 3)

    sums = attend_blocks(lengths, BLOCK_TOKENS, grouped.shape[1:3], chains, scores, weighted)
    out = summed(chains[0] * chains[2], lambda i: sums[:, :, :, i // chains[2], :, i % chains[2]])
    return out.astype(q.dtype).reshape(q.shape)


CACHE = PagedCache(page_shape, kv_heads, append_rows, fill_pages, paged_attention)
