"""Group relative policy optimisation: advantages, losses, and the update, two jitted programs (arXiv:2402.03300)."""

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

from minigrpo.config import LossOptions
from minigrpo.grpo import losses
from minigrpo.grpo.logprobs import Head, completion_logprobs, logprobs_after, take_inside
from minigrpo.grpo.optimizer import TrainState, apply_gradients, like_params
from minigrpo.model.attention import ATTENTION, Rows, attend_on, stand_in_rows
from minigrpo.model.qwen import MLP, Params, join, unchanged
from minigrpo.runtime.mesh import Layout, by_sequence, launch

ADVANTAGE_EPSILON = 1e-4
"""Added to the std that advantages are divided by."""

DROPOUT = 0xD809
"""Folded into the seed for dropout, and for nothing else."""

BUCKETS = 8
SMALLEST_STEP = 16
"""Padded lengths differ by at least this many tokens."""

CHECKPOINT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "mlp": jax.checkpoint_policies.save_only_these_names(ATTENTION, MLP),
    "attention": jax.checkpoint_policies.save_only_these_names(ATTENTION),
    "full": jax.checkpoint_policies.nothing_saveable,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """How a batch's B sequences lie on S sheets, one for each device and part; minigrpo.grpo.batch lays them out.

    The layers compute a sheet's tokens, of which sequences may share their prompt's; attention and the head see rows of
    whole sequences.
    """

    positions: Any  # int32 [l, T], every token's in its own sequence; lines as of the batch's tokens
    rows: Rows
    scored: Any  # int32 [S, C], the places in the sheet's rows, end to end, whose successors are scored
    targets: Any  # int32 [S, C], these successors
    starts: Any  # int32 [B], where a sequence's completion starts in its sheet's scored ones


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Sequences to train on. Row b's prompt fills tokens[b, :prompt_lengths[b]]; its completion follows at once.

    If packed, tokens lie as `packed` says, and b counts sequences.
    Rows of completion length 0 are padding. Example of one row: tokens [5, 6, 7, 8, 2, 0], prompt_lengths 3,
    completions [8, 2, 0], completion_lengths 2.
    """

    tokens: Any  # int32 [B, T]; if packed, the sheets' tokens, end to end, in lines [l, T]
    prompt_lengths: Any  # int32 [B]
    completions: Any  # int32 [B, C]
    completion_lengths: Any  # int32 [B]
    advantages: Any  # float [B]
    rollout_logprobs: Any  # float [B, C] or None
    """Recorded by the sampler; None for responses on file."""
    old_logprobs: Any = None  # float [B, C] or None
    """Of the policy that sampled, recomputed by the trainer; None when this update is the first on these samples."""
    ref_logprobs: Any = None  # float [B, C] or None
    left_out: Any = None  # bool [B] or None
    """Completions that count in the loss's denominators but teach nothing."""
    packed: Packed | None = None

    @property
    def completion_mask(self) -> Bool[Array, "B C"]:
        return jnp.arange(self.completions.shape[1]) < self.completion_lengths[:, None]

    @property
    def loss_mask(self) -> Float[Array, "B C"]:
        """1 for every token that is trained on."""
        kept = True if self.left_out is None else ~self.left_out[:, None]
        return (self.completion_mask & kept).astype(jnp.float32)


# Advantages


def group_mean(rewards: Float[np.ndarray, "P G"]) -> Float[np.ndarray, "P G"]:
    """The group's mean (arXiv:2402.03300)."""
    return np.broadcast_to(rewards.mean(axis=1, keepdims=True), rewards.shape)


def mean_of_others(rewards: Float[np.ndarray, "P G"]) -> Float[np.ndarray, "P G"]:
    """The mean of the group's other members: leave-one-out (RLOO, arXiv:2402.14740)."""
    return (rewards.sum(axis=1, keepdims=True) - rewards) / (rewards.shape[1] - 1)


BASELINES = {"group": group_mean, "rloo": mean_of_others}


