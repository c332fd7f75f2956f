"""How many parts an update is computed in, from counted bytes and the device's memory."""

from typing import Any

import jax

from minigrpo.build import Programs
from minigrpo.config import DataOptions, OptimizerOptions, RolloutOptions, StepOptions, UsageError
from minigrpo.model.attention import QUERY_BLOCK, fused_on_gpu
from minigrpo.model.qwen import ModelConfig, abstract_params
from minigrpo.rollout.generator import decode_config
from minigrpo.runtime.chips import GIB

CPU_BUDGET = 1 << 30
"""Bytes of activations that all virtual CPU devices may hold together."""

DEVICE_SHARE = 0.2
"""Share of an accelerator's memory given to activations; the rest is for weights, optimizer, gradients and the head."""

FULL, HALF, POOL, SMALL_CHIP = 0.9, 0.45, 0.25, int(14.5 * GIB)
"""What a rollout fills by itself: most of a small chip, about half of a large one, or a pool of a quarter of it."""

SCRATCH = GIB // 4
"""Bytes left for a rollout's temporaries."""


def working_numbers(config: ModelConfig) -> int:
    """Numbers per token that one layer's backward pass works on."""
    heads = config.num_attention_heads * config.head_dim
    return 6 * config.hidden_size + 4 * heads + 4 * config.intermediate_size


def saved_bytes(programs: Programs, length: int) -> int:
    """Counted bytes that one sequence of `length` tokens keeps from the forward to the backward pass."""
    config = programs.config
    working = working_numbers(config)
    with_attention = config.hidden_size + config.num_attention_heads * config.head_dim
    with_mlp = with_attention + 2 * config.intermediate_size
    kept = {"none": working, "dots": working, "mlp": with_mlp, "attention": with_attention, "full": config.hidden_size}
    saved = kept[programs.settings[OptimizerOptions].remat]
    return length * programs.dtype.itemsize * config.num_hidden_layers * saved


def activation_bytes(programs: Programs, length: int) -> int:
    """Counted bytes that one sequence of `length` tokens holds during the backward pass.

    The TPU compiler keeps about as many bytes of a layer's numbers as if all were float32, the GPU's as many as in the
    compute dtype (BUILD_NOTES.md); what the layers save for the backward pass is in the compute dtype.
    """
    width = programs.dtype.itemsize if programs.platform == "gpu" else 4
    working = length * width * working_numbers(programs.config)
    held = saved_bytes(programs, length) + mask_bytes(programs, length)
    return working + held + 3 * score_bytes(programs, length)


def fused_attention(programs: Programs) -> bool:
    on_gpu = programs.platform == "gpu" and fused_on_gpu(programs.config.head_dim, programs.dtype.itemsize)
    return on_gpu or programs.platform == "tpu"


def score_bytes(programs: Programs, length: int) -> int:
    """Bytes of one sequence's attention scores, as many as are held at a time."""
    block = min(QUERY_BLOCK, length) * length
    return 0 if fused_attention(programs) else 4 * programs.config.num_attention_heads * block


def mask_bytes(programs: Programs, length: int) -> int:
    """Bytes of the mask by which cuDNN keeps the sequences of a packed row apart."""
    masked = programs.platform == "gpu" and fused_attention(programs) and programs.arrangement != "apart"
    return programs.dtype.itemsize * length**2 if masked else 0


def device_budget(programs: Programs) -> float:
    if programs.platform == "cpu":
        return CPU_BUDGET / programs.mesh.size
    return DEVICE_SHARE * programs.device_memory


def page_bytes(programs: Programs, page_size: int) -> int:
    """Bytes of one page of the KV cache, all layers together."""
    config = programs.config
    row = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    return page_size * row * programs.dtype.itemsize


def pool_limit(programs: Programs, resident: int) -> int:
    """Most pages that a pool may have on its own account: what a chip has left beside weights and `resident` bytes.

    A pool below the worst case slows down only when completions get long, so it is kept small where memory is not
    scarce: --pool_pages asks for more. 0 is no limit, on the CPU.
    """
    if programs.platform == "cpu":
        return 0
    whole = jax.tree.leaves(abstract_params(decode_config(programs.config), programs.dtype)[1])
    used = resident + sum(leaf.size * leaf.dtype.itemsize for leaf in whole) + SCRATCH
    total, page_size = programs.device_memory, programs.settings[RolloutOptions].page_size
    modest = max(max(HALF * total, SMALL_CHIP) - used, POOL * total)
    return max(1, int(min(modest, FULL * total - used) // page_bytes(programs, page_size)))


def held_bytes(tree: Any) -> int:
    """Bytes of one device's share of arrays."""
    return sum(shard.data.nbytes for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards[:1])


def longest(programs: Programs) -> int:
    """Tokens of the longest sequence that the flags allow."""
    return programs.settings[DataOptions].max_prompt_length + programs.settings[RolloutOptions].max_completion_length


def sequences_per_part(programs: Programs) -> int:
    """Most sequences that --gradient_accumulation_steps=auto gives a device in one part of an update."""
    return max(1, int(device_budget(programs) // activation_bytes(programs, longest(programs))))


def update_rows(programs: Programs) -> int:
    """Sequences of one update: those of a step, or of one of its minibatches."""
    steps = programs.settings[StepOptions]
    return steps.batch_size * steps.num_generations // steps.num_minibatches


def choose_parts(programs: Programs) -> int:
    """--gradient_accumulation_steps, or for auto the fewest equal parts whose activations fit the device."""
    flag = programs.settings[StepOptions].gradient_accumulation_steps
    if flag != "auto":
        if not flag.isdigit() or int(flag) < 1:
            raise UsageError(f"--gradient_accumulation_steps={flag}: must be auto or a whole number of at least 1")
        return int(flag)
    own, fitting = -(-update_rows(programs) // programs.mesh.size), sequences_per_part(programs)
    return next(parts for parts in range(1, own + 1) if own % parts == 0 and own // parts <= fitting)
