"""Models, prompts and limits of the machine that the step and the rollout bench share."""

import dataclasses
import resource
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from minigrpo.build import device_bytes
from minigrpo.config import MOST_TOKENS, Options, Settings, UsageError, option
from minigrpo.kernels.backend import backend_for
from minigrpo.model.params import ModelConfig
from minigrpo.planning.run_spec import RunSpec

CPU_MATMUL, MATMUL, MATMULS = 2048, 8192, 8
"""Size of the square matmul whose rate counts as the machine's, and how often an accelerator computes it in a row."""


@dataclasses.dataclass(frozen=True)
class ModelShape(Options):
    """Model and sequences"""

    mesh: str = option("auto", "FSDP,TP mesh; auto is every chip, and 1,1 on the CPU, as in training")
    vocab: int = option(4096, "vocabulary rows", low=16)
    layers: int = option(4, "layers", low=1)
    hidden: int = option(256, "embedding size; the MLP is three times as wide", low=8)
    heads: int = option(8, "query heads", low=1)
    kv_heads: int = option(4, "key-value heads", low=1)
    head_dim: int = option(32, "head size", low=2)
    prompt_length: int = option(64, "tokens of the longest prompt", low=2, high=MOST_TOKENS)
    new_tokens: int = option(128, "tokens of the longest completion", low=1, high=MOST_TOKENS)
    repeats: int = option(5, "timed repeats after the warm-up; the median counts", low=1)


@dataclasses.dataclass(frozen=True)
class LengthOptions(Options):
    """Lengths of the completions"""

    mean_length: int = option(
        0, "mean of geometric completion lengths; 0 gives every completion all of --new_tokens", low=0
    )


def model_config(shape: ModelShape) -> ModelConfig:
    """Return a Qwen3 of the flags' sizes; UsageError for sizes that make no model."""
    if shape.heads % shape.kv_heads:
        raise UsageError(f"--heads={shape.heads}: not a multiple of --kv_heads={shape.kv_heads}; make it one")
    if shape.head_dim % 2:
        raise UsageError(f"--head_dim={shape.head_dim}: rotary angles need an even size; add 1")
    return ModelConfig(
        model_type="qwen3",
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=3 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )


def stop_tokens(vocab: int, mean_length: int) -> tuple[int, ...]:
    """Return the tokens that end a completion of random tokens after `mean_length` on average; 0 never ends one."""
    ends = max(1, round(vocab / mean_length)) if mean_length else 0
    return tuple(range(vocab - ends, vocab)) if ends else (vocab,)


def run_spec(shape: ModelShape, mean_length: int, mesh: Mesh, settings: Settings) -> RunSpec:
    """Return the spec of a run of this model, as `minigrpo.train` would make it of `settings`."""
    device = mesh.devices.flat[0]
    return RunSpec(
        settings=settings,
        config=model_config(shape),
        mesh=mesh,
        backend=backend_for(device),
        platform=device.platform,
        device_bytes=device_bytes(device),
        dtype=jnp.dtype("float32" if device.platform == "cpu" else "bfloat16"),
        num_tokens=shape.vocab,
        stop_tokens=stop_tokens(shape.vocab, mean_length),
    )


def matmul_rate(dtype: Any) -> float:
    """Measure the FLOP/s of large matmuls of random numbers, the best of five."""
    on_cpu = jax.default_backend() == "cpu"
    size, turns = (CPU_MATMUL, 1) if on_cpu else (MATMUL, MATMULS)
    x = jax.random.normal(jax.random.key(0), (size, size), dtype) / size**0.5
    multiply = jax.jit(lambda x: jax.lax.fori_loop(0, turns, lambda _, y: y @ x, x))
    jax.block_until_ready(multiply(x))
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        jax.block_until_ready(multiply(x))
        seconds.append(time.perf_counter() - started)
    return 2 * turns * size**3 / min(seconds)


def peak_mib(device: jax.Device) -> float:
    """Return the most memory used so far: the device's where it is known, else the process's."""
    stats = device.memory_stats() or {}
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return float(stats.get("peak_bytes_in_use", process)) / 2**20
