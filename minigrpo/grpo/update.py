"""The update: two jitted programs, whose shapes never change. The first computes gradients, the second applies them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from minigrpo.grpo.batch import Batch, PackedBatch, micro_batch
from minigrpo.grpo.logprobs import LMHead, logprobs_after, take_along
from minigrpo.grpo.optimizer import TrainState, apply_gradients, like_params, offload, reload
from minigrpo.kernels.backend import CausalAttention
from minigrpo.kernels.causal_attention import ATTENTION
from minigrpo.model.attention import attend_on, expand_hidden
from minigrpo.model.params import Params, join
from minigrpo.model.qwen import MLP, ComputeSpec, LayerContext, Qwen, unchanged
from minigrpo.runtime.mesh import by_sequence

DROPOUT = 0xD809
"""Folded into the seed for dropout, and for nothing else."""

REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "mlp": jax.checkpoint_policies.save_only_these_names(ATTENTION, MLP),
    "attention": jax.checkpoint_policies.save_only_these_names(ATTENTION),
    "full": jax.checkpoint_policies.nothing_saveable,
}

Objective = Callable[[Batch, Array, Array, Array], tuple[Float[Array, ""], dict[str, Any]]]
"""(batch, weights, logprobs, entropy) -> a share of the loss, and {"sums": ..., "largest": ..., "tokens": ...}.

Sums and maxima are for metrics; "tokens" are numbers of every token, [B, C] each."""


@dataclasses.dataclass(frozen=True)
class UpdateSpec:
    """Everything static about log-probs and updates."""

    model: Qwen
    head: LMHead
    compute: ComputeSpec
    causal_attention: CausalAttention
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    objective: Objective
    token_weights: Callable[[Float[Array, "B C"], Int[Array, ""]], Float[Array, "B C"]]
    """Loss mask of the whole batch and its number of completions -> weight of every token in the loss."""
    remat: str = "full"
    dropout_seed: int | None = None
    """Seed of the adapters' dropout; None is no dropout."""
    offload_optimizer: bool = False
    """The state's moments are in the host's memory between updates."""


def completion_logprobs(
    spec: UpdateSpec, params: Params, packed: PackedBatch, dropout: Array | None = None
) -> tuple[Float[Array, "B C"], Float[Array, "B C"]]:
    """Compute log-probs and entropy of a micro-batch's completions, with adapter dropout if there is a key per row."""
    mesh, policy = spec.head.mesh, REMAT_POLICIES[spec.remat]
    context = LayerContext(
        attend=attend_on(mesh, spec.causal_attention, packed.segment_ids, packed.shared_prefix),
        compute=spec.compute,
        dropout=dropout,
        remat=unchanged if policy is None else functools.partial(jax.checkpoint, policy=policy),
    )
    hidden, _ = spec.model(params, packed.tokens, packed.position_ids, context)
    rows = expand_hidden(mesh, hidden, packed.shared_prefix).reshape(len(packed.targets), -1, hidden.shape[2])
    wanted = packed.loss_positions, packed.targets, packed.cutoffs
    logprobs, entropy = logprobs_after(spec.head, rows, spec.model.head(params), *wanted)
    return by_completion(packed, logprobs), by_completion(packed, entropy)


def by_completion(packed: PackedBatch, values: Float[Array, "A S"]) -> Float[Array, "B C"]:
    """Arrange a micro-batch's values by completion; those past a completion's end are meaningless."""
    devices, most = values.shape
    length = packed.batch.completions.shape[1]
    positions = packed.starts.reshape(devices, -1, 1) + jnp.arange(length)[None, None]
    return take_along(values, jnp.minimum(positions, most - 1).reshape(devices, -1)).reshape(-1, length)


@functools.partial(jax.jit, static_argnums=0)
def batch_logprobs(spec: UpdateSpec, params: Params, packed: PackedBatch) -> Float[Array, "A M K C"]:
    """Compute log-probs of the batch's completions: the reference and the old-policy pass."""
    shape = packed.batch.completions.shape

    def fill(index: Array, found: Array) -> Array:
        logprobs, _ = completion_logprobs(spec, params, micro_batch(packed, index))
        return found.at[:, index].set(logprobs.reshape(shape[0], *shape[2:]))

    found = jax.lax.fori_loop(0, packed.micro_batches, fill, jnp.zeros(shape, jnp.float32))
    return jax.lax.with_sharding_constraint(found, by_sequence(spec.head.mesh))


