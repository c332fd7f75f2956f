"""How many parts an update is computed in, from counted bytes and the device's memory."""

import jax

from minigrpo.attention import QUERY_BLOCK
from minigrpo.chips import GIB, memory_of_kind
from minigrpo.config import DataOptions, OptimizerOptions, RolloutOptions, StepOptions, UsageError
from minigrpo.model import ModelConfig
from minigrpo.start import Programs

CPU_BUDGET = 1 << 30
"""Bytes of activations that all virtual CPU devices may hold together."""

DEVICE_SHARE = 0.2
"""Share of an accelerator's memory given to activations; the rest is for weights, optimizer, gradients and the head."""


def working_numbers(config: ModelConfig) -> int:
    """Numbers per token that one layer's backward pass works on."""
    heads = config.num_attention_heads * config.head_dim
    return 6 * config.hidden_size + 4 * heads + 4 * config.intermediate_size


def saved_bytes(programs: Programs, length: int) -> int:
    """Counted bytes that one sequence of `length` tokens keeps from the forward to the backward pass."""
    config = programs.config
    working = working_numbers(config)
    with_attention = config.hidden_size + config.num_attention_heads * config.head_dim
    kept = {"none": working, "dots": working, "attention": with_attention, "full": config.hidden_size}
    saved = kept[programs.settings[OptimizerOptions].remat]
    return length * programs.dtype.itemsize * config.num_hidden_layers * saved


def activation_bytes(programs: Programs, length: int) -> int:
    """Counted bytes that one sequence of `length` tokens holds during the backward pass."""
    config = programs.config
    scores = 3 * config.num_attention_heads * min(QUERY_BLOCK, length) * length * 4 if programs.platform != "tpu" else 0
    return length * programs.dtype.itemsize * working_numbers(config) + saved_bytes(programs, length) + scores


def device_bytes(device: jax.Device) -> int:
    """An accelerator's memory; the table's where it is there, so that a run decides as its plan did."""
    known = memory_of_kind(device.device_kind)
    return known or (device.memory_stats() or {}).get("bytes_limit", 16 * GIB)


def device_budget(programs: Programs) -> float:
    if programs.platform == "cpu":
        return CPU_BUDGET / programs.mesh.size
    return DEVICE_SHARE * device_bytes(programs.mesh.devices.flat[0])


def choose_parts(programs: Programs, rows: int) -> int:
    """--gradient_accumulation_steps, or for auto the fewest equal parts whose activations fit the device."""
    flag = programs.settings[StepOptions].gradient_accumulation_steps
    if flag != "auto":
        if not flag.isdigit() or int(flag) < 1:
            raise UsageError(f"--gradient_accumulation_steps={flag}: must be auto or a whole number of at least 1")
        return int(flag)
    length = programs.settings[DataOptions].max_prompt_length
    length += programs.settings[RolloutOptions].max_completion_length
    own = -(-rows // programs.mesh.size)
    fitting = max(1, int(device_budget(programs) // activation_bytes(programs, length)))
    return next(parts for parts in range(1, own + 1) if own % parts == 0 and own // parts <= fitting)
