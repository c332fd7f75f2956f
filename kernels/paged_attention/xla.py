"""Paged attention and cache append in plain XLA: the path of CPU and GPU."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCK_TOKENS, CPU_BLOCK_TOKENS = 128, 64
"""Context tokens read per loop turn, in pieces that divide this and the page. Independent of the page size, so that
results do not depend on it."""


def append_rows(
    pages: Float[Array, "L P S W"],
    layer: Int[Array, ""],
    page: Int[Array, "B"],
    offset: Int[Array, "B"],
    k: Float[Array, "B K H"],
    v: Float[Array, "B K H"],
) -> Float[Array, "L P S W"]:
    """Writes one token row per sequence at pages[layer, page, offset]; a page >= P writes nothing."""
    rows = jnp.stack([k, v], axis=2).reshape(k.shape[0], -1).astype(pages.dtype)
    return pages.at[layer, page, offset].set(rows, mode="drop")


def paged_attention(
    q: Float[Array, "B N H"],
    pages: Float[Array, "L P S W"],
    layer: Int[Array, ""],
    lengths: Int[Array, "B"],
    page_table: Int[Array, "B M"],
    size: int = BLOCK_TOKENS,
) -> Float[Array, "B N H"]:
    """As the package's `paged_attention`, in blocks of `size` tokens."""
    batch, heads, dim = q.shape
    layers, _, page_size, width = pages.shape
    kv_heads = width // (2 * dim)
    grouped = q.astype(jnp.float32).reshape(batch, kv_heads, heads // kv_heads, dim) / math.sqrt(dim)
    piece = math.gcd(page_size, size)
    pieces = pages.reshape(layers, -1, piece, width)

    def block(index, state):
        peak, total, acc = state
        first = index * size + jnp.arange(0, size, piece)
        entries = jnp.minimum(first // page_size, page_table.shape[1] - 1)
        wanted = page_table[:, entries] * (page_size // piece) + first % page_size // piece
        wanted = jnp.where(first < lengths[:, None], wanted, 0)
        rows = pieces[layer, wanted].reshape(batch, size, kv_heads, 2, dim)
        valid = index * size + jnp.arange(size) < lengths[:, None]
        scores = jnp.einsum("BSKH,BKGH->BKSG", rows[:, :, :, 0].astype(jnp.float32), grouped)
        scores = jnp.where(valid[:, None, None], scores.swapaxes(2, 3), -jnp.inf)
        new_peak = jnp.maximum(peak, scores.max(axis=-1))
        weights = jnp.exp(scores - new_peak[..., None])
        rescale = jnp.exp(peak - new_peak)
        values = jnp.where(valid[:, :, None, None], rows[:, :, :, 1], 0)
        update = jnp.einsum("BKGS,BSKH->BKGH", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return new_peak, total * rescale + weights.sum(axis=-1), acc * rescale[..., None] + update

    lead = grouped.shape[:3]
    lowest = jnp.full(lead, jnp.finfo(jnp.float32).min)
    state = (lowest, jnp.zeros(lead, jnp.float32), jnp.zeros(grouped.shape, jnp.float32))
    blocks = (jnp.max(lengths) + size - 1) // size
    _, total, acc = jax.lax.fori_loop(0, blocks, block, state)
    return (acc / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]).astype(q.dtype).reshape(q.shape)
