"""Policy losses: pure functions of arrays, each with its source, and their sum over a batch.

Shapes: B completions, C their tokens. `mask` is 1 where a token counts. A loss is the sum over all tokens of a weight,
which holds every denominator, times the token's own loss.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minigrpo.config import LossOptions
from minigrpo.grpo.batch import Batch

# How tokens are averaged


def weights_grpo(mask: Float[Array, "B C"], rows: Int[Array, ""]) -> Float[Array, "B C"]:
    """Average over a completion's tokens, then over `rows` completions (arXiv:2402.03300, eq. 3)."""
    return mask / jnp.maximum(mask.sum(axis=1, keepdims=True), 1) / jnp.maximum(rows, 1).astype(mask.dtype)


def weights_bnpo(mask: Float[Array, "B C"], rows: Int[Array, ""]) -> Float[Array, "B C"]:
    """Average over all tokens of the batch; also DAPO's (arXiv:2503.14476, eq. 8) with the batch global."""
    return mask / jnp.maximum(mask.sum(), 1)


def weights_dr_grpo(mask: Float[Array, "B C"], rows: Int[Array, ""], max_tokens: int) -> Float[Array, "B C"]:
    """Divide the sum over tokens by completions times the length limit, length having no weight (arXiv:2503.20783)."""
    return mask / (jnp.maximum(rows, 1) * max_tokens).astype(mask.dtype)


def token_weights(
    loss_type: str, mask: Float[Array, "B C"], rows: Int[Array, ""], max_tokens: int
) -> Float[Array, "B C"]:
    """Return the weight of every token in the loss of a whole batch of `rows` completions."""
    functions: dict[str, Callable[[Array, Array], Array]] = {
        "grpo": weights_grpo,
        "bnpo": weights_bnpo,
        "dapo": weights_bnpo,
        "cispo": weights_bnpo,
        "dr_grpo": functools.partial(weights_dr_grpo, max_tokens=max_tokens),
    }
    return functions[loss_type](mask, rows)


# Probability ratios


def token_log_ratio(log_ratio: Float[Array, "B C"], mask: Float[Array, "B C"]) -> Float[Array, "B C"]:
    """Return every token's own ratio of policy to old policy."""
    return log_ratio


def sequence_log_ratio(log_ratio: Float[Array, "B C"], mask: Float[Array, "B C"]) -> Float[Array, "B C"]:
    """Average over the completion's tokens, the same for each of them (GSPO, arXiv:2507.18071, eq. 7)."""
    mean = (log_ratio * mask).sum(axis=1, keepdims=True) / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
    return jnp.broadcast_to(mean, log_ratio.shape)


LOG_RATIOS = {"token": token_log_ratio, "sequence": sequence_log_ratio}

# Objectives


def clipped_loss(
    ratio: Float[Array, "B C"], advantages: Float[Array, "B 1"], low: float, high: float, delta: float | None = None
) -> Float[Array, "B C"]:
    """Compute -min(r A, clip(r, 1-low, 1+high) A) (arXiv:1707.06347, eq. 7), r at most `delta` (arXiv:2505.07291)."""
    clipped = jnp.clip(ratio, 1 - low, 1 + high)
    bounded = ratio if delta is None else jnp.minimum(ratio, delta)
    return -jnp.minimum(bounded * advantages, clipped * advantages)


def cispo_loss(
    ratio: Float[Array, "B C"], advantages: Float[Array, "B 1"], logprobs: Float[Array, "B C"], cap: float
) -> Float[Array, "B C"]:
    """Compute -min(r, cap) A log p, the capped ratio a constant, so no token loses its gradient (arXiv:2506.13585)."""
    return -jax.lax.stop_gradient(jnp.minimum(ratio, cap)) * advantages * logprobs


# Estimates of KL(policy || reference), per token (http://joschu.net/blog/kl-approx.html)


def kl_k2(logprobs: Float[Array, "B C"], ref_logprobs: Float[Array, "B C"]) -> Float[Array, "B C"]:
    """Halve the squared log-ratio: biased, with the right gradient on-policy."""
    return jnp.square(logprobs - ref_logprobs) / 2


def kl_k3(logprobs: Float[Array, "B C"], ref_logprobs: Float[Array, "B C"]) -> Float[Array, "B C"]:
    """Compute r - 1 - log r with r = reference / policy: unbiased and never negative (arXiv:2402.03300, eq. 4)."""
    log_ratio = ref_logprobs - logprobs
    return jnp.expm1(log_ratio) - log_ratio


KL_ESTIMATORS = {"k2": kl_k2, "k3": kl_k3}

# Correction of the difference between sampler and trainer


