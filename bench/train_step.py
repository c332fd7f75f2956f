"""Time and memory of whole GRPO steps: `python bench/train_step.py`. The machine's limit first; last line JSON."""

import dataclasses
import functools
import json
import pathlib
import resource
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from minigrpo.build import choose_tiles
from minigrpo.config import (
    MOST_TOKENS,
    LossOptions,
    OptimizerOptions,
    Options,
    RolloutOptions,
    Settings,
    UsageError,
    option,
    run_command,
)
from minigrpo.grpo import losses
from minigrpo.grpo import update as grpo
from minigrpo.grpo.batch import ARRANGEMENTS, place_batch
from minigrpo.grpo.logprobs import Head
from minigrpo.grpo.optimizer import TrainState, init_state, make_optimizer
from minigrpo.model.attention import copying_pays
from minigrpo.model.qwen import ModelConfig, abstract_params
from minigrpo.model.weights import random_params
from minigrpo.planning.cost import Work
from minigrpo.rollout.generator import Roller, Rollout
from minigrpo.runtime.mesh import Layout, check_divisible, make_mesh, start_platform

NO_CHANGE = 1e-30
"""A learning rate at which float32 weights stay as they are."""

CPU_MATMUL, MATMUL, MATMULS = 2048, 8192, 8
"""Size of the square product whose rate counts as the machine's, and how often an accelerator computes it in a row."""


@dataclasses.dataclass(frozen=True)
class ShapeOptions(Options):
    """Step bench"""

    mesh: str = option("1,1", "FSDP,TP mesh")
    vocab: int = option(4096, "vocabulary rows", low=16)
    layers: int = option(4, "layers", low=1)
    hidden: int = option(256, "embedding size; the MLP is three times as wide", low=8)
    heads: int = option(8, "query heads", low=1)
    kv_heads: int = option(4, "key-value heads", low=1)
    head_dim: int = option(32, "head size", low=2)
    prompts: int = option(4, "prompts per step", low=1)
    generations: int = option(4, "completions per prompt", low=2)
    prompt_length: int = option(64, "tokens per prompt", low=2, high=MOST_TOKENS)
    new_tokens: int = option(128, "tokens per completion", low=1, high=MOST_TOKENS)
    remat: str = option("mlp", "what the backward pass recomputes", choices=tuple(grpo.CHECKPOINT_POLICIES))
    repeats: int = option(5, "timed steps after two warm-up steps; the median counts", low=1)


@dataclasses.dataclass(frozen=True)
class LengthOptions(Options):
    """Lengths of the completions"""

    mean_length: int = option(
        0,
        "mean of geometric completion lengths, with prompts of half to all of --prompt_length; 0 gives all full length",
        low=0,
    )
    parts: int = option(1, "parts that the update is computed in", low=1)
    arrangement: str = option(
        "auto",
        "how an update's sequences lie: apart, a row each; rows, several in one; sheets, with shared prompts computed "
        "once; auto as in training",
        choices=("auto", *ARRANGEMENTS),
    )
    sampled: bool = option(True, "sample the completions; false makes them up and times the update alone")


def arrangement_of(lengths: LengthOptions) -> str:
    """--arrangement, or for auto what training does on this platform."""
    if lengths.arrangement != "auto":
        return lengths.arrangement
    return "sheets" if copying_pays(jax.default_backend()) else "rows"


def stop_tokens(vocab: int, mean_length: int) -> tuple[int, ...]:
    """As many of the vocabulary as end a completion of random tokens after `mean_length` on average; 0 never does."""
    ends = max(1, round(vocab / mean_length)) if mean_length else 0
    return tuple(range(vocab - ends, vocab)) if ends else (vocab,)


def model_config(options: ShapeOptions) -> ModelConfig:
    """A Qwen3 of the flags' sizes; UsageError for sizes that make no model."""
    if options.heads % options.kv_heads:
        raise UsageError(f"--heads={options.heads}: not a multiple of --kv_heads={options.kv_heads}; make it one")
    if options.head_dim % 2:
        raise UsageError(f"--head_dim={options.head_dim}: rotary angles need an even size; add 1")
    return ModelConfig(
        model_type="qwen3",
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        head_dim=options.head_dim,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )


def matmul_rate(dtype: jnp.dtype) -> float:
    """FLOP/s of large products of random numbers, the best of five."""
    on_cpu = jax.default_backend() == "cpu"
    size, turns = (CPU_MATMUL, 1) if on_cpu else (MATMUL, MATMULS)
    x = jax.random.normal(jax.random.key(0), (size, size), dtype) / size**0.5
    product = jax.jit(lambda x: jax.lax.fori_loop(0, turns, lambda _, y: y @ x, x))
    jax.block_until_ready(product(x))
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        jax.block_until_ready(product(x))
        seconds.append(time.perf_counter() - started)
    return 2 * turns * size**3 / min(seconds)


def make_trainer(options: ShapeOptions, config: ModelConfig, mesh: Mesh, dtype: jnp.dtype, parts: int) -> grpo.Trainer:
    return grpo.Trainer(
        graph=abstract_params(config)[0],
        head=Head(mesh, options.vocab, 1.0, choose_tiles(mesh)),
        layout=Layout(dtype, mesh),
        remat=options.remat,
        optimizer=make_optimizer(
            OptimizerOptions(learning_rate=NO_CHANGE, lr_schedule="constant", warmup_ratio=0.0), 100
        ),
        objective=functools.partial(grpo.policy_loss, LossOptions(beta=0.0)),
        weigh=functools.partial(losses.token_weights, "grpo", max_tokens=options.new_tokens),
        parts=parts,
    )


