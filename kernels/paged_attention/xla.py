"""Paged attention in plain XLA, for devices and head sizes without a kernel.

A page is cut into pieces of at most PIECE_TOKENS tokens; in a piece a head's keys are [H, S] and its values [S, H], as
the two matmuls read them, S being the piece's tokens. So a page is [R, K, W]: R the keys and values of every piece, W
the H*S numbers of a head.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..backend import PagedCache

PIECE_TOKENS = 64
"""A piece has the most tokens that divide this and the page."""

BLOCK_TOKENS = 128
"""Context tokens read per loop turn. Independent of the page size, so that results do not depend on it."""


def page_shape(page_size: int, kv_heads: int, head_dim: int) -> tuple[int, ...]:
    """Return [keys and values of every piece, K, H*S]."""
    piece = math.gcd(page_size, PIECE_TOKENS)
    return 2 * page_size // piece, kv_heads, piece * head_dim


def kv_heads(pages: Float[Array, "L P R K W"], head_dim: int) -> int:
    """Return the number of heads of this size in the pages; 0 if no piece of these pages has such heads."""
    piece, rest = divmod(pages.shape[4], head_dim)
    return 0 if rest or PIECE_TOKENS % piece else pages.shape[3]


def append_rows(
    pages: Float[Array, "L P R K W"],
    layer: Int[Array, ""],
    page: Int[Array, " B"],
    offset: Int[Array, " B"],
    k: Float[Array, "B K H"],
    v: Float[Array, "B K H"],
) -> Float[Array, "L P R K W"]:
    """Append a token per sequence; see `PagedCache.append_rows`."""
    layers, _, pairs, heads, width = pages.shape
    dim = k.shape[2]
    piece, token = page * (pairs // 2) + offset // (width // dim), offset % (width // dim)
    keys = pages.reshape(layers, -1, 2, heads, dim, width // dim)
    keys = keys.at[layer, piece, 0, :, :, token].set(k.astype(pages.dtype), mode="drop")
    values = keys.reshape(layers, -1, 2, heads, width // dim, dim)
    return values.at[layer, piece, 1, :, token].set(v.astype(pages.dtype), mode="drop").reshape(pages.shape)


def fill_pages(
    pages: Float[Array, "L P R K W"],
    layer: Int[Array, ""],
    page: Int[Array, "B M"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
) -> Float[Array, "L P R K W"]:
    """Write whole pages; see `PagedCache.fill_pages`."""
    lead = (*page.shape, pages.shape[2] // 2)
    keys, values = (x.reshape(*lead, -1, *x.shape[2:]).astype(pages.dtype) for x in (k, v))
    laid_out = jnp.einsum("BMCSKH->BMCKHS", keys), jnp.einsum("BMCSKH->BMCKSH", values)
    pairs = jnp.stack([x.reshape(*lead, *pages.shape[3:]) for x in laid_out], axis=3)
    return pages.at[layer, page].set(pairs.reshape(*page.shape, *pages.shape[2:]), mode="drop")


def inside(index: Int[Array, ""], size: int, lengths: Int[Array, " B"]) -> Bool[Array, "B S"]:
    """Mark the tokens of a block of `size` that a sequence has."""
    return index * size + jnp.arange(size)[None] < lengths[:, None]


def attend_blocks(
    lengths: Int[Array, " B"],
    size: int,
    heads: tuple[int, ...],
    dims: tuple[int, ...],
    scores: Callable[[Array], Array],
    weighted: Callable[[Array, Array], Array],
) -> Float[Array, "B K G ..."]:
    """Average values by the softmax of scores, `size` context tokens at a time (arXiv:1805.02867); `heads` are K, G.

    scores(index) returns a block's scores, [B, K, G, size]; weighted(index, weights [B, K, G, size]) returns the sums
    of its values, [B, K, G, *dims], where a weight of 0 adds nothing. A sequence of length 0 gets zeros.
    """
    lead, ones = (len(lengths), *heads), (1,) * len(dims)

    def block(index: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        peak, total, acc = state
        here = jnp.where(inside(index, size, lengths)[:, None, None], scores(index), -jnp.inf)
        new_peak = jnp.maximum(peak, here.max(axis=-1))
        weights, rescale = jnp.exp(here - new_peak[..., None]), jnp.exp(peak - new_peak)
        acc = acc * rescale.reshape(*lead, *ones) + weighted(index, weights)
        return new_peak, total * rescale + weights.sum(axis=-1), acc

    lowest = jnp.full(lead, jnp.finfo(jnp.float32).min)
    state = (lowest, jnp.zeros(lead, jnp.float32), jnp.zeros((*lead, *dims), jnp.float32))
    blocks = (jnp.max(lengths) + size - 1) // size
    _, total, acc = jax.lax.fori_loop(0, blocks, block, state)
    return acc / jnp.maximum(total, jnp.finfo(jnp.float32).tiny).reshape(*lead, *ones)


def paged_attention(
    q: Float[Array, "B N H"],
    pages: Float[Array, "L P R K W"],
    layer: Int[Array, ""],
    lengths: Int[Array, " B"],
    page_table: Int[Array, "B M"],
) -> Float[Array, "B N H"]:
    """Attend to cached tokens; see `PagedCache.paged_attention`."""
    (batch, heads, dim), (layers, _, pairs, kv_heads, width) = q.shape, pages.shape
    grouped = q.astype(jnp.float32).reshape(batch, kv_heads, heads // kv_heads, dim) / math.sqrt(dim)
    piece, count, size = width // dim, pairs // 2, BLOCK_TOKENS
    pieces = pages.reshape(layers, -1, 2, kv_heads, width)

    def wanted(index: Array) -> Array:
        first = index * size + jnp.arange(0, size, piece)
        entry = jnp.minimum(first // (count * piece), page_table.shape[1] - 1)
        within = first[None] // piece % count
        return jnp.where(first[None] < lengths[:, None], page_table[:, entry] * count + within, 0)

    def scores(index: Array) -> Array:
        keys = pieces[layer, wanted(index), 0].reshape(batch, -1, kv_heads, dim, piece)
        keys = jnp.moveaxis(keys, 1, 3).reshape(batch, kv_heads, dim, size)
        return jnp.einsum("BKGH,BKHS->BKGS", grouped, keys.astype(jnp.float32))

    def weighted(index: Array, weights: Array) -> Array:
        values = pieces[layer, wanted(index), 1].reshape(batch, -1, kv_heads, piece, dim)
        values = values.swapaxes(1, 2).reshape(batch, kv_heads, size, dim)
        values = jnp.where(inside(index, size, lengths)[:, None, :, None], values, 0)
        return jnp.einsum("BKGS,BKSH->BKGH", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)

    out = attend_blocks(lengths, size, grouped.shape[1:3], (dim,), scores, weighted)
    return out.astype(q.dtype).reshape(q.shape)


CACHE = PagedCache(page_shape, kv_heads, append_rows, fill_pages, paged_attention)