def group_advantages(
    rewards: Float[np.ndarray, "B"], group: int, scale: str, baseline: str = "group"
) -> Float[np.ndarray, "B"]:
    """Rewards minus their baseline, divided by the std of the group, of the batch, or by 1.

    The std is the unbiased one plus 1e-4. Rows of one group are adjacent.
    """
    grouped = rewards.reshape(-1, group)
    centred = (grouped - BASELINES[baseline](grouped)).reshape(-1)
    spread = {
        "group": lambda: np.repeat(grouped.std(axis=1, ddof=1), group) + ADVANTAGE_EPSILON,
        "batch": lambda: rewards.std(ddof=1) + ADVANTAGE_EPSILON,
        "none": lambda: 1.0,
    }[scale]()
    return (centred / spread).astype(np.float32)


def ragged_advantages(
    rewards: Float[np.ndarray, "B"], group: int, scale: str, baseline: str = "group", lone: float = 0.0
) -> Float[np.ndarray, "B"]:
    """`group_advantages` of groups that are not all full: NaN stands for no completion, or no reward, and gives 0.

    A group of one has nothing to be compared with: its advantage is `lone` times its reward.
    """
    present = ~np.isnan(rewards)
    if present.all():
        return group_advantages(rewards, group, scale, baseline)
    result = np.zeros(len(rewards), np.float32)
    for start in range(0, len(rewards), group):
        rows = start + np.flatnonzero(present[start : start + group])
        own, inside = rewards[rows], "group" if scale == "group" else "none"
        result[rows] = group_advantages(own, len(own), inside, baseline) if len(own) > 1 else lone * own
    by_batch = scale == "batch" and present.sum() > 1
    return (result / (rewards[present].std(ddof=1) + ADVANTAGE_EPSILON if by_batch else 1.0)).astype(np.float32)


def normalised_apart(
    parts: dict[str, Float[np.ndarray, "B"]], weights: dict[str, float], group: int
) -> Float[np.ndarray, "B"]:
    """Weighted sum of every reward function's own advantages, so that none drowns another (GDPO, arXiv:2601.05242).

    The sum is normalised once more over the batch.
    """
    own = [weights[name] * ragged_advantages(scores, group, "group") for name, scores in parts.items()]
    total = np.stack(own).sum(axis=0, dtype=np.float64)
    present = ~np.isnan(np.stack(list(parts.values()))).all(axis=0)
    if present.sum() < 2:
        return np.zeros(len(total), np.float32)
    centred = np.where(present, total - total[present].mean(), 0)
    return (centred / (total[present].std(ddof=1) + ADVANTAGE_EPSILON)).astype(np.float32)


# Batches


