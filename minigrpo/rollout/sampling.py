"""Next-token sampling: one uniform per row by inverse CDF, and the log-probs the trainer will compare with."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

CDF_BLOCK, LEAST_BLOCK = 128, 64
"""Most vocabulary entries summed at a time: the row's CDF is built over blocks first, then inside the one block hit.
Smaller blocks, down to the second, are taken where they divide the vocabulary."""


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Sampling settings. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 leave the distribution whole."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @property
    def truncates(self) -> bool:
        """Tell if tokens are left out of the distribution; greedy sampling has none."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeptSet:
    """The tokens that truncated sampling kept where each token was sampled, written down as a limit of log-probs.

    Example: of softmax probabilities 0.5, 0.3, 0.15 and 0.05, top-k 2 keeps two, so `mass` is 0.8 and `cutoff` -1.55:
    log 0.5 and log 0.3 are above it, log 0.15 and log 0.05 below.
    """

    cutoff: Any  # float [...], log-prob under the whole distribution that the kept tokens reach; -inf if all do
    mass: Any  # float [...], probability of all kept tokens together


def sample(
    sampler: Sampler, logits: Float[Array, "B V"], uniforms: Float[Array, " B"]
) -> tuple[Int[Array, " B"], Float[Array, " B"], KeptSet | None]:
    """Sample a token per row -> tokens, log-probs, and the kept sets, None where the sampler leaves nothing out.

    A log-prob is that of softmax(logits / temperature) over the kept tokens. `logits` hold -inf where there is no
    token. Greedy rows report the log-prob at temperature 1.
    """
    scaled = logits / (sampler.temperature or 1.0)
    peak = scaled.max(axis=-1, keepdims=True)
    probs = jnp.exp(scaled - peak)
    kept = probs
    if sampler.temperature == 0:
        tokens = jnp.argmax(scaled, axis=-1)
    else:
        kept = truncate(sampler, probs)
        tokens = invert_cdf(kept, uniforms)
    chosen = jnp.take_along_axis(scaled - peak, tokens[:, None], axis=-1)[:, 0]
    total = running_sums(in_blocks(probs))[:, -1]
    if not sampler.truncates:
        return tokens, chosen - jnp.log(total), None
    kept_total = running_sums(in_blocks(kept))[:, -1]
    cutoff = midway(scaled - peak, kept > 0) - jnp.log(total)
    return tokens, chosen - jnp.log(kept_total), KeptSet(cutoff, kept_total / total)


def penalise(penalty: float, logits: Float[Array, "B V"], seen: Int[Array, "B N"]) -> Float[Array, "B V"]:
    """Divide positive logits of tokens `seen` by the penalty and multiply negative ones (arXiv:1909.05858, sec. 4.1).

    A number past the vocabulary is no token.
    """
    own = jnp.take_along_axis(logits, seen, axis=1, mode="clip")
    own = jnp.where(own < 0, own * penalty, own / penalty)
    return logits.at[jnp.arange(len(seen))[:, None], seen].set(own, mode="drop")


def midway(logits: Float[Array, "B V"], kept: Bool[Array, "B V"]) -> Float[Array, " B"]:
    """Return the middle between the least kept and the largest dropped logit, farthest from either's rounding.

    It is -inf where every token is kept.
    """
    least = jnp.where(kept, logits, jnp.inf).min(axis=-1)
    largest = jnp.where(kept, -jnp.inf, logits).max(axis=-1)
    return (least + largest) / 2


