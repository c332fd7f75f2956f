"""Rollout throughput: `python bench/rollout_tput.py`. The machine's limits first, then ours; last line JSON."""

import dataclasses
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench" / "peers")]

import jax
import jax.numpy as jnp
import numpy as np
from environment import PEERS, last_json, tunix_python
from jaxtyping import Int
from shapes import LengthOptions, ModelShape, matmul_rate, model_config, peak_mib, run_spec

from minigrpo.build import make_generator
from minigrpo.command_line import run_command
from minigrpo.config import DataOptions, Options, RolloutOptions, Settings, UsageError, option, parse_mesh
from minigrpo.model.params import ModelConfig, Params
from minigrpo.model.qwen import abstract_params
from minigrpo.model.weights import random_params
from minigrpo.planning.cost import Work
from minigrpo.planning.memory import device_share_bytes, pool_limit
from minigrpo.planning.run_spec import RunSpec
from minigrpo.rollout.generator import Generator, Rollout, deal_prompts
from minigrpo.runtime.mesh import check_divisible, make_mesh, start_platform

Result = TypeVar("Result")

CPU_COPY_BYTES, COPY_BYTES, COPIES = 1 << 28, 1 << 31, 4
"""Size of the array rewritten to measure the memory's bandwidth, far above any cache, and how often in a row."""


@dataclasses.dataclass(frozen=True)
class RolloutShape(ModelShape):
    """Rollout bench"""

    prompts: int = option(16, "prompts, of lengths uniform from half of --prompt_length to all of it", low=1)
    generations: int = option(1, "completions per prompt", low=1)
    page_size: int = option(64, "tokens per page", low=1)
    slots: str = option("auto", "most completions decoded at once per device; auto is all, where memory allows")
    pool_pages: int = option(0, "pages per device; 0 holds every slot's worst case", low=0)


@dataclasses.dataclass(frozen=True)
class PeerOptions(Options):
    """Measurement"""

    over_time: bool = option(True, "roll out once more, untimed, to see how many slots decode over time")
    baseline: str = option(
        "none", "a peer to run in turn with ours, each in its own process", choices=("none", "transformers", "tunix")
    )
    tunix_venv: str = option("runs/tunix-venv", "Tunix's own environment, made if it is not there")
    rounds: int = option(2, "turns of each with --baseline", low=1)


@dataclasses.dataclass(frozen=True)
class RolloutSettings(Settings):
    """The flags of this bench."""

    shape: RolloutShape = RolloutShape()
    lengths: LengthOptions = dataclasses.field(default_factory=LengthOptions)
    peer: PeerOptions = PeerOptions()


def copy_bandwidth() -> float:
    """Measure the bytes read and written per second by rewriting or copying a large array, the best of five each."""
    size = CPU_COPY_BYTES if jax.default_backend() == "cpu" else COPY_BYTES
    x = jnp.ones((size >> 12, 1 << 10), jnp.float32)
    rewrite = jax.jit(lambda x: jax.lax.fori_loop(0, COPIES, lambda _, x: x + 1, x), donate_argnums=0)
    copy, seconds, x = jax.jit(jnp.copy), [], jax.block_until_ready(rewrite(x))
    jax.block_until_ready(copy(x))
    for _ in range(5):
        took, x = timed(lambda x: jax.block_until_ready(rewrite(x)), x)
        seconds += [took / COPIES, timed(lambda x: jax.block_until_ready(copy(x)), x)[0]]
    return 2 * size / min(seconds)


def timed(call: Callable[..., Result], *arguments: Any) -> tuple[float, Result]:
    """Return a call's seconds and its result."""
    started = time.perf_counter()
    result = call(*arguments)
    return time.perf_counter() - started, result


def decode_bytes(
    config: ModelConfig, item: int, steps: int, lengths: Int[np.ndarray, " B"], prompt_lengths: Int[np.ndarray, " B"]
) -> float:
    """Count the bytes that decoding must read: the weights once per step, every sequence's cache once per token."""
    weights = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(abstract_params(config))) * item
    row = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers * item
    context = lengths * prompt_lengths + lengths * (lengths + 1) / 2
    return steps * weights + row * float(context.sum())


def run_transformers(settings: RolloutSettings, shape: dict[str, Any]) -> dict[str, Any]:
    """Run transformers' `generate` in a process of its own."""
    mean = settings.lengths.mean_length
    if mean:
        raise UsageError(f"--mean_length={mean}: transformers decodes fixed lengths here; leave it at 0")
    return last_json(sys.executable, str(PEERS / "transformers_generate.py"), json.dumps(shape))


def run_tunix(settings: RolloutSettings, shape: dict[str, Any]) -> dict[str, Any]:
    """Run Tunix's sampler in a process of its own."""
    python = tunix_python(settings.peer.tunix_venv)
    return last_json(python, str(PEERS / "tunix_run.py"), json.dumps(shape | {"mode": "rollout"}))


BASELINES = {"transformers": run_transformers, "tunix": run_tunix}