def bucket(size: int, limit: int) -> int:
    """`size` rounded up to a multiple of limit/8, at least one, so that few shapes are ever compiled."""
    step = max(SMALLEST_STEP, -(-limit // BUCKETS))
    return min(limit, max(1, -(-size // step)) * step)


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
        rollout_logprobs=None,
    )


def pad_rows(batch: Batch, multiple: int) -> Batch:
    """Adds rows of completion length 0 until `multiple` divides them."""
    missing = -len(batch.tokens) % multiple

    def pad(x):
        return np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))

    padded = jax.tree.map(pad, batch)
    padded.prompt_lengths[len(batch.tokens) :] = 1
    return padded


# The loss


def upper_clip(options: LossOptions) -> float:
    return options.epsilon if options.epsilon_high is None else options.epsilon_high


def surrogate(options: LossOptions, ratio: Array, advantages: Array, logprobs: Array) -> Float[Array, "B C"]:
    """Every token's loss before weights, correction and KL penalty."""
    if options.loss_type == "cispo":
        return losses.cispo_loss(ratio, advantages, logprobs, upper_clip(options))
    return losses.clipped_loss(ratio, advantages, options.epsilon, upper_clip(options), options.delta)


def clipped_tokens(options: LossOptions, ratio: Array, advantages: Array) -> tuple[Array, Array]:
    """Where the clip, below and above, takes the token's gradient away; for cispo, where its cap holds."""
    if options.loss_type == "cispo":
        return jnp.zeros(ratio.shape, bool), (ratio > upper_clip(options)) & (advantages > 0)
    return (ratio < 1 - options.epsilon) & (advantages < 0), (ratio > 1 + upper_clip(options)) & (advantages > 0)


def policy_loss(
    options: LossOptions, batch: Batch, weights: Array, logprobs: Array, entropy: Array
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """The batch's share of the loss, and sums over its completion tokens of what the metrics report."""
    mask = batch.completion_mask
    counted = mask.astype(jnp.float32)
    old = jax.lax.stop_gradient(logprobs) if batch.old_logprobs is None else batch.old_logprobs
    log_ratio = losses.LOG_RATIOS[options.importance_sampling_level](jnp.where(mask, logprobs - old, 0), counted)
    ratio = jnp.exp(log_ratio)
    advantages = batch.advantages[:, None]
    recorded = old if batch.rollout_logprobs is None else batch.rollout_logprobs
    mismatch = jnp.where(mask, old - recorded, 0)
    correct = losses.CORRECTIONS[options.rollout_correction]
    loss = surrogate(options, ratio, advantages, logprobs) * correct(mismatch, counted, options.rollout_correction_cap)
    ref = logprobs if batch.ref_logprobs is None else jnp.where(mask, batch.ref_logprobs, logprobs)
    kl = losses.KL_ESTIMATORS[options.kl_estimator](logprobs, ref)
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
    sums = jnp.where(mask, jnp.stack(list(per_token.values())), 0).sum(axis=(1, 2))
    largest = {"sampling/sampling_logp_difference/max": jnp.abs(mismatch).max()}
    share = (jnp.where(mask, loss, 0) * weights).sum()
    return share, {"sums": dict(zip(per_token, sums, strict=True)), "largest": largest}


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
    weigh: Callable[[Float[Array, "B C"], Int[Array, ""]], Float[Array, "B C"]]
    """Loss mask of the whole batch and its number of completions -> weight of every token in the loss."""
    parts: int
    """gradient_accumulation_steps: the batch is computed in this many parts, which changes no number."""
    dropout_seed: int | None = None
    """Seed of the adapters' dropout; None is no dropout."""


def score(
    trainer: Trainer, params: Params, batch: Batch, dropout: Array | None = None
) -> tuple[Float[Array, "B C"], Float[Array, "B C"]]:
    """Log-probs and entropy of the completions under `params`, with adapter dropout if it has a key per sequence."""
    model = nnx.merge(trainer.graph, params)
    policy = CHECKPOINT_POLICIES[trainer.remat]
    remat = unchanged if policy is None else functools.partial(jax.checkpoint, policy=policy)
    packed, head = batch.packed, model.head_weights()
    positions = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]), batch.tokens.shape)
    attend = attend_on(trainer.head.mesh)
    if packed is not None:
        positions, attend = packed.positions, attend_on(trainer.head.mesh, packed.rows)
    hidden, _ = model(batch.tokens, positions, attend, None, trainer.layout, remat, dropout=dropout)
    if packed is None:
        return completion_logprobs(trainer.head, hidden, head, batch.prompt_lengths, batch.completions)
    standing = stand_in_rows(trainer.head.mesh, hidden, packed.rows).reshape(len(packed.scored), -1, hidden.shape[2])
    logprobs, entropy = logprobs_after(trainer.head, standing, head, packed.scored, packed.targets)
    sequences = functools.partial(of_sequences, packed, batch.completions.shape[1])
    return sequences(logprobs), sequences(entropy)


def of_sequences(packed: Packed, length: int, scores: Float[Array, "S C"]) -> Float[Array, "B L"]:
    """Sheets' scores by sequence, `length` of each; those past a completion's end mean nothing."""
    sheets, most = scores.shape
    places = packed.starts.reshape(sheets, -1, 1) + jnp.arange(length)
    places = jnp.minimum(places, most - 1).reshape(sheets, -1)
    return take_inside(scores, places).reshape(-1, length)


def in_parts(trainer: Trainer, tree: Any) -> Any:
    """[B, ...] arrays -> [parts, B/parts, ...], each part spread over every device without moving a row."""
    devices = trainer.head.mesh.size

    def split(x):
        rows = x.reshape(devices, trainer.parts, -1, *x.shape[1:]).swapaxes(0, 1)
        return rows.reshape(trainer.parts, -1, *x.shape[1:])

    return jax.tree.map(split, tree)


