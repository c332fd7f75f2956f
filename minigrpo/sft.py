"""`python -m minigrpo.sft`: supervised training on prompt/completion rows, to teach the answer format before GRPO."""

import dataclasses
import functools
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from minigrpo.build import Build, announce, build, check_lora, check_quantize, make_update_spec
from minigrpo.command_line import run_named
from minigrpo.commands import COMMANDS
from minigrpo.config import RolloutOptions, Settings, SftOptions, UsageError
from minigrpo.data.datasets import (
    PromptSet,
    batch_numbers,
    check_evaluated,
    held_out_options,
    load_completions,
    naming_eval_flags,
    tokenize_completions,
)
from minigrpo.data.rows import Ragged
from minigrpo.grpo import losses
from minigrpo.grpo.batch import Batch, PackedBatch, PackingSpec, pack, pad_batch, put_batch
from minigrpo.grpo.optimizer import TrainState, init_state
from minigrpo.grpo.update import UpdateSpec, batch_logprobs, update
from minigrpo.model.params import Params, join, split_trainable
from minigrpo.planning.memory import packing_spec
from minigrpo.report import write_report
from minigrpo.runtime.bucket import RunHome
from minigrpo.runtime.mesh import fetch
from minigrpo.runtime.progress import Progress
from minigrpo.runtime.run_folder import memory_metrics
from minigrpo.runtime.session import (
    Measured,
    Measurement,
    Position,
    Session,
    check_home,
    choose_home,
    open_session,
    with_run_settings,
)
from minigrpo.runtime.sinks import find_sinks
from minigrpo.runtime.workers import WORKERS, joined

SECTIONS = COMMANDS["sft"].sections

PROGRAMS = {"gradients": 1, "apply_gradients": 1, "batch_loss": 1}
"""Device programs of a run, and how often each may be compiled."""


@dataclasses.dataclass(frozen=True)
class Examples:
    """Rows to train on or to measure, tokenized."""

    prompts: PromptSet
    completions: Ragged
    """End tokens included."""

    def __len__(self) -> int:
        return len(self.completions)

    def take(self, indices: Sequence[int], width: int) -> tuple[list[list[int]], Batch]:
        """Return the prompts of some rows, and their completions as a batch [len(indices), width], on the host."""
        rows = np.zeros((len(indices), width), np.int32)
        for row, i in zip(rows, indices, strict=True):
            row[: len(self.completions[i])] = self.completions[i]
        lengths = np.array([len(self.completions[i]) for i in indices], np.int32)
        return [self.prompts.tokens[i] for i in indices], Batch(rows, lengths, np.zeros(len(indices), np.float32))


@dataclasses.dataclass(frozen=True)
class Run:
    """A supervised run with its choices made."""

    build: Build
    update_spec: UpdateSpec
    packing: PackingSpec
    frozen: Params
    """The weights that are not trained: the base under adapters, {} otherwise."""
    examples: Examples
    held: Examples | None
    """Rows of --eval_steps."""
    total_steps: int

    @property
    def options(self) -> SftOptions:
        """Return the options of this command."""
        return self.build.settings.sft


def negative_log_likelihood(
    batch: Batch, weights: Array, logprobs: Array, entropy: Array
) -> tuple[Array, dict[str, Any]]:
    """Sum -log p over completion tokens by weight."""
    sums = {"entropy": jnp.where(batch.completion_mask, entropy, 0).sum()}
    return -(weights * logprobs).sum(), {"sums": sums, "largest": {}, "tokens": {}}


