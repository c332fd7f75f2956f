"""Per-token log-probs and entropy from hidden states, chunked over the vocabulary, the head sharded over `tp`.

The full [rows, V] logits never exist, forward or backward. Forward, rows and vocabulary are both tiled and the softmax
is accumulated online. Backward, the probabilities are recomputed for some rows at a time, because tiling the vocabulary
there would re-read and re-write the rows' gradient for each tile.

Under truncated sampling the softmax is that of the kept tokens: those that reach the row's cut-off, a log-prob under
the whole softmax. So the forward pass goes over the vocabulary twice: once for the whole total, once for the kept one.
A limit relative to the target's logit would need one pass, but then each token of a position would have another
distribution as soon as the policy is not the one that sampled, and the reference never is.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from minigrpo.kernels.backend import HeadTiles
from minigrpo.runtime.mesh import FSDP, SLICE, TP, data_spec

LOWEST = -1e30
"""Replaces -inf where a difference of two of them must not become NaN."""


@dataclasses.dataclass(frozen=True)
class LMHead:
    """Everything static that turns hidden states into log-probs."""

    mesh: Mesh
    num_tokens: int
    """Real tokens; head rows past them are padding and never have probability."""
    temperature: float
    tiles: HeadTiles


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def token_logprobs(
    head: LMHead,
    hidden: Float[Array, "M D"],
    weights: Float[Array, "V D"],
    targets: Int[Array, " M"],
    cutoffs: Float[Array, " M"] | None = None,
) -> tuple[Float[Array, " M"], Float[Array, " M"]]:
    """Compute log softmax(hidden @ weights^T / temperature) at `targets`, and the softmax's entropy in nats.

    With `cutoffs`, log-probs under that softmax, both are of its kept tokens alone, renormalised: the target and all
    that reach the row's cut-off. Which these are is a constant to the gradient. M must be a multiple of the mesh's
    devices. The entropy is for reading only: no gradient flows through it.
    """
    return forward(head, hidden, weights, targets, cutoffs)[0]


Saved = tuple[Array, Array, Array, Array, Array | None]
"""Hidden states, weights, targets, log of the softmax's total, and the least kept logits or None."""


def forward(
    head: LMHead, hidden: Array, weights: Array, targets: Array, cutoffs: Array | None
) -> tuple[tuple[Array, Array], Saved]:
    """Compute `token_logprobs` -> its results, and everything that the backward pass needs."""
    rows, split = data_spec(head.mesh), PartitionSpec(TP)
    run = jax.shard_map(
        functools.partial(local_forward, head),
        mesh=head.mesh,
        in_specs=(rows, split, rows, rows),
        out_specs=(rows, rows, rows, rows),
        check_vma=False,
    )
    logprobs, entropy, log_total, floors = run(hidden, weights.astype(hidden.dtype), targets, cutoffs)
    return (logprobs, entropy), (hidden, weights, targets, log_total, floors)


def backward(head: LMHead, saved: Saved, cotangents: tuple[Array, Array]) -> tuple[Array, Array, None, None]:
    """Compute gradients of hidden states and weights for the cotangents of the log-probs."""
    hidden, weights, targets, log_total, floors = saved
    rows = data_spec(head.mesh)
    run = jax.shard_map(
        functools.partial(local_backward, head),
        mesh=head.mesh,
        in_specs=(rows, PartitionSpec(TP), rows, rows, rows, rows),
        out_specs=(rows, PartitionSpec(TP, FSDP)),
        check_vma=False,
    )
    hidden_grad, weights_grad = run(hidden, weights.astype(hidden.dtype), targets, log_total, cotangents[0], floors)
    return hidden_grad, weights_grad.astype(weights.dtype), None, None


token_logprobs.defvjp(forward, backward)


Rows = tuple[Array | None, ...]
"""Arrays with an entry per row; None for one that is not needed."""