def dropout_keys(spec: UpdateSpec, updates: Int[Array, ""], packed: PackedBatch) -> Array | None:
    """Return a key per row, fixed by the seed, the update and the sequence in the row."""
    if spec.dropout_seed is None:
        return None
    key = jax.random.fold_in(jax.random.key(spec.dropout_seed), DROPOUT)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.fold_in(key, updates), packed.order)


def weigh_tokens(spec: UpdateSpec, batch: Batch) -> Float[Array, "A M K C"]:
    """Return the weight of every token in the loss. Denominators are the whole batch's."""
    mask = batch.loss_mask
    weights = spec.token_weights(mask.reshape(-1, mask.shape[-1]), (batch.completion_lengths > 0).sum())
    return weights.reshape(mask.shape)


@functools.partial(jax.jit, static_argnums=0)
def gradients(
    spec: UpdateSpec, params: Params, updates: Int[Array, ""], packed: PackedBatch, frozen: Params
) -> tuple[Float[Array, ""], Params, dict[str, Array], dict[str, Float[Array, "A M K C"]]]:
    """Compute the batch's loss, its gradient, metrics, and the objective's numbers of every token.

    Micro-batches are taken one at a time. The gradient is laid out like `params`; `updates` have been applied so far;
    `frozen` are the weights that are not trained: the base model under adapters, {} otherwise.
    """
    weights = weigh_tokens(spec, packed.batch)

    def part_loss(params: Params, index: Array | int) -> tuple[Array, dict[str, Any]]:
        part, own = micro_batch(packed, index), weights[:, index].reshape(-1, weights.shape[-1])
        own_params, keys = join(params, frozen), dropout_keys(spec, updates, part)
        logprobs, entropy = completion_logprobs(spec, own_params, part, keys)
        return spec.objective(part.batch, own, logprobs, entropy)

    def accumulate(index: Array, total: Any) -> Any:
        (loss, aux), grads = jax.value_and_grad(part_loss, has_aux=True)(params, index)
        summed = jax.tree.map(jnp.add, total[0], (loss, aux["sums"], grads))
        largest = jax.tree.map(jnp.maximum, total[1], aux["largest"])
        own = {name: value.reshape(shape[0], *shape[2:]) for name, value in aux["tokens"].items()}
        return summed, largest, {name: total[2][name].at[:, index].set(value) for name, value in own.items()}

    shape = packed.batch.completions.shape
    loss, aux = jax.eval_shape(lambda: part_loss(params, 0))
    tokens = dict.fromkeys(aux["tokens"], jax.ShapeDtypeStruct(shape, jnp.float32))
    shapes = (loss, aux["sums"], params), aux["largest"], tokens
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (loss, sums, grads), largest, tokens = jax.lax.fori_loop(0, packed.micro_batches, accumulate, zeros)
    count = jnp.maximum(packed.batch.completion_lengths.sum(), 1)
    means = {name: value / count.astype(value.dtype) for name, value in sums.items()}
    tokens = jax.lax.with_sharding_constraint(tokens, by_sequence(spec.head.mesh))
    return loss, like_params(spec.head.mesh, grads), means | largest, tokens


def update(
    spec: UpdateSpec, state: TrainState, packed: PackedBatch, frozen: Params
) -> tuple[TrainState, dict[str, Array], dict[str, Float[Array, "A M K C"]]]:
    """Take one optimizer step on the batch's loss -> new state, metrics, numbers of every token; `state` is donated."""
    loss, grads, metrics, tokens = gradients(spec, state.params, state.updates, packed, frozen)
    if spec.offload_optimizer:
        jax.block_until_ready(grads)  # whose scratch is freed before the moments come
        state = reload(state)
    state, applied = apply_gradients(spec.optimizer, spec.schedule, state, loss, grads)
    if spec.offload_optimizer:
        state = offload(state)
    return state, {"loss": loss} | applied | metrics, tokens
