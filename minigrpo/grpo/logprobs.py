"""Per-token log-probs and entropy from hidden states, chunked over the vocabulary, the head sharded over `tp`.

The full [rows, V] logits never exist, forward or backward. Forward, rows and vocabulary are both tiled and the softmax
is accumulated online. Backward, the probabilities are recomputed for some rows at a time, because a part of the
vocabulary at a time would re-read and re-write the rows' gradient for each; the CPU, with few rows, does the latter.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from minigrpo.model.attention import in_chunks
from minigrpo.runtime.mesh import DATA, FSDP, TP, in_order

LEAST_PART = 128
"""Vocabulary entries handled at a time, at least."""

LOWEST = -1e30
"""Stands for -inf where a difference of two of them must not become NaN."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Rows and vocabulary entries per device handled at a time. Sizes change memory and time, no number.

    Counted best for v6e (`bench/logprob_memory.py --topology`): the head's gradient is read and written once per chunk
    of backward rows, so these are as many as can be without a higher peak of scratch.
    """

    rows: int = 2048
    vocab: int = 4096
    backward_rows: int = 2048
    backward_bytes: int = 0
    """Of logits in a backward pass that goes through the vocabulary, as the CPU likes it; 0 goes through the rows."""


@dataclasses.dataclass(frozen=True)
class Head:
    """What turns hidden states into log-probs besides the weights."""

    mesh: Mesh
    num_tokens: int
    """Real tokens; head rows past them are padding and never have probability."""
    temperature: float = 1.0
    tiles: Tiles = Tiles()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def token_logprobs(
    head: Head, hidden: Float[Array, "M D"], weights: Float[Array, "V D"], targets: Int[Array, "M"]
) -> tuple[Float[Array, "M"], Float[Array, "M"]]:
    """log softmax(hidden @ weights^T / temperature) at `targets`, and the softmax's entropy in nats.

    M must be a multiple of the mesh's devices. The entropy is for reading only: no gradient flows through it.
    """
    return forward(head, hidden, weights, targets)[0]


def forward(head, hidden, weights, targets):
    rows, split = PartitionSpec(DATA), PartitionSpec(TP)
    run = jax.shard_map(
        functools.partial(local_forward, head),
        mesh=head.mesh,
        in_specs=(rows, split, rows),
        out_specs=(rows, rows, rows),
        check_vma=False,
    )
    logprobs, entropy, log_total = run(hidden, weights.astype(hidden.dtype), targets)
    return (logprobs, entropy), (hidden, weights, targets, log_total)


def backward(head, saved, cotangents):
    hidden, weights, targets, log_total = saved
    rows = PartitionSpec(DATA)
    run = jax.shard_map(
        functools.partial(backward_by_vocab if head.tiles.backward_bytes else backward_by_rows, head),
        mesh=head.mesh,
        in_specs=(rows, PartitionSpec(TP), rows, rows, rows),
        out_specs=(rows, PartitionSpec(TP, FSDP)),
        check_vma=False,
    )
    hidden_grad, weights_grad = run(hidden, weights.astype(hidden.dtype), targets, log_total, cotangents[0])
    return hidden_grad, weights_grad.astype(weights.dtype), None


token_logprobs.defvjp(forward, backward)


def across_tp(x: Array) -> Array:
    """The rows of all `tp` peers, if there are any: each of them holds another part of the vocabulary."""
    return x if jax.lax.axis_size(TP) == 1 else jax.lax.all_gather(x, TP, tiled=True)


def own_rows(x: Array, size: int) -> Array:
    """This device's rows of what `across_tp` brought together."""
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(TP) * size, size)


def sum_and_split(x: Array, axis: str, dim: int) -> Array:
    """The sum over a mesh axis, of which every device keeps its part of `dim`.

    XLA on the CPU would copy x three times for a single device.
    """
    single = jax.lax.axis_size(axis) == 1
    return x if single else jax.lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True)


def scaled_logits(head: Head, hidden: Array, weights: Array, entries: Array, least: Array | int = 0) -> Array:
    """Logits / temperature in float32 of these vocabulary entries; LOWEST, added, below `least` and past the tokens."""
    logits = jnp.einsum("MD,VD->MV", hidden, weights, preferred_element_type=jnp.float32) / head.temperature
    return logits + jnp.where((entries >= least) & (entries < head.num_tokens), 0, LOWEST)


