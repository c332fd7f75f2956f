"""Causal attention over whole sequences, for training and prefill."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from minigrpo.model import Attend
from minigrpo.sharding import DATA

QUERY_BLOCK = 256
"""Queries scored at a time: bounds the slice of the [T, S] score matrix that ever exists."""

HIDDEN = -1e30
"""Score of a masked position."""


def attend_block(q: Float[Array, "T N H"], k: Float[Array, "S K H"], v: Float[Array, "S K H"]) -> Float[Array, "T N H"]:
    """Attention of the last T of S positions to every position not after them."""
    queries, heads, dim = q.shape
    keys, kv_heads = k.shape[:2]
    grouped = q.reshape(queries, kv_heads, -1, dim).transpose(1, 2, 0, 3).reshape(kv_heads, -1, dim)
    scores = jnp.einsum("KTH,SKH->KTS", grouped, k, preferred_element_type=jnp.float32) / math.sqrt(dim)
    visible = jnp.arange(keys) <= jnp.arange(keys - queries, keys)[:, None]
    scores = jnp.where(jnp.tile(visible, (heads // kv_heads, 1)), scores, HIDDEN)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    out = jnp.einsum("KTS,SKH->KTH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    out = out / weights.sum(axis=-1, keepdims=True)
    return out.astype(q.dtype).reshape(kv_heads, -1, queries, dim).transpose(2, 0, 1, 3).reshape(q.shape)


def attend_sequence(
    q: Float[Array, "T N H"], k: Float[Array, "T K H"], v: Float[Array, "T K H"]
) -> Float[Array, "T N H"]:
    """Softmax(q k^T / sqrt(H)) v under a causal mask, a block of queries at a time, scores recomputed backward."""
    block = jax.checkpoint(attend_block)
    ends = [min(start + QUERY_BLOCK, len(q)) for start in range(0, len(q), QUERY_BLOCK)]
    starts = range(0, len(q), QUERY_BLOCK)
    return jnp.concatenate([block(q[start:end], k[:end], v[:end]) for start, end in zip(starts, ends, strict=True)])


def causal_attention(
    platform: str, q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]
) -> Float[Array, "B T N H"]:
    """`attend_sequence` of every sequence: all at once, or on the CPU, where that is faster, one by one."""
    if platform == "cpu":
        return jax.lax.map(lambda qkv: attend_sequence(*qkv), (q, k, v))
    return jax.vmap(attend_sequence)(q, k, v)


def attend_on(mesh: Mesh) -> Attend:
    """Causal attention of sequences spread over the mesh, in the form the model calls."""
    platform = mesh.devices.flat[0].platform
    rows = PartitionSpec(DATA)

    def attend(layer, q, k, v, carry):
        def local(q, k, v):
            return causal_attention(platform, q, k, v)

        return jax.shard_map(local, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)(q, k, v), carry

    return attend
