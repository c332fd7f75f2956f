"""Group relative policy optimisation: advantages, losses, and one jitted update (arXiv:2402.03300)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from minigrpo.attention import ATTENTION, attend_on
from minigrpo.config import LossOptions
from minigrpo.logprobs import Head, completion_logprobs
from minigrpo.model import Params, unchanged
from minigrpo.optimizer import TrainState, apply_gradients
from minigrpo.sharding import Layout, by_sequence

ADVANTAGE_EPSILON = 1e-4
"""Added to the std that advantages are divided by."""

BUCKETS = 8
SMALLEST_STEP = 16
"""Padded lengths differ by at least this many tokens."""

CHECKPOINT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(ATTENTION),
    "full": jax.checkpoint_policies.nothing_saveable,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Sequences to train on. Row b's prompt fills tokens[b, :prompt_lengths[b]]; its completion follows at once.

    Rows of completion length 0 are padding. Example of one row: tokens [5, 6, 7, 8, 2, 0], prompt_lengths 3,
    completions [8, 2, 0], completion_lengths 2.
    """

    tokens: Any  # int32 [B, T]
    prompt_lengths: Any  # int32 [B]
    completions: Any  # int32 [B, C]
    completion_lengths: Any  # int32 [B]
    advantages: Any  # float [B]
    rollout_logprobs: Any  # float [B, C]
    """Recorded by the sampler."""
    old_logprobs: Any = None  # float [B, C] or None
    """Of the policy that sampled, recomputed by the trainer; None when this update is the first on these samples."""
    ref_logprobs: Any = None  # float [B, C] or None

    @property
    def completion_mask(self) -> Bool[Array, "B C"]:
        return jnp.arange(self.completions.shape[1]) < self.completion_lengths[:, None]


# Advantages


def group_advantages(rewards: Float[np.ndarray, "B"], group: int, scale: str) -> Float[np.ndarray, "B"]:
    """Rewards minus their group's mean, divided by the std of the group, of the batch, or by 1.

    The std is the unbiased one plus 1e-4. Rows of one group are adjacent.
    """
    grouped = rewards.reshape(-1, group)
    centred = (grouped - grouped.mean(axis=1, keepdims=True)).reshape(-1)
    spread = {
        "group": lambda: np.repeat(grouped.std(axis=1, ddof=1), group) + ADVANTAGE_EPSILON,
        "batch": lambda: rewards.std(ddof=1) + ADVANTAGE_EPSILON,
        "none": lambda: 1.0,
    }[scale]()
    return (centred / spread).astype(np.float32)


# Batches