def train(run: Run, state: TrainState, session: Session) -> tuple[Position, TrainState]:
    """Run the loop: take rows, update, log. Stop early where a signal asked for it."""
    options, at, log, measure = session.options, session.first, session.log, measurement(run)
    session.evaluate_first(state, measure)
    for step in range(at.step, run.total_steps):
        started = time.perf_counter()
        log.progress.phase("update")
        indices = choose_rows(run, step)
        prompts, batch = run.examples.take(indices, run.packing.completion_tokens)
        packed = put_batch(run.build.spec.mesh, pack(run.packing, prompts, batch))
        packed_at = time.perf_counter()
        state, on_device, _ = update(run.update_spec, state, packed, run.frozen)
        metrics = {name: float(value) for name, value in jax.device_get(on_device).items()}
        seconds = {"time/data": packed_at - started, "time/update": time.perf_counter() - packed_at}
        metrics |= summary(run, step, sum(map(len, prompts)) + int(batch.completion_lengths.sum()), seconds)
        at = at.after(metrics["skipped_updates"] > 0)
        log.log(at.step, metrics)
        log.log_completions(at.step, samples(run.examples, at.step, indices[: options.log_completions]))
        session.check_skipped(at, batch)
        best = session.checkpoints.rate(at.step, metrics)
        best |= session.evaluate(at, state, measure)
        session.end_step(at, state, best)
    if at.skipped_in_a_row == run.total_steps:
        raise UsageError(
            "the loss or gradient of every update was not finite: nothing was learned, no model is written"
        )
    return at, state


def choose_rows(run: Run, step: int) -> list[int]:
    """Return the rows of a step; the position in the data is a function of the step."""
    size = len(run.examples)
    return [number % size for number in batch_numbers(size, run.options.batch_size, step, run.options.seed)]


def summary(run: Run, step: int, tokens: int, seconds: dict[str, float]) -> dict[str, float]:
    """Return the step's metrics besides the update's own; `tokens` are those of prompts and completions."""
    total = sum(seconds.values())
    epoch = (step + 1) * run.options.batch_size / len(run.examples)
    counts = {"epoch": epoch, "num_tokens": float(tokens), "step_time": total, "tokens_per_second": tokens / total}
    return counts | seconds | memory_metrics()


def samples(examples: Examples, step: int, indices: list[int]) -> list[dict[str, Any]]:
    """Return some of the step's rows as they were read."""
    rows = ((i, examples.prompts.rows[i]) for i in indices)
    return [
        {"step": step, "prompt": row["prompt"], "completion": row["completion"]}
        | {"length": len(examples.completions[i])}
        for i, row in rows
    ]


# Evaluation


@functools.partial(jax.jit, static_argnums=0)
def batch_loss(spec: UpdateSpec, params: Params, packed: PackedBatch) -> Float[Array, ""]:
    """Sum -log p over the completion tokens of a batch, without dropout."""
    logprobs = batch_logprobs(spec, params, packed)
    return -jnp.where(packed.batch.completion_mask, logprobs, 0).sum()


def held_out_loss(run: Run, params: Params, held: Examples) -> dict[str, float]:
    """Return the mean -log p per token of the held-out completions, --batch_size rows at a time."""
    size, total = run.options.batch_size, 0.0
    for start in range(0, len(held), size):
        prompts, batch = held.take(range(start, min(start + size, len(held))), run.packing.completion_tokens)
        packed = put_batch(run.build.spec.mesh, pack(run.packing, *pad_batch(prompts, batch, size)))
        total += float(fetch(batch_loss(run.update_spec, params, packed)))
    tokens = sum(map(len, held.completions))
    return {"loss": total / tokens, "rows": float(len(held)), "tokens": float(tokens)}


def measurement(run: Run) -> Measurement | None:
    """Return the measurement of --eval_steps, the loss on held-out rows."""
    held = run.held
    if held is None:
        return None
    return lambda state, _: Measured(held_out_loss(run, join(state.params, run.frozen), held), [])


# Setting up


def read_examples(built: Build) -> Examples:
    """Tokenize prompts and completions, the end token included; rows too long are dropped and counted."""
    options, data, tokenizer = built.settings.sft, built.settings.data, built.tokenizer
    dataset = load_completions(data, options.problems)
    limit, end = options.max_completion_length, tokenizer.end_of_turn
    prompts, completions = tokenize_completions(dataset, tokenizer, data, limit, end)
    sys.stderr.write(f"data: {len(prompts)} rows of {dataset.name}, {prompts.dropped} dropped as too long\n")
    return Examples(prompts, completions)


