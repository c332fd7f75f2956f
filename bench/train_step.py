"""Time and memory of whole GRPO steps: `python bench/train_step.py`. The machine's limit first; last line JSON."""

import dataclasses
import json
import pathlib
import statistics
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import numpy as np
from jax.sharding import Mesh
from shapes import LengthOptions, ModelShape, matmul_rate, model_config, peak_mib, run_spec

from minigrpo.build import grpo_update_spec, make_generator
from minigrpo.command_line import run_command
from minigrpo.config import (
    DataOptions,
    LossOptions,
    OptimizerOptions,
    Options,
    RolloutOptions,
    Settings,
    StepOptions,
    UsageError,
    option,
)
from minigrpo.grpo.advantages import group_advantages
from minigrpo.grpo.batch import Batch, PackedBatch, pack, put_batch
from minigrpo.grpo.optimizer import TrainState, init_state
from minigrpo.grpo.update import REMAT_POLICIES, update
from minigrpo.model.weights import random_params
from minigrpo.planning.cost import Work
from minigrpo.planning.memory import packing_spec
from minigrpo.rollout.generator import Rollout
from minigrpo.runtime.mesh import check_divisible, make_mesh, start_platform

NO_CHANGE = 1e-30
"""A learning rate at which float32 weights stay as they are."""

UPDATES = 100
"""Length of the learning rate's schedule."""


@dataclasses.dataclass(frozen=True)
class StepShape(ModelShape):
    """Step bench"""

    prompts: int = option(4, "prompts per step", low=1)
    generations: int = option(4, "completions per prompt", low=2)
    remat: str = option("mlp", "what the backward pass recomputes", choices=tuple(REMAT_POLICIES))


PACKINGS: dict[str, dict[str, Any]] = {
    "auto": {},
    "unpacked": {"packing": False},
    "packed": {"share_prompts": "false"},
    "shared": {"share_prompts": "true"},
}
"""--packing as flags of training."""


@dataclasses.dataclass(frozen=True)
class UpdateOptions(Options):
    """Update"""

    gradient_accumulation_steps: str = option(
        "auto", "micro-batches at full length, as in training, where auto fits memory"
    )
    packing: str = option(
        "auto",
        "a row per sequence; several in one; or those with shared prompts computed once; auto as in training",
        choices=tuple(PACKINGS),
    )
    sampled: bool = option(True, "sample the completions; false draws them at random and times the update alone")


@dataclasses.dataclass(frozen=True)
class StepSettings(Settings):
    """The flags of this bench."""

    shape: StepShape = dataclasses.field(default_factory=StepShape)
    lengths: LengthOptions = dataclasses.field(default_factory=LengthOptions)
    update: UpdateOptions = UpdateOptions()


def training_settings(settings: StepSettings) -> Settings:
    """Return the flags of training that make the same step."""
    shape, chosen = settings.shape, settings.update
    return Settings(
        data=DataOptions(max_prompt_length=shape.prompt_length),
        rollout=RolloutOptions(max_completion_length=shape.new_tokens, temperature=1.0),
        loss=LossOptions(beta=0.0),
        optimizer=OptimizerOptions(
            learning_rate=NO_CHANGE, lr_schedule="constant", warmup_ratio=0.0, remat=shape.remat
        ),
        steps=StepOptions(
            batch_size=shape.prompts,
            num_generations=shape.generations,
            gradient_accumulation_steps=chosen.gradient_accumulation_steps,
            **PACKINGS[chosen.packing],
        ),
    )


