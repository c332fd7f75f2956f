"""`python -m minigrpo.sft`: supervised warm start on prompt/completion rows, to teach the answer format."""

import dataclasses
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from minigrpo.build import Setup, set_up
from minigrpo.config import (
    LARGEST_SEED,
    MOST_TOKENS,
    DataOptions,
    LoraOptions,
    ModelOptions,
    OptimizerOptions,
    Options,
    Settings,
    UsageError,
    option,
    run_command,
)
from minigrpo.data.datasets import (
    PROMPT_COLUMNS,
    Dataset,
    Prompts,
    arithmetic,
    batch_numbers,
    choose_column,
    is_prompt,
    read_rows,
    tokenize,
)
from minigrpo.grpo import losses
from minigrpo.grpo import update as grpo
from minigrpo.grpo.optimizer import TrainState, init_state, learning_rate, make_optimizer
from minigrpo.model.qwen import Params, split_trained
from minigrpo.runtime.mesh import by_sequence, put
from minigrpo.runtime.run_folder import check_empty, check_writable


@dataclasses.dataclass(frozen=True)
class SftOptions(Options):
    """Supervised training"""

    mesh: str = option("auto", "FSDP,TP mesh; auto is every device as fsdp, and 1,1 on CPU")
    batch_size: int = option(64, "rows per step", low=1)
    max_steps: int = option(0, "steps; 0 means one pass over the data", low=0)
    max_completion_length: int = option(
        512, "rows with longer completions are dropped and counted", low=1, high=MOST_TOKENS
    )
    problems: int = option(50_000, "rows of builtin:arithmetic to generate", low=1)
    seed: int = option(0, "seed of shuffling and random weights", low=0, high=LARGEST_SEED)
    output_dir: str = option("runs/sft", "folder the trained model is written to")
    log_steps: int = option(20, "steps between printed lines", low=1)


COMPLETION_COLUMNS = ("completion", "response", "answer")

SECTIONS = (ModelOptions, LoraOptions, DataOptions, OptimizerOptions, SftOptions)


def negative_log_likelihood(batch: grpo.Batch, weights, logprobs, entropy):
    """Weighted sum of -log p over completion tokens."""
    return -(weights * logprobs).sum(), {"sums": {"entropy": (entropy * batch.completion_mask).sum()}, "largest": {}}


def load_rows(settings: Settings) -> Dataset:
    """Rows with "prompt" and "completion"."""
    name = settings[DataOptions].dataset
    if name == "builtin:arithmetic":
        rows = arithmetic.problems("train", settings[SftOptions].problems, arithmetic.SFT_START)
        return Dataset(name, rows, arithmetic.SYSTEM_PROMPT)
    rows = read_rows(name, "train")
    prompt = choose_column(rows[0], "prompt_column", settings[DataOptions].prompt_column, PROMPT_COLUMNS)
    completion = choose_column(rows[0], "answer_column", settings[DataOptions].answer_column, COMPLETION_COLUMNS)
    for number, row in enumerate(rows, 1):
        if not is_prompt(row.get(prompt)) or not isinstance(row.get(completion), str):
            raise UsageError(f"--dataset={name}: row {number} has no text in {prompt!r} or {completion!r}")
    return Dataset(name, [{"prompt": row[prompt], "completion": row[completion]} for row in rows], system_prompt="")


def make_batch(setup: Setup, data: Prompts, completions: list[list[int]], indices: list[int]) -> grpo.Batch:
    limit = setup.settings[SftOptions].max_completion_length
    chosen = [completions[i] for i in indices]
    width = max(map(len, chosen))
    rows = np.array([row + [0] * (width - len(row)) for row in chosen], np.int32)
    prompts = [data.tokens[i] for i in indices]
    limits = setup.settings[DataOptions].max_prompt_length, limit
    batch = grpo.assemble(prompts, rows, np.array([len(row) for row in chosen]), limits)
    return put(setup.mesh, grpo.pad_rows(batch, setup.mesh.size), by_sequence(setup.mesh))


def read_data(setup: Setup) -> tuple[Prompts, list[list[int]]]:
    """Tokenized prompts and completions, the end token included; rows too long are dropped and counted."""
    settings = setup.settings
    data = tokenize(load_rows(settings), setup.tokenizer, settings[DataOptions])
    texts = setup.tokenizer.encode([row["completion"] for row in data.rows])
    completions = [row + [setup.stop_tokens[-1]] for row in texts]
    limit = settings[SftOptions].max_completion_length
    kept = [i for i, row in enumerate(completions) if len(row) <= limit]
    if not kept:
        raise UsageError(f"--max_completion_length={limit}: every completion is longer")
    dropped = data.dropped + len(completions) - len(kept)
    sys.stderr.write(f"data: {len(kept)} rows, {dropped} dropped as too long\n")
    return Prompts([data.rows[i] for i in kept], [data.tokens[i] for i in kept], dropped), [
        completions[i] for i in kept
    ]


def train(setup: Setup) -> tuple[TrainState, Params]:
    """The training loop."""
    options = setup.settings[SftOptions]
    data, completions = read_data(setup)
    steps = options.max_steps or -(-len(data) // options.batch_size)
    optimizer = make_optimizer(setup.settings[OptimizerOptions], steps)
    schedule = learning_rate(setup.settings[OptimizerOptions], steps)
    trainer = grpo.Trainer(
        graph=setup.graph,
        head=setup.head(temperature=1.0),
        layout=setup.layout,
        remat=setup.settings[OptimizerOptions].remat,
        optimizer=optimizer,
        objective=negative_log_likelihood,
        weigh=losses.weights_bnpo,
        parts=1,
        dropout_seed=options.seed if setup.config.lora and setup.config.lora.dropout else None,
    )
    trained, frozen = split_trained(setup.config, setup.load(options.seed, setup.trained_dtype))
    state = init_state(optimizer, trained, setup.mesh)
    started, skipped = time.perf_counter(), jnp.float32(0)
    for step in range(steps):
        numbers = batch_numbers(len(data), options.batch_size, step, options.seed)
        indices = [number % len(data) for number in numbers]
        state, metrics = grpo.update(trainer, state, make_batch(setup, data, completions, indices), frozen)
        skipped += metrics["skipped_updates"]
        if (step + 1) % options.log_steps == 0 or step + 1 == steps:
            loss, norm, rate = float(metrics["loss"]), float(metrics["grad_norm"]), float(schedule(step))
            seconds = (time.perf_counter() - started) / (step + 1)
            text = (
                f"step {step + 1}/{steps}  loss {loss:.4f}  grad_norm {norm:.3f}  lr {rate:.2e}  {seconds:.3f} s/step"
            )
            sys.stderr.write(text + (f"  skipped, not finite: {int(skipped)}" if skipped else "") + "\n")
    if skipped == steps:
        raise UsageError("the loss or gradient of every update was not finite: nothing was learned, nothing is written")
    return state, frozen


def main(settings: Settings) -> int:
    folder = Path(settings[SftOptions].output_dir).absolute()
    check_empty(folder)
    check_writable(folder)
    setup = set_up(settings, settings[SftOptions].mesh)
    state, frozen = train(setup)
    setup.export(folder, folder / "adapter", state.params, frozen)
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
