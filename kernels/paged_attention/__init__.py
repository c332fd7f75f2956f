"""Decode attention over a paged KV cache.

Pages have the layout [L, num_pages, page_size, 2*K*H]: the lanes of one token row are k0 v0 k1 v1 ..., one pair of
head vectors per kv head. One page is contiguous, and sharding the lanes shards the heads.
"""

from .xla import append_rows, paged_attention

__all__ = ["append_rows", "paged_attention"]
