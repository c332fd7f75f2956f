"""Rollout throughput: `python bench/rollout_tput.py`. The machine's limit first, then ours; last line JSON."""

import dataclasses
import json
import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench" / "peers")]

import jax
import jax.numpy as jnp
import numpy as np
from environment import PEERS, last_json, tunix_python
from train_step import model_config

from minigrpo.config import Options, RolloutOptions, Settings, UsageError, option, parse_mesh, run_command
from minigrpo.model import ModelConfig, abstract_params
from minigrpo.rollout import Roller
from minigrpo.sharding import make_mesh, start_platform
from minigrpo.weights import random_params

COPY_BYTES = 1 << 28
"""Size of the array copied to measure the memory's bandwidth: far above any cache."""


@dataclasses.dataclass(frozen=True)
class BenchOptions(Options):
    """Rollout bench"""

    mesh: str = option("1,1", "FSDP,TP mesh")
    vocab: int = option(4096, "vocabulary rows", low=16)
    layers: int = option(4, "layers", low=1)
    hidden: int = option(256, "embedding size; the MLP is three times as wide", low=8)
    heads: int = option(8, "query heads", low=1)
    kv_heads: int = option(4, "key-value heads", low=1)
    head_dim: int = option(32, "head size", low=2)
    prompts: int = option(16, "prompts", low=1)
    generations: int = option(1, "completions per prompt", low=1)
    prompt_length: int = option(64, "tokens per prompt; lengths are uniform from half of it to it", low=2)
    new_tokens: int = option(128, "tokens per completion", low=1)
    mean_length: int = option(0, "mean of geometric completion lengths; 0 gives every completion all new tokens", low=0)
    page_size: int = option(64, "tokens per page", low=1)
    slots: int = option(64, "completions decoded at once per device", low=1)
    repeats: int = option(5, "timed repeats after one warm-up; the median counts", low=1)
    baseline: str = option(
        "none", "a peer to run in turn with ours, each in its own process", choices=("none", "transformers", "tunix")
    )
    tunix_venv: str = option("runs/tunix-venv", "Tunix's own environment, made if it is not there")
    rounds: int = option(2, "turns of each with --baseline", low=1)


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy of a large array, best of five."""
    x = jnp.ones(COPY_BYTES // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    jax.block_until_ready(copy(x))
    return 2 * COPY_BYTES / min(timed(lambda: jax.block_until_ready(copy(x)))[0] for _ in range(5))


def timed(call):
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def decode_bytes(config: ModelConfig, item: int, steps: int, lengths: np.ndarray, prompt_lengths: np.ndarray) -> float:
    """Bytes decoding must read: the weights once per step, and every sequence's keys and values once per token."""
    weights = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(abstract_params(config)[1])) * item
    row = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers * item
    context = lengths * prompt_lengths + lengths * (lengths + 1) / 2
    return steps * weights + row * float(context.sum())


def run_transformers(options: BenchOptions, shape: dict) -> dict:
    if options.mean_length:
        raise UsageError(f"--mean_length={options.mean_length}: transformers decodes fixed lengths here; leave it at 0")
    return last_json(sys.executable, str(PEERS / "transformers_generate.py"), json.dumps(shape))


def run_tunix(options: BenchOptions, shape: dict) -> dict:
    python = tunix_python(options.tunix_venv)
    return last_json(python, str(PEERS / "tunix_run.py"), json.dumps(shape | {"mode": "rollout"}))


BASELINES = {"transformers": run_transformers, "tunix": run_tunix}