def in_chunks(size: int, arrays: tuple[Array, *Rows]) -> Rows:
    """Split [m, ...] arrays into [chunks, size, ...], the last chunk filled up with zeros."""
    chunks = -(-arrays[0].shape[0] // size)

    def split(x: Array) -> Array:
        padding = [(0, chunks * size - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, padding).reshape(chunks, size, *x.shape[1:])

    chunked: Rows = jax.tree.map(split, arrays)
    return chunked


def across_tp(x: Array) -> Array:
    """Gather the rows of all `tp` peers, if there are any: each of them holds another part of the vocabulary."""
    return x if jax.lax.axis_size(TP) == 1 else jax.lax.all_gather(x, TP, tiled=True)


def own_rows(x: Array, size: int) -> Array:
    """Take this device's rows from those of all `tp` peers."""
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(TP) * size, size)


def sum_and_split(x: Array, axis: str, dim: int) -> Array:
    """Sum over a mesh axis; every device keeps its part of `dim`."""
    single = jax.lax.axis_size(axis) == 1
    return x if single else jax.lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True)


def scaled_logits(head: LMHead, hidden: Array, weights: Array, entries: Array, least: Array | int = 0) -> Array:
    """Compute logits / temperature of these vocabulary entries in float32; LOWEST below `least` and past the tokens."""
    logits = jnp.einsum("MD,VD->MV", hidden, weights, preferred_element_type=jnp.float32) / head.temperature
    return logits + jnp.where((entries >= least) & (entries < head.num_tokens), 0, LOWEST)


def drop_below(floors: Array | None, logits: Array, entries: Array, targets: Array) -> Array:
    """Set logits of these vocabulary entries that are under their row's floor to LOWEST, but never the target's."""
    if floors is None:
        return logits
    return jnp.where((logits >= floors[:, None]) | (targets[:, None] == entries), logits, LOWEST)


def target_logits(head: LMHead, hidden: Array, weights: Array, targets: Array, first: Array) -> Array:
    """Compute each row's logit / temperature at its target; 0 for one that another device holds."""
    own = weights[jnp.clip(targets - first, 0, weights.shape[0] - 1)]
    logits = jnp.einsum("MD,MD->M", hidden, own, preferred_element_type=jnp.float32) / head.temperature
    return jnp.where((targets >= first) & (targets < first + weights.shape[0]), logits, 0)


TargetValues = tuple[Array, Array, Array, Array | None]
"""Log-probs, entropy, log of the softmax's total and, with cut-offs, the least kept logit, of every row."""


def local_forward(head: LMHead, hidden: Array, weights: Array, targets: Array, cutoffs: Array | None) -> TargetValues:
    """Compute the values of one device's rows from its part of the vocabulary."""
    size = min(head.tiles.rows, hidden.shape[0])
    first = jax.lax.axis_index(TP) * weights.shape[0]

    def chunk(rows: Rows) -> TargetValues:
        hidden, targets, cutoffs = jax.tree.map(across_tp, rows)
        reduce = functools.partial(softmax_totals, head, hidden, weights, first, targets)
        log_total, total, weighted = reduce(None)
        floors = None if cutoffs is None else log_total + cutoffs
        if floors is not None:
            log_total, total, weighted = reduce(floors)
        logprobs = jax.lax.psum(target_logits(head, hidden, weights, targets, first), TP) - log_total
        outs = logprobs, jnp.log(total) - weighted / total, log_total, floors
        own: TargetValues = jax.tree.map(lambda out: own_rows(out, size), outs)
        return own

    outs = jax.lax.map(chunk, in_chunks(size, (hidden, targets, cutoffs)))
    values: TargetValues = jax.tree.map(lambda out: out.reshape(-1)[: hidden.shape[0]], outs)
    return values


def softmax_totals(
    head: LMHead, hidden: Array, weights: Array, first: Array, targets: Array, floors: Array | None
) -> tuple[Array, Array, Array]:
    """Reduce each row over the whole vocabulary -> log of the total, and the two sums of `shift` from its peak."""
    peak, total, weighted = softmax_stats(head, hidden, weights, first, targets, floors)
    top = jax.lax.pmax(peak, TP)
    total, weighted = jax.lax.psum(shift(peak, top, total, weighted), TP)
    return top + jnp.log(total), total, weighted


def shift(peak: Array, to: Array, total: Array, weighted: Array) -> tuple[Array, Array]:
    """Rescale the sums of e and of e * x, with x = logit - peak and e = exp(x), to the higher peak `to`."""
    rescale = jnp.exp(peak - to)
    return total * rescale, (weighted + (peak - to) * total) * rescale


