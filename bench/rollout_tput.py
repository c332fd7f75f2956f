"""Rollout throughput: `python bench/rollout_tput.py`. The machine's limits first, then ours; last line JSON."""

import dataclasses
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench" / "peers")]

import jax
import jax.numpy as jnp
import numpy as np
from environment import PEERS, last_json, tunix_python
from jax.sharding import Mesh
from train_step import matmul_rate, model_config, peak_mib, stop_tokens

from minigrpo.config import MOST_TOKENS, Options, RolloutOptions, Settings, UsageError, option, parse_mesh, run_command
from minigrpo.model.qwen import ModelConfig, Params, abstract_params
from minigrpo.model.weights import random_params
from minigrpo.planning.cost import Work
from minigrpo.planning.memory import held_bytes
from minigrpo.rollout.generator import Roller, Rollout, spread
from minigrpo.runtime.mesh import check_divisible, make_mesh, start_platform

CPU_COPY_BYTES, COPY_BYTES, COPIES = 1 << 28, 1 << 31, 4
"""Size of the array rewritten to measure the memory's bandwidth, far above any cache, and how often in a row."""


@dataclasses.dataclass(frozen=True)
class BenchOptions(Options):
    """Rollout bench"""

    mesh: str = option("auto", "FSDP,TP mesh; auto is every chip, and 1,1 on the CPU, as in training")
    vocab: int = option(4096, "vocabulary rows", low=16)
    layers: int = option(4, "layers", low=1)
    hidden: int = option(256, "embedding size; the MLP is three times as wide", low=8)
    heads: int = option(8, "query heads", low=1)
    kv_heads: int = option(4, "key-value heads", low=1)
    head_dim: int = option(32, "head size", low=2)
    prompts: int = option(16, "prompts", low=1)
    generations: int = option(1, "completions per prompt", low=1)
    prompt_length: int = option(
        64, "tokens per prompt; lengths are uniform from half of it to it", low=2, high=MOST_TOKENS
    )
    new_tokens: int = option(128, "tokens per completion", low=1, high=MOST_TOKENS)
    mean_length: int = option(0, "mean of geometric completion lengths; 0 gives every completion all new tokens", low=0)
    page_size: int = option(64, "tokens per page", low=1)
    slots: int = option(64, "completions decoded at once per device", low=1)
    pool_pages: int = option(0, "pages per device; 0 holds every slot's worst case", low=0)
    over_time: bool = option(True, "roll out once more, untimed, to see how many slots decode over time")
    repeats: int = option(5, "timed repeats after one warm-up; the median counts", low=1)
    baseline: str = option(
        "none", "a peer to run in turn with ours, each in its own process", choices=("none", "transformers", "tunix")
    )
    tunix_venv: str = option("runs/tunix-venv", "Tunix's own environment, made if it is not there")
    rounds: int = option(2, "turns of each with --baseline", low=1)


def copy_bandwidth() -> float:
    """Bytes read and written per second where a large array is rewritten in place or copied, the best of five each."""
    size = CPU_COPY_BYTES if jax.default_backend() == "cpu" else COPY_BYTES
    x = jnp.ones((size >> 12, 1 << 10), jnp.float32)
    rewrite = jax.jit(lambda x: jax.lax.fori_loop(0, COPIES, lambda _, x: x + 1, x), donate_argnums=0)
    copy, seconds, x = jax.jit(jnp.copy), [], jax.block_until_ready(rewrite(x))
    jax.block_until_ready(copy(x))
    for _ in range(5):
        took, x = timed(lambda x=x: jax.block_until_ready(rewrite(x)))
        seconds += [took / COPIES, timed(lambda x=x: jax.block_until_ready(copy(x)))[0]]
    return 2 * size / min(seconds)


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
    if options.mesh != "auto":
        parse_mesh(options.mesh)  # before the peer takes its time
    own = ("baseline", "rounds", "tunix_venv", "over_time")
    given = {name: value for name, value in dataclasses.asdict(options).items() if name not in own}
    flags = ["--over_time=false", *(f"--{name}={value}" for name, value in given.items())]
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


@dataclasses.dataclass(frozen=True)
class Job:
    """The prompts, the model and its settings."""

    options: BenchOptions
    mesh: Mesh
    dtype: jnp.dtype
    config: ModelConfig
    params: Params
    prompts: list[list[int]]
    stops: tuple[int, ...]

    @property
    def completions(self) -> int:
        return self.options.prompts * self.options.generations

    def roller(self, new_tokens: int, watch: Callable | None = None) -> Roller:
        options = self.options
        rollout = RolloutOptions(
            max_completion_length=new_tokens,
            temperature=1.0,
            page_size=options.page_size,
            slots=options.slots,
            pool_pages=options.pool_pages,
        )
        return Roller(self.config, self.mesh, self.dtype, rollout, options.vocab, self.stops, watch, spread_cpu=True)

    def generate(self, roller: Roller, step: int) -> Rollout:
        return roller(self.params, self.prompts, list(range(self.options.prompts)), self.options.generations, (0, step))

    def devices(self, roller: Roller) -> int:
        """How many the completions are decoded on."""
        return roller.mesh_for(held_bytes(self.params), self.completions).size

    def completions_each(self, devices: int) -> int:
        """A device's completions, those included that an uneven split adds and that decode nothing."""
        empty = [[] for _ in self.prompts]
        rows, group = spread(empty, [0] * len(empty), self.options.generations, devices, 0)
        return len(rows.tokens) // devices * group