def target_logits(head: Head, hidden: Array, weights: Array, targets: Array, first: Array) -> Array:
    """Each row's logit / temperature at its target; 0 for one that another device holds."""
    own = weights[jnp.clip(targets - first, 0, weights.shape[0] - 1)]
    logits = jnp.einsum("MD,MD->M", hidden, own, preferred_element_type=jnp.float32) / head.temperature
    return jnp.where((targets >= first) & (targets < first + weights.shape[0]), logits, 0)


def local_forward(head: Head, hidden: Array, weights: Array, targets: Array):
    """One device's rows against its part of the vocabulary -> log-probs, entropy, log of the softmax's total."""
    size = min(head.tiles.rows, hidden.shape[0])
    first = jax.lax.axis_index(TP) * weights.shape[0]

    def chunk(rows):
        hidden, targets = (across_tp(x) for x in rows)
        peak, total, weighted = softmax_stats(head, hidden, weights, first)
        top = jax.lax.pmax(peak, TP)
        total, weighted = jax.lax.psum(shift(peak, top, total, weighted), TP)
        log_total = top + jnp.log(total)
        logprobs = jax.lax.psum(target_logits(head, hidden, weights, targets, first), TP) - log_total
        return tuple(own_rows(out, size) for out in (logprobs, jnp.log(total) - weighted / total, log_total))

    outs = jax.lax.map(chunk, in_chunks(size, (hidden, targets)))
    return tuple(out.reshape(-1)[: hidden.shape[0]] for out in outs)


def shift(peak: Array, to: Array, total: Array, weighted: Array) -> tuple[Array, Array]:
    """Sums of e and of e * x, with x = logit - peak and e = exp(x), as they are for the higher peak `to`."""
    rescale = jnp.exp(peak - to)
    return total * rescale, (weighted + (peak - to) * total) * rescale


