"""Decode attention over a paged KV cache: a Pallas kernel on TPU, XLA elsewhere.

Pages have the layout [L, num_pages, page_size, 2*K*H]: the lanes of one token row are k0 v0 k1 v1 ..., one pair of
head vectors per kv head. One page is contiguous, and sharding the lanes shards the heads.
"""

import jax
from jaxtyping import Array, Float, Int

from . import tpu, xla
from .xla import append_rows

__all__ = ["append_rows", "paged_attention"]


def paged_attention(
    device: jax.Device,
    q: Float[Array, "B N H"],
    pages: Float[Array, "L P S W"],
    layer: Int[Array, ""],
    lengths: Int[Array, "B"],
    page_table: Int[Array, "B M"],
) -> Float[Array, "B N H"]:
    """Softmax(q k^T / sqrt(H)) v of one query per sequence over its first `lengths` cached tokens.

    Token t of sequence b is row t % S of page page_table[b, t // S]. Entries of page_table past the length, and rows
    past it in the last page, are never used, whatever they hold. A sequence of length 0 gets zeros. `device` is one of
    those the program is for. ValueError when the pages' width does not hold kv heads that the query heads can share.
    """
    heads, dim = q.shape[1:]
    width = pages.shape[3]
    if width % (2 * dim) or heads % (width // (2 * dim)):
        raise ValueError(f"pages of width {width} do not hold kv heads that {heads} query heads of {dim} can share")
    if device.platform == "tpu":
        return tpu.paged_attention(q, pages, layer, lengths, page_table, tpu.read_tuning(device.device_kind))
    size = xla.CPU_BLOCK_TOKENS if device.platform == "cpu" else xla.BLOCK_TOKENS
    return xla.paged_attention(q, pages, layer, lengths, page_table, size)