class Stepper:
    """A GRPO step on random prompts with a reward that differs inside every group.

    Every step is the same, its lengths included.
    """

    def __init__(self, settings: StepSettings, mesh: Mesh):
        self.settings, self.shape, self.mesh = settings, settings.shape, mesh
        self.run = run_spec(self.shape, settings.lengths.mean_length, mesh, training_settings(settings))
        self.update_spec = grpo_update_spec(self.run, UPDATES)
        self.packing = packing_spec(self.run, self.run.update_sequences, self.shape.generations)
        self.generator = make_generator(self.run, self.run.settings.rollout)
        weights = random_params(self.run.config, mesh, 0)
        self.state: TrainState = init_state(self.update_spec.optimizer, weights, mesh)

    def prompts(self, rng: np.random.Generator) -> list[list[int]]:
        """Draw prompts: of half to all of --prompt_length with --mean_length, else all of it."""
        shape = self.shape
        least = shape.prompt_length // 2 if self.settings.lengths.mean_length else shape.prompt_length
        sizes = rng.integers(least, shape.prompt_length + 1, shape.prompts)
        return [rng.integers(3, shape.vocab, size).tolist() for size in sizes]

    def completions(self, prompts: list[list[int]], rng: np.random.Generator) -> Rollout:
        """Sample completions from the policy, or draw them at random at full length."""
        shape = self.shape
        if self.settings.update.sampled:
            return self.generator(self.state.params, prompts, list(range(shape.prompts)), shape.generations, (0, 0))
        size = shape.prompts * shape.generations, shape.new_tokens
        tokens, guessed = rng.integers(3, shape.vocab, size), np.full(size, -np.log(shape.vocab), np.float32)
        return Rollout(tokens.astype(np.int32), guessed, np.full(size[0], size[1]), np.zeros(size[0], bool))

    def batch(self, prompts: list[list[int]], rollout: Rollout) -> PackedBatch:
        """Pack the completions with their advantages, on the mesh."""
        rewards = rollout.tokens.sum(axis=1) % 17 / 17.0
        advantages = group_advantages(rewards, self.shape.generations, "group")
        lengths = rollout.lengths.astype(np.int32)
        batch = Batch(rollout.tokens, lengths, advantages, rollout.logprobs)
        return put_batch(self.mesh, pack(self.packing, prompts, batch))

    def __call__(self) -> dict[str, float]:
        """Return the seconds of the step and of its phases, its sampled tokens and its micro-batches."""
        rng = np.random.default_rng(0)
        prompts = self.prompts(rng)
        started = time.perf_counter()
        rollout = self.completions(prompts, rng)
        sampled = time.perf_counter()
        batch = self.batch(prompts, rollout)
        self.state, metrics, _ = jax.block_until_ready(update(self.update_spec, self.state, batch, {}))
        ended = time.perf_counter()
        assert np.isfinite(float(metrics["loss"]))
        seconds = {"step": ended - started, "rollout": sampled - started, "update": ended - sampled}
        counts = {"tokens": int(rollout.lengths.sum()), "micro_batches": int(batch.micro_batches)}
        return seconds | counts


def count_flops(stepper: Stepper) -> tuple[Work, float]:
    """Count a step's work, and its FLOPs, at mean lengths."""
    shape, mean = stepper.shape, stepper.settings.lengths.mean_length
    completion = min(mean or shape.new_tokens, shape.new_tokens)
    prompt = shape.prompt_length * 3 // 4 if mean else shape.prompt_length
    shared = stepper.packing.share_prefixes
    work = Work(stepper.run.config, shape.prompts, shape.generations, prompt, completion, shared)
    return work, work.update_flops(shape.remat) + (work.rollout_flops() if stepper.settings.update.sampled else 0)


def summarise(stepper: Stepper, first: float, steps: list[dict[str, float]]) -> dict[str, Any]:
    """Return the report's figures of the timed steps."""
    median = {name: statistics.median(step[name] for step in steps) for name in steps[0]}
    return {
        "micro_batches": int(median["micro_batches"]),
        "micro_batch_rows": stepper.packing.rows,
        "first_step_seconds": round(first, 3),
        "seconds": [round(step["step"], 4) for step in steps],
        "median_seconds": {name: round(median[name], 4) for name in ("step", "rollout", "update")},
        "tokens_per_second": round(median["tokens"] / median["step"], 1),
    }


def main(settings: StepSettings) -> int:
    """Print the machine's limit, and time steps."""
    shape, lengths = settings.shape, settings.lengths
    if lengths.mean_length and not settings.update.sampled:
        raise UsageError(
            f"--mean_length={lengths.mean_length}: completions drawn at random have full length; "
            "leave it at 0 or sample them with --sampled=true"
        )
    start_platform(shape.mesh)
    mesh = make_mesh(shape.mesh)
    check_divisible(model_config(shape).sizes, mesh)
    stepper = Stepper(settings, mesh)
    work, flops = count_flops(stepper)
    rate = matmul_rate(stepper.run.dtype) * (1 if jax.default_backend() == "cpu" else mesh.size)
    sys.stderr.write(f"limit: {flops / 1e9:.1f} GFLOP at {rate / 1e9:.0f} GFLOP/s is {flops / rate:.3f} s a step\n")
    first = stepper()["step"]
    stepper()
    found = summarise(stepper, first, [stepper() for _ in range(shape.repeats)])
    seconds = found["median_seconds"]
    report = {
        "bench": "train_step",
        "jax": jax.__version__,
        "device": mesh.devices.flat[0].device_kind,
        **settings.as_dict(),
        "sequences": work.rows,
        **found,
        "gflop": round(flops / 1e9, 1),
        "share_of_matmul_rate": round(flops / rate / seconds["step"], 3),
        "peak_mib": round(peak_mib(mesh.devices.flat[0]), 1),
    }
    sys.stderr.write(
        f"ours:  {seconds['step']:.3f} s (rollout {seconds['rollout']:.3f}, update {seconds['update']:.3f}), "
        f"{report['share_of_matmul_rate']:.0%} of the limit, {report['peak_mib']:.0f} MiB at the peak\n"
    )
    sys.stdout.write(json.dumps(report) + "\n")
    return 0


if __name__ == "__main__":
    sections = ("shape", "lengths", "update")
    run_command("python bench/train_step.py", __doc__ or "", sections, main, kind=StepSettings)
