"""Causal attention on TPU by JAX's splash attention kernel."""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jaxtyping import Array, Float, Int

from . import ATTENTION

TPU_TILE, MOST_BLOCK = 128, 1024


def block_tokens(length: int) -> int:
    """Return the kernel's block in tokens: the longest multiple of 128, at most 1,024, that divides `length`."""
    return next(block for block in range(MOST_BLOCK, 0, -TPU_TILE) if length % block == 0)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"] | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Attend causally in every row, padded at the end to whole tiles. `interpret` runs the kernel elsewhere."""
    length, heads = q.shape[1:3]
    padded = -(-length // TPU_TILE) * TPU_TILE
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((padded, padded))] * heads)
    block = block_tokens(padded)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,
    )
    kernel = splash_attention_kernel.make_splash_mha(
        mask=mask,
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTENTION,
        interpret=interpret,
    )

    def heads_first(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0))).swapaxes(1, 2)

    scaled = q * jnp.asarray(1 / math.sqrt(q.shape[-1]), q.dtype)
    ids = None if segments is None else jnp.pad(segments, ((0, 0), (0, padded - length)))
    both = None if ids is None else splash_attention_kernel.SegmentIds(ids, ids)
    out = jax.vmap(kernel)(heads_first(scaled), heads_first(k), heads_first(v), both)
    return out.swapaxes(1, 2)[:, :length]