def make_job(options: BenchOptions) -> Job:
    mesh, config = make_mesh(options.mesh), model_config(options)
    check_divisible(config.sizes, mesh)
    rng = np.random.default_rng(1)
    sizes = rng.integers(options.prompt_length // 2, options.prompt_length + 1, options.prompts)
    prompts = [rng.integers(3, options.vocab, size).tolist() for size in sizes]
    return Job(
        options=options,
        mesh=mesh,
        dtype=jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16"),
        config=config,
        params=random_params(config, mesh, 0),
        prompts=prompts,
        stops=stop_tokens(options.vocab, options.mean_length),
    )


def occupancy_over_time(job: Job, devices: int, step: int) -> list[float]:
    """Share of a device's slots decoding, by tenths of all devices' steps; the rollout is run once more, untimed."""
    total = job.completions_each(devices)
    shares: list[float] = []

    def watch(completions, positions, tokens):
        shares.append(float((np.asarray(completions) < total).sum()) / min(job.options.slots, total))

    job.generate(job.roller(job.options.new_tokens, watch), step)
    jax.effects_barrier()
    return [round(float(np.mean(part)), 3) for part in np.array_split(shares, 10) if len(part)]


def limit_seconds(job: Job, last: Rollout, bandwidth: float, flop_rate: float) -> tuple[float, float]:
    """What decoding's bytes and the whole rollout's FLOPs take at the machine's rates."""
    options = job.options
    sizes = np.repeat([len(prompt) for prompt in job.prompts], options.generations)
    needed = decode_bytes(job.config, job.dtype.itemsize, last.decode_steps, last.lengths, sizes)
    work = Work(job.config, options.prompts, options.generations, int(sizes.mean()), round(float(last.lengths.mean())))
    return needed / bandwidth, work.rollout_flops() / flop_rate


def describe(report: dict, limits: tuple[float, float], seconds: float, prefill_seconds: float) -> str:
    """The report in words; `limits` are seconds to read weights and cache, and for the products."""
    share, over_time = report["decode_share_of_bandwidth"], report["occupancy_over_time"]
    return (
        f"limit: {limits[0]:.3f} s to read weights and cache at {report['copy_gb_per_s']:.1f} GB/s, "
        f"{limits[1]:.3f} s for the products at {report['matmul_gflop_per_s']:.0f} GFLOP/s\n"
        f"ours:  {seconds:.3f} s, {report['tokens_per_second']:.0f} tokens/s (median of {report['repeats']}), "
        f"{report['share_of_limit']:.0%} of the limit; prefill and first token {prefill_seconds:.3f} s, "
        f"{report['prefill_tokens_per_second']:.0f} prompt tokens/s; "
        f"later tokens {report['decode_tokens_per_second'] or 'too few to time'} per s\n"
        f"decoding alone reads at {'?' if share is None else f'{share:.0%}'} of the copy's rate; "
        f"slots decoding, by tenths of the steps: {' '.join(f'{part:.0%}' for part in over_time) or '?'}; "
        f"{report['peak_mib']:.0f} MiB at the peak\n"
    )


def measure(options: BenchOptions) -> int:
    """Ours in this process: the machine's limits, then the rates and their share of them."""
    start_platform(options.mesh)
    job = make_job(options)
    device, chips = job.mesh.devices.flat[0], job.mesh.size if jax.default_backend() != "cpu" else 1
    roller, prefiller = job.roller(options.new_tokens), job.roller(1)
    devices = job.devices(roller)
    compile_seconds, _ = timed(lambda: job.generate(roller, 0))
    job.generate(prefiller, 0)
    turns = range(1, options.repeats + 1)
    prefill_seconds = statistics.median(timed(lambda i=i: job.generate(prefiller, i))[0] for i in turns)
    runs = [timed(lambda i=i: job.generate(roller, i)) for i in turns]
    peak = peak_mib(device)  # before that of the machine's own limits
    bandwidth, flop_rate = chips * copy_bandwidth(), chips * matmul_rate(job.dtype)
    rates = [float(result.lengths.sum()) / seconds for seconds, result in runs]
    number = sorted(range(options.repeats), key=lambda i: runs[i][0])[options.repeats // 2]
    seconds, last = runs[number]  # the run of median time
    reading, computing = limit_seconds(job, last, bandwidth, flop_rate)
    later, decoding = float(last.lengths.sum()) - job.completions, seconds - prefill_seconds
    share = reading * (1 - 1 / last.decode_steps) / decoding if later and decoding > 0 else None
    over_time = occupancy_over_time(job, devices, number + 1) if options.over_time else []
    report = {
        "bench": "rollout_tput",
        "jax": jax.__version__,
        "device": device.device_kind,
        "devices": devices,
        **dataclasses.asdict(options),
        "copy_gb_per_s": round(bandwidth / 1e9, 2),
        "matmul_gflop_per_s": round(flop_rate / 1e9, 1),
        "limit_seconds": round(max(reading, computing), 6),
        "first_call_seconds": round(compile_seconds, 2),
        "rates": [round(rate, 1) for rate in rates],
        "tokens_per_second": round(statistics.median(rates), 1),
        "tokens_per_second_min": round(min(rates), 1),
        "tokens_per_second_max": round(max(rates), 1),
        "prefill_tokens_per_second": round(sum(map(len, job.prompts)) / prefill_seconds, 1),
        "decode_tokens_per_second": round(later / decoding, 1) if later and decoding > 0 else None,
        "decode_steps": last.decode_steps,
        "decode_share_of_bandwidth": share and round(share, 3),
        "occupancy": round(last.occupancy, 3),
        "occupancy_over_time": over_time,
        "peak_mib": round(peak, 1),
        "share_of_limit": round(max(reading, computing) / seconds, 3),
    }
    sys.stderr.write(describe(report, (reading, computing), seconds, prefill_seconds))
    sys.stdout.write(json.dumps(report) + "\n")
    return 0


if __name__ == "__main__":
    run_command("python bench/rollout_tput.py", __doc__ or "", (BenchOptions,), main)