def compare(settings: RolloutSettings) -> int:
    """Run ours and the peer in turn on the same shapes; report medians and their ratio."""
    shape, peer = settings.shape, settings.peer
    if shape.mesh != "auto":
        parse_mesh(shape.mesh)  # before the peer takes its time
    given = dataclasses.asdict(shape) | dataclasses.asdict(settings.lengths)
    flags = ["--over_time=false", *(f"--{name}={value}" for name, value in given.items())]
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(peer.rounds):
        theirs += BASELINES[peer.baseline](settings, given)["rates"]
        ours += last_json(sys.executable, __file__, *flags)["rates"]
    report = {
        "bench": "rollout_tput",
        "jax": jax.__version__,
        **settings.as_dict(),
        "ours_tokens_per_second": round(statistics.median(ours), 1),
        "baseline_tokens_per_second": round(statistics.median(theirs), 1),
        "ratio": round(statistics.median(ours) / statistics.median(theirs), 3),
    }
    sys.stderr.write(
        f"ours {report['ours_tokens_per_second']:.0f}, {peer.baseline} "
        f"{report['baseline_tokens_per_second']:.0f} tokens/s: {report['ratio']:.2f} times\n"
    )
    sys.stdout.write(json.dumps(report) + "\n")
    return 0


def main(settings: RolloutSettings) -> int:
    """Measure ours, beside a peer if one is asked for."""
    return measure(settings) if settings.peer.baseline == "none" else compare(settings)


@dataclasses.dataclass(frozen=True)
class Job:
    """The prompts, the model and its settings."""

    shape: RolloutShape
    run: RunSpec
    params: Params
    prompts: list[list[int]]

    @property
    def completions(self) -> int:
        """Return the number of completions of all prompts."""
        return self.shape.prompts * self.shape.generations

    def generator(self, new_tokens: int, on_token: Callable[[Any, Any, Any], None] | None = None) -> Generator:
        """Return a generator of at most `new_tokens` tokens, with the pool that memory allows."""
        options = dataclasses.replace(self.run.settings.rollout, max_completion_length=new_tokens)
        return make_generator(self.run, options, pool_limit(self.run, device_share_bytes(self.params)), on_token)

    def generate(self, generator: Generator, step: int) -> Rollout:
        """Roll out once."""
        shape = self.shape
        return generator(self.params, self.prompts, list(range(shape.prompts)), shape.generations, (0, step))

    def slots(self, generator: Generator) -> tuple[int, int]:
        """Return a device's completions, those that only even out the split included, and its slots."""
        rows, _, group = deal_prompts(generator.spec, self.prompts, [0] * len(self.prompts), self.shape.generations)
        own = len(rows.lengths) // self.run.mesh.size
        return own * group, generator.spec.slot_count(own, group)


