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
from minigrpo.data import arithmetic
from minigrpo.data.datasets import (
    PROMPT_COLUMNS,
    Dataset,
    Prompts,
    batch_numbers,
    choose_column,
    is_prompt,
    read_rows,
    tokenize,
)
from minigrpo.grpo import losses
from minigrpo.grpo.batch import Batch, PackedBatch, PackingSpec, pack, put_batch
from minigrpo.grpo.optimizer import TrainState, init_state
from minigrpo.grpo.update import update
from minigrpo.model.params import Params, split_trainable
from minigrpo.planning.memory import packing_spec
from minigrpo.runtime.run_folder import check_empty, check_writable

COMPLETION_COLUMNS = ("completion", "response", "answer")

SECTIONS = ("model", "lora", "data", "optimizer", "sft")


def negative_log_likelihood(
    batch: Batch, weights: Array, logprobs: Array, entropy: Array
) -> tuple[Array, dict[str, Any]]:
    """Sum -log p over completion tokens by weight."""
    return -(weights * logprobs).sum(), {"sums": {"entropy": (entropy * batch.completion_mask).sum()}, "largest": {}}


def load_rows(settings: Settings) -> Dataset:
    """Read rows with "prompt" and "completion"."""
    name = settings.data.dataset
    if name == "builtin:arithmetic":
        rows = arithmetic.problems("train", settings.sft.problems, arithmetic.SFT_START)
        return Dataset(name, rows, arithmetic.SYSTEM_PROMPT)
    rows = read_rows(name, "train")
    prompt = choose_column(rows[0], "prompt_column", settings.data.prompt_column, PROMPT_COLUMNS)
    completion = choose_column(rows[0], "answer_column", settings.data.answer_column, COMPLETION_COLUMNS)
    for number, row in enumerate(rows, 1):
        if not is_prompt(row.get(prompt)) or not isinstance(row.get(completion), str):
            raise UsageError(f"--dataset={name}: row {number} has no text in {prompt!r} or {completion!r}")
    return Dataset(name, [{"prompt": row[prompt], "completion": row[completion]} for row in rows], system_prompt="")


def read_data(built: Build) -> tuple[Prompts, list[list[int]]]:
    """Tokenize prompts and completions, the end token included; rows too long are dropped and counted."""
    settings, tokenizer = built.settings, built.tokenizer
    data = tokenize(load_rows(settings), tokenizer, settings.data)
    texts = tokenizer.encode([row["completion"] for row in data.rows])
    completions = [row + [tokenizer.stop_tokens[-1]] for row in texts]
    limit = settings.sft.max_completion_length
    kept = [i for i, row in enumerate(completions) if len(row) <= limit]
    if not kept:
        raise UsageError(f"--max_completion_length={limit}: every completion is longer")
    dropped = data.dropped + len(completions) - len(kept)
    sys.stderr.write(f"data: {len(kept)} rows, {dropped} dropped as too long\n")
    prompts = Prompts([data.rows[i] for i in kept], [data.tokens[i] for i in kept], dropped)
    return prompts, [completions[i] for i in kept]


def make_batch(packing: PackingSpec, data: Prompts, completions: list[list[int]], indices: list[int]) -> PackedBatch:
    """Pack some rows, on the host."""
    rows = np.zeros((len(indices), packing.completion_tokens), np.int32)
    for row, i in zip(rows, indices, strict=True):
        row[: len(completions[i])] = completions[i]
    lengths = np.array([len(completions[i]) for i in indices], np.int32)
    batch = Batch(rows, lengths, np.zeros(len(indices), np.float32))
    return pack(packing, [list(data.tokens[i]) for i in indices], batch)


def step_line(step: int, steps: int, metrics: dict[str, Any], seconds: float, skipped: float) -> str:
    """Return what a person reads of a step."""
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
    built = build(settings, settings.sft.mesh)
    state, frozen = train(built)
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
