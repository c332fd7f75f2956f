"""`python -m minigrpo.sft`: supervised warm start on prompt/completion rows, to teach the answer format."""

import dataclasses
import functools
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array

from minigrpo.build import Build, build, make_update_spec
from minigrpo.config import RolloutOptions, Settings, UsageError, run_command
from minigrpo.data.columns import COMPLETION_COLUMNS
from minigrpo.data.datasets import PromptSet, batch_numbers, load_completions, tokenize_completions
from minigrpo.data.rows import Ragged
from minigrpo.grpo import losses
from minigrpo.grpo.batch import Batch, PackedBatch, PackingSpec, pack, put_batch
from minigrpo.grpo.optimizer import TrainState, init_state
from minigrpo.grpo.update import update
from minigrpo.model.params import Params, split_trainable
from minigrpo.planning.memory import packing_spec
from minigrpo.runtime.progress import Progress
from minigrpo.runtime.run_folder import check_empty, check_writable

SECTIONS = ("model", "lora", "data", "optimizer", "sft")


def negative_log_likelihood(
    batch: Batch, weights: Array, logprobs: Array, entropy: Array
) -> tuple[Array, dict[str, Any]]:
    """Sum -log p over completion tokens by weight."""
    return -(weights * logprobs).sum(), {"sums": {"entropy": (entropy * batch.completion_mask).sum()}, "largest": {}}


def read_data(built: Build) -> tuple[PromptSet, Ragged]:
    """Tokenize prompts and completions, the end token included; rows too long are dropped and counted."""
    options, data, tokenizer = built.settings.sft, built.settings.data, built.tokenizer
    dataset = load_completions(data, options.problems)
    limit, end = options.max_completion_length, tokenizer.end_of_turn
    prompts, completions = tokenize_completions(dataset, tokenizer, data, limit, end)
    sys.stderr.write(f"data: {len(prompts)} rows, {prompts.dropped} dropped as too long\n")
    return prompts, completions


def make_batch(packing: PackingSpec, data: PromptSet, completions: Ragged, indices: list[int]) -> PackedBatch:
    """Pack some rows, on the host."""
    rows = np.zeros((len(indices), packing.completion_tokens), np.int32)
    for row, i in zip(rows, indices, strict=True):
        row[: len(completions[i])] = completions[i]
    lengths = np.array([len(completions[i]) for i in indices], np.int32)
    batch = Batch(rows, lengths, np.zeros(len(indices), np.float32))
    return pack(packing, [data.tokens[i] for i in indices], batch)


def step_line(step: int, steps: int, metrics: dict[str, Any], seconds: float, skipped: float) -> str:
    """Format a step's metrics as a line for people."""
    loss, norm, rate = (float(metrics[name]) for name in ("loss", "grad_norm", "learning_rate"))
    text = f"step {step}/{steps}  loss {loss:.4f}  grad_norm {norm:.3f}  lr {rate:.2e}  {seconds:.3f} s/step"
    return text + (f"  skipped, not finite: {skipped:.0f}" if skipped else "") + "\n"


def train(built: Build) -> tuple[TrainState, Params]:
    """Run the training loop -> the last state, and the weights that were not trained."""
    spec, options = built.spec, built.settings.sft
    data, completions = read_data(built)
    steps = options.max_steps or -(-len(data) // options.batch_size)
    loss = negative_log_likelihood, losses.weights_bnpo
    update_spec = make_update_spec(spec, steps, loss, temperature=1.0, seed=options.seed)
    limits = dataclasses.replace(built.settings, rollout=RolloutOptions(options.max_completion_length))
    packing = packing_spec(dataclasses.replace(spec, settings=limits), options.batch_size, group=1)
    trainable, frozen = split_trainable(spec.config, built.load(options.seed, spec.base_dtype))
    state = init_state(update_spec.optimizer, trainable, spec.mesh)
    pick = functools.partial(batch_numbers, len(data), options.batch_size, seed=options.seed)
    skipped: Array | float
    started, skipped = time.perf_counter(), 0.0
    for step in range(steps):
        indices = [number % len(data) for number in pick(step=step)]
        packed = put_batch(spec.mesh, make_batch(packing, data, completions, indices))
        state, metrics = update(update_spec, state, packed, frozen)
        skipped += metrics["skipped_updates"]
        if (step + 1) % options.log_steps == 0 or step + 1 == steps:
            seconds = (time.perf_counter() - started) / (step + 1)
            sys.stderr.write(step_line(step + 1, steps, metrics, seconds, float(skipped)))
    if skipped == steps:
        raise UsageError("the loss or gradient of every update was not finite: nothing was learned, nothing is written")
    return state, frozen


def main(settings: Settings) -> int:
    """Train as the settings say."""
    folder = Path(settings.sft.output_dir).absolute()
    check_empty(folder)
    check_writable(folder)
    with Progress() as progress:
        progress.phase("loading")
        built = build(settings, settings.sft.mesh)
        progress.phase("update")
        state, frozen = train(built)
        progress.phase("export")
        built.export(folder, folder / "adapter", state.params, frozen)
    sys.stderr.write(f"model written to {folder}\n")
    return 0


if __name__ == "__main__":
    run_command(
        "python -m minigrpo.sft",
        __doc__ or "",
        SECTIONS,
        main,
        "Here --answer_column is the completion; auto tries " + ", ".join(COMPLETION_COLUMNS) + ".",
    )