def no_correction(log_ratio: Float[Array, "B C"], mask: Float[Array, "B C"], cap: float) -> Float[Array, "B C"]:
    """Return 1 for every token."""
    return jnp.ones_like(log_ratio)


def token_correction(log_ratio: Float[Array, "B C"], mask: Float[Array, "B C"], cap: float) -> Float[Array, "B C"]:
    """Compute min(trainer's / sampler's probability, cap) of every token: truncated importance sampling."""
    return jnp.minimum(jnp.exp(log_ratio), cap)


def sequence_correction(log_ratio: Float[Array, "B C"], mask: Float[Array, "B C"], cap: float) -> Float[Array, "B C"]:
    """Compute the truncated ratio of whole completions."""
    whole = jnp.exp(jnp.minimum((log_ratio * mask).sum(axis=1, keepdims=True), jnp.log(cap)))
    return jnp.broadcast_to(whole, log_ratio.shape)


CORRECTIONS = {"none": no_correction, "token": token_correction, "sequence": sequence_correction}


# The loss of a batch


def upper_clip(options: LossOptions) -> float:
    """Return the upper clipping range: --epsilon where --epsilon_high is not given."""
    return options.epsilon if options.epsilon_high is None else options.epsilon_high


def surrogate(options: LossOptions, ratio: Array, advantages: Array, logprobs: Array) -> Float[Array, "B C"]:
    """Compute every token's loss before weights, correction and KL penalty."""
    if options.loss_type == "cispo":
        return cispo_loss(ratio, advantages, logprobs, upper_clip(options))
    return clipped_loss(ratio, advantages, options.epsilon, upper_clip(options), options.delta)


def clipped_tokens(
    options: LossOptions, ratio: Array, advantages: Array
) -> tuple[Bool[Array, "B C"], Bool[Array, "B C"]]:
    """Find tokens whose gradient the clip takes away, below and above; for cispo, where its cap holds."""
    if options.loss_type == "cispo":
        return jnp.zeros(ratio.shape, bool), (ratio > upper_clip(options)) & (advantages > 0)
    return (ratio < 1 - options.epsilon) & (advantages < 0), (ratio > 1 + upper_clip(options)) & (advantages > 0)


def policy_loss(
    options: LossOptions, batch: Batch, weights: Array, logprobs: Array, entropy: Array
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """Compute the batch's share of the loss, the metrics' sums over its completion tokens, and every token's numbers.

    These are the policy's log-probs and entropy, and "clipped": 1 where the ratio is clipped (for cispo, capped) above
    its range, -1 below it.
    """
    mask = batch.completion_mask
    counted = mask.astype(jnp.float32)
    old = jax.lax.stop_gradient(logprobs) if batch.old_logprobs is None else batch.old_logprobs
    log_ratio = LOG_RATIOS[options.importance_sampling_level](jnp.where(mask, logprobs - old, 0), counted)
    ratio = jnp.exp(log_ratio)
    advantages = batch.advantages[:, None]
    recorded = old if batch.rollout_logprobs is None else batch.rollout_logprobs
    mismatch = jnp.where(mask, old - recorded, 0)
    correct = CORRECTIONS[options.rollout_correction]
    loss = surrogate(options, ratio, advantages, logprobs) * correct(mismatch, counted, options.rollout_correction_cap)
    ref = logprobs if batch.ref_logprobs is None else jnp.where(mask, batch.ref_logprobs, logprobs)
    kl = KL_ESTIMATORS[options.kl_estimator](logprobs, ref)
    kl = kl * ratio if options.kl_bias_correction else kl
    loss = loss + options.beta * kl
    low_clipped, high_clipped = clipped_tokens(options, ratio, advantages)
    per_token = {
        "kl": kl,
        "entropy": entropy,
        "clip_ratio/low_mean": low_clipped,
        "clip_ratio/high_mean": high_clipped,
        "clip_ratio/region_mean": low_clipped | high_clipped,
        "sampling/sampling_logp_difference/mean": jnp.abs(mismatch),
    }
    sums = jnp.where(mask, jnp.stack([value.astype(jnp.float32) for value in per_token.values()]), 0).sum(axis=(1, 2))
    largest = {"sampling/sampling_logp_difference/max": jnp.abs(mismatch).max()}
    clipped = high_clipped.astype(jnp.float32) - low_clipped.astype(jnp.float32)
    tokens = {"policy_logprobs": logprobs, "entropy": entropy, "clipped": clipped}
    share = (jnp.where(mask, loss, 0) * weights).sum()
    return share, {"sums": dict(zip(per_token, sums, strict=True)), "largest": largest, "tokens": tokens}
