"""The parts a policy loss is put together from: pure functions of arrays, each with its source.

Shapes: B completions, C their tokens. `mask` is 1 where a token counts. A loss is the sum over all tokens of a weight,
which holds every denominator, times the token's own loss.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# How tokens are averaged


def weights_grpo(mask: Float[Array, "B C"], rows: Int[Array, ""]) -> Float[Array, "B C"]:
    """Mean over a completion's tokens, then over `rows` completions (arXiv:2402.03300, eq. 3)."""
    return mask / jnp.maximum(mask.sum(axis=1, keepdims=True), 1) / jnp.maximum(rows, 1)


def weights_bnpo(mask: Float[Array, "B C"], rows: Int[Array, ""]) -> Float[Array, "B C"]:
    """Mean over all tokens of the batch; also DAPO's (arXiv:2503.14476, eq. 8) with the batch global."""
    return mask / jnp.maximum(mask.sum(), 1)


def weights_dr_grpo(mask: Float[Array, "B C"], rows: Int[Array, ""], max_tokens: int) -> Float[Array, "B C"]:
    """Sum over tokens divided by completions times the length limit, length having no weight (arXiv:2503.20783)."""
    return mask / (jnp.maximum(rows, 1) * max_tokens)


def token_weights(
    loss_type: str, mask: Float[Array, "B C"], rows: Int[Array, ""], max_tokens: int
) -> Float[Array, "B C"]:
    """Weight of every token in the loss of a whole batch of `rows` completions."""
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
    """Every token's own ratio of policy to old policy."""
    return log_ratio


def sequence_log_ratio(log_ratio: Float[Array, "B C"], mask: Float[Array, "B C"]) -> Float[Array, "B C"]:
    """The mean over the completion's tokens, the same for each of them (GSPO, arXiv:2507.18071, eq. 7)."""
    mean = (log_ratio * mask).sum(axis=1, keepdims=True) / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
    return jnp.broadcast_to(mean, log_ratio.shape)


LOG_RATIOS = {"token": token_log_ratio, "sequence": sequence_log_ratio}

# Objectives


def clipped_loss(
    ratio: Float[Array, "B C"], advantages: Float[Array, "B 1"], low: float, high: float, delta: float | None = None
) -> Float[Array, "B C"]:
    """-min(r A, clip(r, 1-low, 1+high) A) (arXiv:1707.06347, eq. 7); r at most `delta`, if given (arXiv:2505.07291)."""
    clipped = jnp.clip(ratio, 1 - low, 1 + high)
    bounded = ratio if delta is None else jnp.minimum(ratio, delta)
    return -jnp.minimum(bounded * advantages, clipped * advantages)


def cispo_loss(
    ratio: Float[Array, "B C"], advantages: Float[Array, "B 1"], logprobs: Float[Array, "B C"], cap: float
) -> Float[Array, "B C"]:
    """-min(r, cap) A log p, the capped ratio a constant, so that no token loses its gradient (arXiv:2506.13585)."""
    return -jax.lax.stop_gradient(jnp.minimum(ratio, cap)) * advantages * logprobs


# Estimates of KL(policy || reference), per token (http://joschu.net/blog/kl-approx.html)


def kl_k2(logprobs: Float[Array, "B C"], ref_logprobs: Float[Array, "B C"]) -> Float[Array, "B C"]:
    """Half the squared log-ratio: biased, with the right gradient on-policy."""
    return jnp.square(logprobs - ref_logprobs) / 2


def kl_k3(logprobs: Float[Array, "B C"], ref_logprobs: Float[Array, "B C"]) -> Float[Array, "B C"]:
    """r - 1 - log r with r = reference / policy: unbiased and never negative (arXiv:2402.03300, eq. 4)."""
    log_ratio = ref_logprobs - logprobs
    return jnp.expm1(log_ratio) - log_ratio


KL_ESTIMATORS = {"k2": kl_k2, "k3": kl_k3}

# Correction of the difference between sampler and trainer


def no_correction(log_ratio: Float[Array, "B C"], mask: Float[Array, "B C"], cap: float) -> Float[Array, "B C"]:
    return jnp.ones_like(log_ratio)


def token_correction(log_ratio: Float[Array, "B C"], mask: Float[Array, "B C"], cap: float) -> Float[Array, "B C"]:
    """min(trainer's / sampler's probability, cap) of every token: truncated importance sampling."""
    return jnp.minimum(jnp.exp(log_ratio), cap)


def sequence_correction(log_ratio: Float[Array, "B C"], mask: Float[Array, "B C"], cap: float) -> Float[Array, "B C"]:
    """The same of whole completions."""
    whole = jnp.exp(jnp.minimum((log_ratio * mask).sum(axis=1, keepdims=True), jnp.log(cap)))
    return jnp.broadcast_to(whole, log_ratio.shape)


CORRECTIONS = {"none": no_correction, "token": token_correction, "sequence": sequence_correction}
