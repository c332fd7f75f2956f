"""Memory of a run by arithmetic: micro-batches, the page pool, and GPUs' needs, which no compiler here counts.

The TPU's own needs are the compiler's word (`minigrpo.plan`).
"""

import dataclasses
import math
from typing import Any

import jax

from minigrpo.config import UsageError
from minigrpo.grpo.batch import SEQUENCES_PER_ROW, PackingSpec
from minigrpo.kernels.causal_attention import gpu as gpu_attention
from minigrpo.kernels.causal_attention.xla import QUERY_BLOCK
from minigrpo.model.hub import placed
from minigrpo.model.params import ModelConfig, Params, split_trainable
from minigrpo.model.qwen import abstract_params
from minigrpo.planning.cost import Work
from minigrpo.planning.run_spec import RunSpec
from minigrpo.runtime.chips import GIB
from minigrpo.runtime.mesh import HOST_MEMORY, TP

CPU_BUDGET = 1 << 30
"""Bytes of activations that all virtual CPU devices may hold together."""

ACTIVATION_SHARE = 0.2
"""Share of an accelerator's memory given to activations; the rest is for weights, optimizer, gradients and the head."""

ROLLOUT_SHARE = 0.9
"""Share of an accelerator's memory that a rollout may fill, everything resident included."""

ROLLOUT_SCRATCH = GIB // 4
"""Bytes left for a rollout's temporaries."""

SAMPLING_COPIES = 3
"""Float32 arrays of [slots, vocabulary] that sampling works on."""

GATHERED_LAYERS = 2
"""Layers whose weights are whole on a device at once: one in use, one arriving."""


# Activations


def working_numbers(config: ModelConfig) -> int:
    """Count the numbers per token in the working set of one layer's backward pass."""
    heads = config.num_attention_heads * config.head_dim
    return 6 * config.hidden_size + 4 * heads + 4 * config.intermediate_size


def saved_bytes(spec: RunSpec, length: int) -> int:
    """Count the bytes that one sequence of `length` tokens keeps from the forward to the backward pass."""
    config = spec.config
    working = working_numbers(config)
    with_attention = config.hidden_size + config.num_attention_heads * config.head_dim
    with_mlp = with_attention + 2 * config.intermediate_size
    kept = {"none": working, "dots": working, "mlp": with_mlp, "attention": with_attention, "full": config.hidden_size}
    return length * spec.dtype.itemsize * config.num_hidden_layers * kept[spec.settings.optimizer.remat]


def has_fused_attention(spec: RunSpec) -> bool:
    """Tell if attention holds no scores in memory."""
    on_gpu = spec.platform == "gpu" and gpu_attention.takes(spec.config.head_dim, spec.dtype.itemsize)
    return on_gpu or spec.platform == "tpu"


def score_bytes(spec: RunSpec, length: int) -> int:
    """Count the bytes of one sequence's attention scores, as many as are held at a time."""
    block = min(QUERY_BLOCK, length) * length
    return 0 if has_fused_attention(spec) else 4 * spec.config.num_attention_heads * block


def mask_bytes(spec: RunSpec, length: int) -> int:
    """Count the bytes of the mask by which cuDNN tells the sequences of a packed row from each other."""
    masked = spec.platform == "gpu" and has_fused_attention(spec) and packs(spec)
    return spec.dtype.itemsize * length**2 if masked else 0


def activation_bytes(spec: RunSpec, length: int) -> int:
    """Count the bytes that one sequence of `length` tokens holds during the backward pass.

    The TPU compiler keeps about as many bytes of a layer's numbers as if all were float32, the GPU's as many as in the
    compute dtype (BUILD_NOTES.md#bytes-that-the-tpu-and-gpu-compilers-keep); what the layers save for the backward pass
    is in the compute dtype.
    """
    width = spec.dtype.itemsize if spec.platform == "gpu" else 4
    working = length * width * working_numbers(spec.config)
    return working + saved_bytes(spec, length) + mask_bytes(spec, length) + 3 * score_bytes(spec, length)


def activation_budget(spec: RunSpec) -> float:
    """Return the bytes of activations that one device may hold."""
    if spec.platform == "cpu":
        return CPU_BUDGET / spec.mesh.size
    return ACTIVATION_SHARE * spec.device_bytes


# Micro-batches


def packs(spec: RunSpec) -> bool:
    """Tell if sequences share rows; under dropout, which has a key per row, each has its own."""
    return spec.settings.steps.packing and not spec.dropout


def longest(spec: RunSpec) -> int:
    """Return the tokens of the longest sequence that the flags allow."""
    return spec.settings.data.max_prompt_length + spec.settings.rollout.max_completion_length


