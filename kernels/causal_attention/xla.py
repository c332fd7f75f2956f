"""Causal attention in plain XLA: a block of queries at a time, scores recomputed in the backward pass."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from . import ATTENTION

QUERY_BLOCK = 256
"""Queries scored at a time: bounds the slice of the [T, S] score matrix that ever exists."""

SCORE_BYTES = 16 << 20
"""Scores of the rows that are computed together; a single row may have more."""

MASKED_SCORE = -1e30
"""Added to the score of a masked position."""

Saved = tuple[Array, Array, Array, Array, Array | None, Array]
"""Positions, q, k, v, segments and result of `attend_block`, for the backward pass."""


def by_kv_head(x: Float[Array, "T N H"], kv_heads: int) -> Float[Array, "K GT H"]:
    """Group queries, or anything that belongs to them, by their key-value head."""
    queries, _, dim = x.shape
    return x.reshape(queries, kv_heads, -1, dim).transpose(1, 2, 0, 3).reshape(kv_heads, -1, dim)


def by_query(x: Float[Array, "K GT H"], queries: int) -> Float[Array, "T N H"]:
    """Invert `by_kv_head`."""
    kv_heads, _, dim = x.shape
    return x.reshape(kv_heads, -1, queries, dim).transpose(2, 0, 1, 3).reshape(queries, -1, dim)


def softmax_weights(
    positions: Int[Array, " T"],
    q: Float[Array, "K GT H"],
    k: Float[Array, "S K H"],
    segments: Int[Array, " S"] | None,
) -> Float[Array, "K GT S"]:
    """Return exp(score - the query's highest score), 0 for later keys and other segments.

    Masked scores get a large negative number added: XLA on the CPU then fuses matmul, sum and softmax into one kernel,
    which it does not do for a choice between two values. The barrier keeps the mask from being built once for all rows
    before all layers.
    """
    positions, segments, k = jax.lax.optimization_barrier((positions, segments, k))
    visible = jnp.arange(len(k))[None] <= positions[:, None]
    if segments is not None:
        visible &= segments[positions][:, None] == segments[None]
    mask = jnp.tile((1 - visible.astype(jnp.float32)) * MASKED_SCORE, (q.shape[1] // len(positions), 1))
    scores = jnp.einsum("KTH,SKH->KTS", q, k, preferred_element_type=jnp.float32) * (1 / math.sqrt(q.shape[2]))
    scores += mask[None]
    return jnp.exp(scores - scores.max(axis=-1, keepdims=True))


def attend_block(
    positions: Int[Array, " T"],
    q: Float[Array, "T N H"],
    k: Float[Array, "S K H"],
    v: Float[Array, "S K H"],
    segments: Int[Array, " S"] | None,
) -> Float[Array, "T N H"]:
    """Attend from the queries at `positions` to the keys up to them, in the same segment."""
    weights = softmax_weights(positions, by_kv_head(q, k.shape[1]), k, segments)
    out = jnp.einsum("KTS,SKH->KTH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return by_query((out / weights.sum(axis=-1, keepdims=True)).astype(q.dtype), len(q))


def attend_forward(positions: Array, q: Array, k: Array, v: Array, segments: Array | None) -> tuple[Array, Saved]:
    """Attend as `attend_block` -> its result, and everything that the backward pass needs."""
    out = checkpoint_name(attend_block(positions, q, k, v, segments), ATTENTION)
    return out, (positions, q, k, v, segments, out)


def attend_backward(saved: Saved, cotangent: Array) -> tuple[None, Array, Array, Array, None]:
    """Compute gradients from the results; scores are recomputed (arXiv:2205.14135, appendix B.4)."""
    positions, q, k, v, segments, out = saved
    q, out, cotangent = (by_kv_head(x, k.shape[1]) for x in (q, out, cotangent))
    matmul, scale = functools.partial(jnp.einsum, preferred_element_type=jnp.float32), 1 / math.sqrt(q.shape[2])
    weights = softmax_weights(positions, q, k, segments)
    weights = weights / weights.sum(axis=-1, keepdims=True)
    mean = (cotangent.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    scores_grad = (weights * (matmul("KTH,SKH->KTS", cotangent, v) - mean)).astype(q.dtype)
    q_grad = matmul("KTS,SKH->KTH", scores_grad, k) * scale
    k_grad = matmul("KTH,KTS->KHS", q, scores_grad) * scale
    v_grad = matmul("KTH,KTS->KHS", cotangent, weights.astype(q.dtype))
    k_grad, v_grad = (x.transpose(2, 0, 1) for x in (k_grad, v_grad))
    return None, by_query(q_grad.astype(q.dtype), len(positions)), k_grad.astype(k.dtype), v_grad.astype(v.dtype), None


attend_with_gradient = jax.custom_vjp(attend_block)
attend_with_gradient.defvjp(attend_forward, attend_backward)


def attend_sequence(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    segments: Int[Array, " T"] | None = None,
) -> Float[Array, "T N H"]:
    """Compute softmax(q k^T / sqrt(H)) v of one row under a causal mask, a block of queries at a time."""
    length = len(q)
    if length <= QUERY_BLOCK:
        return attend_with_gradient(jnp.arange(length), q, k, v, segments)
    blocks = -(-length // QUERY_BLOCK)
    padded = jnp.pad(q, ((0, blocks * QUERY_BLOCK - length), (0, 0), (0, 0)))
    positions = jnp.arange(len(padded)).reshape(blocks, -1)
    out = jax.lax.map(
        lambda block: attend_with_gradient(*block, k, v, segments),
        (positions, padded.reshape(blocks, -1, *q.shape[1:])),
    )
    return out.reshape(-1, *q.shape[1:])[:length]


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Attend causally in every row, within its segments; few rows at a time, as their scores are in memory."""
    row_bytes = 4 * q.shape[2] * min(q.shape[1], QUERY_BLOCK) * q.shape[1]
    together = max(1, min(len(q), SCORE_BYTES // row_bytes))
    if together == len(q):
        return jax.vmap(attend_sequence)(q, k, v, segments)
    return jax.lax.map(lambda row: attend_sequence(*row), (q, k, v, segments), batch_size=together)
