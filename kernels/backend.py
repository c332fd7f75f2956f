"""Table of the differences between devices. `backend_for` chooses it once; nothing else asks for a platform."""

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

CausalAttention = Callable[[Array, Array, Array, Array | None], Array]
"""(q [B,T,N,H], k [B,T,K,H], v [B,T,K,H], segment_ids [B,T] or None) -> [B,T,N,H], differentiable."""


@dataclasses.dataclass(frozen=True)
class PagedCache:
    """Page layout of a KV cache, and the functions that write and read it.

    Pages are [L, num_pages, ...]: the trailing dims are one page of one layer, contiguous, in the order that its reader
    wants.
    """

    page_shape: Callable[[int, int, int], tuple[int, ...]]
    """(page_size, kv_heads, head_dim) -> the trailing dims."""
    kv_heads: Callable[[Array, int], int]
    """(pages, head_dim) -> kv heads of that size in a page; 0 if it holds others."""
    append_rows: Callable[..., Array]
    """(pages, layer, page [B], offset [B], k [B,K,H], v [B,K,H]) -> pages with one more token per sequence.

    A page number past the pool writes nothing."""
    fill_pages: Callable[..., Array]
    """(pages, layer, page [B,M], k [B,T,K,H], v [B,T,K,H]) -> pages, T being M whole pages."""
    attend: Callable[..., Array]
    """Like `paged_attention`, for pages known to fit."""
    page_bytes: int = 0
    """Largest page of one layer; 0 is no limit."""
    table_bytes: int = 0
    """Largest page table of all slots; 0 is no limit."""

    def empty_pages(
        self, layers: int, num_pages: int, page_size: int, kv_heads: int, head_dim: int, dtype: Any
    ) -> Float[Array, "L P ..."]:
        """Return zeroed pages."""
        return jnp.zeros((layers, num_pages, *self.page_shape(page_size, kv_heads, head_dim)), dtype)

    def paged_attention(
        self,
        q: Float[Array, "B N H"],
        pages: Float[Array, "L P ..."],
        layer: Int[Array, ""],
        lengths: Int[Array, " B"],
        page_table: Int[Array, "B M"],
    ) -> Float[Array, "B N H"]:
        """Attend with one query per sequence to its first `lengths` cached tokens: softmax(q k^T / sqrt(H)) v.

        Token t of sequence b is token t % page_size of page page_table[b, t // page_size]. Entries of page_table past
        the length, and tokens past it in the last page, may hold anything. A sequence of length 0 gets zeros.
        Raises ValueError when the query heads cannot share the pages' kv heads.
        """
        heads, dim = q.shape[1:]
        kv_heads = self.kv_heads(pages, dim)
        if not kv_heads or heads % kv_heads:
            raise ValueError(f"pages {pages.shape} do not hold kv heads that {heads} query heads of {dim} can share")
        return self.attend(q, pages, layer, lengths, page_table)


@dataclasses.dataclass(frozen=True)
class FusedProjections:
    """Fused kernels for decoding one token per sequence. A None entry uses the plain einsum."""

    gated: Callable[..., Array] | None = None
    """gated(x [B,D], gate, up) -> silu(x gate) * (x up) [B,F]."""
    heads: Callable[..., tuple[Array, Array, Array]] | None = None
    """heads(x [B,D], (q, k, v), (q_norm, k_norm), (cos, sin) [B,H/2], eps) -> rotated q and k, and v [B,heads,H]."""


UNFUSED = FusedProjections()


@dataclasses.dataclass(frozen=True)
class DecodeShape:
    """Sizes that decide which fused kernels a decoding batch can use."""

    rows: int
    hidden_size: int
    intermediate_size: int
    head_dim: int
    qk_norm: bool
    dtype: Any


@dataclasses.dataclass(frozen=True)
class HeadTiles:
    """Tokens and vocabulary entries per device that the LM head handles at a time. Sizes change no number.

    The defaults were counted best for v6e (`bench/logprob_memory.py --topology`): the gradient of the head is read and
    written once per chunk of backward rows, so these are as many as fit without a higher peak of scratch.
    """

    rows: int = 2048
    vocab: int = 4096
    backward_rows: int = 2048


@dataclasses.dataclass(frozen=True)
class Backend:
    """Everything that a device does differently."""

    causal_attention: CausalAttention
    """Attention of training and prefill."""
    paged_cache: Callable[[int, int, Any], PagedCache]
    """(page_size, head_dim, dtype) -> the cache of decoding."""
    fused_projections: Callable[[DecodeShape], FusedProjections] = lambda shape: UNFUSED
    head_tiles: HeadTiles = HeadTiles()
    unroll_layers: bool = True
    """Decode with unrolled layers over unstacked weights: off TPU a scan would copy each layer's."""
    least_batch: int = 4
    """The decoding batch shrinks to no fewer slots, as each size is compiled."""
    micro_batch_tokens: int = 8192
    """Tokens per device that make a micro-batch large enough to keep the device busy."""
    share_prefixes: bool = True
    """Computing a group's prompt once costs less than computing it in every row."""
    compiler_options: tuple[tuple[str, Hashable], ...] = ()
    """XLA options of the rollout program."""


def backend_for(device: jax.Device) -> Backend:
    """Return the table for a device: `kernels.PLATFORM.backend(device)`, or plain XLA where there is no such file."""
    return _backend(device.platform, device.device_kind, str(getattr(device, "compute_capability", "")))


@functools.cache
def _backend(platform: str, device_kind: str, compute_capability: str) -> Backend:
    own_file = importlib.util.find_spec(f"{__package__}.{platform}")
    module = importlib.import_module(f"{__package__}.{platform if own_file else 'xla'}")
    backend: Backend = module.backend(device_kind, compute_capability)
    return backend