class Stepper:
    """A GRPO step on random prompts with a reward that differs inside every group.

    Every step is the same, its lengths included, so that none compiles anew.
    """

    def __init__(self, options: ShapeOptions, lengths: LengthOptions, mesh: Mesh, dtype: jnp.dtype):
        config = model_config(options)
        self.options, self.lengths, self.mesh = options, lengths, mesh
        self.trainer = make_trainer(options, config, mesh, dtype, lengths.parts)
        rollout = RolloutOptions(max_completion_length=options.new_tokens, temperature=1.0)
        stops = stop_tokens(options.vocab, lengths.mean_length)
        self.roller = Roller(config, mesh, dtype, rollout, options.vocab, stops, spread_cpu=True)
        self.state: TrainState = init_state(self.trainer.optimizer, random_params(config, mesh, 0), mesh)

    def completions(self, prompts: list[list[int]], rng: np.random.Generator) -> Rollout:
        """Sampled from the policy, or made up."""
        options = self.options
        if self.lengths.sampled:
            return self.roller(self.state.params, prompts, list(range(options.prompts)), options.generations, (0, 0))
        shape = options.prompts * options.generations, options.new_tokens
        tokens, guessed = rng.integers(3, options.vocab, shape), np.full(shape, -np.log(options.vocab), np.float32)
        return Rollout(tokens, guessed, np.full(shape[0], shape[1]), np.zeros(shape[0], bool), 0, 0.0)

    def __call__(self) -> dict[str, float]:
        """Seconds of the step and of its phases, and how many tokens it sampled."""
        options, rng = self.options, np.random.default_rng(0)
        least = options.prompt_length // 2 if self.lengths.mean_length else options.prompt_length
        sizes = rng.integers(least, options.prompt_length + 1, options.prompts)
        prompts = [rng.integers(3, options.vocab, size).tolist() for size in sizes]
        started = time.perf_counter()
        rollout = self.completions(prompts, rng)
        sampled = time.perf_counter()
        rewards = rollout.tokens.sum(axis=1) % 17 / 17.0
        rows = [prompt for prompt in prompts for _ in range(options.generations)]
        limits = options.prompt_length, options.new_tokens
        batch = grpo.assemble(rows, rollout.tokens, rollout.lengths, limits)
        advantages = grpo.group_advantages(rewards, options.generations, "group")
        recorded = rollout.logprobs[:, : batch.completions.shape[1]]
        batch = dataclasses.replace(batch, advantages=advantages, rollout_logprobs=recorded)
        batch = place_batch(self.mesh, batch, self.trainer.parts, arrangement_of(self.lengths))
        self.state, metrics = jax.block_until_ready(grpo.update(self.trainer, self.state, batch, {}))
        ended = time.perf_counter()
        assert np.isfinite(float(metrics["loss"]))
        seconds = {"step": ended - started, "rollout": sampled - started, "update": ended - sampled}
        return seconds | {"tokens": int(rollout.lengths.sum())}


def peak_mib(device: jax.Device) -> float:
    """Most memory used so far: the device's where it says so, else the process's."""
    stats = device.memory_stats() or {}
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return stats.get("peak_bytes_in_use", process) / 2**20


def main(settings: Settings) -> int:
    options: ShapeOptions = settings[ShapeOptions]
    lengths: LengthOptions = settings[LengthOptions]
    if lengths.mean_length and not lengths.sampled:
        raise UsageError(
            f"--mean_length={lengths.mean_length}: completions that are made up have full length; "
            "leave it at 0 or sample them with --sampled=true"
        )
    start_platform(options.mesh)
    mesh = make_mesh(options.mesh)
    check_divisible(model_config(options).sizes, mesh)
    dtype = jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
    completion = min(lengths.mean_length or options.new_tokens, options.new_tokens)
    prompt = options.prompt_length * 3 // 4 if lengths.mean_length else options.prompt_length  # on average
    shared = arrangement_of(lengths) == "sheets"
    work = Work(model_config(options), options.prompts, options.generations, prompt, completion, shared)
    rate = matmul_rate(dtype) * (1 if jax.default_backend() == "cpu" else mesh.size)
    flops = work.update_flops(options.remat) + (work.rollout_flops() if lengths.sampled else 0)
    sys.stderr.write(f"limit: {flops / 1e9:.1f} GFLOP at {rate / 1e9:.0f} GFLOP/s is {flops / rate:.3f} s a step\n")
    stepper = Stepper(options, lengths, mesh, dtype)
    first = stepper()["step"]
    stepper()
    steps = [stepper() for _ in range(options.repeats)]
    median = {name: statistics.median(step[name] for step in steps) for name in ("step", "rollout", "update")}
    tokens = statistics.median(step["tokens"] for step in steps)
    report = {
        "bench": "train_step",
        "jax": jax.__version__,
        "device": mesh.devices.flat[0].device_kind,
        **dataclasses.asdict(options),
        **dataclasses.asdict(lengths),
        "sequences": work.rows,
        "first_step_seconds": round(first, 3),
        "seconds": [round(step["step"], 4) for step in steps],
        "median_seconds": {name: round(value, 4) for name, value in median.items()},
        "tokens_per_second": round(tokens / median["step"], 1),
        "gflop": round(flops / 1e9, 1),
        "share_of_matmul_rate": round(flops / rate / median["step"], 3),
        "peak_mib": round(peak_mib(mesh.devices.flat[0]), 1),
    }
    sys.stderr.write(
        f"ours:  {median['step']:.3f} s (rollout {median['rollout']:.3f}, update {median['update']:.3f}), "
        f"{report['share_of_matmul_rate']:.0%} of the limit, {report['peak_mib']:.0f} MiB at the peak\n"
    )
    sys.stdout.write(json.dumps(report) + "\n")
    return 0


if __name__ == "__main__":
    run_command("python bench/train_step.py", __doc__ or "", (ShapeOptions, LengthOptions), main)