def fitting_rows(spec: RunSpec) -> int:
    """Return the most rows of a micro-batch whose activations fit a device."""
    return max(1, int(activation_budget(spec) // activation_bytes(spec, longest(spec))))


def micro_batch_rows(spec: RunSpec, packing: PackingSpec, sequences: int) -> int:
    """Return --gradient_accumulation_steps as rows of a micro-batch; auto keeps a device busy within its memory."""
    flag, own = spec.settings.steps.gradient_accumulation_steps, -(-sequences // spec.mesh.size)
    if flag == "auto":
        row_tokens = packing.packed_share * packing.row_tokens
        busy = max(1, round(spec.backend.micro_batch_tokens / row_tokens))
        most = min(own, busy, int(fitting_rows(spec) / packing.packed_share))
        return -(-own // -(-own // most))  # as even as they can be at full length
    if not flag.isdigit() or int(flag) < 1:
        raise UsageError(f"--gradient_accumulation_steps={flag}: must be auto or a whole number of at least 1")
    return -(-own // int(flag))


def packing_spec(spec: RunSpec, sequences: int, group: int) -> PackingSpec:
    """Return the fixed shape of micro-batches for updates on `sequences` sequences."""
    share = {"auto": spec.backend.share_prefixes, "true": True, "false": False}[spec.settings.steps.share_prompts]
    packing = PackingSpec(
        devices=spec.mesh.size,
        rows=1,
        prompt_tokens=spec.settings.data.max_prompt_length,
        completion_tokens=spec.settings.rollout.max_completion_length,
        group=group,
        sequences_per_row=SEQUENCES_PER_ROW if packs(spec) else 1,
        share_prefixes=share and packs(spec) and group > 1,
    )
    return dataclasses.replace(packing, rows=micro_batch_rows(spec, packing, sequences))


# The rollout


def page_bytes(spec: RunSpec) -> int:
    """Count the bytes of one page of the KV cache, all layers together."""
    config = spec.config
    row = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    return spec.settings.rollout.page_size * row * spec.dtype.itemsize


def pool_limit(spec: RunSpec, resident: int) -> int:
    """Return the most pages that fit beside the decoded weights and `resident` bytes; 0 is no limit, on the CPU."""
    if spec.platform == "cpu":
        return 0
    decoded = jax.tree.leaves(abstract_params(spec.config.decoded, spec.dtype))
    used = resident + sum(leaf.size * leaf.dtype.itemsize for leaf in decoded) + ROLLOUT_SCRATCH
    return max(1, int(ROLLOUT_SHARE * spec.device_bytes - used) // page_bytes(spec))


def device_share_bytes(tree: Any) -> int:
    """Count the bytes of one device's share of arrays, those in the host's memory left out."""
    here = [leaf for leaf in jax.tree.leaves(tree) if leaf.sharding.memory_kind != HOST_MEMORY]
    return sum(shard.data.nbytes for leaf in here for shard in leaf.addressable_shards[:1])


def abstract_share_bytes(tree: Any) -> int:
    """Count the bytes of one device's share of abstract arrays."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# What a device holds from step to step


@dataclasses.dataclass(frozen=True)
class Resident:
    """Bytes of one device that a run holds from step to step."""

    trainable: int
    moments: int
    frozen: int
    reference: int
    """Bytes that the reference needs besides the frozen weights."""

    @property
    def total(self) -> int:
        """Return their sum."""
        return self.trainable + self.moments + self.frozen + self.reference


def count_resident(spec: RunSpec, *, offloaded: bool) -> Resident:
    """Count what stays on a device; offloaded moments do not."""

    def share(shapes: Params) -> int:
        return abstract_share_bytes(placed(spec.mesh, shapes))

    config = spec.config
    trainable = share(split_trainable(config, abstract_params(config))[0])
    weights = abstract_params(config, spec.dtype)
    copied = spec.settings.loss.beta > 0 and not config.lora
    moments = 0 if offloaded else 2 * trainable
    return Resident(trainable, moments, share(split_trainable(config, weights)[1]), share(weights) if copied else 0)


# Scratch memory by arithmetic, for GPUs


def gathered_bytes(spec: RunSpec, work: Work) -> int:
    """Count the bytes of gathered layers."""
    layer = work.layer_weights // spec.config.num_hidden_layers
    return GATHERED_LAYERS * layer * spec.dtype.itemsize


def update_scratch(spec: RunSpec, work: Work, packing: PackingSpec, trainable: int) -> int:
    """Count two gradients, the sum and this micro-batch's, and the larger of the layers' and the head's pass."""
    sizes, tp, length = spec.config.sizes, spec.mesh.shape[TP], longest(spec)
    rows = packing.packed_tokens / length
    chunk = min(spec.backend.head_tiles.backward_rows, packing.loss_tokens)
    head = int(rows * saved_bytes(spec, length)) + 4 * (sizes["V"] // tp) * (sizes["D"] + 2 * chunk * tp)
    layers = int(rows * activation_bytes(spec, length)) + trainable + gathered_bytes(spec, work)
    return trainable + max(layers, head)


def scoring_scratch(spec: RunSpec, work: Work, packing: PackingSpec) -> int:
    """Count the widest of one layer's numbers in a forward pass: the MLP's, or attention's scores and weights."""
    widest = 2 * (spec.config.intermediate_size + spec.config.hidden_size) * spec.dtype.itemsize
    length = longest(spec)
    row = max(length * widest, 2 * score_bytes(spec, length)) + mask_bytes(spec, length)
    return packing.rows * row + gathered_bytes(spec, work)


def rollout_scratch(spec: RunSpec, slots: int, pool: int) -> int:
    """Count the bytes of the page pool, and of sampling over the vocabulary."""
    return pool + 4 * SAMPLING_COPIES * slots * spec.config.vocab_size