def softmax_stats(
    head: LMHead, hidden: Array, weights: Array, first: Array, targets: Array, floors: Array | None
) -> tuple[Array, Array, Array]:
    """Reduce each row over this device's vocabulary, from `first` on, to its peak logit and two sums.

    These are the sums of exp(x) and of x * exp(x), with x = logit - peak.
    """
    vocab = weights.shape[0]
    size = min(head.tiles.vocab, vocab)

    def tile(index: Array, stats: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        peak, total, weighted = stats
        start = jnp.minimum(index * size, vocab - size)
        part = jax.lax.dynamic_slice_in_dim(weights, start, size)
        entries = (first + start + jnp.arange(size))[None]
        logits = scaled_logits(head, hidden, part, entries, first + index * size)
        logits = drop_below(floors, logits, entries, targets)
        new_peak = jnp.maximum(peak, logits.max(axis=-1))
        below = logits - new_peak[:, None]
        exps = jnp.exp(below)
        total, weighted = shift(peak, new_peak, total, weighted)
        return new_peak, total + exps.sum(axis=-1), weighted + (exps * below).sum(axis=-1)

    zeros = jnp.zeros(hidden.shape[0], jnp.float32)
    return jax.lax.fori_loop(0, -(-vocab // size), tile, (zeros + LOWEST, zeros, zeros))


def local_backward(
    head: LMHead,
    hidden: Array,
    weights: Array,
    targets: Array,
    log_total: Array,
    cotangent: Array,
    floors: Array | None,
) -> tuple[Array, Array]:
    """Compute gradients of one device's rows and of its part of the head, for the cotangent of the log-probs."""
    size = min(head.tiles.backward_rows, hidden.shape[0])
    first = jax.lax.axis_index(TP) * weights.shape[0]
    entries = (first + jnp.arange(weights.shape[0]))[None]

    def chunk(weights_grad: Array, rows: Rows) -> tuple[Array, Array]:
        h, t, lse, g, floors = jax.tree.map(across_tp, rows)
        probs = jnp.exp(drop_below(floors, scaled_logits(head, h, weights, entries), entries, t) - lse[:, None])
        scale = (g / head.temperature)[:, None]
        logits_grad = (jnp.where(t[:, None] == entries, scale, 0) - scale * probs).astype(h.dtype)
        hidden_grad = jnp.einsum("MV,VD->MD", logits_grad, weights, preferred_element_type=jnp.float32)
        weights_grad += jnp.einsum("MV,MD->VD", logits_grad, h, preferred_element_type=jnp.float32)
        return weights_grad, sum_and_split(hidden_grad, TP, 0).astype(h.dtype)

    zeros = jnp.zeros(weights.shape, jnp.float32)
    rows = in_chunks(size, (hidden, targets, log_total, cotangent, floors))
    weights_grad, hidden_grad = jax.lax.scan(chunk, zeros, rows)
    hidden_grad = hidden_grad.reshape(-1, hidden.shape[1])[: hidden.shape[0]]
    if SLICE in head.mesh.axis_names:
        weights_grad = jax.lax.psum(weights_grad, SLICE)
    return hidden_grad, sum_and_split(weights_grad, FSDP, 1)


def take_along(x: Array, positions: Array) -> Array:
    """Take x at `positions` along its second dim, all of which exist: nothing is checked."""
    return jnp.take_along_axis(x, positions, axis=1, mode="promise_in_bounds")


def logprobs_after(
    head: LMHead,
    hidden: Float[Array, "R T D"],
    weights: Float[Array, "V D"],
    before: Int[Array, "R C"],
    targets: Int[Array, "R C"],
    cutoffs: Float[Array, "R C"] | None = None,
) -> tuple[Float[Array, "R C"], Float[Array, "R C"]]:
    """Compute log-prob and entropy of `targets` as successors of the tokens at the positions `before` in their rows."""
    predicting = take_along(hidden, before[:, :, None])
    rows = predicting.reshape(before.size, -1), weights, targets.reshape(-1)
    logprobs, entropy = token_logprobs(head, *rows, None if cutoffs is None else cutoffs.reshape(-1))
    return logprobs.reshape(before.shape), entropy.reshape(before.shape)
