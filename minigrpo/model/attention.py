"""Causal attention over whole sequences, for training and prefill."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from minigrpo.model.qwen import Attend
from minigrpo.runtime.mesh import DATA

QUERY_BLOCK = 256
"""Queries scored at a time: bounds the slice of the [T, S] score matrix that ever exists."""

CPU_SCORES = 10 << 20
"""Most bytes of scores in a part of the rows on the CPU: more leave its caches. A row alone may have more."""

HIDDEN = -1e30
"""Added to the score of a masked position."""

TPU_TILE, MOST_BLOCK = 128, 1024

ATTENTION = "attention"
"""The name of attention's results for rematerialisation policies."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows that attention sees, and how tokens stand there that lie on sheets, end to end: a shared one in several.

    S sheets hold M tokens each, and R / S rows of T places belong to each. Without sheets, tokens lie as they stand. A
    token is a key and a value in each of its places, but a query in only one of them.
    """

    segments: Any  # int32 [R, T], the row's sequences from 1 on; 0 is padding
    tokens: Any = None  # int32 [R, T], the token of the sheet that stands there
    first: Any = None  # int32 [S, M], the first place of each token in its sheet's rows, end to end; past them if none
    others: Any = None  # int32 [S, Q, E], the other places of the sheet's first Q tokens; past the rows if none
    query_tokens: Any = None  # int32 [R, A], the tokens that are a row's queries; past the sheet if none
    query_places: Any = None  # int32 [R, A], where in the row they stand
    query_numbers: Any = None  # int32 [S, M], each token's number among its sheet's queries; past them if none


def in_chunks(size: int, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    """[m, ...] arrays -> [chunks, size, ...], the last chunk filled up with zeros."""
    chunks = -(-arrays[0].shape[0] // size)

    def split(x):
        padding = [(0, chunks * size - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, padding).reshape(chunks, size, *x.shape[1:])

    return tuple(split(x) for x in arrays)


def by_kv_head(x: Float[Array, "T N H"], kv_heads: int) -> Float[Array, "K GT H"]:
    """Queries, or what belongs to them, of each key-value head."""
    queries, _, dim = x.shape
    return x.reshape(queries, kv_heads, -1, dim).transpose(1, 2, 0, 3).reshape(kv_heads, -1, dim)


def by_query(x: Float[Array, "K GT H"], queries: int) -> Float[Array, "T N H"]:
    """The inverse of `by_kv_head`."""
    kv_heads, _, dim = x.shape
    return x.reshape(kv_heads, -1, queries, dim).transpose(2, 0, 1, 3).reshape(queries, -1, dim)


def softmax_weights(
    places: Int[Array, "T"],
    q: Float[Array, "K GT H"],
    k: Float[Array, "S K H"],
    segments: Int[Array, "S"] | None,
) -> Float[Array, "K GT S"]:
    """exp(score - the query's highest score), 0 for keys after a query's place or in another segment.

    What hides a score is added to it. XLA on the CPU makes one kernel of products, sums and a softmax, in which no
    score leaves the caches, but not of a choice between two values. The barrier has the mask made here and anew, not
    once for all rows and before all layers.
    """
    places, segments, k = jax.lax.optimization_barrier((places, segments, k))
    visible = jnp.arange(len(k)) <= places[:, None]
    if segments is not None:
        visible &= segments[places][:, None] == segments
    hiding = jnp.tile((1 - visible.astype(jnp.float32)) * HIDDEN, (q.shape[1] // len(places), 1))
    scores = jnp.einsum("KTH,SKH->KTS", q, k, preferred_element_type=jnp.float32) * (1 / math.sqrt(q.shape[2])) + hiding
    return jnp.exp(scores - scores.max(axis=-1, keepdims=True))


def attend_block(
    places: Int[Array, "T"],
    q: Float[Array, "T N H"],
    k: Float[Array, "S K H"],
    v: Float[Array, "S K H"],
    segments: Int[Array, "S"] | None,
) -> Float[Array, "T N H"]:
    """Attention of the queries at `places` to every place not after them, in the same segment."""
    weights = softmax_weights(places, by_kv_head(q, k.shape[1]), k, segments)
    out = jnp.einsum("KTS,SKH->KTH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return by_query((out / weights.sum(axis=-1, keepdims=True)).astype(q.dtype), len(q))


def attend_forward(places, q, k, v, segments):
    out = checkpoint_name(attend_block(places, q, k, v, segments), ATTENTION)
    return out, (places, q, k, v, segments, out)


def attend_backward(saved, cotangent):
    """Gradients from the results; scores are recomputed (arXiv:2205.14135, appendix B.4)."""
    places, q, k, v, segments, out = saved
    q, out, cotangent = (by_kv_head(x, k.shape[1]) for x in (q, out, cotangent))
    product, scale = functools.partial(jnp.einsum, preferred_element_type=jnp.float32), 1 / math.sqrt(q.shape[2])
    weights = softmax_weights(places, q, k, segments)
    weights = weights / weights.sum(axis=-1, keepdims=True)
    mean = (cotangent.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    scores_grad = (weights * (product("KTH,SKH->KTS", cotangent, v) - mean)).astype(q.dtype)
    q_grad = product("KTS,SKH->KTH", scores_grad, k) * scale
    k_grad = product("KTH,KTS->KHS", q, scores_grad) * scale
    v_grad = product("KTH,KTS->KHS", cotangent, weights.astype(q.dtype))
    k_grad, v_grad = (x.transpose(2, 0, 1) for x in (k_grad, v_grad))
    return None, by_query(q_grad.astype(q.dtype), len(places)), k_grad.astype(k.dtype), v_grad.astype(v.dtype), None


attend_with_gradient = jax.custom_vjp(attend_block)
attend_with_gradient.defvjp(attend_forward, attend_backward)


def attend_sequence(
    q: Float[Array, "T N H"],
    k: Float[Array, "S K H"],
    v: Float[Array, "S K H"],
    segments: Int[Array, "S"] | None = None,
    places: Int[Array, "T"] | None = None,
) -> Float[Array, "T N H"]:
    """Softmax(q k^T / sqrt(H)) v under a causal mask, a block of queries at a time, scores recomputed backward.

    Queries stand at `places`, or each at its own.
    """
    places = jnp.arange(len(q)) if places is None else places
    if len(q) <= QUERY_BLOCK:
        return attend_with_gradient(places, q, k, v, segments)
    blocks = in_chunks(QUERY_BLOCK, (places, q))
    out = jax.lax.map(lambda block: attend_with_gradient(*block, k, v, segments), blocks)
    return out.reshape(-1, *q.shape[1:])[: len(q)]


def splash_block(length: int) -> int:
    """Tokens of a block of the TPU kernel: the longest multiple of 128, at most 1,024, that divides `length`."""
    return next(block for block in range(MOST_BLOCK, 0, -TPU_TILE) if length % block == 0)


def splash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"] | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Causal attention by JAX's own TPU kernel, padded at the end to a whole number of tiles.

    `interpret` runs it elsewhere. JAX's kernel is imported here, as other devices do without Pallas.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    length, heads = q.shape[1:3]
    padded = -(-length // TPU_TILE) * TPU_TILE
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((padded, padded))] * heads)
    block = splash_block(padded)
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

    def heads_first(x):
        return jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0))).swapaxes(1, 2)

    scaled = q * jnp.asarray(1 / math.sqrt(q.shape[-1]), q.dtype)
    ids = None if segments is None else jnp.pad(segments, ((0, 0), (0, padded - length)))
    both = None if ids is None else splash_attention_kernel.SegmentIds(ids, ids)
    out = jax.vmap(kernel)(heads_first(scaled), heads_first(k), heads_first(v), both)
    return out.swapaxes(1, 2)[:, :length]


def fused_on_gpu(head_dim: int, itemsize: int) -> bool:
    """Whether cuDNN has an attention for such numbers, on Ampere and newer."""
    return itemsize == 2 and head_dim % 8 == 0 and head_dim <= 128


def cudnn_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Causal attention by cuDNN, of 16-bit numbers, padded at the end to an even length, which its masks need."""
    length, odd = q.shape[1], q.shape[1] % 2
    q, k, v = (jnp.pad(x, ((0, 0), (0, odd), (0, 0), (0, 0))) for x in (q, k, v))
    ids = None if segments is None else jnp.pad(segments, ((0, 0), (0, odd)))
    mask = None if ids is None else ids[:, None, :, None] == ids[:, None, None]
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")
    return checkpoint_name(out[:, :length], ATTENTION)


def causal_attention(
    platform: str,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    segments: Int[Array, "B S"] | None = None,
    places: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Causal attention of every row, within its segments: fused on TPU and GPU; on the CPU in parts of the rows.

    Queries stand at `places`; where it is fused, and without `places`, each at its own.
    """
    if platform == "tpu":
        return splash_attention(q, k, v, segments)
    if platform == "gpu" and fused_on_gpu(q.shape[3], q.dtype.itemsize):
        return cudnn_attention(q, k, v, segments)
    if platform == "cpu":
        return attend_in_parts(q, k, v, segments, places)
    return jax.vmap(attend_sequence)(q, k, v, segments, places)


def rows_together(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"]) -> int:
    """The most rows that divide B and whose scores, of a block of queries, are within CPU_SCORES; at least one."""
    scores = 4 * q.shape[2] * min(q.shape[1], QUERY_BLOCK) * k.shape[1]  # bytes of float32
    most = max(1, CPU_SCORES // scores)
    return max(rows for rows in range(1, min(most, len(q)) + 1) if len(q) % rows == 0)


def attend_in_parts(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    segments: Int[Array, "B S"] | None,
    places: Int[Array, "B T"] | None,
) -> Float[Array, "B T N H"]:
    """`attend_sequence` of `rows_together` at a time, of two such parts in a turn of the loop.

    XLA (YNN, as of jax 0.10) computes a part's products on one core each, so that two parts keep two cores
    busy, with twice CPU_SCORES. Up to three parts are no loop at all, which other work would have to wait for.
    """
    rows = rows_together(q, k)
    parts = jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), (q, k, v, segments, places))
    _, out = jax.lax.scan(lambda _, part: (None, jax.vmap(attend_sequence)(*part)), None, parts, unroll=2)
    return out.reshape(q.shape)


def any_place(platform: str) -> bool:
    """Whether a row's queries may be fewer than its keys, and at any places."""
    return platform == "cpu"


def read(x: Float[Array, "M N H"], places: Int[Array, "*P"]) -> Float[Array, "*P N H"]:
    """Entries of x; 0 past its end."""
    return x.at[places].get(mode="fill", fill_value=0, wrap_negative_indices=False)


@jax.custom_vjp
def to_rows(x: Float[Array, "M N H"], rows: Rows) -> Float[Array, "R T N H"]:
    """One sheet's tokens as they stand in its rows. Backward, what the copies of a token get is read and added up."""
    return x.at[rows.tokens].get(mode="promise_in_bounds", wrap_negative_indices=False)


def to_rows_forward(x, rows):
    return to_rows(x, rows), rows


def to_rows_backward(rows, cotangent):
    flat = cotangent.reshape(-1, *cotangent.shape[2:])
    grads, shared = read(flat, rows.first[0]), rows.others.shape[1]
    copies = read(flat, rows.others[0]).sum(axis=1, dtype=jnp.float32)
    return jnp.concatenate([(grads[:shared] + copies).astype(flat.dtype), grads[shared:]]), None


to_rows.defvjp(to_rows_forward, to_rows_backward)


@jax.custom_vjp
def move(x: Float[Array, "M N H"], places: Int[Array, "*P"], back: Int[Array, "M"]) -> Float[Array, "*P N H"]:
    """x at `places`, 0 past its end. Each entry of x goes to one place, which `back` names, or to none."""
    return read(x, places)


def move_forward(x, places, back):
    return read(x, places), back


def move_backward(back, cotangent):
    return read(cotangent.reshape(-1, *cotangent.shape[-2:]), back), None, None


move.defvjp(move_forward, move_backward)


def sheet_attention(platform: str, q: Array, k: Array, v: Array, rows: Rows) -> Array:
    """Attention of one sheet's tokens, in lines [l, T, ...], every sequence in its row."""
    k_rows, v_rows = (to_rows(x.reshape(-1, *x.shape[2:]), rows) for x in (k, v))
    tokens, numbers = rows.query_tokens, rows.query_numbers[0]
    queries = move(q.reshape(-1, *q.shape[2:]), tokens, numbers)
    out = causal_attention(platform, queries, k_rows, v_rows, rows.segments, rows.query_places)
    return move(out.reshape(-1, *q.shape[2:]), numbers, tokens.reshape(-1)).reshape(q.shape)


def attend_rows(platform: str, q: Array, k: Array, v: Array, rows: Rows | None) -> Array:
    """Attention of one device's tokens: a sequence in each row, or as `rows` says."""
    if rows is not None and rows.tokens is not None:
        return sheet_attention(platform, q, k, v, rows)
    return causal_attention(platform, q, k, v, None if rows is None else rows.segments)


def copying_pays(platform: str) -> bool:
    """Whether copying tokens to rows in every layer costs less than computing again those that are shared.

    On TPU by the compiler's count of cycles it costs more (BUILD_NOTES.md); no TPU has timed it.
    """
    return platform != "tpu"


def on_devices(mesh: Mesh, local: Callable[..., Array], *arguments: Any) -> Array:
    """Each device's own rows by themselves."""
    spec = PartitionSpec(DATA)
    return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(*arguments)


def attend_on(mesh: Mesh, rows: Rows | None = None) -> Attend:
    """Causal attention in the form the model calls: of rows, or of a sheet per device, spread over the mesh."""
    local = functools.partial(attend_rows, mesh.devices.flat[0].platform)

    def attend(layer, q, k, v, carry):
        return on_devices(mesh, local, q, k, v, rows), carry

    return attend


def stand_in_rows(mesh: Mesh, hidden: Float[Array, "l T D"], rows: Rows) -> Float[Array, "R W D"]:
    """Hidden states of sheets' lines as they stand in rows."""
    if rows.tokens is None:
        return hidden

    def local(x, rows):
        return to_rows(x.reshape(-1, 1, x.shape[2]), rows)[:, :, 0]

    return on_devices(mesh, local, hidden, rows)