def bucket(size: int, limit: int) -> int:
    """`size` rounded up to a multiple of limit/8, so that few shapes are ever compiled."""
    step = max(SMALLEST_STEP, -(-limit // BUCKETS))
    return min(limit, -(-size // step) * step)


def assemble(
    prompts: list[list[int]],
    completions: Int[np.ndarray, "B C"],
    lengths: Int[np.ndarray, "B"],
    limits: tuple[int, int],
) -> Batch:
    """Token rows of prompt + completion, as short as the longest allows; `limits` are on prompt and completion."""
    width = bucket(int(lengths.max()), limits[1])
    kept = np.zeros((len(prompts), width), np.int32)
    kept[:, : completions.shape[1]] = completions[:, :width]
    kept *= np.arange(width) < lengths[:, None]
    longest = max(len(prompt) + length for prompt, length in zip(prompts, lengths, strict=True))
    tokens = np.zeros((len(prompts), bucket(int(longest), sum(limits))), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        tokens[row, len(prompt) : len(prompt) + lengths[row]] = kept[row, : lengths[row]]
    return Batch(
        tokens=tokens,
        prompt_lengths=np.array([len(prompt) for prompt in prompts], np.int32),
        completions=kept,
        completion_lengths=lengths.astype(np.int32),
        advantages=np.zeros(len(prompts), np.float32),
        rollout_logprobs=np.zeros(kept.shape, np.float32),
    )


def pad_rows(batch: Batch, multiple: int) -> Batch:
    """Adds rows of completion length 0 until `multiple` divides them."""
    missing = -len(batch.tokens) % multiple

    def pad(x):
        return np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))

    padded = jax.tree.map(pad, batch)
    padded.prompt_lengths[len(batch.tokens) :] = 1
    return padded


# Losses: pure functions of arrays. The loss is the sum of token weight times token loss.


def weights_grpo(mask: Float[Array, "B C"]) -> Float[Array, "B C"]:
    """Mean over a completion's tokens, then over completions (arXiv:2402.03300, eq. 3)."""
    lengths = mask.sum(axis=1, keepdims=True)
    return mask / jnp.maximum(lengths, 1) / jnp.maximum((lengths > 0).sum(), 1)


def weights_bnpo(mask: Float[Array, "B C"]) -> Float[Array, "B C"]:
    """Mean over all tokens of the batch; also DAPO's (arXiv:2503.14476, eq. 8) with the batch global."""
    return mask / jnp.maximum(mask.sum(), 1)


def weights_dr_grpo(mask: Float[Array, "B C"], max_tokens: int) -> Float[Array, "B C"]:
    """Sum over tokens divided by completions times the length limit, length having no weight (arXiv:2503.20783)."""
    return mask / (jnp.maximum((mask.sum(axis=1) > 0).sum(), 1) * max_tokens)


def token_weights(loss_type: str, mask: Bool[Array, "B C"], max_tokens: int) -> Float[Array, "B C"]:
    functions: dict[str, Callable[[Array], Array]] = {
        "grpo": weights_grpo,
        "bnpo": weights_bnpo,
        "dapo": weights_bnpo,
        "dr_grpo": functools.partial(weights_dr_grpo, max_tokens=max_tokens),
    }
    return functions[loss_type](mask.astype(jnp.float32))


def clipped_objective(ratio: Array, advantages: Array, low: float, high: float) -> Float[Array, "B C"]:
    """-min(r A, clip(r, 1-low, 1+high) A) per token (arXiv:1707.06347, eq. 7)."""
    clipped = jnp.clip(ratio, 1 - low, 1 + high)
    return -jnp.minimum(ratio * advantages, clipped * advantages)


def kl_k3(logprobs: Float[Array, "B C"], ref_logprobs: Float[Array, "B C"]) -> Float[Array, "B C"]:
    """The k3 estimate of KL(policy || reference): r - 1 - log r with r = ref / policy (arXiv:2402.03300, eq. 4)."""
    log_ratio = ref_logprobs - logprobs
    return jnp.expm1(log_ratio) - log_ratio


def policy_loss(
    options: LossOptions, batch: Batch, weights: Array, logprobs: Array, entropy: Array
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """The batch's share of the loss, and sums over its completion tokens of what the metrics report."""
    mask = batch.completion_mask
    old = jax.lax.stop_gradient(logprobs) if batch.old_logprobs is None else batch.old_logprobs
    high = options.epsilon if options.epsilon_high is None else options.epsilon_high
    ratio = jnp.exp(jnp.where(mask, logprobs - old, 0))
    advantages = batch.advantages[:, None]
    loss = clipped_objective(ratio, advantages, options.epsilon, high)
    ref = logprobs if batch.ref_logprobs is None else jnp.where(mask, batch.ref_logprobs, logprobs)
    kl = kl_k3(logprobs, ref)
    loss = jnp.where(mask, loss + options.beta * kl, 0)
    low_clipped = (ratio < 1 - options.epsilon) & (advantages < 0)
    high_clipped = (ratio > 1 + high) & (advantages > 0)
    difference = jnp.abs(old - batch.rollout_logprobs)
    per_token = {
        "kl": kl,
        "entropy": entropy,
        "clip_ratio/low_mean": low_clipped,
        "clip_ratio/high_mean": high_clipped,
        "clip_ratio/region_mean": low_clipped | high_clipped,
        "sampling/sampling_logp_difference/mean": difference,
    }
    sums = {name: jnp.where(mask, value, 0).sum() for name, value in per_token.items()}
    largest = {"sampling/sampling_logp_difference/max": jnp.where(mask, difference, 0).max()}
    return (loss * weights).sum(), {"sums": sums, "largest": largest}


# The device programs

Objective = Callable[[Batch, Array, Array, Array], tuple[Float[Array, ""], dict[str, Any]]]
"""(batch, weights, logprobs, entropy) -> a share of the loss, and {"sums": ..., "largest": ...} for metrics."""


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Everything static about scoring and updating."""

    graph: nnx.GraphDef
    head: Head
    layout: Layout
    remat: str
    optimizer: optax.GradientTransformation
    objective: Objective
    weigh: Callable[[Bool[Array, "B C"]], Float[Array, "B C"]]
    """Completion mask of the whole batch -> weight of every token in the loss."""
    parts: int
    """gradient_accumulation_steps: the batch is computed in this many parts, which changes no number."""


def score(trainer: Trainer, params: Params, batch: Batch) -> tuple[Float[Array, "B C"], Float[Array, "B C"]]:
    """Log-probs and entropy of the completions under `params`."""
    model = nnx.merge(trainer.graph, params)
    policy = CHECKPOINT_POLICIES[trainer.remat]
    remat = unchanged if policy is None else functools.partial(jax.checkpoint, policy=policy)
    positions = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]), batch.tokens.shape)
    hidden, _ = model(batch.tokens, positions, attend_on(trainer.head.mesh), None, trainer.layout, remat)
    return completion_logprobs(trainer.head, hidden, model.head_weights(), batch.prompt_lengths, batch.completions)


def in_parts(trainer: Trainer, tree: Any) -> Any:
    """[B, ...] arrays -> [parts, B/parts, ...], each part spread over every device without moving a row."""
    devices = trainer.head.mesh.size

    def split(x):
        rows = x.reshape(devices, trainer.parts, -1, *x.shape[1:]).swapaxes(0, 1)
        return rows.reshape(trainer.parts, -1, *x.shape[1:])

    return jax.tree.map(split, tree)


def from_parts(trainer: Trainer, x: Array) -> Array:
    """The inverse of `in_parts`."""
    rows = x.reshape(trainer.parts, trainer.head.mesh.size, -1, *x.shape[2:]).swapaxes(0, 1)
    return rows.reshape(-1, *x.shape[2:])


@functools.partial(jax.jit, static_argnums=0)
def batch_logprobs(trainer: Trainer, params: Params, batch: Batch) -> Float[Array, "B C"]:
    """Log-probs of the batch's completions: the reference and the old-policy pass."""
    parts = jax.lax.map(lambda part: score(trainer, params, part)[0], in_parts(trainer, batch))
    return jax.lax.with_sharding_constraint(from_parts(trainer, parts), by_sequence(trainer.head.mesh))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def update(trainer: Trainer, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer step on the batch's loss -> new state, metrics. Denominators are those of the whole batch."""
    weights = trainer.weigh(batch.completion_mask)

    def part_loss(params, part):
        batch, weights = part
        logprobs, entropy = score(trainer, params, batch)
        return trainer.objective(batch, weights, logprobs, entropy)

    def accumulate(total, part):
        (loss, aux), grads = jax.value_and_grad(part_loss, has_aux=True)(state.params, part)
        summed = jax.tree.map(jnp.add, total, (loss, aux["sums"], grads))
        return summed, aux["largest"]

    parts = in_parts(trainer, (batch, weights))
    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(lambda: part_loss(state.params, first))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes[0], shapes[1]["sums"], state.params))
    (loss, sums, grads), largest = jax.lax.scan(accumulate, zeros, parts)
    new_state, applied = apply_gradients(trainer.optimizer, state, loss, grads)
    tokens = jnp.maximum(batch.completion_lengths.sum(), 1)
    means = {name: value / tokens for name, value in sums.items()}
    return new_state, {"loss": loss} | applied | means | {name: value.max() for name, value in largest.items()}