def make_job(settings: RolloutSettings) -> Job:
    """Draw prompts and weights."""
    shape = settings.shape
    rollout = RolloutOptions(
        max_completion_length=shape.new_tokens,
        temperature=1.0,
        page_size=shape.page_size,
        slots=shape.slots,
        pool_pages=shape.pool_pages,
    )
    mesh, config = make_mesh(shape.mesh), model_config(shape)
    check_divisible(config.sizes, mesh)
    training = Settings(data=DataOptions(max_prompt_length=shape.prompt_length), rollout=rollout)
    rng = np.random.default_rng(1)
    sizes = rng.integers(shape.prompt_length // 2, shape.prompt_length + 1, shape.prompts)
    return Job(
        shape=shape,
        run=run_spec(shape, settings.lengths.mean_length, mesh, training),
        params=random_params(config, mesh, 0),
        prompts=[rng.integers(3, shape.vocab, size).tolist() for size in sizes],
    )


def occupancy_over_time(job: Job, step: int) -> list[float]:
    """Return the share of slots decoding, by tenths of all devices' steps; the rollout is run once more, untimed."""
    shares: list[float] = []
    total, slots = job.slots(job.generator(job.shape.new_tokens))

    def watch(completions: Any, positions: Any, tokens: Any) -> None:
        shares.append(float((np.asarray(completions) < total).sum()) / slots)

    job.generate(job.generator(job.shape.new_tokens, watch), step)
    jax.effects_barrier()
    return [round(float(np.mean(part)), 3) for part in np.array_split(shares, 10) if len(part)]


def limit_seconds(job: Job, last: Rollout, bandwidth: float, flop_rate: float) -> tuple[float, float]:
    """Return the seconds of decoding's bytes and of the whole rollout's FLOPs at the machine's rates."""
    shape, config = job.shape, job.run.config
    sizes = np.repeat([len(prompt) for prompt in job.prompts], shape.generations)
    needed = decode_bytes(config, job.run.dtype.itemsize, last.decode_steps, last.lengths, sizes)
    work = Work(config, shape.prompts, shape.generations, int(sizes.mean()), round(float(last.lengths.mean())))
    return needed / bandwidth, work.rollout_flops() / flop_rate


def describe(report: dict[str, Any], limits: tuple[float, float], seconds: float, prefill_seconds: float) -> str:
    """Return the report in words; `limits` are seconds to read weights and cache, and for the matmuls."""
    share, over_time = report["decode_share_of_bandwidth"], report["occupancy_over_time"]
    return (
        f"limit: {limits[0]:.3f} s to read weights and cache at {report['copy_gb_per_s']:.1f} GB/s, "
        f"{limits[1]:.3f} s for the matmuls at {report['matmul_gflop_per_s']:.0f} GFLOP/s\n"
        f"ours:  {seconds:.3f} s, {report['tokens_per_second']:.0f} tokens/s (median of {report['repeats']}), "
        f"{report['share_of_limit']:.0%} of the limit; prefill and first token {prefill_seconds:.3f} s, "
        f"{report['prefill_tokens_per_second']:.0f} prompt tokens/s; "
        f"later tokens {report['decode_tokens_per_second'] or 'too few to time'} per s\n"
        f"decoding alone reads at {'?' if share is None else f'{share:.0%}'} of the copy's rate; "
        f"slots decoding, by tenths of the steps: {' '.join(f'{part:.0%}' for part in over_time) or '?'}; "
        f"{report['peak_mib']:.0f} MiB at the peak\n"
    )


@dataclasses.dataclass(frozen=True)
class Timing:
    """Timed rollouts of a job."""

    first_call: float
    """Seconds, compiling included."""
    prefill: float
    """Seconds of a rollout of one token each."""
    runs: list[tuple[float, Rollout]]

    @property
    def median(self) -> int:
        """Return the number of the run of median time."""
        return sorted(range(len(self.runs)), key=lambda i: self.runs[i][0])[len(self.runs) // 2]

    @property
    def rates(self) -> list[float]:
        """Return the tokens per second of every run."""
        return [float(rollout.lengths.sum()) / seconds for seconds, rollout in self.runs]


def time_rollouts(job: Job) -> Timing:
    """Time whole rollouts, and those of one token, after a warm-up of each."""
    generator, prefiller = job.generator(job.shape.new_tokens), job.generator(1)
    first, _ = timed(job.generate, generator, 0)
    job.generate(prefiller, 0)
    turns = range(1, job.shape.repeats + 1)
    prefill = statistics.median(timed(job.generate, prefiller, i)[0] for i in turns)
    return Timing(first, prefill, [timed(job.generate, generator, i) for i in turns])


def rates_of(job: Job, timing: Timing, reading: float) -> dict[str, Any]:
    """Return the report's rates; `reading` is the limit of decoding's bytes in seconds."""
    seconds, last = timing.runs[timing.median]
    later, decoding = float(last.lengths.sum()) - job.completions, seconds - timing.prefill
    share = reading * (1 - 1 / last.decode_steps) / decoding if later and decoding > 0 else None
    return {
        "first_call_seconds": round(timing.first_call, 2),
        "rates": [round(rate, 1) for rate in timing.rates],
        "tokens_per_second": round(statistics.median(timing.rates), 1),
        "tokens_per_second_min": round(min(timing.rates), 1),
        "tokens_per_second_max": round(max(timing.rates), 1),
        "prefill_tokens_per_second": round(sum(map(len, job.prompts)) / timing.prefill, 1),
        "decode_tokens_per_second": round(later / decoding, 1) if later and decoding > 0 else None,
        "decode_steps": last.decode_steps,
        "decode_share_of_bandwidth": share and round(share, 3),
        "occupancy": round(last.occupancy, 3),
    }


def measure(settings: RolloutSettings) -> int:
    """Measure ours in this process: the machine's limits, then the rates and their share of them."""
    start_platform(settings.shape.mesh)
    job = make_job(settings)
    mesh, device = job.run.mesh, job.run.mesh.devices.flat[0]
    chips = mesh.size if jax.default_backend() != "cpu" else 1
    timing = time_rollouts(job)
    peak = peak_mib(device)  # before that of the machine's own limits
    bandwidth, flop_rate = chips * copy_bandwidth(), chips * matmul_rate(job.run.dtype)
    seconds, last = timing.runs[timing.median]
    reading, computing = limit_seconds(job, last, bandwidth, flop_rate)
    report = {
        "bench": "rollout_tput",
        "jax": jax.__version__,
        "device": device.device_kind,
        "devices": mesh.size,
        **settings.as_dict(),
        "copy_gb_per_s": round(bandwidth / 1e9, 2),
        "matmul_gflop_per_s": round(flop_rate / 1e9, 1),
        "limit_seconds": round(max(reading, computing), 6),
        **rates_of(job, timing, reading),
        "occupancy_over_time": occupancy_over_time(job, timing.median + 1) if settings.peer.over_time else [],
        "peak_mib": round(peak, 1),
        "share_of_limit": round(max(reading, computing) / seconds, 3),
    }
    sys.stderr.write(describe(report, (reading, computing), seconds, timing.prefill))
    sys.stdout.write(json.dumps(report) + "\n")
    return 0


if __name__ == "__main__":
    sections = ("shape", "lengths", "peer")
    run_command("python bench/rollout_tput.py", __doc__ or "", sections, main, kind=RolloutSettings)