def read_held_out(built: Build) -> Examples | None:
    """Read the rows of --eval_steps, before training starts."""
    settings, tokenizer = built.settings, built.tokenizer
    if not settings.run.eval_steps:
        return None
    options, size = held_out_options(settings.data, settings.run), settings.run.eval_size
    limit, end = settings.sft.max_completion_length, tokenizer.end_of_turn
    with naming_eval_flags():
        dataset = load_completions(options, size, "test")
        dataset = dataclasses.replace(dataset, rows=dataset.rows[:size])
        return Examples(*tokenize_completions(dataset, tokenizer, options, limit, end))


def with_shared_settings(built: Build) -> Build:
    """Return the build with this command's steps and lengths where the code shared with GRPO reads them."""
    options = built.settings.sft
    rollout = RolloutOptions(max_completion_length=options.max_completion_length)
    settings = dataclasses.replace(built.settings, steps=options.as_steps, rollout=rollout)
    return dataclasses.replace(built, spec=dataclasses.replace(built.spec, settings=settings))


def check_settings(built: Build) -> None:
    """Raise UsageError for settings that cannot be trained with."""
    if built.settings.data.offline:
        raise UsageError("--offline: means nothing here; python -m minigrpo.train trains on scored responses")
    check_quantize(built.spec.config)
    check_lora(built.settings, built.spec.config)
    check_evaluated(built.settings)
    if built.settings.run.push_to_hub:
        raise UsageError("--push_to_hub: is minigrpo.train's; upload RUN/final with `hf upload OWNER/NAME RUN/final`")


def make_run(built: Build) -> tuple[Run, TrainState]:
    """Load data and weights, and make a run and its first state of them."""
    built = with_shared_settings(built)
    check_settings(built)
    spec, options = built.spec, built.settings.sft
    examples, held = read_examples(built), read_held_out(built)
    if WORKERS.count > 1:
        WORKERS.equal({f"prompts of --dataset={built.settings.data.dataset} of digest": examples.prompts.digest()})
    total = options.max_steps or max(1, math.ceil(options.num_epochs * len(examples) / options.batch_size))
    loss = negative_log_likelihood, losses.weights_bnpo
    update_spec = make_update_spec(spec, total, loss, temperature=1.0, seed=options.seed)
    packing = packing_spec(spec, options.batch_size, group=1)
    trainable, frozen = split_trainable(spec.config, built.load(options.seed, spec.base_dtype))
    state = init_state(update_spec.optimizer, trainable, spec.mesh, offloaded=update_spec.offload_optimizer)
    return Run(built, update_spec, packing, frozen, examples, held, total), state


def main(settings: Settings) -> int:
    """Train as the settings say."""
    with joined(settings), Progress() as progress, choose_home(settings.run) as home:
        return run_training(with_run_settings(settings, home), progress, home)


def run_training(settings: Settings, progress: Progress, home: RunHome) -> int:
    """Build the run, train it, and write its results."""
    progress.phase("loading")
    openers = find_sinks(settings.run) if WORKERS.writes else {}
    built = build(settings, settings.run.mesh)
    folder = home.folder
    check_home(built.settings, home)
    run, state = make_run(built)
    announce(built, run.packing, run.options.batch_size, (state.params, run.frozen), home.name)
    session, state = open_session(home, built.settings, run.total_steps, state, progress, openers)

    def export(state: TrainState) -> Path:
        built.export(folder / "final", folder / "adapter", state.params, run.frozen)
        return Path(WORKERS.first(lambda: str(write_report(folder))))

    return session.complete(lambda: train(run, state, session), export, PROGRAMS)


if __name__ == "__main__":
    run_named("sft", main)