def parts_used(trainer: Trainer, lengths: Int[Array, "P B"]) -> int | Array:
    """Parts up to the last one with a completion; the only one is always computed."""
    if trainer.parts == 1:
        return 1
    return jnp.max(jnp.where((lengths > 0).any(axis=1), jnp.arange(1, trainer.parts + 1), 0))


def from_parts(trainer: Trainer, x: Array) -> Array:
    """The inverse of `in_parts`."""
    rows = x.reshape(trainer.parts, trainer.head.mesh.size, -1, *x.shape[2:]).swapaxes(0, 1)
    return rows.reshape(-1, *x.shape[2:])


@functools.partial(jax.jit, static_argnums=0)
def batch_logprobs(trainer: Trainer, params: Params, batch: Batch) -> Float[Array, "B C"]:
    """Log-probs of the batch's completions: the reference and the old-policy pass."""
    parts = in_parts(trainer, batch)

    def fill(index, scored):
        logprobs, _ = score(trainer, params, jax.tree.map(lambda x: x[index], parts))
        return scored.at[index].set(logprobs)

    empty = jnp.zeros(parts.completions.shape, jnp.float32)
    scored = jax.lax.fori_loop(0, parts_used(trainer, parts.completion_lengths), fill, empty)
    return jax.lax.with_sharding_constraint(from_parts(trainer, scored), by_sequence(trainer.head.mesh))


def dropout_keys(trainer: Trainer, updates: Array, rows: int) -> Array | None:
    """A key per sequence, fixed by the seed, the update and the row."""
    if trainer.dropout_seed is None:
        return None
    key = jax.random.fold_in(jax.random.key(trainer.dropout_seed), DROPOUT)
    return jax.random.split(jax.random.fold_in(key, updates), rows)


@functools.partial(jax.jit, static_argnums=0)
def gradients(
    trainer: Trainer, params: Params, updates: Int[Array, ""], batch: Batch, frozen: Params
) -> tuple[Float[Array, ""], Params, dict[str, Array]]:
    """The batch's loss, its gradient, laid out like `params`, and metrics. Denominators are those of the whole batch.

    `updates` have been applied so far; `frozen` are the weights that are not trained: the base model under adapters, {}
    otherwise.
    """
    weights = trainer.weigh(batch.loss_mask, (batch.completion_lengths > 0).sum())

    def part_loss(params, part):
        batch, weights, keys = part
        logprobs, entropy = score(trainer, join(params, frozen), batch, keys)
        return trainer.objective(batch, weights, logprobs, entropy)

    keys = dropout_keys(trainer, updates, len(batch.tokens))
    parts = in_parts(trainer, (batch, weights, keys))

    def accumulate(index, total):
        part = jax.tree.map(lambda x: x[index], parts)
        (loss, aux), grads = jax.value_and_grad(part_loss, has_aux=True)(params, part)
        summed = jax.tree.map(jnp.add, total[0], (loss, aux["sums"], grads))
        return summed, jax.tree.map(jnp.maximum, total[1], aux["largest"])

    first = jax.tree.map(lambda x: x[0], parts)
    loss, aux = jax.eval_shape(lambda: part_loss(params, first))
    shapes = (loss, aux["sums"], params), aux["largest"]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    turns = parts_used(trainer, parts[0].completion_lengths)
    (loss, sums, grads), largest = jax.lax.fori_loop(0, turns, accumulate, zeros)
    tokens = jnp.maximum(batch.completion_lengths.sum(), 1)
    means = {name: value / tokens for name, value in sums.items()}
    return loss, like_params(trainer.head.mesh, grads), means | largest


def update(trainer: Trainer, state: TrainState, batch: Batch, frozen: Params) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer step on the batch's loss -> new state, metrics; `state` is used up.

    Two programs, of which only the first depends on the batch's shape: a new shape compiles that one alone.
    """
    loss, grads, metrics = launch(gradients, trainer, state.params, state.updates, batch, frozen)
    state, applied = launch(apply_gradients, trainer.optimizer, state, loss, grads)
    return state, {"loss": loss} | applied | metrics