def truncate(sampler: Sampler, probs: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """Zero the tokens that top-k, then top-p, then min-p leave out; `probs` are relative to a row's maximum of 1.

    Each keeps the tokens at or above a limit. Those of top-k and top-p are bisected, as sorting takes longer. Equals of
    the k-th token are all kept; top-p may count some of them only.
    """
    kept, least = probs, jnp.full(len(probs), sampler.min_p, probs.dtype)
    if sampler.top_k:
        kept = likeliest_blocks(probs, sampler.top_k)
        limit = top_k_limit(kept, sampler.top_k)
        kept = jnp.where(kept >= limit[:, None], kept, 0)
        least = jnp.maximum(least, limit)
    if sampler.top_p < 1:
        least = jnp.maximum(least, top_p_limit(kept, sampler.top_p))
    return jnp.where(probs >= least[:, None], probs, 0)


def likeliest_blocks(probs: Float[Array, "B V"], k: int) -> Float[Array, "B N"]:
    """Take the k blocks of the vocabulary with the likeliest tokens, or all: none elsewhere exceeds theirs."""
    blocks = in_blocks(probs)
    if k >= blocks.shape[1]:
        return probs
    chosen = jax.lax.top_k(blocks.max(axis=-1), k)[1]
    return jnp.take_along_axis(blocks, chosen[:, :, None], axis=1).reshape(len(probs), -1)


def top_k_limit(probs: Float[Array, "B N"], k: int) -> Float[Array, " B"]:
    """Return the k-th largest, or 0 if there are fewer."""
    return bisect(lambda limit: (probs >= limit).sum(axis=-1) >= k, len(probs))


def top_p_limit(probs: Float[Array, "B N"], p: float) -> Float[Array, " B"]:
    """Return the least probability in the smallest set of tokens that holds p of the mass (arXiv:1904.09751)."""

    def mass(limit: Array | int) -> Array:
        return jnp.where(probs >= limit, probs, 0).sum(axis=-1)

    wanted = p * mass(0)
    return bisect(lambda limit: mass(limit) >= wanted, len(probs))


def bisect(holds: Callable[[Float[Array, "B 1"]], Bool[Array, " B"]], rows: int) -> Float[Array, " B"]:
    """Find the largest float32 in [0, 1], for each row, for which `holds`; it holds from 0 up to some number.

    Floats that are not negative are ordered like their bits, which are found one by one. The first two of 32 are 0.
    """

    def attempt(turn: Array, found: Array) -> Array:
        tried = found | (1 << (29 - turn))
        return jnp.where(holds(jax.lax.bitcast_convert_type(tried, jnp.float32)[:, None]), tried, found)

    found = jax.lax.fori_loop(0, 30, attempt, jnp.zeros(rows, jnp.int32))
    return jnp.minimum(jax.lax.bitcast_convert_type(found, jnp.float32), 1)


def first_past(cumulative: Float[Array, "B N"], target: Float[Array, " B"]) -> Int[Array, " B"]:
    """Return the first index whose cumulative sum exceeds target, at most the last index with probability mass."""
    past = jnp.sum(cumulative <= target[:, None], axis=-1)
    return jnp.minimum(past, jnp.sum(cumulative < cumulative[:, -1:], axis=-1))


def in_blocks(probs: Float[Array, "B V"]) -> Float[Array, "B N S"]:
    """Cut the vocabulary into blocks, the last one filled with zeros."""
    rows, vocab = probs.shape
    divisor = math.gcd(vocab, CDF_BLOCK)
    size = divisor if divisor >= LEAST_BLOCK else CDF_BLOCK
    return jnp.pad(probs, ((0, 0), (0, -vocab % size))).reshape(rows, -1, size)


def running_sums(blocks: Float[Array, "B N S"]) -> Float[Array, "B N"]:
    """Sum all numbers up to each block's last, in one pass over the vocabulary that all uses of the blocks share."""
    return jnp.cumsum(blocks.sum(axis=-1), axis=-1)


def invert_cdf(probs: Float[Array, "B V"], uniforms: Float[Array, " B"]) -> Int[Array, " B"]:
    """Return the token where the row's running sum of unnormalised `probs` passes uniform * total; never one of 0."""
    blocks = in_blocks(probs)
    cumulative = running_sums(blocks)
    target = uniforms * cumulative[:, -1]
    block = first_past(cumulative, target)
    before = jnp.where(block > 0, jnp.take_along_axis(cumulative, jnp.maximum(block - 1, 0)[:, None], axis=1)[:, 0], 0)
    inside = jnp.cumsum(jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0], axis=-1)
    return block * blocks.shape[2] + first_past(inside, target - before)