def compare(options: BenchOptions) -> int:
    """Ours and the peer in turn on the same shapes; medians, and their ratio."""
    own = ("baseline", "rounds", "tunix_venv")
    given = {name: value for name, value in dataclasses.asdict(options).items() if name not in own}
    flags = [f"--{name}={value}" for name, value in given.items()]
    ours, theirs = [], []
    for _ in range(options.rounds):
        theirs += BASELINES[options.baseline](options, given)["rates"]
        ours += last_json(sys.executable, __file__, *flags)["rates"]
    report = {
        "bench": "rollout_tput",
        "jax": jax.__version__,
        **dataclasses.asdict(options),
        "ours_tokens_per_second": round(statistics.median(ours), 1),
        "baseline_tokens_per_second": round(statistics.median(theirs), 1),
        "ratio": round(statistics.median(ours) / statistics.median(theirs), 3),
    }
    sys.stderr.write(
        f"ours {report['ours_tokens_per_second']:.0f}, {options.baseline} "
        f"{report['baseline_tokens_per_second']:.0f} tokens/s: {report['ratio']:.2f} times\n"
    )
    sys.stdout.write(json.dumps(report) + "\n")
    return 0


def main(settings: Settings) -> int:
    options: BenchOptions = settings[BenchOptions]
    return measure(options) if options.baseline == "none" else compare(options)


def measure(options: BenchOptions) -> int:
    """Ours in this process: the machine's limit, then the rate and its share of it."""
    parse_mesh(options.mesh)
    start_platform(options.mesh)
    mesh = make_mesh(options.mesh)
    dtype = jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
    config = model_config(options)
    params = random_params(config, mesh, 0)
    rng = np.random.default_rng(1)
    sizes = rng.integers(options.prompt_length // 2, options.prompt_length + 1, options.prompts)
    prompts = [rng.integers(3, options.vocab, size).tolist() for size in sizes]
    ends = max(1, round(options.vocab / options.mean_length)) if options.mean_length else 0
    stops = tuple(range(options.vocab - ends, options.vocab)) if ends else (options.vocab,)
    rollout = RolloutOptions(
        max_completion_length=options.new_tokens, temperature=1.0, page_size=options.page_size, slots=options.slots
    )
    roller = Roller(config, mesh, dtype, rollout, options.vocab, stops)

    def generate(step: int):
        return roller(params, prompts, list(range(options.prompts)), options.generations, (0, step))

    bandwidth = copy_bandwidth()
    compile_seconds, _ = timed(lambda: generate(0))
    runs = [timed(lambda i=i: generate(i)) for i in range(1, options.repeats + 1)]
    rates = [float(result.lengths.sum()) / seconds for seconds, result in runs]
    seconds, last = runs[-1]
    needed = decode_bytes(
        config, dtype.itemsize, last.decode_steps, last.lengths, np.repeat(sizes, options.generations)
    )
    report = {
        "bench": "rollout_tput",
        "jax": jax.__version__,
        "device": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
        **{name: value for name, value in dataclasses.asdict(options).items() if name != "mesh"},
        "copy_gb_per_s": round(bandwidth / 1e9, 2),
        "limit_seconds": round(needed / bandwidth, 4),
        "first_call_seconds": round(compile_seconds, 2),
        "rates": [round(rate, 1) for rate in rates],
        "tokens_per_second": round(statistics.median(rates), 1),
        "tokens_per_second_min": round(min(rates), 1),
        "tokens_per_second_max": round(max(rates), 1),
        "decode_steps": last.decode_steps,
        "occupancy": round(last.occupancy, 3),
        "share_of_limit": round(needed / bandwidth / seconds, 3),
    }
    sys.stderr.write(
        f"limit: {needed / 1e9:.2f} GB to read at {bandwidth / 1e9:.1f} GB/s is {needed / bandwidth:.3f} s\n"
        f"ours:  {seconds:.3f} s, {report['tokens_per_second']:.0f} tokens/s (median of {options.repeats}), "
        f"{report['share_of_limit']:.0%} of the limit\n"
    )
    sys.stdout.write(json.dumps(report) + "\n")
    return 0


if __name__ == "__main__":
    run_command("python bench/rollout_tput.py", __doc__ or "", (BenchOptions,), main)
