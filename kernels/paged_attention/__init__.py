"""Decode attention over a paged KV cache: a Pallas kernel each on TPU and on Hopper GPUs, XLA elsewhere.

On TPU a page is [page_size, 2*K*H], the lanes of one token row being k0 v0 k1 v1 ..., one pair of head vectors per kv
head, so that sharding the lanes shards the heads. For Hopper it is [2, K, page_size, H]. Elsewhere it is pieces of
[2, K, ...], keys before values, see `xla`, and `cpu` for the small heads that the CPU reads in place.
"""