def softmax_stats(head: Head, hidden: Array, weights: Array, first: Array) -> tuple[Array, Array, Array]:
    """Per row over this device's vocabulary, from `first` on: the peak and `shift`'s two sums."""
    vocab = weights.shape[0]
    size = min(head.tiles.vocab, vocab)

    def tile(index, stats):
        peak, total, weighted = stats
        start = jnp.minimum(index * size, vocab - size)
        part = jax.lax.dynamic_slice_in_dim(weights, start, size)
        logits = scaled_logits(head, hidden, part, first + start + jnp.arange(size), first + index * size)
        new_peak = jnp.maximum(peak, logits.max(axis=-1))
        below = logits - new_peak[:, None]
        exps = jnp.exp(below)
        total, weighted = shift(peak, new_peak, total, weighted)
        return new_peak, total + exps.sum(axis=-1), weighted + (exps * below).sum(axis=-1)

    zeros = jnp.zeros(hidden.shape[0], jnp.float32)
    return jax.lax.fori_loop(0, -(-vocab // size), tile, (zeros + LOWEST, zeros, zeros))


def backward_by_rows(head: Head, hidden: Array, weights: Array, targets: Array, log_total: Array, cotangent: Array):
    """Gradients of one device's rows and of its part of the head, for the cotangent of the log-probs."""
    size = min(head.tiles.backward_rows, hidden.shape[0])
    first = jax.lax.axis_index(TP) * weights.shape[0]
    entries = first + jnp.arange(weights.shape[0])

    def chunk(weights_grad, rows):
        h, t, lse, g = (across_tp(x) for x in rows)
        probs = jnp.exp(scaled_logits(head, h, weights, entries) - lse[:, None])
        scale = (g / head.temperature)[:, None]
        logits_grad = (jnp.where(t[:, None] == entries, scale, 0) - scale * probs).astype(h.dtype)
        hidden_grad = jnp.einsum("MV,VD->MD", logits_grad, weights, preferred_element_type=jnp.float32)
        weights_grad += jnp.einsum("MV,MD->VD", logits_grad, h, preferred_element_type=jnp.float32)
        return weights_grad, sum_and_split(hidden_grad, TP, 0).astype(h.dtype)

    zeros = jnp.zeros(weights.shape, jnp.float32)
    weights_grad, hidden_grad = jax.lax.scan(chunk, zeros, in_chunks(size, (hidden, targets, log_total, cotangent)))
    hidden_grad = hidden_grad.reshape(-1, hidden.shape[1])[: hidden.shape[0]]
    return hidden_grad, sum_and_split(weights_grad, FSDP, 1)


def backward_by_vocab(head: Head, hidden: Array, weights: Array, targets: Array, log_total: Array, cotangent: Array):
    """The same, a part of the vocabulary at a time: the head's gradient is written once, the rows' often.

    The last part overlaps the one before, where it writes the same again but adds nothing to the rows' gradient. The
    head's gradient comes out transposed, with the transposed rows as first operand, which XLA on the CPU multiplies
    faster; in float32, as of bfloat16 it has not got that product.
    """
    h, t, lse, g = (across_tp(x) for x in (hidden, targets, log_total, cotangent))
    vocab = weights.shape[0]
    size = min(vocab, max(LEAST_PART, head.tiles.backward_bytes // (4 * h.shape[0])))
    first, scale = jax.lax.axis_index(TP) * vocab, (g / head.temperature)[:, None]
    turned = h.T.astype(jnp.float32)

    def part(index, grads):
        hidden_grad, weights_grad = grads
        start = jnp.minimum(index * size, vocab - size)
        entries, own = first + start + jnp.arange(size), jax.lax.dynamic_slice_in_dim(weights, start, size)
        probs = jnp.exp(scaled_logits(head, h, own, entries) - lse[:, None])
        logits_grad = (jnp.where(t[:, None] == entries, scale, 0) - scale * probs).astype(h.dtype)
        fresh = jnp.where((entries >= first + index * size)[:, None], own, 0)
        hidden_grad += jnp.einsum("MV,VD->MD", logits_grad, fresh, preferred_element_type=jnp.float32)
        own_grad = in_order(jnp.einsum("DM,MV->DV", turned, logits_grad.astype(jnp.float32)), "DV", "VD")
        return hidden_grad, jax.lax.dynamic_update_slice_in_dim(weights_grad, own_grad, start, axis=0)

    zeros = jnp.zeros(h.shape, jnp.float32), jnp.zeros(weights.shape, jnp.float32)
    hidden_grad, weights_grad = jax.lax.fori_loop(0, -(-vocab // size), part, zeros)
    hidden_grad = sum_and_split(hidden_grad, TP, 0).astype(h.dtype)
    return hidden_grad, sum_and_split(weights_grad, FSDP, 1)


def take_inside(x: Array, places: Array) -> Array:
    """x at `places` along its second dim, all of which are there: nothing is checked."""
    return jnp.take_along_axis(x, places, axis=1, mode="promise_in_bounds")


def completion_logprobs(
    head: Head,
    hidden: Float[Array, "B T D"],
    weights: Float[Array, "V D"],
    prompt_lengths: Int[Array, "B"],
    completions: Int[Array, "B C"],
) -> tuple[Float[Array, "B C"], Float[Array, "B C"]]:
    """Log-prob and entropy of every completion token, given the hidden states of prompt + completion.

    Row b's prompt fills positions 0..prompt_lengths[b]-1 and its completion follows; only completion positions are
    scored. Values past a completion's end mean nothing: mask them.
    """
    before = jnp.minimum(prompt_lengths[:, None] - 1 + jnp.arange(completions.shape[1]), hidden.shape[1] - 1)
    return logprobs_after(head, hidden, weights, before, completions)


def logprobs_after(
    head: Head,
    hidden: Float[Array, "R T D"],
    weights: Float[Array, "V D"],
    before: Int[Array, "R C"],
    targets: Int[Array, "R C"],
) -> tuple[Float[Array, "R C"], Float[Array, "R C"]]:
    """Log-prob and entropy of `targets` as successors of the tokens at the positions `before` in their rows."""
    scored = take_inside(hidden, before[:, :, None])
    logprobs, entropy = token_logprobs(head, scored.reshape(before.size, -1), weights, targets.reshape(-1))
    return logprobs.reshape(before.shape), entropy.reshape(before.shape)
