"""Decode attention over a paged KV cache: a Pallas kernel each on TPU and on Hopper GPUs, XLA elsewhere.

Pages are [L, num_pages, ...]: what comes after is one page of one layer, contiguous, laid out as its reader likes it.
On TPU it is [page_size, 2*K*H], the lanes of one token row being k0 v0 k1 v1 ..., one pair of head vectors per kv head,
so that sharding the lanes shards the heads; for Hopper it is [2, K, page_size, H]; elsewhere it is pieces of
[2, K, ...], keys before values, see `xla` and, for the small heads that the CPU reads in place, `cpu`.
"""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from . import cpu, xla

__all__ = ["append_rows", "empty_pages", "fill_pages", "paged_attention"]


HOPPER_RANK = 6
"""Dims of pages laid out for the Hopper kernel, [L, P, 2, K, S, H], which tell them from others."""


def hopper() -> ModuleType:
    """The Hopper kernel; imported where it is used, as what it is made of takes a quarter of a second to load."""
    from . import gpu

    return gpu


def mosaic() -> ModuleType:
    """The TPU kernel; imported where it is used, as other devices do without Pallas."""
    from . import tpu

    return tpu


def path(device: jax.Device, head_dim: int, pages: Float[Array, "L P ..."]) -> ModuleType:
    """What reads and writes these pages of heads of this size on a device."""
    return hopper() if pages.ndim == HOPPER_RANK else plain_path(device, head_dim)


def plain_path(device: jax.Device, head_dim: int) -> ModuleType:
    """What reads and writes pages that are not laid out for the Hopper kernel."""
    if device.platform == "cpu" and head_dim <= cpu.MOST_HEAD_DIM:
        return cpu
    return mosaic() if device.platform == "tpu" else xla


def empty_pages(
    device: jax.Device, layers: int, num_pages: int, page_size: int, kv_heads: int, head_dim: int, dtype: Any
) -> Float[Array, "L P ..."]:
    """Zeroed pages of a device that the program is for."""
    on_hopper = device.platform == "gpu" and hopper().reads(device, page_size, head_dim, dtype)
    own = hopper() if on_hopper else plain_path(device, head_dim)
    return jnp.zeros((layers, num_pages, *own.page_shape(page_size, kv_heads, head_dim)), dtype)


def append_rows(
    device: jax.Device,
    pages: Float[Array, "L P ..."],
    layer: Int[Array, ""],
    page: Int[Array, "B"],
    offset: Int[Array, "B"],
    k: Float[Array, "B K H"],
    v: Float[Array, "B K H"],
) -> Float[Array, "L P ..."]:
    """Writes one token per sequence at `offset` of `page`; a page >= P writes nothing."""
    return path(device, k.shape[2], pages).append_rows(pages, layer, page, offset, k, v)


def fill_pages(
    device: jax.Device,
    pages: Float[Array, "L P ..."],
    layer: Int[Array, ""],
    page: Int[Array, "B M"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
) -> Float[Array, "L P ..."]:
    """Writes whole pages, T being M times the page size; a page >= P writes nothing."""
    return path(device, k.shape[3], pages).fill_pages(pages, layer, page, k, v)


def paged_attention(
    device: jax.Device,
    q: Float[Array, "B N H"],
    pages: Float[Array, "L P ..."],
    layer: Int[Array, ""],
    lengths: Int[Array, "B"],
    page_table: Int[Array, "B M"],
) -> Float[Array, "B N H"]:
    """Softmax(q k^T / sqrt(H)) v of one query per sequence over its first `lengths` cached tokens.

    Token t of sequence b is token t % page_size of page page_table[b, t // page_size]. Entries of page_table past the
    length, and tokens past it in the last page, are never used, whatever they hold. A sequence of length 0 gets zeros.
    ValueError when the pages do not hold kv heads that the query heads can share.
    """
    heads, dim = q.shape[1:]
    own = path(device, dim, pages)
    kv_heads = own.kv_heads(pages, dim)
    if not kv_heads or heads % kv_heads:
        raise ValueError(f"pages {pages.shape} do not hold kv heads that {heads} query heads of {dim} can share")
    return own.paged_attention(device, q, pages, layer, lengths, page_table)
