"""How many parts an update is computed in, from counted bytes and the device's memory."""

from minigrpo.attention import QUERY_BLOCK
from minigrpo.config import DataOptions, OptimizerOptions, RolloutOptions, StepOptions, UsageError
from minigrpo.start import Setup

CPU_BUDGET = 1 << 30
"""Bytes of activations that all virtual CPU devices may hold together."""

DEVICE_SHARE = 0.5
"""Share of an accelerator's memory given to activations; the rest is for weights, optimizer and the head."""


def activation_bytes(setup: Setup, length: int) -> int:
    """Counted bytes that one sequence of `length` tokens holds during the backward pass."""
    config, item = setup.config, setup.dtype.itemsize
    heads = config.num_attention_heads * config.head_dim
    working = 6 * config.hidden_size + 4 * heads + 4 * config.intermediate_size
    saved = {"none": working, "dots": working, "full": config.hidden_size}[setup.settings[OptimizerOptions].remat]
    scores = 3 * config.num_attention_heads * min(QUERY_BLOCK, length) * length * 4
    return length * item * (working + config.num_hidden_layers * saved) + scores


def device_budget(setup: Setup) -> float:
    device = setup.mesh.devices.flat[0]
    if device.platform == "cpu":
        return CPU_BUDGET / setup.mesh.size
    stats = device.memory_stats() or {}
    return DEVICE_SHARE * stats.get("bytes_limit", 16 << 30)


def choose_parts(setup: Setup, rows: int) -> int:
    """--gradient_accumulation_steps, or for auto the fewest parts whose activations fit the device."""
    flag = setup.settings[StepOptions].gradient_accumulation_steps
    if flag != "auto":
        if not flag.isdigit() or int(flag) < 1:
            raise UsageError(f"--gradient_accumulation_steps={flag}: must be auto or a whole number of at least 1")
        return int(flag)
    length = setup.settings[DataOptions].max_prompt_length + setup.settings[RolloutOptions].max_completion_length
    own = -(-rows // setup.mesh.size)
    fitting = max(1, int(device_budget(setup) // activation_bytes(setup, length)))
    return next(parts for parts in range(1, own + 1) if -(-own // parts) <= fitting or parts == own)
